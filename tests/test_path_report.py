"""What is measured along a path, a user's own figures beside it, and how the program tells all that."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import logm
from support import boft_tensors, butterfly_matrix, read_folder, write_adapter, write_checkpoint
from torch import Tensor
from typer.testing import CliRunner, Result

import boft_export
from boft_export.cli.main import app
from boft_export.linalg.energy import hyperspherical_energy

PRE = "base_model.model."


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def measure(base: Path, adapter: Path, output: Path, **options: Any) -> dict[str, boft_export.PathReport]:
    report = boft_export.measure_path(boft_export.interpolate(base, adapter, output, **options))
    return {layer.module: layer for layer in report.layers}


# Measures


def energy(neurons: Tensor) -> float:
    """The definition, pair by pair."""
    units = [row / row.norm() for row in neurons.double() if row.any()]
    pairs = [1 / float((a - b).norm()) for i, a in enumerate(units) for b in units[:i] if (a - b).norm() > 1e-6]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("shape", [(2, 3), (20, 7), (33, 64)])
def test_the_energy_is_that_of_its_definition(shape: tuple[int, int]) -> None:
    neurons = randn(*shape)
    assert hyperspherical_energy(neurons.double()) == pytest.approx(energy(neurons), rel=1e-12)


def test_the_energy_leaves_out_what_has_none() -> None:
    neurons = randn(5, 8).double()
    expected = energy(neurons)
    twins = torch.cat([neurons, torch.zeros(2, 8)])
    assert hyperspherical_energy(twins) == pytest.approx(expected, rel=1e-12)
    assert math.isfinite(hyperspherical_energy(torch.cat([neurons, neurons[:1] * 3])) or math.nan)
    assert hyperspherical_energy(neurons[:1]) is None
    assert hyperspherical_energy(torch.zeros(4, 8)) is None


@pytest.mark.parametrize("path", list(boft_export.InterpolationPath))
def test_layers_are_measured(tmp_path: Path, path: str) -> None:
    weight, trained = randn(24, 32), boft_tensors("a", 32, 24, m=2, b=4, std=0.2)
    base = write_checkpoint(tmp_path / "base", {"a.weight": weight})
    adapter = write_adapter(tmp_path / "adapter", trained)
    alphas = (0, 0.25, 0.5, 1)
    layer = measure(base, adapter, tmp_path / "out", alphas=alphas, path=path)["a"]
    log = np.real(logm(butterfly_matrix(trained[f"{PRE}a.boft_R"]).numpy()))
    assert [p.alpha for p in layer.points] == list(alphas)
    assert (layer.tensor, layer.num_features) == ("a.weight", 32)
    for point in layer.points:
        written = read_folder(tmp_path / "out" / f"alpha-{point.alpha:g}")["a.weight"]
        change = (written.double() - weight.double()).norm() / weight.double().norm()
        assert point.relative_change == pytest.approx(float(change), rel=1e-6)
        assert point.energy_ratio == pytest.approx(energy(written) / energy(weight), rel=1e-9)
        assert point.distance == pytest.approx(math.sqrt(32) * point.rms_angle)
        assert point.largest_angle >= point.rms_angle
    first, *between, last = layer.points
    assert first.distance == first.residual == first.relative_change == 0
    assert last.distance == pytest.approx(np.linalg.norm(log), rel=1e-9)
    assert last.largest_angle == pytest.approx(np.abs(np.linalg.eigvals(log)).max(), rel=1e-9)
    assert last.residual < 1e-14
    if path == "linear":
        assert all(p.residual > 1e-3 and abs(p.energy_ratio - 1) > 1e-6 for p in between)
    else:
        assert all(p.residual < 1e-14 and abs(p.energy_ratio - 1) < 1e-6 for p in between)
    if path == "geodesic":
        assert [p.distance for p in between] == pytest.approx([a * last.distance for a in alphas[1:-1]], rel=1e-9)


def test_an_angle_past_half_a_turn_comes_back(tmp_path: Path) -> None:
    """Extrapolated so far that a plane has turned by more than pi, its distance is the shorter way."""
    base = write_checkpoint(tmp_path / "base", {"a.weight": randn(4, 2)})
    # One plane of angle 2 atan(1): a quarter turn.
    quarter = {f"{PRE}a.boft_R": torch.tensor([[[[0.0, 1.0], [-1.0, 0.0]]]]), f"{PRE}a.boft_s": torch.ones(4, 1)}
    adapter = write_adapter(tmp_path / "adapter", quarter)
    layer = measure(base, adapter, tmp_path / "out", alphas=(1, 2.5))["a"]
    assert [p.largest_angle for p in layer.points] == pytest.approx([math.pi / 2, 0.75 * math.pi])


def test_a_large_layer_is_measured_by_some_of_its_neurons(tmp_path: Path) -> None:
    weight = randn(1500, 8)
    base = write_checkpoint(tmp_path / "base", {"a.weight": weight})
    adapter = write_adapter(tmp_path / "adapter", boft_tensors("a", 8, 1500))
    layer = measure(base, adapter, tmp_path / "out", alphas=(0.5,))["a"]
    some = weight[[i * 1500 // 512 for i in range(512)]].double()
    assert layer.base_energy == pytest.approx(hyperspherical_energy(some), rel=1e-12)
    assert layer.points[0].energy_ratio == pytest.approx(1, abs=1e-6)


def test_parts_of_fused_weights_and_old_convolutions_are_measured_as_their_adapter_sees_them(tmp_path: Path) -> None:
    fused, conv = randn(24, 16), randn(6, 4, 3, 3)
    name = "model.layers.0.attn.qkv_proj"
    base = write_checkpoint(tmp_path / "base", {f"{name}.weight": fused, "conv.weight": conv})
    parts = {
        k: v
        for i, p in enumerate("qkv")
        for k, v in boft_tensors(f"model.layers.0.attn.{p}_proj", 16, 8, seed=i).items()
    }
    adapter = write_adapter(
        tmp_path / "adapter", parts | boft_tensors("conv", 36, 6, b=6), drop=("exclude_modules", "peft_version")
    )
    layers = measure(base, adapter, tmp_path / "out", alphas=(0.5,))
    for i, part in enumerate("qkv"):
        rows = fused[8 * i : 8 * i + 8]
        assert layers[f"model.layers.0.attn.{part}_proj"].base_energy == pytest.approx(energy(rows), rel=1e-12)
    assert layers["conv"].base_energy == pytest.approx(energy(conv.reshape(36, 6).T), rel=1e-12)
    assert all(abs(layer.points[0].energy_ratio - 1) < 1e-6 for layer in layers.values())


# Files


@pytest.mark.parametrize("suffix", [".json", ".html", ".png"])
def test_reports_of_each_kind(base: Path, adapter: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / "reports" / f"path{suffix}"
    done = run("interpolate", base, adapter, "-o", tmp_path / "out", "--alphas", "0:1:0.5", "--path-report", file)
    assert done.exit_code == 0, done.output
    assert f"reported to {file}" in done.stdout
    content = file.read_bytes()
    if suffix == ".json":
        document = json.loads(content)
        assert [o["label"] for o in document["outputs"]] == ["0", "0.5", "1"]
        assert {layer["module"] for layer in document["layers"]} == {
            f"layers.{i}.{k}" for i in (0, 1) for k in ("up", "down")
        }
        assert document["layers"][0]["points"][1]["rms_angle"] > 0
    else:
        assert content.startswith({".html": b"<!doctype html>", ".png": b"\x89PNG"}[suffix])
    again = run("interpolate", base, adapter, "-o", tmp_path / "other", "--alpha", "1", "--path-report", file)
    assert (again.exit_code, file.read_bytes()) == (2, content)


def test_plots_without_matplotlib(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("boft_export.report.path_report.find_spec", lambda _: None)
    arguments = ["interpolate", base, adapter, "-o", tmp_path / "out", "--alpha", "0.5", "--path-report"]
    done = run(*arguments, tmp_path / "path.html")
    assert done.exit_code == 2
    assert "pip install 'boft-export[plots]'" in done.stderr
    assert not (tmp_path / "out").exists()
    assert run(*arguments, tmp_path / "path.json").exit_code == 0


# A user's own figures

SCRIPT = """
import sys
from pathlib import Path
from neighbour import offset
print("a word on stdout")
def evaluate(model_dir):
    assert isinstance(model_dir, str)
    return {"bytes": sum(p.stat().st_size for p in Path(model_dir).glob("*.safetensors")), "alpha": offset(model_dir),
            "nothing": float("nan")}
"""
NEIGHBOUR = """
import json
def offset(folder):
    return json.load(open(folder + "/boft_export.json"))["settings"]["alpha"][0]
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "neighbour.py").write_text(NEIGHBOUR)
    (tmp_path / "scripts" / "judge.py").write_text(SCRIPT)
    return tmp_path / "scripts" / "judge.py"


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_figures_of_each_output(base: Path, adapter: Path, tmp_path: Path, script: Path) -> None:
    file = tmp_path / "path.json"
    arguments = ["interpolate", base, adapter, "-o", tmp_path / "out", "--alphas", "0:1:0.5"]
    done = run(*arguments, "--eval", script, "--path-report", file, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    size = sum(p.stat().st_size for p in base.glob("*.safetensors"))
    expected = [{"bytes": size, "alpha": a, "nothing": None} for a in (0, 0.5, 1)]
    assert [o["evaluation"] for o in document["outputs"]] == expected
    assert [o["evaluation"] for o in json.loads(file.read_text())["outputs"]] == expected
    assert "a word on stdout" in done.stderr


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_figures_are_shown(base: Path, adapter: Path, tmp_path: Path, script: Path) -> None:
    several = run(
        "interpolate", base, adapter, "-o", tmp_path / "a", "--alpha", "0", "--alpha", "0.5", "--eval", script
    )
    assert [row.split()[0] for row in several.stdout.splitlines() if "alpha-" in row] == ["0", "0.5"]
    assert "nothing" in several.stdout
    single = run("interpolate", base, adapter, "-o", tmp_path / "b", "--alpha", "0.5", "--eval", script)
    assert "alpha: 0.5" in single.stdout


@pytest.mark.parametrize(
    ("text", "message", "kept"),
    [
        ("def evaluate(model_dir)", "not valid Python", False),
        ("def judge(model_dir): return {}", "defines no function evaluate", False),
        ("evaluate = 3", "defines no function evaluate", True),
        ("import no_such_module\ndef evaluate(m): return {}", "ModuleNotFoundError", True),
        ("def evaluate(m): raise ValueError('too bad')", "ValueError: too bad", True),
        ("import sys\ndef evaluate(m): sys.exit(0)", "SystemExit", True),
        ("def evaluate(m): return 0.5", "expected figures by name", True),
        ("def evaluate(m): return {1: 0.5}", "expected figures by name", True),
        ("def evaluate(m): return {'accuracy': 'high'}", "could not convert", True),
    ],
)
def test_scripts_that_fail(base: Path, adapter: Path, tmp_path: Path, text: str, message: str, *, kept: bool) -> None:
    """What can be seen without running the script is refused at once; later the checkpoints are there, and stay."""
    script = tmp_path / "judge.py"
    script.write_text(text)
    done = run("interpolate", base, adapter, "-o", tmp_path / "out", "--alpha", "0.5", "--eval", script)
    assert done.exit_code == 3, done.output
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "boft_export.json").exists() is kept


def test_a_script_may_go_elsewhere_and_have_children(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Whatever becomes of stdout and of the current folder, the document is whole and the report where it belongs."""
    text = "import os, subprocess\ndef evaluate(m):\n    os.chdir('/')\n    subprocess.run(['echo', 'child'])\n"
    (tmp_path / "judge.py").write_text(text + "    return {'files': len(os.listdir(m))}\n")
    command = [sys.executable, "-m", "boft_export", "interpolate", base, adapter, "-o", "out", "--alphas", "0:1:0.5"]
    command += ["--eval", "judge.py", "--path-report", "path.json", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outputs"][2]["evaluation"] == {"files": 7.0}
    assert "child" in done.stderr
    assert json.loads((tmp_path / "path.json").read_text())["outputs"][2]["evaluation"] == {"files": 7.0}


def test_a_script_that_fails_costs_no_report(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("def evaluate(m): return {'x': 10**400}")
    arguments = ["interpolate", base, adapter, "-o", tmp_path / "out", "--alpha", "0.5"]
    done = run(*arguments, "--eval", tmp_path / "judge.py", "--path-report", tmp_path / "path.json")
    assert done.exit_code == 3, done.output
    assert len(json.loads((tmp_path / "path.json").read_text())["layers"]) == 4


@pytest.mark.parametrize(
    ("report", "code", "message"),
    [
        ("out/config.json", 2, "lies in the output"),
        ("out.json/../out/x.json", 2, "lies in the output"),
        ("map.json", 2, "is an input"),
        ("adapter/adapter_config.json", 2, "is an input"),
        ("base/config.json", 2, "would write into the base's folder"),
        ("base/new.json", 2, "would write into the base's folder"),
        ("map.json/x.json", 4, "is no folder"),
    ],
)
def test_reports_keep_off_what_is_read_and_written(
    base: Path, adapter: Path, tmp_path: Path, report: str, code: int, message: str
) -> None:
    """Also where the base is named by the adapter alone, and the adapter given as a file."""
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}))
    (tmp_path / "map.json").write_text('{"layers.0.*": 0}')
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    arguments = ["interpolate", "-", adapter / "adapter_model.safetensors", "-o", tmp_path / "out", "--alpha", "0.5"]
    options = ["--alpha-map", tmp_path / "map.json", "--overwrite", "--path-report", tmp_path / report]
    done = run(*arguments, *options)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_brackets_and_colons_are_shown_as_they_are(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("def evaluate(m): return {'acc[/x]:b:': 1}")
    output = tmp_path / "o[x]"
    done = run("interpolate", base, adapter, "-o", output, "--alphas", "0:1:1", "--eval", tmp_path / "judge.py")
    assert done.exit_code == 0, done.output
    assert "acc[/x]:b:" in done.stdout
    assert f"{output}/alpha-1" in done.stdout


def test_a_stop_while_evaluating_says_what_is_there(base: Path, adapter: Path, tmp_path: Path) -> None:
    script = tmp_path / "judge.py"
    script.write_text("def evaluate(m): raise KeyboardInterrupt")
    done = run("interpolate", base, adapter, "-o", tmp_path / "out", "--alpha", "0.5", "--eval", script)
    assert done.exit_code == 130
    assert f"interrupted; {tmp_path / 'out'} was published." in done.stderr
    assert "--resume" not in done.stderr
    assert (tmp_path / "out" / "boft_export.json").is_file()


# What the program says


def test_a_sweep_is_told_by_alpha(base: Path, adapter: Path, tmp_path: Path) -> None:
    done = run("interpolate", base, adapter, "-o", tmp_path / "out", "--alphas", "0:1:0.25")
    assert done.exit_code == 0
    assert done.stderr == ""
    rows = [line.split() for line in done.stdout.splitlines() if "alpha-" in line]
    assert [row[0] for row in rows] == ["0", "0.25", "0.5", "0.75", "1"]
    changes = [float(row[2]) for row in rows]
    assert changes == sorted(changes)
    assert "applied 4 of 4 adapter layers at alpha 0, 0.25, 0.5, 0.75, 1 (geodesic)" in done.stdout


def test_one_alpha_is_told_by_layer(base: Path, adapter: Path, tmp_path: Path) -> None:
    done = run("interpolate", base, adapter, "-o", tmp_path / "out", "--alpha", "0.5", "--path", "factorwise")
    assert done.exit_code == 0
    assert "layers.*.up.weight" in done.stdout
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def test_decimals_are_what_they_say(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Ten steps of 0.1 are 1, and three are 0.3: no folder alpha-0.30000000000000004."""
    arguments = ["interpolate", base, adapter, "-o", tmp_path / "out", "--dry-run", "--json", "--alphas"]
    for text, labels in (
        ("0:1:0.1", ["0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1"]),
        ("0:1:0.4", ["0", "0.4", "0.8"]),
        ("1:0:-0.5", ["1", "0.5", "0"]),
        ("-0.5:0.5:0.5", ["-0.5", "0", "0.5"]),
        ("0.5:0.5:1", ["0.5"]),
    ):
        document = json.loads(run(*arguments, text).stdout)
        assert [o["label"] for o in document["outputs"]] == labels
        assert [Path(o["folder"]).name for o in document["outputs"]] == [f"alpha-{label}" for label in labels]
        assert document["bytes_to_write"] == len(labels) * sum(f.stat().st_size for f in base.glob("*.safetensors"))


def test_negative_alphas_are_no_options(base: Path, adapter: Path, tmp_path: Path) -> None:
    done = run("interpolate", base, adapter, "-o", tmp_path / "out", "--alpha", "-0.5", "--path", "cayley")
    assert done.exit_code == 0, done.output
    assert "alpha -0.5 lies beyond base (0) and tuned model (1)" in done.stderr


@pytest.mark.parametrize(
    "text",
    [
        '{"layers.0.*": 0, "*.1.up.weight": [0.5]}',
        "layers.0.*: 0\n'*.1.up.weight': [0.5]\n",
        '{"layers.0.*": 0e-3,\t"*.1.up.weight": [5e-1]}',
        "layers.0.*: 0e-3\n'*.1.up.weight': [5e-1]\n",
    ],
)
def test_maps_are_read_from_files(base: Path, adapter: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "map.yaml").write_text(text)
    done = run("interpolate", base, adapter, "-o", tmp_path / "out", "--alpha-map", tmp_path / "map.yaml", "--json")
    assert done.exit_code == 0, done.output
    (output,) = json.loads(done.stdout)["outputs"]
    alphas = {name: t["steps"][0]["alpha"] for name, t in output["tensors"].items()}
    assert alphas == {
        "layers.0.up.weight": 0, "layers.0.down.weight": 0, "layers.1.up.weight": 0.5, "layers.1.down.weight": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("*.up: 0.5", "not valid YAML"),
        ("- 1\n- 2", "should map patterns"),
        ("", "should map patterns"),
        ("layers.0.*: high", "should have a number"),
        ("layers.0.*: true", "should have a number"),
        ("layers.0.*: []", "should have a number"),
        ("1: 0.5", "should have a number"),
        ("layers.0.*: {a: 1}", "should have a number"),
        ("[" * 2000, "not valid YAML"),
        ("layers.0.*: .nan", "not a finite number"),
        ("layers.0.*: 1:30", "should have a number"),
        ("layers.0.*: 2020-99-99", "should have a number"),
        ("layers.0.*: 0x_", "should have a number"),
        ('{"layers.0.*": 1, "layers.0.*": 0}', "occurs twice"),
        ("layers.0.*: 1\nlayers.0.*: 0", "occurs twice"),
        ("? [a]\n: 1", "not valid YAML"),
        ('{"layers.0.*": ' + "9" * 400 + "}", "too large"),
        ("{}", "found nothing"),
    ],
)
def test_maps_that_are_none(base: Path, adapter: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "map.yaml").write_text(text)
    done = run("interpolate", base, adapter, "-o", tmp_path / "out", "--alpha-map", tmp_path / "map.yaml")
    assert done.exit_code == (2 if "nan" in text else 3), done.output
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_failure_after_the_run_keeps_what_is_written(base: Path, adapter: Path, tmp_path: Path) -> None:
    """An adapter that is gone can't be measured; the checkpoint is there all the same."""
    result = boft_export.interpolate(base, adapter, tmp_path / "out", 0.5)
    file, aside = adapter / "adapter_model.safetensors", tmp_path / "aside"
    file.rename(aside)
    with pytest.raises(boft_export.AccessError):
        boft_export.measure_path(result)
    aside.rename(file)
    assert len(boft_export.measure_path(result).layers) == 4
