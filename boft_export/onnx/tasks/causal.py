"""Causal language models: one graph that serves prefill and decode, with the KV cache going in and coming out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from boft_export.onnx.tasks.task import Compared, Graph, RunGraph, Task, Tensors

_BATCH, _STEP, _PAST, _TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


def _cache_names(layers: int, prefix: str) -> list[str]:
    return [f"{prefix}.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


def _cache_shape(config: Any) -> tuple[int, int, int]:  # noqa: ANN401  # transformers is untyped here
    """Return layers, heads of keys and values, and features of a head."""
    heads = config.num_attention_heads
    features = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, features


def _graphs(model: Any) -> Sequence[Graph]:  # noqa: ANN401  # as above
    from transformers import DynamicCache

    config = model.config.get_text_config()
    layers, heads, features = _cache_shape(config)
    past = _cache_names(layers, "past_key_values")
    batch, step, before = 2, 3, 4
    sample = {
        "input_ids": torch.ones(batch, step, dtype=torch.long),
        "attention_mask": torch.ones(batch, before + step, dtype=torch.long),
        "position_ids": torch.arange(before, before + step).expand(batch, step).clone(),
        **{n: torch.zeros(batch, heads, before, features, dtype=model.dtype) for n in past},
    }
    tokens = {0: _BATCH, 1: _STEP}
    axes = {
        "input_ids": tokens,
        "attention_mask": {0: _BATCH, 1: _TOTAL},
        "position_ids": tokens,
        **{n: {0: _BATCH, 2: _PAST} for n in past},
    }

    def forward(module: nn.Module, inputs: Tensors) -> list[Tensor]:
        cache = DynamicCache(config=config)
        for i in range(layers):
            cache.update(inputs[f"past_key_values.{i}.key"], inputs[f"past_key_values.{i}.value"], i)
        plain = {n: inputs[n] for n in ("input_ids", "attention_mask", "position_ids")}
        out = module(**plain, past_key_values=cache, use_cache=True)
        return [out.logits, *(x for layer in out.past_key_values.layers for x in (layer.keys, layer.values))]

    return [Graph("model", sample, axes, ("logits", *_cache_names(layers, "present")), forward)]


def _compare(model: Any, run: RunGraph, seed: int) -> Iterator[Compared]:  # noqa: ANN401  # as above
    """Run the whole text through the model at once, and through the graph in steps."""
    generator = torch.Generator().manual_seed(seed)
    layers, heads, features = _cache_shape(model.config.get_text_config())
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for rows, steps, padded in ((1, (5, 1, 1, 1), 0), (3, (7, 2, 1), 3)):
        length = sum(steps)
        ids = torch.randint(vocabulary, (rows, length), generator=generator)
        mask = torch.ones(rows, length, dtype=torch.long)
        if padded:
            mask[-1, :padded] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        whole = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        empty = torch.zeros(rows, heads, 0, features, dtype=model.dtype)
        cache = dict.fromkeys(_cache_names(layers, "past_key_values"), empty)
        done = 0
        for size in steps:
            now = slice(done, done + size)
            fed = {"input_ids": ids[:, now], "attention_mask": mask[:, : now.stop], "position_ids": positions[:, now]}
            out = run("model", {**fed, **cache})
            cache = {n: out[n.replace("past_key_values", "present")] for n in cache}
            case = f"batch of {rows}, {size} tokens after {done}" + (f", {padded} of padding" if padded else "")
            yield Compared("logits", case, whole[:, now], out["logits"], mask[:, now].bool())
            done += size


TEXT_GENERATION = Task("text-generation", "AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), _graphs, _compare)
