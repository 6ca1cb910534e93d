"""Encoders with decoders: three graphs, of the encoder, the decoder's first run, and its later ones with a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from boft_export.errors import InputError
from boft_export.onnx.tasks.inputs import LONG, longest
from boft_export.onnx.tasks.task import Axes, Compared, Graph, RunGraph, Task, Tensors

_ENCODER, _DECODER, _WITH_PAST = "encoder_model", "decoder_model", "decoder_with_past_model"
_SOURCE: Axes = {0: "batch_size", 1: "encoder_sequence_length"}
_ANSWER: Axes = {0: "batch_size", 1: "decoder_sequence_length"}
_PAST: Axes = {0: "batch_size", 2: "past_decoder_sequence_length"}
_PAST_SOURCE: Axes = {0: "batch_size", 2: "encoder_sequence_length"}
# Rows, how many tokens are asked and answered, the latter at each step, and where some rows are padded. The first is as
# long as a model lets it be.
_CASES = ((1, LONG, (LONG - 3, 1, 2), None), (3, 11, (3, 1, 2), "right"), (3, 9, (1, 4, 1), "left"))


@dataclass(frozen=True)
class _Sizes:
    """Sizes of what goes from graph to graph.

    Attributes:
        hidden: Features of the encoder's output.
        cache: Heads and features by the names of the cache's tensors.
    """

    hidden: int
    cache: dict[str, tuple[int, int]]


def _sizes(model: Any) -> _Sizes:  # noqa: ANN401  # transformers is untyped here
    """Return sizes, as a run on a few tokens shows them.

    Raises:
        InputError: If something else than keys and values is kept.
    """
    with torch.no_grad():
        ids = torch.ones(1, 2, dtype=torch.long)
        out = model(input_ids=ids, decoder_input_ids=ids, use_cache=True)
    cache = out.past_key_values
    parts = [getattr(getattr(cache, f"{n}_attention_cache", None), "layers", []) for n in ("self", "cross")]
    found = {}
    for i, layers in enumerate(zip(*parts, strict=True)):
        for part, layer in zip(("decoder", "encoder"), layers, strict=True):
            for kind, tensor in (("key", layer.keys), ("value", layer.values)):
                found[f"past_key_values.{i}.{part}.{kind}"] = (tensor.shape[1], tensor.shape[3])
    if not found:
        raise InputError(f"{type(model).__name__} does not keep keys and values of its decoder's layers.")
    return _Sizes(out.encoder_last_hidden_state.shape[-1], found)


def _graphs(model: Any) -> Sequence[Graph]:  # noqa: ANN401  # as above
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    sizes = _sizes(model)
    batch, asked, answered, past = 2, 5, 3, 4
    # The tracer would take one tensor that is given twice for one input.
    ids, question, mask = (torch.ones(batch, n, dtype=torch.long) for n in (answered, asked, asked))
    states = torch.zeros(batch, asked, sizes.hidden, dtype=model.dtype)
    cache = {
        n: torch.zeros(batch, heads, asked if ".encoder." in n else past, size, dtype=model.dtype)
        for n, (heads, size) in sizes.cache.items()
    }

    def encode(module: Any, inputs: Tensors) -> list[Tensor]:  # noqa: ANN401  # as above
        return [module.get_encoder()(**inputs).last_hidden_state]

    def decode(module: nn.Module, inputs: Tensors, states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        kept = EncoderDecoderCache(_filled("decoder", inputs), _filled("encoder", inputs))
        out = module(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=inputs["encoder_attention_mask"],
            decoder_input_ids=inputs["input_ids"],
            past_key_values=kept,
            use_cache=True,
        )
        kept = out.past_key_values
        parts = {"decoder": kept.self_attention_cache.layers, "encoder": kept.cross_attention_cache.layers}
        kinds = {"key": "keys", "value": "values"}
        names = [n.split(".") for n in sizes.cache]
        return out.logits, {
            f"present.{i}.{part}.{kind}": getattr(parts[part][int(i)], kinds[kind]) for _, i, part, kind in names
        }

    def _filled(part: str, inputs: Tensors) -> Any:  # noqa: ANN401  # as above
        filled = DynamicCache()
        for n in sizes.cache:
            if n in inputs and n.endswith(f"{part}.key"):
                filled.update(inputs[n], inputs[n.replace(".key", ".value")], int(n.split(".")[1]))
        return filled

    def first(module: nn.Module, inputs: Tensors) -> list[Tensor]:
        logits, kept = decode(module, inputs, inputs["encoder_hidden_states"])
        return [logits, *kept.values()]

    def later(module: Any, inputs: Tensors) -> list[Tensor]:  # noqa: ANN401  # as above
        # Nothing is computed of the states but their shape: the cache has what the decoder's layers made of them.
        asked = inputs["encoder_attention_mask"]
        states = asked[:, :, None].expand(-1, -1, sizes.hidden).to(module.dtype)
        logits, kept = decode(module, inputs, states)
        return [logits, *(t for n, t in kept.items() if ".decoder." in n)]

    plain = {"encoder_attention_mask": mask, "input_ids": ids}
    axes = {"encoder_attention_mask": _SOURCE, "input_ids": _ANSWER, "encoder_hidden_states": _SOURCE}
    axes |= {n: _PAST_SOURCE if ".encoder." in n else _PAST for n in cache}
    outputs = ("logits", *map(_present, cache))
    return [
        Graph(
            _ENCODER,
            {"input_ids": question, "attention_mask": mask},
            {"input_ids": _SOURCE, "attention_mask": _SOURCE},
            ("last_hidden_state",),
            encode,
        ),
        Graph(_DECODER, plain | {"encoder_hidden_states": states}, axes, outputs, first),
        Graph(_WITH_PAST, plain | cache, axes, tuple(n for n in outputs if ".encoder." not in n), later),
    ]


def _present(name: str) -> str:
    return name.replace("past_key_values", "present")


def _compare(model: Any, run: RunGraph, seed: int) -> Iterator[Compared]:  # noqa: ANN401  # as above
    """Run question and answer through the model at once, and through the graphs in steps."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    most = longest(model.config)
    for rows, wanted, (first, *later), padding in _CASES:
        asked, steps = min(wanted, most), (min(first, most - sum(later)), *later)
        ids = torch.randint(vocabulary, (rows, asked), generator=generator)
        answer = torch.randint(vocabulary, (rows, sum(steps)), generator=generator)
        mask = torch.ones_like(ids)
        if padding:
            mask[-1, slice(3) if padding == "left" else slice(-3, None)] = 0
        suffix = f", padded {padding}" if padding else ""
        whole = model(input_ids=ids, attention_mask=mask, decoder_input_ids=answer, use_cache=False)
        states = run(_ENCODER, {"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
        case = f"batch of {rows}, {asked} tokens{suffix}"
        yield Compared("last_hidden_state", case, whole.encoder_last_hidden_state, states, mask.bool())
        fed, done = {"encoder_attention_mask": mask, "encoder_hidden_states": states}, 0
        for size in steps:
            now = slice(done, done + size)
            out = run(_WITH_PAST if done else _DECODER, {**fed, "input_ids": answer[:, now]})
            fed |= {n.replace("present", "past_key_values"): t for n, t in out.items() if n != "logits"}
            yield Compared("logits", f"{case}, {size} answered after {done}", whole.logits[:, now], out["logits"])
            done += size


TEXT_TO_TEXT = Task(
    "text2text-generation",
    "AutoModelForSeq2SeqLM",
    ("ForConditionalGeneration", "MTModel"),
    _graphs,
    _compare,
    attention=dict.fromkeys(("t5", "mt5", "umt5", "longt5", "switch_transformers"), "eager"),
)
