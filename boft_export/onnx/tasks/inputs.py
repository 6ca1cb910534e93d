"""Inputs that a model's signature and config ask for, in the sizes that a case names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from boft_export.errors import InputError
from boft_export.onnx.tasks.task import Axes

_TOKENS = {0: "batch_size", 1: "sequence_length"}
_AXES: dict[str, Axes] = {
    "input_ids": _TOKENS,
    "attention_mask": _TOKENS,
    "token_type_ids": _TOKENS,
    "decoder_input_ids": {0: "batch_size", 1: "decoder_sequence_length"},
    "pixel_values": {0: "batch_size"},
    "input_values": {0: "batch_size", 1: "audio_sequence_length"},
    "input_features": {0: "batch_size"},
}
_FREE_IMAGE: Axes = {0: "batch_size", 2: "height", 3: "width"}
# What a model is made for, each by the input that says so.
MAIN = ("input_ids", "pixel_values", "input_values", "input_features", "decoder_input_ids")


@dataclass(frozen=True)
class Case:
    """Sizes of inputs.

    Attributes:
        rows: The batch.
        length: Tokens, and what stands for them in other inputs.
        padding: Where the last row is padded: ``left``, ``right`` or ``none``.
    """

    rows: int
    length: int
    padding: str = "none"


SAMPLE = Case(2, 5)
CASES = (Case(1, 3), Case(3, 7, "right"), Case(3, 9, "left"))
# Of tokens, so many that T5 and its kin have them all in their last bucket of distances, which begins at 128.
LONG = 136
# What models keep of their positions for other use, at the most.
_RESERVED = 4


def taken(kind: type, names: tuple[str, ...] = MAIN) -> tuple[str, ...]:
    """Return those of the named inputs that a class's forward takes."""
    parameters = inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]  # it is a model's class
    return tuple(n for n in names if n in parameters)


def axes(model: Any, names: Mapping[str, Tensor]) -> dict[str, Axes]:  # noqa: ANN401  # transformers is untyped here
    """Return the dynamic axes of inputs; an image's size is one where the model's config doesn't fix it."""
    return {n: _FREE_IMAGE if n == "pixel_values" and image_size(model) is None else _AXES[n] for n in names}


def longest(config: Any) -> int:  # noqa: ANN401  # as above
    """Return how many tokens to run a model on to see it treat far ones as it should, as far as it takes so many."""
    known = getattr(config, "max_position_embeddings", None)
    return max(SAMPLE.length, min(LONG, known - _RESERVED)) if isinstance(known, int) and known > 0 else LONG


def text(model: Any, case: Case, generator: torch.Generator) -> dict[str, Tensor]:  # noqa: ANN401  # as above
    """Return tokens, as far as the model takes what says more of them."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    pad = getattr(config, "pad_token_id", None) or 0
    vocabulary = getattr(config, "vocab_size", None) or model.get_input_embeddings().weight.shape[0]
    length = longest(config) if case.length == LONG else case.length
    ids = torch.randint(vocabulary - 1, (case.rows, length), generator=generator)
    # No token is the one that stands for padding, by which some models tell positions.
    ids += ids >= pad
    mask = torch.ones_like(ids)
    if case.padding != "none":
        mask[-1, slice(None, 2) if case.padding == "left" else slice(-2, None)] = 0
    ids[mask == 0] = pad
    found = {"input_ids": ids, "attention_mask": mask}
    if kinds := getattr(config, "type_vocab_size", 0):
        found["token_type_ids"] = torch.randint(kinds, ids.shape, generator=generator)
    if getattr(model.config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = ids[:, : length - 1].clone()
    return {n: found[n] for n in taken(type(model), tuple(found))}


def images(model: Any, case: Case, generator: torch.Generator) -> dict[str, Tensor]:  # noqa: ANN401  # as above
    """Return images; of the size that the config fixes, or else of one that goes with the case."""
    config = getattr(model.config, "vision_config", model.config)
    side = min(case.length, 9)
    height, width = image_size(model) or (32 * side, 32 * side + 32)
    shape = (case.rows, getattr(config, "num_channels", 3), height, width)
    return {"pixel_values": torch.randn(shape, generator=generator, dtype=torch.float32).to(model.dtype)}


def image_size(model: Any) -> tuple[int, int] | None:  # noqa: ANN401  # as above
    """Return the height and width that a model's config fixes."""
    size = getattr(getattr(model.config, "vision_config", model.config), "image_size", None)
    if size is None:
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


def sounds(model: Any, case: Case, generator: torch.Generator) -> dict[str, Tensor]:  # noqa: ANN401  # as above
    """Return waves, or the spectra that stand for them in some models."""
    if "input_values" in taken(type(model)):
        return {"input_values": torch.randn(case.rows, 800 * case.length, generator=generator).to(model.dtype)}
    bins, frames = (getattr(model.config, n, None) for n in ("num_mel_bins", "max_source_positions"))
    if not bins or not frames:
        raise InputError(f"the config of {type(model).__name__} does not say what spectra it takes.")
    return {"input_features": torch.randn(case.rows, bins, 2 * frames, generator=generator).to(model.dtype)}


MAKERS = {"input_ids": text, "pixel_values": images, "input_values": sounds, "input_features": sounds}
