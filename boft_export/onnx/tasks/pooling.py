"""Sentence embeddings: an encoder with the pooling and normalisation that sentence-transformers keeps beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from boft_export.errors import DamagedFileError, InputError
from boft_export.onnx.tasks.inputs import text
from boft_export.onnx.tasks.single import single_graph
from boft_export.onnx.tasks.task import Task, Tensors


def _first(mask: Tensor) -> Tensor:
    """Return the first position of each row that counts."""
    return torch.where(mask.bool(), _positions(mask), mask.shape[1] - 1).amin(1)


def _positions(mask: Tensor) -> Tensor:
    return torch.arange(mask.shape[1], device=mask.device).expand_as(mask)


def _at(tokens: Tensor, position: Tensor) -> Tensor:
    return tokens.gather(1, position[:, None, None].expand(-1, 1, tokens.shape[2])).squeeze(1)


def _weighted(tokens: Tensor, weights: Tensor) -> Tensor:
    weights = weights.to(tokens.dtype)[..., None]
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def _root_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(tokens.dtype)[..., None]
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1e-9).sqrt()


# Each makes one vector of a row's tokens, given which of them count; in the order in which several are put together.
_POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": lambda tokens, mask: _at(tokens, _first(mask)),
    "max": lambda tokens, mask: tokens.masked_fill(~mask.bool()[..., None], float("-inf")).amax(1),
    "mean": _weighted,
    "mean_sqrt_len_tokens": _root_mean,
    "weightedmean": lambda tokens, mask: _weighted(tokens, mask * (_positions(mask) + 1 - _first(mask)[:, None])),
    "lasttoken": lambda tokens, mask: _at(tokens, (_positions(mask) * mask).amax(1)),
}
# Before its release 6, sentence-transformers had a switch for each.
SWITCHES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


@dataclass(frozen=True)
class Pooling:
    """How a sentence's embedding is made of its tokens'.

    Attributes:
        modes: The vectors that it is put together of.
        normalize: It is brought to length 1.
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False

    def __call__(self, model: Any, inputs: Tensors) -> Tensors:  # noqa: ANN401  # transformers is untyped here
        """Run a model and pool what comes out."""
        tokens = model(**inputs).last_hidden_state
        return {"token_embeddings": tokens, "sentence_embedding": self.pool(tokens, inputs["attention_mask"])}

    def pool(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the embeddings of rows of tokens, of which those count that the mask has a 1 for."""
        # In float16, a sum would lose what a mean has.
        embedding = torch.cat([_POOLINGS[m](tokens.float(), mask) for m in self.modes], dim=-1)
        if self.normalize:
            embedding = torch.nn.functional.normalize(embedding, dim=-1)
        return embedding.to(tokens.dtype)


def read_pooling(folder: Path) -> Pooling:
    """Return the pooling of a folder of sentence-transformers; the mean of any other, as sentence-transformers has it.

    Raises:
        InputError: If it has modules that are not known here.
    """
    if not (folder / "modules.json").is_file():
        return Pooling()
    modules = _modules(folder / "modules.json")
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise InputError(
            f"{folder / 'modules.json'} lists {', '.join(kinds)}: only Transformer, Pooling and then Normalize can be "
            "one graph.",
            hint="Export the encoder alone with --task feature-extraction.",
        )
    path = folder / modules[1][1] / "config.json"
    return Pooling(_modes(_read(path), path), normalize=len(kinds) == 3)


def _modules(path: Path) -> list[tuple[str, PurePosixPath]]:
    """Return the class of each module, and its folder."""
    try:
        found = [(str(m["type"]).rpartition(".")[2], PurePosixPath(m["path"])) for m in _read(path)]
    except (TypeError, LookupError) as error:
        raise DamagedFileError(f"{path} is not a list of modules: {error}.") from error
    outside = next((p for _, p in found if p.is_absolute() or ".." in p.parts), None)
    if outside is not None:
        raise DamagedFileError(f"{path} names a folder outside of its own: {outside}.")
    return found


def _modes(config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    named = config.get("pooling_mode")
    modes = [named] if isinstance(named, str) else list(named or [m for m, key in SWITCHES.items() if config.get(key)])
    unknown = [str(m) for m in modes if m not in _POOLINGS]
    if unknown:
        raise InputError(f"{path} names the pooling {', '.join(unknown)}, expected one of {', '.join(_POOLINGS)}.")
    if config.get("include_prompt") is False:
        raise InputError(f"{path} leaves prompts out of the pooling, which a graph can't: it is not told their length.")
    return tuple(modes) or ("mean",)


def _read(path: Path) -> Any:  # noqa: ANN401  # JSON
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{path} can't be read: {error}.") from error


def _with_pooling(task: Task, pooling: Pooling) -> Task:
    graphs, compare = single_graph(text, pooling)
    return replace(task, graphs=graphs, compare=compare)


_graphs, _compare = single_graph(text, Pooling())
SENTENCE_SIMILARITY = Task(
    "sentence-similarity",
    "AutoModel",
    (),
    _graphs,
    _compare,
    for_folder=lambda task, folder: _with_pooling(task, read_pooling(folder)),
)
