"""What an export to ONNX must refuse, say, and leave as it was: models that are not what they seem, and failures."""

from __future__ import annotations

import json
import logging
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import boft_tensors, needs_transformers_5, write_adapter
from torch import Tensor

from boft_export import InputError, export_onnx
from boft_export.models.loading import model_errors
from boft_export.onnx.external_data import DataFile, Layout

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
BERT = {**SIZES, "intermediate_size": 64}
QUERY = "encoder.layer.0.attention.self.query"


def save(folder: Path, name: str, **config: Any) -> Path:
    """Save a tiny model of a class of transformers with random weights."""
    import transformers

    kind = getattr(transformers, name)
    torch.manual_seed(0)
    kind(kind.config_class(**config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT."""
    return save(tmp_path_factory.mktemp("bert") / "base", "BertModel", **BERT)


def changed(base: Path, folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """Copy a checkpoint with some tensors or entries of its config replaced."""
    shutil.copytree(base, folder)
    save_file(load_file(base / "model.safetensors") | (tensors or {}), folder / "model.safetensors", {"format": "pt"})
    text = json.loads((base / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(text))
    return folder


# Weights


def test_tables_that_a_model_computes_and_never_saves_are_in_the_graph(tmp_path: Path) -> None:
    sizes = {f"{part}_{n}": size for part in ("encoder", "decoder") for n, size in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    tokens = {"vocab_size": 99, "pad_token_id": 98, "decoder_start_token_id": 98, "eos_token_id": 0}
    folder = save(tmp_path / "base", "MarianMTModel", d_model=32, **sizes, **heads, **tokens)
    assert not [n for n in load_file(folder / "model.safetensors") if "embed_positions" in n]
    result = export_onnx(folder, (), tmp_path / "out")
    assert max(a.relative_difference for a in result.agreements) < 1e-5


def test_a_model_that_takes_short_inputs_another_way_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "base", "BigBirdModel", **BERT, block_size=4, num_random_blocks=1)
    with pytest.raises(InputError, match="set attention_type from block_sparse to original_full"):
        export_onnx(folder, (), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@needs_transformers_5
def test_weights_that_files_have_in_another_form_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "base", "NomicBertModel", **BERT)
    with pytest.raises(InputError, match=r"q_proj.*no parameter has the name of .*Wqkv\.weight"):
        export_onnx(folder, (), tmp_path / "out")


def test_weights_in_integers_are_refused_before_anything_is_traced(base: Path, tmp_path: Path) -> None:
    folder = changed(base, tmp_path / "base", {f"{QUERY}.weight": torch.ones(32, 32, dtype=torch.int8)})
    with pytest.raises(InputError, match=r"query\.weight is stored as I8") as failure:
        export_onnx(folder, (), tmp_path / "out")
    assert "quantised" in str(failure.value.hint)


def test_a_buffer_of_integers_is_taken_in_the_dtype_that_the_model_has_it_in(base: Path, tmp_path: Path) -> None:
    folder = changed(base, tmp_path / "base", {"embeddings.position_ids": torch.arange(512)[None].int()})
    assert export_onnx(folder, (), tmp_path / "out").agreements[0].relative_difference < 1e-5


# Failures


def test_the_cause_of_a_failure_is_told_in_one_plain_line() -> None:
    def fail() -> None:
        try:
            raise IndexError("axis \x1b[31m7\x1b[0m is missing\nsecond line")
        except IndexError as error:
            raise RuntimeError("\x1b[96mstep 1/3\x1b[0m failed") from error

    with pytest.raises(InputError) as failure, model_errors(InputError, "it can't be traced"):
        fail()
    assert str(failure.value) == "it can't be traced: IndexError: axis 7 is missing"


def test_a_model_whose_control_flow_depends_on_values_is_refused_for_that(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0}
    folder = save(tmp_path / "base", "LlamaForCausalLM", **SIZES, intermediate_size=64, rope_scaling=rope)
    with pytest.raises(InputError, match="can't be traced: GuardOnDataDependentSymNode: Could not guard") as failure:
        export_onnx(folder, (), tmp_path / "out")
    assert "\x1b" not in str(failure.value)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_failure_while_weights_are_written_is_told_as_what_it_is(tmp_path: Path) -> None:
    layout = Layout()
    place = layout.add("F32", (4,))
    with pytest.raises(ValueError, match="broadcast"), DataFile(tmp_path / "data", layout.nbytes) as file:
        file.write([place], 0, memoryview(bytes(17)))


def test_what_a_killed_run_left_is_not_in_the_way(base: Path, tmp_path: Path) -> None:
    for name in ("quantized", "merged"):
        (tmp_path / ".out.boft-export" / name).mkdir(parents=True)
        (tmp_path / ".out.boft-export" / name / "model.onnx").write_text("half of it")
    assert export_onnx(base, (), tmp_path / "out", quantize="int8").agreements[0].kind == "int8"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nothing_of_the_process_is_changed(base: Path, tmp_path: Path) -> None:
    import transformers

    def state() -> dict[str, object]:
        loggers = {
            n: logging.getLogger(n).level for n in ("torch", "torch.onnx", "onnxscript", "onnx_ir", "transformers")
        }
        return {
            "random numbers": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),  # noqa: NPY002
            "torch": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()),
            "logging": (loggers, logging.root.level, logging.root.manager.disable),
            "transformers": transformers.utils.logging.get_verbosity(),
            "bars": transformers.utils.logging.is_progress_bar_enabled(),
            "modules": torch.nn.Module.register_parameter,
            "warnings": list(warnings.filters),
        }

    export_onnx(base, (), tmp_path / "first")
    before = state()
    adapter = write_adapter(tmp_path / "adapter", boft_tensors(QUERY, 32, 32))
    export_onnx(base, adapter, tmp_path / "out", dtype="float16")
    assert state() == before
