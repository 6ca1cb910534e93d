"""Tied parameters against PEFT and transformers: whatever side is adapted, the merged model computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import BOFTConfig, get_peft_model
from peft_cpu import enable_butterflies_on_cpu
from support import load_tool

import boft_export
from boft_export.planning import tie_table

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": 2,
}  # fmt: skip
# Class, settings, what is rotated, what is trained whole, and whether the base is saved without its head.
CASES = [
    ("Bart", "BartForConditionalGeneration", SEQ2SEQ, ["q_proj", "lm_head"], None, False),
    ("Bart", "BartForConditionalGeneration", SEQ2SEQ, ["q_proj", "fc1"], ["shared"], False),
    ("Bart", "BartForConditionalGeneration", SEQ2SEQ, ["q_proj", "fc1"], None, False),
    ("Marian", "MarianMTModel", SEQ2SEQ, ["q_proj", "lm_head"], None, False),
    ("Marian", "MarianMTModel", SEQ2SEQ, ["q_proj", "fc1"], ["shared"], False),
    ("Bert", "BertForMaskedLM", SMALL, ["query"], ["word_embeddings"], False),
    ("Bert", "BertForMaskedLM", SMALL, ["query", "decoder"], None, False),
    ("Roberta", "RobertaForMaskedLM", SMALL, ["query"], ["word_embeddings"], False),
    ("Electra", "ElectraForMaskedLM", SMALL | {"embedding_size": 16}, ["query"], ["word_embeddings"], False),
    ("Llama", "LlamaForCausalLM", SMALL | {"tie_word_embeddings": True}, ["q_proj"], ["embed_tokens"], False),
    ("Llama", "LlamaForCausalLM", SMALL | {"tie_word_embeddings": True}, ["q_proj"], ["embed_tokens"], True),
    ("Llama", "LlamaForCausalLM", SMALL | {"tie_word_embeddings": True}, ["q_proj"], ["lm_head"], False),
    ("Llama", "LlamaForCausalLM", SMALL | {"tie_word_embeddings": True}, ["q_proj"], ["lm_head"], True),
]


@pytest.mark.parametrize(("family", "name", "settings", "targets", "saved", "bare"), CASES)
@pytest.mark.filterwarnings("ignore")  # the libraries warn of ties that an adapter breaks, which is what is tested
def test_ties(
    family: str,
    name: str,
    settings: dict[str, Any],
    targets: list[str],
    saved: list[str] | None,
    bare: bool,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    enable_butterflies_on_cpu()
    kind = getattr(transformers, name)
    model = kind(getattr(transformers, f"{family}Config")(**settings)).eval()
    (model.model if bare else model).save_pretrained(tmp_path / "base")
    inputs = {"input_ids": torch.arange(3, 15).view(2, 6)}
    if settings is SEQ2SEQ:
        inputs["decoder_input_ids"] = torch.arange(5, 13).view(2, 4)
    with torch.no_grad():
        plain = model(**inputs).logits
        config = BOFTConfig(
            task_type="CAUSAL_LM" if bare else None,
            boft_block_size=4,
            boft_n_butterfly_factor=2,
            target_modules=targets,
            modules_to_save=saved,
            init_weights=False,
        )
        adapted = get_peft_model(model, config).eval()
        for key, parameter in adapted.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(torch.randn_like(parameter) * 0.5)
        expected = adapted(**inputs).logits
    adapted.save_pretrained(tmp_path / "adapter")
    boft_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", device="cpu")
    merged, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    with torch.no_grad():
        actual = merged.eval()(**inputs).logits
    assert not info["missing_keys"]
    assert (actual - expected).abs().max() < 1e-5
    assert (actual - plain).abs().max() > 1e-4


def test_table_is_up_to_date() -> None:
    """tools/make_ties.py makes it; another release's may differ."""
    table = json.loads(tie_table._TABLE.read_text())
    if table["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {table['transformers']}")
    assert table["ties"] == load_tool("make_ties").ties()
