"""The fold kernel, each instruction set that runs here: against exact arithmetic, numpy, and the fold by torch."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import properties

from boft_export import native
from boft_export.errors import UsageError
from boft_export.linalg.butterfly import butterfly_index
from boft_export.linalg.rounding import round_once
from boft_export.native import DTYPES, Program, Stage, fold_columns, fold_rows

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# Digits, the exponent of the smallest normal number, the largest number.
FORMATS = {
    "BF16": (8, -126, float(torch.finfo(torch.bfloat16).max)),
    "F16": (11, -14, 65504.0),
    "F32": (24, -126, float(np.finfo(np.float32).max)),
}
KERNELS = native._KERNELS
pytestmark = pytest.mark.skipif(not KERNELS, reason="the kernel was not compiled")
ANY_FLOAT = st.one_of(
    st.floats(width=64),
    st.floats(min_value=-7e4, max_value=7e4),
    st.floats(min_value=-1e-4, max_value=1e-4),
    st.floats(min_value=-(2.0**-125), max_value=2.0**-125),
    st.floats(min_value=3.3e38, max_value=3.5e38),
)


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch) -> str:
    monkeypatch.setenv("BOFT_EXPORT_KERNEL", request.param)
    return request.param


@pytest.fixture(scope="module", params=KERNELS)
def any_kernel(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BOFT_EXPORT_KERNEL", request.param)
        yield request.param


def nearest(x: float, dtype: str) -> float:
    """Round ``x`` once, by rational arithmetic."""
    if not math.isfinite(x) or x == 0:
        return x
    digits, lowest, largest = FORMATS[dtype]
    quantum = Fraction(2) ** (max(math.frexp(x)[1] - 1, lowest) - digits + 1)
    rounded = round(abs(Fraction(x)) / quantum) * quantum  # ties to even
    return math.copysign(math.inf if rounded > largest else float(rounded), x)


def raw(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().view(-1).view(torch.uint8).numpy()


def empty(count: int, dtype: str) -> np.ndarray:
    """A buffer of wrong values, so that what is not written shows."""
    return np.full(count * TORCH[dtype].itemsize, 0xAB, np.uint8)


def values(buffer: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(buffer).view(TORCH[dtype])


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether all elements are the same value, NaN and the signs of zeros included."""
    x, y = x.double(), y.double()
    return torch.equal(x.nan_to_num(7e77), y.nan_to_num(7e77)) and torch.equal(
        x.signbit() | x.isnan(), y.signbit() | y.isnan()
    )


def stage(n: int, k: int, rng: np.random.Generator) -> Stage:
    """Random orthogonal blocks on features in random order."""
    blocks = np.linalg.qr(rng.standard_normal((n // k, k, k)))[0]
    return Stage(blocks, rng.permutation(n).reshape(-1, k))


def apply(stages: list[Stage], x: torch.Tensor) -> torch.Tensor:
    for s in stages:
        y = torch.empty_like(x)
        y[:, s.index] = torch.einsum("rbj,bij->rbi", x[:, s.index], torch.from_numpy(s.blocks))
        x = y
    return x


def measured(x: torch.Tensor, y: torch.Tensor, rounded: torch.Tensor) -> list[float]:
    finite = x.isfinite()
    unsound, damaged = int((~finite).sum()), int((finite & ~rounded.isfinite()).sum())
    a, b, c = (t.double()[finite] for t in (x, y, rounded))
    sums = [float((t * t).sum()) for t in (a, b - a, c - b)]
    return [x.numel(), int((c != a).sum()), *sums, damaged, unsound]


@properties
@given(st.lists(ANY_FLOAT, min_size=1), st.sampled_from(sorted(FORMATS)))
@pytest.mark.usefixtures("any_kernel")
def test_rounding_is_that_of_exact_arithmetic(numbers, dtype):
    out = empty(len(numbers), dtype)
    x = torch.tensor(numbers, dtype=torch.float64)
    sums = fold_rows(Program((), len(numbers)), raw(x), "F64", out, dtype, tile_rows=1)
    expected = torch.tensor([nearest(v, dtype) for v in numbers], dtype=torch.float64)
    assert same(values(out, dtype), expected)
    np.testing.assert_allclose(sums[0], measured(x, x, expected), rtol=1e-9)


@pytest.mark.parametrize("dtype", sorted(FORMATS))
@pytest.mark.usefixtures("kernel")
def test_numbers_halfway_between_two_round_to_even(dtype):
    digits, lowest, _ = FORMATS[dtype]
    whole = np.arange(2.0 ** (digits - 1), min(2.0**digits, 2.0 ** (digits - 1) + 256))
    numbers = [
        sign * math.ldexp(w + half, e)
        for sign in (1, -1)
        for w in whole.tolist()
        for half in (0.5, math.nextafter(0.5, 0), 0.5 + 2.0**-24)
        for e in (-digits + 1, lowest - digits + 1, lowest - digits - 3, lowest - 2 * digits)
    ]
    out = empty(len(numbers), dtype)
    fold_rows(Program((), len(numbers)), np.array(numbers), "F64", out, dtype, tile_rows=1)
    assert same(values(out, dtype), torch.tensor([nearest(v, dtype) for v in numbers], dtype=torch.float64))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.usefixtures("kernel")
def test_what_is_not_changed_keeps_its_bits(dtype):
    """Every 16-bit number but NaNs, through the kernel and back."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = numbers.view(torch.float16 if dtype == "F16" else torch.bfloat16)
    x = x[~x.isnan()].to(TORCH[dtype])
    for n in (1, 1023, len(x)):
        rows = len(x) // n
        part = x[: rows * n]
        out = empty(len(part), dtype)
        fold_rows(Program((), n), raw(part), dtype, out, dtype, tile_rows=7)
        assert out.tobytes() == raw(part).tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.usefixtures("kernel")
def test_nan_stays_nan(dtype):
    out = empty(9, dtype)
    fold_rows(Program((), 9), np.array([math.nan, -math.nan, 1.0] * 3), "F64", out, dtype, tile_rows=1)
    assert values(out, dtype).isnan().tolist() == [True, True, False] * 3


@st.composite
def folds(draw: st.DrawFn):
    k = draw(st.integers(1, 20))
    n = k * draw(st.integers(1, 12))
    sizes = [d for d in range(1, n + 1) if n % d == 0 and d <= 40]
    return (
        n,
        draw(st.lists(st.sampled_from(sizes), max_size=3)),
        draw(st.integers(1, 40)),
        draw(st.sampled_from(sorted(DTYPES))),
        draw(st.sampled_from(sorted(DTYPES))),
        draw(st.booleans()),
        draw(st.sampled_from([1.0, 0.0, 0.3, -0.5])),
        draw(st.integers(1, 12)),
        draw(st.integers(0, 999)),
    )


@properties
@given(folds())
@pytest.mark.usefixtures("any_kernel")
def test_rows_and_columns_are_what_the_definition_says(fold):
    n, sizes, rows, source, dtype, scaled, weight, tile, seed = fold
    rng = np.random.default_rng(seed)
    stages = [stage(n, k, rng) for k in sizes]
    program = Program(stages, n)
    x = torch.from_numpy(rng.standard_normal((rows, n)) * 10.0 ** rng.integers(-5, 2)).to(TORCH[source])
    scale = rng.standard_normal(rows) if scaled else None
    y = apply(stages, x.double())
    if scale is not None:
        y = y * torch.from_numpy(scale)[:, None]
    if weight != 1:
        y = (1 - weight) * x.double() + weight * y
    out = empty(x.numel(), dtype)
    sums = fold_rows(program, raw(x), source, out, dtype, scale=scale, weight=weight, tile_rows=tile)
    got = values(out, dtype).view(rows, n)
    if dtype == "F64":
        torch.testing.assert_close(got, y, rtol=1e-12, atol=1e-12 * float(x.abs().max()))
    else:
        # Results of float64 in another order may lie on either side of a midpoint, but seldom do.
        torch.testing.assert_close(got, round_once(y, TORCH[dtype]), rtol=2.0 ** (1 - FORMATS[dtype][0]), atol=1e-7)
        assert (got != round_once(y, TORCH[dtype])).sum() <= (0 if dtype != "F32" else 1)
    assert sums.shape == (-(-rows // tile), 7)
    for t, first in enumerate(range(0, rows, tile)):
        part = slice(first, first + tile)
        expected = measured(x[part], y[part], got[part].double())
        # The change of what is not rotated is rounding alone; so is the rounding of a float64.
        np.testing.assert_allclose(sums[t], expected, rtol=1e-6 if dtype in {"BF16", "F16"} else 1e-3, atol=1e-22)

    across = empty(x.numel(), dtype)
    fold_columns(
        program, raw(x.T), source, across, dtype,
        columns=rows, first=0, scale=scale, weight=weight, tile_rows=tile,
    )  # fmt: skip
    assert raw(values(across, dtype).view(n, rows).T).tobytes() == out.tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(("m", "b"), [(1, 4), (2, 4), (2, 8), (3, 4), (4, 2)])
@pytest.mark.usefixtures("kernel")
def test_butterflies_fold_as_by_torch(dtype, m, b):
    n, rng = 192, np.random.default_rng(m)
    stages = []
    for i in range(m):
        index = np.asarray(butterfly_index(i, n // b, b))
        stages.append(Stage(np.linalg.qr(rng.standard_normal((n // b, b, b)))[0], index))
    x = torch.from_numpy(rng.standard_normal((50, n)) * 0.02).to(TORCH[dtype])
    out = empty(x.numel(), dtype)
    fold_rows(Program(stages, n), raw(x), dtype, out, dtype, tile_rows=50)
    expected = round_once(apply(stages, x.double()), TORCH[dtype])
    assert torch.equal(values(out, dtype).view(50, n), expected)


@pytest.mark.usefixtures("kernel")
def test_sums_and_results_are_the_same_however_a_tensor_is_cut():
    rng = np.random.default_rng(5)
    n, rows, tile = 240, 101, 6
    program = Program([Stage(np.linalg.qr(rng.standard_normal((n // 12, 12, 12)))[0], np.arange(n).reshape(-1, 12))], n)
    x = torch.from_numpy(rng.standard_normal((rows, n))).bfloat16()
    x[40, 7], x[41, 9], x[3, 100] = math.inf, math.nan, -math.inf
    scale = rng.standard_normal(rows)
    whole = empty(x.numel(), "BF16")
    sums = fold_rows(program, raw(x), "BF16", whole, "BF16", scale=scale, tile_rows=tile)
    assert sums[:, 6].sum() == 3
    for step in (tile, 4 * tile, 9 * tile):
        parts, tiles = [], []
        for first in range(0, rows, step):
            part = x[first : first + step]
            out = empty(part.numel(), "BF16")
            tiles.append(
                fold_rows(
                    program, raw(part), "BF16", out, "BF16", scale=scale[first : first + step], tile_rows=tile
                )
            )  # fmt: skip
            parts.append(out)
        assert np.concatenate(parts).tobytes() == whole.tobytes()
        assert np.concatenate(tiles).tobytes() == sums.tobytes()

    x = x.T.contiguous()
    whole = empty(x.numel(), "BF16")
    sums = fold_columns(program, raw(x), "BF16", whole, "BF16", columns=rows, first=0, scale=scale, tile_rows=36)
    for step in (36, 72, 180):
        parts, tiles = [], []
        for first in range(0, n, step):
            part = x[first : first + step]
            out = empty(part.numel(), "BF16")
            tiles.append(
                fold_columns(
                    program, raw(part), "BF16", out, "BF16", columns=rows, first=first, scale=scale, tile_rows=36
                )
            )  # fmt: skip
            parts.append(out)
        assert np.concatenate(parts).tobytes() == whole.tobytes()
        assert np.concatenate(tiles).tobytes() == sums.tobytes()


def test_kernels_with_fma_agree_to_the_last_bit(monkeypatch):
    rng = np.random.default_rng(6)
    program = Program([stage(180, 5, rng), stage(180, 18, rng)], 180)
    x = rng.standard_normal((33, 180))
    found = set()
    for name in KERNELS:
        if name != "plain":
            monkeypatch.setenv("BOFT_EXPORT_KERNEL", name)
            out = empty(x.size, "F64")
            sums = fold_rows(program, x, "F64", out, "F64", scale=rng.permutation(33) * 0 + 0.7, tile_rows=4)
            found.add((out.tobytes(), sums.tobytes()))
    assert len(found) <= 1


@pytest.mark.usefixtures("kernel")
def test_a_fold_in_place():
    rng = np.random.default_rng(7)
    program = Program([stage(96, 8, rng), stage(96, 6, rng)], 96)
    x = torch.from_numpy(rng.standard_normal((40, 96))).half()
    out = empty(x.numel(), "F16")
    fold_rows(program, raw(x), "F16", out, "F16", tile_rows=8)
    fold_rows(program, raw(x), "F16", raw(x), "F16", tile_rows=8)
    assert raw(x).tobytes() == out.tobytes()


@pytest.mark.usefixtures("kernel")
def test_no_rows():
    out = np.zeros(0, np.uint8)
    assert fold_rows(Program((), 8), out, "F32", out, "BF16", tile_rows=4).shape == (0, 7)


@pytest.mark.usefixtures("kernel")
def test_buffers_that_do_not_fit_are_refused():
    program = Program([Stage(np.eye(4)[None].repeat(4, 0), np.arange(16).reshape(4, 4))], 16)
    good = np.zeros(64, np.uint8)
    fold_rows(program, good, "BF16", np.zeros(64, np.uint8), "BF16", tile_rows=1)
    for source, dtype, out, scale in [
        (good[:62], "BF16", good[:62], None),
        (good[:33], "BF16", good[:33], None),
        (good, "BF16", good[:62], None),
        (good, "BF16", good, np.ones(3)),
        (good, "I32", good, None),
    ]:
        with pytest.raises(ValueError, match=r"bytes|scale|dtype"):
            fold_rows(program, source, dtype, out.copy(), dtype, scale=scale, tile_rows=1)
    for first in (2, 16, -4):
        with pytest.raises(ValueError, match="cut a group"):
            fold_columns(program, good, "BF16", good.copy(), "BF16", columns=8, first=first, tile_rows=1)
    with pytest.raises(ValueError, match="whole"):
        fold_rows(program, good, "BF16", good.copy(), "BF16", tile_rows=0)
    with pytest.raises((ValueError, BufferError, TypeError)):
        fold_rows(program, good, "BF16", bytes(64), "BF16", tile_rows=1)


@pytest.mark.parametrize(
    ("index", "blocks"),
    [
        ([[0, 1], [1, 2]], (2, 2, 2)),
        ([[0, 1], [2, 4]], (2, 2, 2)),
        ([[0, 1]], (1, 2, 2)),
        ([[0, 1], [2, 3]], (2, 2, 3)),
    ],
)
def test_stages_that_are_no_partition_are_refused(index, blocks):
    with pytest.raises(ValueError, match="a stage's index"):
        Program([Stage(np.zeros(blocks), np.array(index))], 4)


def test_the_environment_chooses_the_kernel(monkeypatch):
    monkeypatch.delenv("BOFT_EXPORT_KERNEL", raising=False)
    assert native.instruction_set() == KERNELS[0]
    monkeypatch.setenv("BOFT_EXPORT_KERNEL", "torch")
    assert native.instruction_set() is None
    monkeypatch.setenv("BOFT_EXPORT_KERNEL", "sse9")
    with pytest.raises(UsageError, match="no kernel 'sse9' runs here"):
        native.instruction_set()
