"""The table of transformers' renames is the installed release's, and does what that release does."""

from __future__ import annotations

import json

import pytest
import transformers
from support import load_tool

from boft_export.planning import renames


def test_table_is_up_to_date() -> None:
    """tools/make_renames.py makes it; another release's may differ."""
    table = json.loads(renames._TABLE.read_text())
    if table["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {table['transformers']}")
    assert table["renames"] == load_tool("make_renames").renames()


@pytest.mark.parametrize(
    ("config", "on_disk", "in_memory"),
    [
        (
            {"model_type": "vit", "architectures": ["ViTForImageClassification"]},
            "vit.encoder.layer.0.attention.attention.query.weight",
            "vit.layers.0.attention.q_proj.weight",
        ),
        (
            {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]},
            "embed_out.weight",
            "lm_head.weight",
        ),
        (
            {"model_type": "dinov2", "architectures": ["Dinov2Model"]},
            "encoder.layer.1.attention.output.dense.weight",
            "encoder.layer.1.attention.o_proj.weight",
        ),
    ],
    ids=lambda v: v["model_type"] if isinstance(v, dict) else "",
)
def test_names_in_memory(config: dict[str, object], on_disk: str, in_memory: str) -> None:
    assert renames.names_in_memory(config, [on_disk, "other.weight"]) == {in_memory: on_disk}


def test_models_without_renames_have_none() -> None:
    assert (
        renames.names_in_memory({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, ["lm_head.weight"])
        == {}
    )
