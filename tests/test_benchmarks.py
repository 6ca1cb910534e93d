"""Each benchmark runs at its smallest size, prints a table and writes its figures."""

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
from support import butterfly_matrix

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALL = ["--shape", "tiny", "--gigabytes", "0.01", "--runs", "1"]


def run(tmp_path: Path, script: str, *arguments: str) -> tuple[str, dict[str, Any]]:
    command = [sys.executable, str(FOLDER / f"{script}.py"), *arguments, "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((tmp_path / "figures.json").read_text())


def test_merge_beside_a_copy(tmp_path: Path) -> None:
    told, figures = run(tmp_path, "merge", *SMALL, "--targets", "qv", "--outputs", "2")
    rows = {row["command"]: row for row in figures["merge"]}
    assert list(rows) == ["cp", "cp && sync", "merge, qv", "2 x cp", "2 alphas, qv"]
    assert all(command in told for command in rows)
    assert rows["cp"]["of cp"] == 1
    assert rows["2 x cp"]["GB read"] == pytest.approx(2 * rows["cp"]["GB"], rel=0.2)
    # The base of 0.02 GB is read once for both outputs; the rest is Python and its libraries, here torch as well.
    assert rows["2 alphas, qv"]["GB read"] < rows["merge, qv"]["GB read"] + 0.03
    assert figures["machine"]["cores"] >= 1


def test_merge_beside_peers(tmp_path: Path) -> None:
    told, figures = run(tmp_path, "peers", *SMALL, "--targets", "qv", "--factors", "1")
    here = (FOLDER.parent / ".venv-mergekit").exists()
    assert ("mergekit is left out" in told) is not here
    measured, large = [r for r in figures["peers"] if r["GB"] < 1], [r for r in figures["peers"] if r["GB"] > 1]
    assert [r["by"] for r in measured] == ["boft-export", "PEFT", *(["mergekit"] if here else [])]
    assert [(r["by"], r["note"][:12]) for r in large] == [("PEFT", "extrapolated")]


def test_a_layer_alone(tmp_path: Path) -> None:
    _, figures = run(tmp_path, "layer", "--features", "256", "--runs", "1")
    assert [r["by"] for r in figures["layer"]][:2] == ["PEFT", "torch"]
    assert figures["differing"] < 0.01


def test_the_fold_kernel_alone(tmp_path: Path) -> None:
    _, figures = run(tmp_path, "fold_kernel", "--features", "64", "--rows", "16", "--seconds", "0.0001")
    assert [r["stage"] for r in figures["stages"]] == [0, 4, 8, 16, 32, 64]
    assert {r["kernel"] for r in figures["layers"]} >= {"torch"}
    assert all(r["ns/element"] > 0 for r in figures["layers"])


def test_precision(tmp_path: Path) -> None:
    arguments = ["--model", "random", "--gigabytes", "0.003", "--factors", "2", "--dtypes", "float16"]
    _, figures = run(tmp_path, "precision", *arguments)
    rows = {row["by"]: row for row in figures["precision"]}
    assert rows["boft-export"]["wrong"] == 0
    assert rows["boft-export"]["largest error, ulp"] <= 0.5
    assert rows["PEFT, all float16"]["right"] < 0.9


def test_the_exact_merge_that_precision_is_measured_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import precision

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 32, generator=generator)
    blocks, scale = torch.randn(3, 8, 4, 4, generator=generator), torch.rand(5, 1, generator=generator)
    found = precision.exact_merge(*map(precision.wide, (weight, blocks, scale)))
    expected = (scale.double() * (weight.double() @ butterfly_matrix(blocks).T)).numpy()
    assert np.abs(found - expected).max() < 1e-14
    rotation = precision.exact_merge(*map(precision.wide, (torch.eye(32), blocks, torch.ones(32, 1))))
    # Far below float64's rounding.
    assert np.abs(rotation @ rotation.T - np.eye(32)).max() < 1e-17


def test_inference(tmp_path: Path) -> None:
    _, figures = run(tmp_path, "inference", *SMALL, "--tokens", "2", "--factors", "2", "--threads", "2")
    assert len(figures["inference"]) == 6
    for row in figures["inference"]:
        assert math.isfinite(row["seconds"])
        if row["by"] == "merged":
            assert row["from unmerged"] < 1e-4
