"""Text encoders: tokens in, embeddings or logits out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from boft_export.onnx.tasks.task import Compared, Graph, RunGraph, Task, Tensors

_TOKENS = {0: "batch_size", 1: "sequence_length"}


def _inputs(model: Any) -> tuple[str, ...]:  # noqa: ANN401  # transformers is untyped here
    types = int(getattr(model.config, "type_vocab_size", 0) or 0)
    return ("input_ids", "attention_mask", *(("token_type_ids",) if types else ()))


def _graphs(model: Any) -> Sequence[Graph]:  # noqa: ANN401  # as above
    names = _inputs(model)
    sample = {n: torch.ones(2, 5, dtype=torch.long) for n in names}
    if "token_type_ids" in sample:
        sample["token_type_ids"] = torch.zeros(2, 5, dtype=torch.long)

    def forward(module: nn.Module, inputs: Tensors) -> list[Tensor]:
        return [module(**inputs).last_hidden_state]

    return [Graph("model", sample, dict.fromkeys(names, _TOKENS), ("last_hidden_state",), forward)]


def _compare(model: Any, run: RunGraph, seed: int) -> Iterator[Compared]:  # noqa: ANN401  # as above
    generator = torch.Generator().manual_seed(seed)
    names = _inputs(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for rows, length, side in ((1, 3, "none"), (3, 7, "right"), (3, 9, "left")):
        ids = torch.randint(vocabulary, (rows, length), generator=generator)
        mask = torch.ones(rows, length, dtype=torch.long)
        if side != "none":
            padded = slice(None, 2) if side == "left" else slice(-2, None)
            mask[-1, padded] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        inputs = {n: inputs[n] for n in names}
        expected = model(**inputs).last_hidden_state
        actual = run("model", inputs)["last_hidden_state"]
        case = f"batch of {rows}, {length} tokens, padding {side}"
        yield Compared("last_hidden_state", case, expected, actual, mask.bool())


FEATURE_EXTRACTION = Task("feature-extraction", "AutoModel", ("Model",), _graphs, _compare)
