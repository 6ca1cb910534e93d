"""Two checkpoints compared: each kind of change by its name, the measures, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from safetensors.torch import save_file
from support import boft_tensors, expected_merge, properties, write_checkpoint
from torch import Tensor
from typer.testing import CliRunner

import boft_export
from boft_export.checkpoint import read_weight_file
from boft_export.cli import diff as diff_command
from boft_export.errors import DamagedFileError, ResourceError, UsageError
from boft_export.linalg.bits import as_integers, largest_step
from boft_export.linalg.rounding import round_once
from boft_export.pipeline import tensor_comparison, tensor_pair
from boft_export.pipeline.diff import diff
from boft_export.pipeline.tensor_change import ChangeKind, TensorChange
from boft_export.pipeline.tensor_comparison import measure_change
from boft_export.pipeline.workers import workers
from boft_export.report.schemas import schema

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
Compare = Callable[..., TensorChange]


@pytest.fixture
def compare(tmp_path: Path) -> Compare:
    def run(old: Tensor, new: Tensor, jobs: int = 1) -> TensorChange:
        refs = []
        for name, tensor in (("old", old), ("new", new)):
            save_file({"x": tensor.contiguous()}, tmp_path / f"{name}.safetensors")
            refs.append(read_weight_file(tmp_path / f"{name}.safetensors").tensors[0])
        with workers(jobs) as pool:
            return measure_change(*refs, pool=pool)

    return run


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(n: int, seed: int = 1) -> Tensor:
    return torch.linalg.qr(randn(n, n, seed=seed))[0]


SHAPES = [(24, 32), (130, 32), (300, 64), (40, 3, 3, 4), (90, 2, 3, 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kinds(compare: Compare, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    old = randn(*shape).to(dtype)
    flat = old.double().reshape(shape[0], -1)
    rows, width = flat.shape
    scale = 1 + 0.2 * randn(rows, 1, seed=2)
    edited = flat.clone()
    edited[1, 2] += 1
    few_rows = flat.clone()
    few_rows[: rows // 3] = randn(rows // 3, width, seed=3)
    negative = torch.where(torch.arange(rows) % 3 == 0, -0.9, 1.1)[:, None]
    columns = 1 + 0.2 * randn(width, seed=4)
    changes = {
        "identical": flat,
        "rotation": scale * (flat @ orthogonal(width).T),
        "rotation with negative scales": negative * (flat @ orthogonal(width).T),
        "scale": scale * flat,
        "scale with negative ones": negative * flat,
        "scale of all": 1.5 * flat,
        "rotation_output": orthogonal(rows) @ flat,
        "rotation_output with scales": orthogonal(rows) @ flat * columns,
        "edit": edited,
        "edit of rows": few_rows,
        "replacement": randn(rows, width, seed=5),
        "replacement of rows in another order": flat.flip(0),
        "replacement by noise": flat * (1 + 0.2 * randn(rows, width, seed=6)),
        "replacement by NaN": flat,
    }
    found = {}
    for name, changed in changes.items():
        new = round_once(changed.reshape(shape), dtype).clone()
        if name.endswith("NaN"):
            new[0, 0] = math.nan
        change = compare(old, new)
        found[name] = str(change.kind)
        assert (change.reason is not None) is (change.kind is ChangeKind.UNKNOWN)
    expected = {name: name.split()[0] for name in changes} | {"replacement by NaN": "unknown"}
    # It is a rotation of the outputs.
    expected["replacement of rows in another order"] = "rotation_output"
    assert found == expected


def test_false_alarms(compare: Compare) -> None:
    """No correct merge is taken for anything but a rotation: over 200 of them, of all dtypes and sizes."""
    sizes = [(8, 6, 1, 2), (8, 300, 2, 4), (32, 24, 3, 8), (64, 100, 4, 8), (72, 130, 1, 8)]
    stds = (0.02, 0.3, 1.0)
    for seed in range(4):  # 240 in all
        for n, out, m, b in sizes:
            for std in stds:
                layer = boft_tensors("x", n, out, m=m, b=b, std=std, seed=seed)
                for dtype in DTYPES:
                    old = (0.02 * randn(out, n, seed=seed)).to(dtype)
                    change = compare(old, round_once(expected_merge(old, layer), dtype))
                    assert change.kind is ChangeKind.ROTATION, (n, out, m, b, std, dtype, change)
                    scale = layer["base_model.model.x.boft_s"]
                    assert change.smallest_scale == pytest.approx(float(scale.min()), abs=0.02)
                    assert change.largest_scale == pytest.approx(float(scale.max()), abs=0.02)


def test_convolutions_as_old_peft_read_them(compare: Compare) -> None:
    """Their bytes were taken for (in k k, out), rotated from the left, and their columns scaled."""
    for out in (6, 80):
        old = randn(out, 4, 3, 3).bfloat16()
        new = orthogonal(36) @ old.double().reshape(36, out) * (1 + 0.1 * randn(out, seed=3))
        assert compare(old, new.reshape(old.shape).bfloat16()).kind is ChangeKind.ROTATION_OUTPUT


@pytest.mark.parametrize("shape", [(7,), (3000,), (64, 5), (70, 9), (2, 3, 4, 5), (1, 1), (), (1, 20)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_measures(compare: Compare, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    old = randn(*shape).to(dtype)
    new = (old.double() + 0.1 * randn(*shape, seed=1)).to(dtype)
    change = compare(old, new)
    a, b = (x.double().reshape(shape[0] if len(shape) > 1 else 1, -1) for x in (old, new))
    assert change.changed == int((old != new).sum())
    assert change.relative_change == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-9)
    angles = torch.acos(torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1))
    assert change.mean_angle == pytest.approx(float(angles.mean()), abs=1e-7)
    assert change.largest_angle == pytest.approx(float(angles.max()), abs=1e-7)
    ratio = b.norm(dim=1) / a.norm(dim=1)
    if change.kind is not ChangeKind.SCALE:
        assert change.smallest_scale == pytest.approx(float(ratio.min()))
        assert change.mean_scale == pytest.approx(float(ratio.mean()))
        assert change.largest_scale == pytest.approx(float(ratio.max()))
    if old.numel() > 1:
        assert change.kind in {ChangeKind.UNKNOWN, ChangeKind.REPLACEMENT, ChangeKind.EDIT}


def steps(a: float, b: float, dtype: torch.dtype) -> int:
    """Count the numbers of a dtype from one to another, one by one."""
    x, end, count = torch.tensor(min(a, b), dtype=dtype), torch.tensor(max(a, b), dtype=dtype), 0
    while x < end:
        x = torch.nextafter(x, end)
        count += 1
    return count


@given(st.floats(-1e-3, 1e-3), st.integers(-40, 40), st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
@properties
def test_steps_of_the_dtype(value: float, away: int, dtype: torch.dtype) -> None:
    start = torch.tensor([value], dtype=dtype)
    end = start.clone()
    for _ in range(abs(away)):
        end = torch.nextafter(end, torch.tensor([math.copysign(1, away)], dtype=dtype))
    found = largest_step(start, end)
    assert found == abs(away) == steps(float(start), float(end), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_across_the_whole_range(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    ends = [torch.tensor([x], dtype=dtype) for x in (info.min, info.max)]
    positive = int(as_integers(ends[1])[0])
    assert largest_step(*ends) == 2 * positive
    zeros = [torch.tensor([x], dtype=dtype) for x in (-0.0, 0.0)]
    assert largest_step(*zeros) == 0


@given(st.floats(1e-12, 3.1), st.floats(0.5, 2), st.integers(2, 40))
@properties
def test_angles_however_small(angle: float, scale: float, width: int) -> None:
    u, v = torch.linalg.qr(randn(width, 2, seed=width))[0].T
    turned = scale * (math.cos(angle) * u + math.sin(angle) * v)
    found = tensor_comparison.row_angles(*(x.square().sum().reshape(1) for x in (u, turned, turned - u)))
    # Where lengths change too, the square root of float64's precision is what is left of small angles.
    assert float(found) == pytest.approx(angle, rel=1e-6, abs=1e-13 + 3e-8 * math.sqrt(abs(scale - 1)))


def test_conversions(compare: Compare) -> None:
    wide = randn(70, 40)
    for old, new in ((torch.float32, torch.bfloat16), (torch.float64, torch.float16), (torch.bfloat16, torch.float32)):
        before = wide.to(old)
        change = compare(before, round_once(before.double(), new))
        assert (change.kind, change.changed, change.largest_ulp) == (ChangeKind.CONVERTED, 0, 0)
        rotated = round_once(before.double() @ orthogonal(40).T, new)
        assert compare(before, rotated).kind is ChangeKind.ROTATION
    # Rounded twice, by way of float32, as torch does.
    double = torch.full((3, 5), 1 + 2.0**-8 + 2.0**-40, dtype=torch.float64)
    change = compare(double, double.to(torch.bfloat16))
    assert (change.kind, change.changed, change.largest_ulp) == (ChangeKind.ROUNDING, 15, 1)


def test_tiny_changes(compare: Compare) -> None:
    old = randn(100, 50).bfloat16()
    stepped = old.clone()
    stepped[3, 4] = torch.nextafter(old[3, 4], torch.tensor(9, dtype=torch.bfloat16))
    change = compare(old, stepped)
    assert (change.kind, change.changed, change.largest_ulp) == (ChangeKind.ROUNDING, 1, 1)
    zeros = torch.zeros(4, 4)
    change = compare(zeros, -zeros)
    assert (change.kind, change.changed, change.largest_ulp) == (ChangeKind.ROUNDING, 16, 0)


def test_rotations_lost_in_rounding_are_no_edits(compare: Compare) -> None:
    for angle in (1e-5, 1e-4, 1e-3):
        for seed in range(3):
            skew = randn(16, 16, seed=seed) * angle
            old = randn(100, 16, seed=seed + 9).bfloat16()
            new = round_once(old.double() @ torch.matrix_exp(skew - skew.T), torch.bfloat16)
            assert compare(old, new).kind not in {ChangeKind.EDIT, ChangeKind.REPLACEMENT}


def test_what_stays_zero_is_not_untouched(compare: Compare) -> None:
    old = randn(30, 16)
    old[5:] = 0
    assert compare(old, old @ orthogonal(16).T).kind is ChangeKind.ROTATION
    row = randn(1, 64)
    row[:, 4:] = 0
    turned = row.clone()
    turned[:, :4] = row[:, :4] @ orthogonal(4).T
    assert compare(row, turned).kind is ChangeKind.UNKNOWN
    bias = torch.ones(64)
    bias[7] = 3
    assert compare(torch.ones(64), bias).kind is ChangeKind.EDIT


def test_nothing_to_compare(compare: Compare) -> None:
    for shape in ((0,), (0, 4), (4, 0)):
        assert compare(torch.zeros(shape), torch.zeros(shape)).kind is ChangeKind.IDENTICAL
        assert compare(torch.zeros(shape), torch.zeros(shape).half()).kind is ChangeKind.CONVERTED
    born = compare(torch.zeros(3, 4), torch.ones(3, 4))
    assert born.kind is ChangeKind.REPLACEMENT
    assert born.relative_change == math.inf
    died = compare(torch.ones(3, 4), torch.zeros(3, 4))
    assert (died.kind, died.largest_scale) == (ChangeKind.SCALE, 0)


@pytest.mark.parametrize("rows", [20, 100])
def test_zero_rows(compare: Compare, rows: int) -> None:
    old = randn(rows, 16)
    old[3] = 0
    rotated = old @ orthogonal(16).T
    assert compare(old, rotated).kind is ChangeKind.ROTATION
    rotated[3] = 1e-3
    assert compare(old, rotated).kind is ChangeKind.REPLACEMENT


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite(compare: Compare, bad: float, dtype: torch.dtype) -> None:
    old = randn(80, 8).to(dtype)
    new = (0.5 * old).to(dtype)
    new[5, 5] = bad
    change = compare(old, new)
    assert (change.nonfinite, change.nonfinite_new, change.kind) == (0, 1, ChangeKind.UNKNOWN)
    assert change.relative_change == pytest.approx(0.5)
    both = compare(new, 2 * new)
    assert (both.nonfinite, both.nonfinite_new) == (1, 1)
    assert compare(new, new.clone()).kind is ChangeKind.IDENTICAL
    assert "finite" in (both.reason or "")


def test_values_without_squares(compare: Compare) -> None:
    change = compare(torch.full((3, 4), 1e200, dtype=torch.float64), torch.full((3, 4), -2e200, dtype=torch.float64))
    assert change.kind is ChangeKind.UNKNOWN
    assert change.relative_change is None
    assert "large" in (change.reason or "")


def test_other_dtypes(compare: Compare) -> None:
    old = torch.arange(24).reshape(4, 6)
    assert compare(old, old.clone()).kind is ChangeKind.IDENTICAL
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64):
        before, after = old.to(dtype), old.to(dtype).clone()
        after[1, 1] = 0
        change = compare(before, after)
        assert (change.kind, change.changed, change.largest_ulp) == (ChangeKind.UNKNOWN, 1, None)
        assert "not compared" in (change.reason or "")
    assert compare(old, old.float()).changed is None


@pytest.mark.parametrize("shape", [(1, 5000), (40, 3000), (200, 900), (70, 3000), (5000,)], ids=str)
@pytest.mark.parametrize("kind", ["rotation", "scale", "other"])
def test_pieces_and_threads(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], kind: str
) -> None:
    """However it is cut, also in the midst of a row, the outcome is the same; and to the last bit for any threads."""
    old = randn(*shape).float()
    flat = old.double().reshape(shape[0] if len(shape) > 1 else 1, -1)
    width = flat.shape[1]
    rotation = torch.block_diag(*[orthogonal(50)] * (width // 50))
    new = {"rotation": flat @ rotation.T, "scale": 1.5 * flat, "other": randn(*flat.shape, seed=7)}[kind]
    new = new.reshape(shape).float()
    whole = compare(old, new)
    for block, tile, widest in ((4096, 1000, 1000), (30000, 500, 1 << 17), (1 << 20, 64, 1 << 17)):
        monkeypatch.setattr(tensor_pair, "BLOCK_BYTES", block)
        monkeypatch.setattr(tensor_comparison, "BLOCK_BYTES", block)
        monkeypatch.setattr(tensor_pair, "_TILE_ELEMENTS", tile)
        monkeypatch.setattr(tensor_pair, "_WIDEST", widest)
        cut = compare(old, new)
        assert compare(old, new, jobs=4) == cut
        too_long = flat.shape[0] > 64 and width > widest
        assert cut.kind is (ChangeKind.UNKNOWN if too_long and kind != "scale" else whole.kind)
        for field in dataclasses.fields(TensorChange):
            if field.name not in {"kind", "reason", "residual", "noise", "limit"}:
                assert getattr(cut, field.name) == pytest.approx(getattr(whole, field.name), rel=1e-9, abs=5e-8), (
                    field.name
                )


def test_shapes_must_be_the_same(compare: Compare) -> None:
    with pytest.raises(ValueError, match="shape"):
        compare(torch.zeros(2, 3), torch.zeros(3, 2))


def test_merge_of_a_checkpoint(base: Path, adapter: Path, tmp_path: Path) -> None:
    boft_export.merge(base, adapter, tmp_path / "merged")
    seen: list[tuple[int, int]] = []
    found = diff(base, tmp_path / "merged", jobs=2, progress=lambda done, total, _name: seen.append((done, total)))
    kinds = {t.name: t.change.kind for t in found.tensors}
    assert all(k is (ChangeKind.IDENTICAL if "norm" in n else ChangeKind.ROTATION) for n, k in kinds.items())
    assert len(found.changed) == 4
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0
    assert diff(base, base).same
    changes = [t.change.relative_change for t in found.changed]
    assert changes == sorted(changes, reverse=True)


def two(folder: Path) -> tuple[Path, Path]:
    """Write two checkpoints that differ in all ways."""
    old = {f"h.{i}.w": randn(20, 16, seed=i).bfloat16() for i in range(3)}
    old |= {"same": torch.ones(3), "gone": torch.ones(2), "resized": torch.ones(4, 2), "converted": torch.ones(5)}
    new: dict[str, Tensor] = {
        **{f"h.{i}.w": (old[f"h.{i}.w"].double() @ orthogonal(16).T).bfloat16() for i in range(2)},
        "h.2.w": 3 * randn(20, 16, seed=8).bfloat16(),
        "same": torch.ones(3),
        "resized": torch.ones(5, 2),
        "converted": torch.ones(5).half(),
        "new": torch.ones(()),
    }
    first = {"model_type": "x", "a": {"b": 1, "c": [1]}, "z": 1}
    second = {"model_type": "x", "a": {"b": 2, "c": [1]}, "y": None}
    return write_checkpoint(folder / "A", old, first), write_checkpoint(folder / "B", new, second)


def test_all_ways_to_differ(tmp_path: Path) -> None:
    found = diff(*two(tmp_path))
    assert (found.changed[0].name, str(found.changed[0].change.kind)) == ("h.2.w", "replacement")
    assert {t.name: str(t.change.kind) for t in found.tensors if not t.name.startswith("h")} == {
        "same": "identical",
        "converted": "converted",
    }
    assert [t.name for t in found.only_a] == ["gone"]
    assert [(t.name, t.shape) for t in found.only_b] == [("new", ())]
    assert [(t.name, t.shape, t.new_shape) for t in found.reshaped] == [("resized", (4, 2), (5, 2))]
    assert {(c.key, c.old, c.new) for c in found.config} == {("a.b", "1", "2"), ("z", "1", None), ("y", None, "null")}
    assert not found.same


def test_refusals(tmp_path: Path) -> None:
    a, b = two(tmp_path)
    with pytest.raises(UsageError, match="0 jobs"):
        diff(a, b, jobs=0)
    with pytest.raises(ResourceError, match="too few"):
        diff(a, b, max_memory="10MB")
    assert diff(a, b, max_memory="320MiB") == diff(a, b)
    file = b / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(DamagedFileError):
        diff(a, b)


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    made.command(diff_command.NAME, epilog=diff_command.EPILOG)(diff_command.command)
    made.command("other")(lambda: None)
    return made


def run(app: typer.Typer, *arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["diff", *map(str, arguments)])
    return result.exit_code, result.stdout


def document(text: str) -> Mapping[str, object]:
    found: Mapping[str, object] = json.loads(text, parse_constant=pytest.fail)
    Draft202012Validator(schema("diff")).validate(found)
    return found


def test_command(app: typer.Typer, tmp_path: Path) -> None:
    a, b = two(tmp_path)
    code, text = run(app, a, b)
    assert code == 0
    lines = text.splitlines()
    assert any("h.*.w" in x and "x2" in x and "rotation" in x for x in lines)
    assert any("h.*.w" in x and "x1" in x and "replacement" in x for x in lines)
    assert "config.json: a.b: 1 to 2" in text
    assert "only in A" in text
    assert "4x2" in text
    assert lines[-1].startswith("2 rotation, ")
    code, text = run(app, a, b, "--top", 1)
    assert "h.2.w" in text
    assert "h.1.w" not in text
    assert "and 3 more" in text
    assert run(app, a, b, "--exit-code")[0] == 1
    assert run(app, a, b, "-q", "--exit-code") == (1, "")
    assert run(app, a, a, "--exit-code")[0] == 0
    assert "the same: 7 identical" in run(app, a, a)[1]
    assert run(app, a, b, "--top", 0)[0] == 2


def test_json(app: typer.Typer, tmp_path: Path) -> None:
    Draft202012Validator.check_schema(schema("diff"))
    a, b = two(tmp_path)
    found = document(run(app, a, b, "--json")[1])
    assert found["counts"] == {
        "rotation": 2, "replacement": 1, "identical": 1, "converted": 1, "reshaped": 1, "only_a": 1, "only_b": 1
    }  # fmt: skip
    assert document(run(app, a, a, "--json")[1])["same"] is True
    born = write_checkpoint(tmp_path / "zeros", {"x": torch.zeros(3, 3)})
    grown = write_checkpoint(tmp_path / "ones", {"x": torch.eye(3) * math.inf})
    assert document(run(app, born, grown, "--json")[1])["counts"] == {"unknown": 1}
    code, text = run(app, a, tmp_path / "nothing", "--json")
    assert code == 4
    assert document(text)["error"]


def test_help_runs_without_torch() -> None:
    code = "import sys, boft_export.cli.diff, boft_export.report.diff_report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
