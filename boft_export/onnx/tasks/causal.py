"""Causal language models: one graph that serves prefill and decode, with the KV cache going in and coming out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from boft_export.errors import InputError
from boft_export.onnx.tasks.task import Compared, Graph, RunGraph, Task, Tensors

_BATCH, _STEP, _PAST, _TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
# Rows, how many tokens go in at each step, and where some rows' first step is padded.
_CASES = ((1, (5, 1, 1, 1), None), (3, (9, 1, 4), "left"), (3, (18, 1, 2), "right"))


def _graphs(model: Any) -> Sequence[Graph]:  # noqa: ANN401  # transformers is untyped here
    from transformers import DynamicCache

    batch, step, past = 2, 3, 4
    plain = _plain_inputs(torch.ones(batch, step, dtype=torch.long), torch.ones(batch, past + step, dtype=torch.long))
    plain = {n: t for n, t in plain.items() if n in _accepted(model)}
    shapes = _cache_shapes(model)
    cache = {n: torch.zeros(batch, heads, past, size, dtype=model.dtype) for n, (heads, size) in shapes.items()}
    axes = {n: {0: _BATCH, 1: _TOTAL if n == "attention_mask" else _STEP} for n in plain}
    axes |= {n: {0: _BATCH, 2: _PAST} for n in cache}
    layers = len(shapes) // 2

    def forward(module: nn.Module, inputs: Tensors) -> list[Tensor]:
        # Without the config, layers of a sliding window keep all that they are given, and masks see to the window.
        cache = DynamicCache()
        for i in range(layers):
            cache.update(inputs[f"past_key_values.{i}.key"], inputs[f"past_key_values.{i}.value"], i)
        out = module(**{n: inputs[n] for n in plain}, past_key_values=cache, use_cache=True)
        return [out.logits, *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values))]

    outputs = ("logits", *map(_present, shapes))
    return [Graph("model", plain | cache, axes, outputs, forward)]


def _plain_inputs(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the inputs besides the cache: the last tokens, the mask of all so far, and the tokens' positions in it."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def _accepted(model: nn.Module) -> set[str]:
    return set(inspect.signature(type(model).forward).parameters)


def _present(name: str) -> str:
    return name.replace("past_key_values", "present")


def _cache_shapes(model: Any) -> dict[str, tuple[int, int]]:  # noqa: ANN401  # as above
    """Return heads and features of each layer's keys and values, as two tokens leave them in a cache.

    Raises:
        InputError: If the model is made of several, or keeps something else than keys and values.
    """
    if model.config.get_text_config() is not model.config:
        raise InputError(
            f"{type(model).__name__} is made of several models, of which {TEXT_GENERATION.name} would export only one.",
            hint="Give the text model's own checkpoint.",
        )
    with torch.no_grad():
        out = model(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=True)
    found = {
        f"past_key_values.{i}.{kind}": getattr(layer, f"{kind}s", None)
        for i, layer in enumerate(getattr(out.get("past_key_values"), "layers", []))
        for kind in ("key", "value")
    }
    if not found or not all(isinstance(t, Tensor) and t.ndim == 4 for t in found.values()):
        raise InputError(
            f"{type(model).__name__} does not keep each layer's keys and values, and no other cache can be exported."
        )
    return {name: (tensor.shape[1], tensor.shape[3]) for name, tensor in found.items() if tensor is not None}


def compare_steps(
    model: Any,  # noqa: ANN401  # as above
    run: RunGraph,
    seed: int,
    cases: Sequence[tuple[int, tuple[int, ...], str | None]] = _CASES,
) -> Iterator[Compared]:
    """Run the whole text through the model at once, and through the graph in steps.

    Each case has its rows, the tokens of each step, and the side that is padded.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = _cache_shapes(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for rows, steps, padding in cases:
        ids = torch.randint(vocabulary, (rows, sum(steps)), generator=generator)
        mask = torch.ones_like(ids)
        if padding == "left":
            mask[-1, :3] = mask[-2, :1] = 0
        elif padding == "right":
            mask[-1, steps[0] - 3 : steps[0]] = 0
        inputs = {n: t for n, t in _plain_inputs(ids, mask).items() if n in _accepted(model)}
        whole = model(**inputs, use_cache=False).logits
        cache = {n: torch.zeros(rows, heads, 0, size, dtype=model.dtype) for n, (heads, size) in shapes.items()}
        done = 0
        for size in steps:
            now = slice(done, done + size)
            out = run("model", _plain_inputs(ids[:, now], mask[:, : now.stop]) | cache)
            cache = {n: out[_present(n)] for n in cache}
            case = f"batch of {rows}, {size} tokens after {done}" + (f", padded {padding}" if padding else "")
            yield Compared("logits", case, whole[:, now], out["logits"], mask[:, now].bool())
            done += size


TEXT_GENERATION = Task(
    "text-generation", "AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), _graphs, compare_steps
)
