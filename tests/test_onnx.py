"""Exporting to ONNX: the whole way, from a checkpoint and an adapter to a folder that ONNX Runtime serves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import boft_tensors, expected_merge, read_folder, write_adapter
from torch import Tensor
from typer.testing import CliRunner

import boft_export
from boft_export import InputError, ResourceError, UsageError, export_onnx
from boft_export.cli.main import app

BERT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
QUERY = "encoder.layer.1.attention.self.query.weight"


def bert_adapter(folder: Path, *, m: int = 2, seed: int = 0) -> Path:
    layers = [f"encoder.layer.{i}.attention.self.{part}" for i in range(2) for part in ("query", "value")]
    tensors = {}
    for i, name in enumerate(layers):
        tensors |= boft_tensors(name, 32, 32, m=m, seed=seed + i)
    return write_adapter(folder, tensors)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert") / "base"
    torch.manual_seed(0)
    BertModel(BertConfig(**BERT)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of two factors."""
    return bert_adapter(tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="module")
def exported(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> boft_export.ExportResult:
    """The tiny BERT with its adapter, exported."""
    return export_onnx(base, adapter, tmp_path_factory.mktemp("exported") / "out")


def weights(folder: Path) -> dict[str, Tensor]:
    """Return a graph's initializers."""
    model = onnx.load(folder / "model.onnx")
    return {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in model.graph.initializer}


def test_the_adapter_is_folded_in_and_rounded_once(
    exported: boft_export.ExportResult, base: Path, adapter: Path
) -> None:
    trained = load_file(adapter / "adapter_model.safetensors")
    blocks = {k: v for k, v in trained.items() if QUERY.removesuffix(".weight") in k}
    wanted = expected_merge(load_file(base / "model.safetensors")[QUERY], blocks)
    assert torch.equal(weights(exported.output)[QUERY].T, wanted.float())


def test_outputs_are_those_of_the_model(exported: boft_export.ExportResult) -> None:
    assert [a.output for a in exported.agreements] == ["last_hidden_state"]
    assert exported.agreements[0].relative_difference < 1e-5
    assert exported.agreements[0].providers == ("CPUExecutionProvider",)
    assert not [n for n in exported.plan.notices if n.level is boft_export.Level.WARNING]


def test_the_graph_is_valid_and_its_axes_have_the_usual_names(exported: boft_export.ExportResult) -> None:
    model = onnx.load(exported.output / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    shapes = {i.name: [d.dim_param for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert shapes == {name: ["batch_size", "sequence_length"] for name in names}


def test_weights_keep_the_models_names_and_none_is_stored_twice(exported: boft_export.ExportResult, base: Path) -> None:
    own = load_file(base / "model.safetensors")
    found = [n for n in weights(exported.output) if n in own]
    assert len(found) == len([n for n in own if not n.startswith("pooler")])
    size = (exported.output / "model.onnx_data").stat().st_size
    assert size < sum(own[n].nbytes for n in found) + 4096 * len(found)


def test_a_graph_tells_its_origin_and_nothing_of_the_machine(exported: boft_export.ExportResult, base: Path) -> None:
    raw = (exported.output / "model.onnx").read_bytes()
    for hidden in (str(base.parent).encode(), b"site-packages", b"/boft_export/", b"Traceback"):
        assert hidden not in raw
    told = {p.key: p.value for p in onnx.load(exported.output / "model.onnx", load_external_data=False).metadata_props}
    assert json.loads(told["boft_export.adapters"])[0]["name"] == "adapter"
    files = exported.manifest["files"]
    assert set(files) == {"model.onnx", "model.onnx_data"}
    assert json.loads((exported.output / "boft_export.json").read_text()) == exported.manifest
    assert json.loads(told["boft_export.sha256"])["base/model.safetensors"] in json.dumps(exported.manifest["base"])


def test_the_folder_has_what_loaders_want_and_no_checkpoint(exported: boft_export.ExportResult) -> None:
    names = {p.name for p in exported.output.iterdir()}
    assert names == {"README.md", "boft_export.json", "config.json", "model.onnx", "model.onnx_data"}


def test_the_python_on_the_card_runs_in_the_folder(exported: boft_export.ExportResult) -> None:
    code = re.search(r"```python\n(.*?)```", (exported.output / "README.md").read_text(), re.DOTALL)
    assert code is not None
    done = subprocess.run(
        [sys.executable, "-c", code[1]], cwd=exported.output, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "last_hidden_state (2, 2, 32)\n"), done.stderr


def test_exporting_the_merged_checkpoint_gives_the_same_graph(
    exported: boft_export.ExportResult, base: Path, adapter: Path, tmp_path: Path
) -> None:
    boft_export.merge(base, adapter, tmp_path / "merged")
    again = export_onnx(tmp_path / "merged", (), tmp_path / "out")
    one, other = (onnx.load(f / "model.onnx", load_external_data=False) for f in (exported.output, again.output))
    assert one.graph == other.graph
    assert (exported.output / "model.onnx_data").read_bytes() == (again.output / "model.onnx_data").read_bytes()


@pytest.mark.parametrize("shards", [1, 2])
def test_a_bfloat16_base_is_exported_in_float32_from_its_exact_values(
    base: Path, adapter: Path, tmp_path: Path, shards: int
) -> None:
    tensors = {k: v.bfloat16() for k, v in load_file(base / "model.safetensors").items()}
    shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    place = {t: names[i % shards] for i, t in enumerate(tensors)}
    for name in names:
        save_file({t: v for t, v in tensors.items() if place[t] == name}, tmp_path / "base" / name, {"format": "pt"})
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    result = export_onnx(tmp_path / "base", adapter, tmp_path / "out", max_memory="600MiB", jobs=1)
    trained = load_file(adapter / "adapter_model.safetensors")
    blocks = {k: v for k, v in trained.items() if QUERY.removesuffix(".weight") in k}
    found = weights(result.output)
    assert torch.equal(found[QUERY].T, expected_merge(tensors[QUERY], blocks).float())
    assert all(v.dtype != torch.bfloat16 for v in found.values())


def test_part_of_the_way_is_exported_as_interpolate_has_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    options = {"alpha": 0.4, "path": "factorwise", "alpha_map": {"encoder.layer.1.*": 0.0}}
    boft_export.interpolate(base, adapter, tmp_path / "merged", **options)
    result = export_onnx(base, adapter, tmp_path / "out", **options)
    wanted, found = read_folder(tmp_path / "merged"), weights(result.output)
    for name in (QUERY, QUERY.replace("layer.1", "layer.0")):
        assert torch.equal(found[name].T, wanted[name])
    assert "alpha = 0.4" in (result.output / "README.md").read_text()
    assert result.manifest["settings"]["alpha"] == [0.4]


def test_two_adapters_apply_in_order(base: Path, adapter: Path, tmp_path: Path) -> None:
    second = bert_adapter(tmp_path / "second", m=1, seed=9)
    boft_export.merge(base, [adapter, second], tmp_path / "merged")
    result = export_onnx(base, [adapter, second], tmp_path / "out")
    assert torch.equal(weights(result.output)[QUERY].T, read_folder(tmp_path / "merged")[QUERY])


def test_float16_weights_are_rounded_once(base: Path, adapter: Path, tmp_path: Path) -> None:
    boft_export.merge(base, adapter, tmp_path / "merged", dtype="float16")
    result = export_onnx(base, adapter, tmp_path / "out", dtype="float16")
    assert torch.equal(weights(result.output)[QUERY].T, read_folder(tmp_path / "merged")[QUERY])
    assert result.agreements[0].kind == "float16"


def test_what_the_task_does_not_use_is_noted(base: Path, tmp_path: Path) -> None:
    pooler = boft_tensors("pooler.dense", 32, 32)
    partly = write_adapter(tmp_path / "partly", pooler | boft_tensors(QUERY.removesuffix(".weight"), 32, 32))
    result = export_onnx(base, partly, tmp_path / "out")
    notice = next(n for n in result.plan.notices if n.code == "not-in-graph")
    assert (notice.level, notice.subject) == (boft_export.Level.WARNING, "pooler.dense.weight")
    with pytest.raises(InputError, match=r"pooler\.dense\.weight: 1 of 1 tensors"):
        export_onnx(base, write_adapter(tmp_path / "none", pooler), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_base_of_several_dtypes_is_kept_in_that_of_most(base: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = {k: v.half() if v.ndim > 1 else v for k, v in load_file(base / "model.safetensors").items()}
    shutil.copytree(base, tmp_path / "base")
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    found = weights(export_onnx(tmp_path / "base", adapter, tmp_path / "out", dtype=None).output)
    assert {v.dtype for n, v in found.items() if n in tensors} == {torch.float16}


# What is refused


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--task", "mind-reading"], 2, "there is no task mind-reading"),
        (["--task", "text-generation-with-tea"], 2, "feature-extraction"),
        (["--task", "image-classification"], 3, "bert"),
        (["--task", "text-classification"], 3, "classifier.weight"),
        (["--opset", "7"], 2, "opset 7"),
        (["--dtype", "bfloat16"], 2, "bfloat16"),
        (["--alpha", "half"], 2, "half"),
        (["--max-memory", "1MiB"], 5, "memory"),
        (["--subfolder", "nowhere"], 4, "nowhere"),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else None,
)
def test_what_can_not_be_exported_is_refused_and_leaves_nothing(
    base: Path, adapter: Path, tmp_path: Path, options: list[str], code: int, told: str
) -> None:
    done = CliRunner().invoke(app, ["onnx", str(base), str(adapter), "-o", str(tmp_path / "out"), *options])
    assert done.exit_code == code, done.output
    assert told in done.stderr
    assert done.stderr.count("error:") == 1
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_a_config_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("config.json"))
    with pytest.raises(InputError, match="config"):
        export_onnx(tmp_path / "base", (), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("modules", "told"),
    [("[1]", "not a list of modules"), ('[{"type": "a.Transformer", "path": "../x"}]', "outside of its own")],
)
def test_modules_that_are_none_or_lie_elsewhere_are_refused(
    base: Path, tmp_path: Path, modules: str, told: str
) -> None:
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "modules.json").write_text(modules)
    with pytest.raises(boft_export.DamagedFileError, match=told):
        export_onnx(tmp_path / "base", (), tmp_path / "out", task="sentence-similarity")


@pytest.mark.parametrize("asked", [{"dtype": "float16"}, {"opset": 20}])
def test_a_graph_that_exists_keeps_its_dtype_and_opset(
    exported: boft_export.ExportResult, base: Path, adapter: Path, tmp_path: Path, asked: dict[str, object]
) -> None:
    with pytest.raises(UsageError, match="float32 with opset 23, and stays so"):
        export_onnx(base, adapter, tmp_path / "out", base_onnx=exported.output, **asked)


def test_an_architecture_that_nobody_knows_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "unheard_of", "architectures": ["UnheardOfModel"]}')
    with pytest.raises(InputError, match="unheard_of"):
        export_onnx(tmp_path / "base", (), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_too_little_disk_is_told_before_any_weight_is_written(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 99, 99))
    with pytest.raises(ResourceError, match="99 are free"):
        export_onnx(base, adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_kept(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        export_onnx(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"


# What is said


def test_a_dry_run_tells_what_would_be_done_and_writes_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    command = ["onnx", str(base), str(adapter), "-o", str(tmp_path / "out"), "-n", "--json"]
    done = CliRunner().invoke(app, command)
    told = json.loads(done.stdout)
    assert (done.exit_code, told["task"], told["layers"]) == (0, "feature-extraction", {"applied": 4, "expected": 4})
    assert not list(tmp_path.iterdir())


def test_progress_tells_of_every_phase(base: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    export_onnx(base, (), tmp_path / "out", progress=lambda *now: seen.append(now))
    phases = [name for _, total, name in seen if not total]
    assert phases == ["building the model", "tracing model", "verifying"]
    done = [(now, total) for now, total, _ in seen if total]
    assert done == sorted(done)
    assert done[-1][0] == done[-1][1]


def test_the_command_tells_what_was_compared(base: Path, adapter: Path, tmp_path: Path) -> None:
    command = ["onnx", str(base), str(adapter), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--json"])
    told = json.loads(done.stdout)
    assert told["verified"][0]["relative_difference"] < 1e-5
    assert told["graphs"]["model.onnx"]["nodes"] > 10
    shown = CliRunner().invoke(app, [*command, "--overwrite"])
    assert shown.exit_code == 0
    assert re.search(r"last_hidden_state +\d+ ", shown.stdout)
    assert "CPUExecutionProvider" in shown.stdout
    assert "4 of 4 adapter layers" in shown.stdout


def test_a_transposed_matrix_is_written_right_however_it_is_cut(tmp_path: Path) -> None:
    from boft_export.onnx.external_data import DataFile, Layout

    matrix = np.arange(7 * 5, dtype=np.uint16).reshape(7, 5)
    layout = Layout()
    layout.add("U8", (3,))
    place = layout.add("BF16", (7, 5), transposed=True)
    for size in (2, 4, 6, 10, 14, 22, 70):
        with DataFile(tmp_path / "data", layout.nbytes) as file:
            raw = memoryview(matrix.tobytes())
            for start in range(0, len(raw), size):
                file.write([place], start, raw[start : start + size])
        stored = np.fromfile(tmp_path / "data", np.uint16, offset=place.offset).reshape(5, 7)
        assert np.array_equal(stored, matrix.T)
