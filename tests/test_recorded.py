"""Reading ``boft_export.json`` back: what a run wrote, and files that are not what a run writes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import boft_tensors, write_adapter, write_checkpoint

import boft_export
from boft_export.checkpoint import open_checkpoint
from boft_export.pipeline.recorded import read_recorded

UP = "layers.0.up.weight"
DIGEST = "0" * 64


def test_a_merge(base: Path, adapter: Path, tmp_path: Path) -> None:
    boft_export.merge(base, adapter, tmp_path / "out", dtype="float16")
    found = read_recorded(open_checkpoint(tmp_path / "out"))
    assert found is not None
    assert (found.command, found.path, found.alphas, found.alpha_map) == ("merge", "geodesic", (1.0,), {})
    assert (found.dtype, found.compute_dtype) == ("float16", "float64")
    assert (found.base.name, [a.name for a in found.adapters]) == ("base", ["adapter"])
    for recorded, folder in ((found.base, base), (found.adapters[0], adapter)):
        for name, digest in recorded.sha256.items():
            assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert {n: f.nbytes for n, f in found.files.items()} == {
        p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")
    }
    folded = found.tensors["layers.0.up.weight"]
    assert (folded.action, folded.dtype, folded.shape, folded.alphas) == ("fold", "F16", (24, 32), {0: 1.0})
    assert found.tensors["layers.0.norm.weight"].action == "convert"
    assert len(found.tensors) == 6
    assert found.undo == {}


def test_an_interpolation(base: Path, adapter: Path, tmp_path: Path) -> None:
    boft_export.interpolate(
        base,
        [adapter, adapter],
        tmp_path / "out",
        alphas=[(0.5, 0.25)],
        path="factorwise",
        alpha_map={"layers.1.*": 0.75},
    )
    found = read_recorded(open_checkpoint(tmp_path / "out" / "alpha-0.5_0.25"))
    assert found is not None
    assert (found.command, found.path, found.alphas) == ("interpolate", "factorwise", (0.5, 0.25))
    # A map's one number may stand for all adapters.
    assert found.alpha_map == {"layers.1.*": (0.75, 0.75)}
    assert found.tensors["layers.0.up.weight"].alphas == {0: 0.5, 1: 0.25}
    assert found.tensors["layers.1.up.weight"].alphas == {0: 0.75, 1: 0.75}


def test_no_manifest(base: Path) -> None:
    assert read_recorded(open_checkpoint(base)) is None


@pytest.fixture(scope="module")
def truncated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that an interpolation wrote, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    base = write_checkpoint(folder / "base", {UP: torch.ones(4, 8)})
    adapter = write_adapter(folder / "adapter", boft_tensors("layers.0.up", 8, 4))
    boft_export.interpolate(base, adapter, folder / "out", 0.5, path="truncate")
    return folder / "out"


def put(*path: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    """Return a change: ``value`` at a path of keys; what was there is taken away where it is None."""

    def change(manifest: dict[str, Any]) -> None:
        owner: Any = manifest
        for key in path[:-1]:
            owner = owner[key]
        if value is None:
            del owner[path[-1]]
        else:
            owner[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("command", value=None), "has no command"),
        (put("command", value=7), "command should be text, found 7"),
        (put("schema_version", value=True), "schema_version should be a whole number"),
        (put("schema_version", value=2), "schema version 2, this program reads 1"),
        (put("base", value=[]), "base should be an object, found []"),
        (put("base", "sha256", "config.json", value="0" * 63), "base.sha256.config.json should be a SHA-256"),
        (put("adapters", value={}), "adapters should be a list"),
        (put("adapters", value=["x"]), "adapters[0] should be an object"),
        (put("adapters", value=[]), "steps[0].adapter should be one of 0 adapters"),
        (put("settings", value=None), "has no settings"),
        (put("settings", "dtype", value={}), "settings.dtype should be text"),
        (put("settings", "path", value="straight"), "settings.path should be one of geodesic"),
        (put("settings", "alpha", value=[]), "settings.alpha should be a list of numbers"),
        (put("settings", "alpha", value=[0.5, 0.5]), "settings.alpha should be a number for each of 1 adapters"),
        (put("settings", "alpha", value=[float("nan")]), "settings.alpha should be a finite number"),
        (put("settings", "alpha", value=[10**400]), "settings.alpha should be a finite number"),
        (put("settings", "alpha", value=[1.5]), "settings.alpha should be on the path truncate"),
        (put("settings", "alpha", value=["0.5"]), "settings.alpha should be a finite number"),
        (put("settings", "alpha_map", value={"*": "x"}), "settings.alpha_map.* should be a list"),
        (put("settings", "alpha_map", value={"*": [False]}), "settings.alpha_map.* should be a finite number"),
        (put("files", value="model.safetensors"), "files should be an object"),
        (put("files", "../x", value={"bytes": 1, "sha256": DIGEST}), "a path within the checkpoint, found '../x'"),
        (put("files", "/x", value={"bytes": 1, "sha256": DIGEST}), "a path within the checkpoint"),
        (put("files", "a\\b", value={"bytes": 1, "sha256": DIGEST}), "a path within the checkpoint"),
        (put("files", "x", value={"bytes": -1, "sha256": DIGEST}), "files.x.bytes should be a whole number"),
        (put("files", "x", value={"bytes": 1e3, "sha256": DIGEST}), "files.x.bytes should be a whole number"),
        (put("files", "x", value={"bytes": 1, "sha256": DIGEST.upper() + "Z"}), "files.x.sha256 should be a SHA-256"),
        (put("tensors", UP, "action", value="melt"), f"tensors.{UP}.action should be one of copy"),
        (put("tensors", UP, "action", value=["copy"]), f"tensors.{UP}.action should be one of copy"),
        (put("tensors", UP, "dtype", value="F9"), f"tensors.{UP}.dtype should be a dtype"),
        (put("tensors", UP, "dtype", value=["F32"]), f"tensors.{UP}.dtype should be a dtype"),
        (put("tensors", UP, "shape", value=[4, -1]), f"tensors.{UP}.shape should be a whole number"),
        (put("tensors", UP, "shape", value=[1 << 40] * 3), f"tensors.{UP}.shape should be a shape"),
        (put("tensors", UP, "shape", value=[1] * 1000), f"tensors.{UP}.shape should be a shape"),
        (put("tensors", UP, "steps", value={}), f"tensors.{UP}.steps should be a list"),
        (put("tensors", UP, "steps", 0, "adapter", value=1), "steps[0].adapter should be one of 1 adapters, found 1"),
        (put("tensors", UP, "steps", 0, "alpha", value="1"), "steps[0].alpha should be a finite number"),
        (put("undo", value=[]), "undo should be an object"),
        (put("undo", value={"a/../../b": {"bytes": 1, "sha256": DIGEST}}), "a path within the checkpoint"),
    ],
)
def test_what_is_wrong_is_said(
    truncated: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    shutil.copytree(truncated, tmp_path / "out")
    file = tmp_path / "out" / "boft_export.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(boft_export.InputError) as failure:
        read_recorded(open_checkpoint(tmp_path / "out"))
    assert said in failure.value.message
    assert len(failure.value.message) < 600


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"schema_version": ' + b"9" * 5000])
def test_what_is_no_manifest(base: Path, content: bytes) -> None:
    (base / "boft_export.json").write_bytes(content)
    with pytest.raises(boft_export.DamagedFileError, match=r"boft_export\.json"):
        read_recorded(open_checkpoint(base))


def test_a_file_too_large_is_not_read(base: Path) -> None:
    with (base / "boft_export.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(boft_export.DamagedFileError, match="which no manifest has"):
        read_recorded(open_checkpoint(base))
