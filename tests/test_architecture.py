"""What holds of the code as a whole: layers, imports, and the public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import boft_export

ROOT = Path(boft_export.__file__).parent
# Imports go down only: from a higher rank to a lower one, or within a package. Packages of one rank are siblings.
RANK = {
    "errors": 0, "version": 0, "native": 1, "linalg": 1, "checkpoint": 1, "adapters": 1, "planning": 2, "pipeline": 3,
    "models": 4, "onnx": 5, "validation": 6, "plots": 7, "report": 8, "cli": 9,
}  # fmt: skip
MODULES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem in RANK)
# What only the examples, the tests and optional commands may load.
FOREIGN = {
    "transformers", "peft", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "optimum", "matplotlib", "diffusers", "ray",
}  # fmt: skip
ALLOWED = {
    "pipeline": {"ray"},
    "plots": {"matplotlib"},
    "models": {"transformers", "peft", "diffusers"},
    "onnx": {"transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "diffusers"},
    "validation": {"transformers"},
}


def imports(path: Path) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{a.name}" for a in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    own = path.relative_to(ROOT).with_suffix("").parts[0]
    for name in imports(path):
        if not name.startswith("boft_export."):
            assert name.split(".")[0] not in FOREIGN - ALLOWED.get(own, set())
            continue
        other = name.split(".")[1]
        assert other == own or RANK[other] < RANK[own], f"{own} imports {name}"


def test_every_package_has_a_rank() -> None:
    packages = {p.name for p in ROOT.iterdir() if p.is_dir() and p.name != "__pycache__"}
    files = {p.stem for p in ROOT.glob("*.py")} - {"__init__", "__main__"}
    assert packages | files == set(RANK)


def test_no_file_is_a_drawer_for_everything() -> None:
    assert not {p.stem for p in MODULES} & {"utils", "common", "helpers", "misc"}


def test_public_names() -> None:
    assert boft_export.__all__ == [
        "AccessError",
        "Agreement",
        "BoftExportError",
        "Check",
        "CheckFailedError",
        "DamagedFileError",
        "Diff",
        "ExportResult",
        "Factor",
        "FoldPlan",
        "FunctionalFacts",
        "FunctionalInputs",
        "InputError",
        "Inspection",
        "InterpolationPath",
        "InterpolationResult",
        "LayerFacts",
        "LayerRotation",
        "Level",
        "MergeResult",
        "Notice",
        "Outcome",
        "PathReport",
        "Policy",
        "ReadOptions",
        "ResourceError",
        "Rotation",
        "Sources",
        "TensorChange",
        "TensorFacts",
        "Thresholds",
        "UnmergeResult",
        "UsageError",
        "Validation",
        "__version__",
        "diff",
        "export_onnx",
        "factorwise",
        "geodesic",
        "inspect",
        "interpolate",
        "interpolate_rotation",
        "interpolate_scale",
        "measure_path",
        "merge",
        "plan",
        "read_policy",
        "read_rotations",
        "unmerge",
        "validate",
        "write_path_report",
        "write_rotations",
    ]
    for name in boft_export.__all__:
        assert getattr(boft_export, name).__doc__


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["merge", "--help"],
        ["--version"],
        ["inspect", "{adapter}"],
        ["merge", "{base}", "{adapter}", "-o", "x", "-n"],
        ["interpolate", "--help"],
        ["validate", "--help"],
        ["unmerge", "--help"],
        ["diff", "--help"],
        ["onnx", "--help"],
        ["interpolate", "{base}", "{adapter}", "-o", "x", "-n", "--alphas", "0:1:0.5", "--path-report", "x.html"],
    ],
    ids=" ".join,
)
def test_runs_without_torch(arguments: list[str], base: Path, adapter: Path, tmp_path: Path) -> None:
    """--help, inspect and a dry run start fast because they load no tensor library."""
    code = (
        "import sys\n"
        "from boft_export.cli.main import app\n"
        "try:\n    app()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "loaded = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    filled = [a.format(base=base, adapter=adapter) for a in arguments]
    done = subprocess.run(
        [sys.executable, "-c", code, *filled], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
