"""Proving graphs: what is right passes, and what is wrong in any way does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import boft_tensors, write_adapter
from typer.testing import CliRunner

from boft_export import CheckFailedError, ExportResult, Outcome, UsageError, Validation, export_onnx, validate
from boft_export.cli.main import app
from boft_export.onnx import graphs
from boft_export.onnx.limits import LIMITS, graph_kind
from boft_export.report.schemas import schema
from boft_export.report.validation_report import validation_document

BERT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
# Values large enough that attention, and so its adapter, matters.
BERT |= {"initializer_range": 0.5}
QUERY = "encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny BERT and an adapter of two factors, in folders."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(BertConfig(**BERT)).save_pretrained(folder / "base")
    return folder / "base", write_adapter(folder / "adapter", boft_tensors(QUERY, 32, 32))


@pytest.fixture(scope="module")
def exported(bert: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The two as a graph."""
    return export_onnx(*bert, tmp_path_factory.mktemp("onnx") / "out")


@pytest.fixture
def graph(exported: ExportResult, tmp_path: Path) -> Path:
    """A copy of the exported folder, to be spoiled."""
    return Path(shutil.copytree(exported.output, tmp_path / "graph"))


def spoil_weight(folder: Path, value: float = 3.0) -> None:
    """Put a number in the place of one weight's last element."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    stored = next(i for i in model.graph.initializer if i.name == f"{QUERY}.weight")
    place = {e.key: e.value for e in stored.external_data}
    with (folder / place["location"]).open("r+b") as file:
        file.seek(int(place["offset"]) + int(place["length"]) - 4)
        file.write(np.float32(value).tobytes())


def spoil_attribute(folder: Path) -> None:
    """Change a node's attribute: the epsilon of the layer norms."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for attribute in (a for n in model.graph.node if n.op_type == "LayerNormalization" for a in n.attribute):
        if attribute.name == "epsilon":
            attribute.f = 0.1
    onnx.save(model, folder / "model.onnx")


def forget_hashes(folder: Path) -> None:
    """Take the manifest away, so that only the outputs can tell."""
    (folder / "boft_export.json").unlink()


def findings(result: Validation) -> set[str | None]:
    return {c.finding for c in result.failures}


def test_an_export_says_how_it_was_proven(exported: ExportResult) -> None:
    found = exported.agreements[0]
    assert (found.kind, found.reference, found.providers) == ("float32", "hooks", ("CPUExecutionProvider",))
    assert found.constants_folded
    assert found.relative_difference <= LIMITS["float32"].largest
    assert 0 < found.mean_difference < found.largest_difference
    assert found.smallest_cosine > 0.99999
    assert found.cases > 1
    assert exported.manifest["verified"] == [found.document()]
    assert not [n for n in exported.plan.notices if n.code in {"adapter-not-visible", "no-cuda-provider"}]


def test_a_right_graph_passes(bert: tuple[Path, Path], exported: ExportResult) -> None:
    base, adapter = bert
    result = validate(adapter, base=base, onnx=exported.output)
    assert result.outcome is Outcome.PASS
    assert {"manifest", "onnx"} <= {c.check for c in result.checks}
    document = validation_document(result, 1.0)
    assert document["onnx"] == "out"
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(document, schema("validate"))


@pytest.mark.parametrize("spoil", [spoil_weight, spoil_attribute])
def test_a_graph_that_was_changed_differs(spoil: Any, bert: tuple[Path, Path], graph: Path) -> None:
    base, adapter = bert
    spoil(graph)
    assert findings(validate(adapter, base=base, onnx=graph)) == {"changed-file", "onnx-differs"}
    forget_hashes(graph)
    assert findings(validate(adapter, base=base, onnx=graph)) == {"onnx-differs"}


def test_numbers_that_are_not_finite_are_said_to_be(bert: tuple[Path, Path], graph: Path) -> None:
    base, adapter = bert
    spoil_weight(graph, float("nan"))
    forget_hashes(graph)
    [check] = validate(adapter, base=base, onnx=graph).failures
    assert check.finding == "onnx-broken"
    assert "of the graph are not finite" in check.message


def test_another_adapter_and_none_differ(bert: tuple[Path, Path], graph: Path, tmp_path: Path) -> None:
    base, _ = bert
    other = write_adapter(tmp_path / "other", boft_tensors(QUERY, 32, 32, seed=1))
    assert findings(validate(other, base=base, onnx=graph)) == {"other-adapter", "onnx-differs"}
    assert findings(validate(base=base, onnx=graph)) == {"other-adapter", "onnx-differs"}


def test_a_graph_of_the_base_passes_by_the_base_alone(bert: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = bert
    result = export_onnx(base, (), tmp_path / "out")
    assert result.agreements[0].reference == "base"
    assert validate(base=base, onnx=tmp_path / "out").outcome is Outcome.PASS
    forget_hashes(tmp_path / "out")
    assert findings(validate(adapter, base=base, onnx=tmp_path / "out")) == {"onnx-differs"}


def test_a_folder_without_graphs_and_a_file_that_is_none(bert: tuple[Path, Path], graph: Path, tmp_path: Path) -> None:
    base, adapter = bert
    (tmp_path / "empty").mkdir()
    assert findings(validate(adapter, base=base, onnx=tmp_path / "empty")) == {"no-graph"}
    (graph / "model.onnx").unlink()
    assert "no-graph" in findings(validate(adapter, base=base, onnx=graph))
    (graph / "model.onnx").write_bytes(b"no graph")
    assert {"changed-file"} <= findings(validate(adapter, base=base, onnx=graph))
    with pytest.raises(UsageError, match="is no folder"):
        validate(adapter, base=base, onnx=tmp_path / "nowhere")


def test_the_command_ends_with_1_where_a_graph_differs(bert: tuple[Path, Path], graph: Path) -> None:
    arguments = ["validate", str(bert[1]), "--base", str(bert[0]), "--onnx", str(graph)]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["outcome"] == "pass"
    spoil_weight(graph)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "onnx-differs" in done.stdout + done.stderr


@pytest.fixture
def spoiled_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that writes one wrong weight."""
    save = graphs.save_graph

    def save_wrong(*args: Any) -> None:
        save(*args)
        spoil_weight(args[2].parent)

    monkeypatch.setattr(graphs, "save_graph", save_wrong)


@pytest.mark.usefixtures("spoiled_writer")
def test_nothing_is_published_where_the_graph_differs(bert: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckFailedError, match="differs from the model's") as raised:
        export_onnx(*bert, tmp_path / "out")
    assert raised.value.exit_code == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["geodesic", "linear"])
def test_a_point_between_base_and_tuned_is_proven_by_folding_it_again(
    path: str, bert: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = bert
    result = export_onnx(base, adapter, tmp_path / "out", alpha=0.5, path=path)
    assert result.agreements[0].reference == "folded weights"
    found = validate(adapter, base=base, onnx=tmp_path / "out")
    assert not found.failures
    assert [c.finding for c in found.checks if c.outcome is Outcome.FAIL] == ["part-way"]


def test_bfloat16_is_refused_before_anything_is_done_where_only_a_cpu_is(
    bert: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="bfloat16 with CUDA only") as raised:
        export_onnx(*bert, tmp_path / "out", dtype="bfloat16")
    assert "--dtype float32" in str(raised.value.hint)
    assert not list(tmp_path.iterdir())


def test_float16_is_held_to_what_float16_rounds(bert: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = bert
    result = export_onnx(base, adapter, tmp_path / "out", dtype="float16")
    found = result.agreements[0]
    assert found.kind == graph_kind(tmp_path / "out" / "model.onnx") == "float16"
    assert LIMITS["float32"].largest < found.relative_difference <= found.allowed(LIMITS["float16"])
    assert found.relative_difference / 3 < found.rounding < found.relative_difference * 3
    assert validate(adapter, base=base, onnx=tmp_path / "out").outcome is Outcome.PASS
    forget_hashes(tmp_path / "out")
    assert findings(validate(base=base, onnx=tmp_path / "out")) == {"onnx-differs"}


def test_an_adapter_too_small_to_be_seen_is_said_to_be(bert: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = bert
    tensors = {
        k: v * 1e-8 if k.endswith("boft_R") else torch.ones_like(v) for k, v in boft_tensors(QUERY, 32, 32).items()
    }
    adapter = write_adapter(tmp_path / "adapter", tensors)
    result = export_onnx(base, adapter, tmp_path / "out")
    assert "adapter-not-visible" in {n.code for n in result.plan.notices}
    found = validate(adapter, base=base, onnx=tmp_path / "out")
    assert "inconclusive" in {str(c.outcome) for c in found.checks if c.check == "onnx"}


def test_a_base_in_bfloat16_is_proven_in_float32(bert: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = bert
    half = Path(shutil.copytree(base, tmp_path / "half"))
    tensors = load_file(half / "model.safetensors")
    save_file({k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}, half / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    result = export_onnx(half, adapter, tmp_path / "out")
    assert result.agreements[0].relative_difference < 1e-5


def test_what_neither_peft_nor_hooks_apply_is_proven_by_folding_it_again(
    bert: tuple[Path, Path], tmp_path: Path
) -> None:
    """Two adapters of PEFT's OFT whose blocks differ: PEFT wants them alike, and the hooks know no OFT."""
    base, _ = bert
    config = {"peft_type": "OFT", "r": 0, "coft": False, "eps": 6e-5, "block_share": False, "use_cayley_neumann": False}
    adapters = []
    for size in (4, 8):
        skew = torch.randn(32 // size, size * (size - 1) // 2, generator=torch.Generator().manual_seed(size)) * 0.3
        tensors = {f"base_model.model.{QUERY}.oft_R.weight": skew}
        adapters.append(write_adapter(tmp_path / f"oft-{size}", tensors, {**config, "oft_block_size": size}))
    assert export_onnx(base, adapters, tmp_path / "out").agreements[0].reference == "folded weights"


def test_a_layer_that_the_task_does_not_run_is_no_failure(bert: tuple[Path, Path], tmp_path: Path) -> None:
    """The pooler makes what feature extraction doesn't give."""
    base, _ = bert
    tensors = {**boft_tensors(QUERY, 32, 32), **boft_tensors("pooler.dense", 32, 32)}
    result = export_onnx(base, write_adapter(tmp_path / "adapter", tensors), tmp_path / "out")
    assert result.agreements[0].reference == "hooks"
    assert "not-in-graph" in {n.code for n in result.plan.notices}


def test_cuda_that_is_not_there_is_no_silent_fall_back(exported: ExportResult) -> None:
    """ONNX Runtime goes on without a word; what it ran on is read back."""
    from boft_export.onnx.session import Session, has_cuda

    if has_cuda():
        pytest.skip("CUDA is here")
    assert Session(exported.output / "model.onnx", "cuda").providers == ["CPUExecutionProvider"]


def test_a_resized_vocabulary_and_a_replaced_head_are_proven(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    whole = {
        "base_model.model.lm_head.weight": torch.randn(56, 32),
        "base_model.model.model.embed_tokens.weight": torch.randn(56, 32),
    }
    tensors = {**boft_tensors("model.layers.0.self_attn.q_proj", 32, 32), **whole}
    adapter = write_adapter(tmp_path / "adapter", tensors, {"modules_to_save": ["lm_head", "embed_tokens"]})
    result = export_onnx(tmp_path / "base", adapter, tmp_path / "out")
    assert result.agreements[0].reference == "hooks"
    assert validate(adapter, base=tmp_path / "base", onnx=tmp_path / "out").outcome is Outcome.PASS


def rename_output(folder: Path) -> None:
    """Give the output a name that the task doesn't know."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["other" if o == "last_hidden_state" else o for o in node.output]
    model.graph.output[0].name = "other"
    onnx.save(model, folder / "model.onnx")


def test_an_output_that_is_not_there_is_named(bert: tuple[Path, Path], graph: Path) -> None:
    base, adapter = bert
    forget_hashes(graph)
    rename_output(graph)
    [check] = validate(adapter, base=base, onnx=graph).failures
    assert check.finding == "onnx-broken"
    assert "model.onnx gives no last_hidden_state, expected for this task, but other" in check.message


def test_a_graph_that_was_not_run_is_no_pass(bert: tuple[Path, Path], graph: Path) -> None:
    base, adapter = bert
    forget_hashes(graph)
    shutil.copy(graph / "model.onnx", graph / "model_quantized.onnx")
    found = validate(adapter, base=base, onnx=graph)
    assert not found.failures
    [open_] = [c for c in found.checks if c.outcome is Outcome.INCONCLUSIVE]
    assert "model_quantized.onnx" in open_.message


def test_rotated_kernels_are_seen_in_the_outputs(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    sizes = {"num_channels": 4, "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    ResNetModel(ResNetConfig(**sizes)).save_pretrained(tmp_path / "base")
    tensors = boft_tensors("encoder.stages.0.layers.0.layer.0.convolution", 72, 8)
    result = export_onnx(tmp_path / "base", write_adapter(tmp_path / "adapter", tensors), tmp_path / "out")
    assert {a.reference for a in result.agreements} == {"hooks and rotated kernels"}
    assert "adapter-not-visible" not in {n.code for n in result.plan.notices}
