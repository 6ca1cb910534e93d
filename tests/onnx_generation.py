"""Tiny models that generate text, and greedy generation from their graphs as a user of ONNX Runtime writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from support import boft_tensors, write_adapter
from torch import nn

_SIZES = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.2}
_DECODER = {
    **_SIZES, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_BART = {
    **_SIZES, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128,
    "init_std": 0.2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
_T5 = {
    **_SIZES, "d_model": 32, "d_ff": 64, "d_kv": 12, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "initializer_factor": 1.0, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_BOTH_KINDS = ["sliding_attention", "full_attention"]

# Each architecture by the name of its config, with what makes it another than Llama.
DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": False},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": 5, "head_dim": 12},
    "Gemma": {"head_dim": 16, "num_key_value_heads": 1},
    "Gemma2": {"head_dim": 16, "sliding_window": 10, "layer_types": _BOTH_KINDS, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 6, "layer_types": _BOTH_KINDS, "query_pre_attn_scalar": 16},
    "Phi": {"num_key_value_heads": 4},
    "Phi3": {"sliding_window": 9},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2},
    "Bloom": {"n_layer": 2, "n_head": 4},
}  # fmt: skip
SEQ2SEQ: dict[str, dict[str, Any]] = {"T5": _T5, "Bart": _BART}


def save_model(folder: Path, name: str, **settings: Any) -> nn.Module:
    """Save a random model of an architecture, with ``settings`` of its config in place of ours, and return it."""
    import transformers

    config = getattr(transformers, f"{name}Config")
    if name in SEQ2SEQ:
        kind, made = transformers.AutoModelForSeq2SeqLM, config(**SEQ2SEQ[name] | settings)
    else:
        kind, made = transformers.AutoModelForCausalLM, config(**_DECODER | DECODERS[name] | settings)
    torch.manual_seed(0)
    model = kind.from_config(made).eval()
    # Where the head is tied to large embeddings, each token only repeats itself.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.05)
    model.save_pretrained(folder)
    return model


def save_adapter(folder: Path, model: nn.Module, factors: int = 2) -> Path:
    """Save an adapter of all linear layers but the head."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    tensors = {}
    for seed, (name, layer) in enumerate(layers.items()):
        tensors |= boft_tensors(name, layer.in_features, layer.out_features, m=factors, std=0.1, seed=seed)
    return write_adapter(folder, tensors)


def _empty(session: onnxruntime.InferenceSession, rows: int) -> dict[str, np.ndarray]:
    """Return the cache before the first token."""
    past = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past_key_values")}
    return {n: np.zeros((rows, heads, 0, size), np.float32) for n, (_, heads, _, size) in past.items()}


def greedy(folder: Path, ids: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """Continue rows of tokens, padded left, with a decoder's graph."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    inputs, outputs = ({x.name for x in session.get_inputs()}, [x.name for x in session.get_outputs()])
    step, cache = ids, _empty(session, len(ids))
    for _ in range(count):
        positions = (mask.cumsum(-1) - 1).clip(0)[:, -step.shape[1] :]
        fed = {"input_ids": step, "attention_mask": mask, "position_ids": positions, **cache}
        out = dict(zip(outputs, session.run(None, {n: v for n, v in fed.items() if n in inputs}), strict=True))
        step = out["logits"][:, -1:].argmax(-1)
        ids, mask = np.hstack([ids, step]), np.hstack([mask, np.ones_like(step)])
        cache = {n: out[n.replace("past_key_values", "present")] for n in cache}
    return ids


def greedy_seq2seq(folder: Path, ids: np.ndarray, mask: np.ndarray, start: int, count: int) -> np.ndarray:
    """Answer rows of tokens with the three graphs of an encoder and decoder."""
    encoder, first, later = (
        onnxruntime.InferenceSession(folder / f"{n}.onnx")
        for n in ("encoder_model", "decoder_model", "decoder_with_past_model")
    )
    (states,) = encoder.run(None, {"input_ids": ids, "attention_mask": mask})
    answer = np.full((len(ids), 1), start)
    fed, session, cache = {"encoder_hidden_states": states}, first, {}
    for _ in range(count):
        fed = {"input_ids": answer[:, -1:], "encoder_attention_mask": mask, **fed}
        out = dict(zip([o.name for o in session.get_outputs()], session.run(None, fed), strict=True))
        cache |= {n.replace("present", "past_key_values"): v for n, v in out.items() if n != "logits"}
        answer = np.hstack([answer, out["logits"][:, -1:].argmax(-1)])
        fed, session = dict(cache), later
    return answer
