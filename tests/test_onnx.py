"""Exporting to ONNX: the whole way, from a checkpoint and an adapter to a folder that ONNX Runtime serves."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file
from support import boft_tensors, expected_merge, write_adapter

from boft_export import export_onnx
from boft_export.onnx.session import Session

BERT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny BERT and an adapter of two factors, in folders."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(BertConfig(**BERT)).save_pretrained(folder / "base")
    layers = [f"encoder.layer.{i}.attention.self.{part}" for i in range(2) for part in ("query", "value")]
    tensors = {k: v for i, name in enumerate(layers) for k, v in boft_tensors(name, 32, 32, seed=i).items()}
    return folder / "base", write_adapter(folder / "adapter", tensors)


def test_an_encoder_is_exported_with_its_adapter_folded_in(bert: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = bert
    result = export_onnx(base, adapter, tmp_path / "out")
    assert [a.output for a in result.agreements] == ["last_hidden_state"]
    assert max(a.relative_difference for a in result.agreements) < 1e-5
    assert Session(tmp_path / "out" / "model.onnx").providers == ["CPUExecutionProvider"]
    model = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    name = "encoder.layer.1.attention.self.query.weight"
    stored = next(onnx.numpy_helper.to_array(i) for i in model.graph.initializer if i.name == name)
    blocks = {
        k: v for k, v in load_file(adapter / "adapter_model.safetensors").items() if "layer.1" in k and "query" in k
    }
    wanted = expected_merge(load_file(base / "model.safetensors")[name], blocks)
    assert torch.equal(torch.from_numpy(stored.copy()).T, wanted.float())
