"""The mathematics: butterflies, Cayley transforms, products of factors, stages, and rounding once."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import BOFTConfig
from peft.tuners.boft import layer as peft_boft
from peft_cpu import enable_butterflies_on_cpu
from support import butterfly_matrix, properties
from torch import Tensor

from boft_export.linalg.butterfly import butterfly_index
from boft_export.linalg.cayley import cayley, skew
from boft_export.linalg.planner import GATHER_COST, STAGE_COST, TORCH_COSTS, plan_stages
from boft_export.linalg.rotation import Factor, Rotation, couple, fuse, widen
from boft_export.linalg.rounding import round_once

FLOAT64 = torch.float64
SEEDS = st.integers(0, 1000)


def close(x: Tensor, y: Tensor, tolerance: float = 1e-13) -> bool:
    return x.shape == y.shape and bool((x - y).abs().max() <= tolerance)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=FLOAT64, generator=torch.Generator().manual_seed(seed))


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=FLOAT64)


def matrix(factor: Factor) -> Tensor:
    """The dense matrix of a factor, by its definition."""
    dense = torch.zeros(factor.num_features, factor.num_features, dtype=FLOAT64)
    for block, index in zip(factor.blocks, factor.index, strict=True):
        dense[index[:, None], index] = block
    return dense


@st.composite
def butterflies(draw: st.DrawFn) -> tuple[int, int, int]:
    """m, D and b of a valid layer of about 200 features at most."""
    m = draw(st.integers(1, 5))
    b = draw(st.integers(1, 40)) if m == 1 else 2 * draw(st.integers(1, 100 // 2 ** (m - 1)))
    return m, 2 ** (m - 1) * draw(st.integers(1, max(1, 200 // (b * 2 ** (m - 1))))), b


def build(shape: tuple[int, int, int], seed: int = 0) -> tuple[Rotation, Tensor]:
    """A rotation with random blocks, and the dense matrix that it should be."""
    m, count, b = shape
    raw = randn(m, count, b, b, seed=seed) * 0.5
    factors = [Factor(cayley(skew(raw[i])), butterfly_index(i, count, b)) for i in range(m)]
    return Rotation(tuple(factors)), butterfly_matrix(raw)


def random_factor(index: Tensor, seed: int = 0) -> Factor:
    count, size = index.shape
    return Factor(cayley(skew(randn(count, size, size, seed=seed))), index)


@st.composite
def partitions(draw: st.DrawFn, n: int | None = None) -> Tensor:
    """The index of a factor whose blocks may lie anywhere: in runs of some length, in any order."""
    n = n or draw(st.integers(1, 64))
    size = draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
    run = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
    runs = torch.tensor(draw(st.permutations(range(n // run))))
    return torch.arange(n).view(-1, run)[runs].view(-1, size)


# Butterflies


@properties
@given(butterflies(), SEEDS)
def test_every_form_of_a_rotation_is_the_same_matrix(shape, seed):
    rotation, expected = build(shape, seed)
    one_by_one = eye(rotation.num_features)
    for factor in rotation.factors:
        one_by_one = matrix(factor) @ one_by_one
    assert close(one_by_one, expected)
    assert close(rotation.dense(), expected)
    for smallest in (1, 16):
        assert close(rotation.fused(smallest).dense(), expected)
    assert close(matrix(rotation.groups()), expected)


@properties
@given(butterflies(), st.integers(0, 4), st.sampled_from([None, 1, 16]))
def test_rows_and_columns_are_products_with_the_dense_matrix(shape, rows, smallest):
    rotation, dense = build(shape)
    if smallest is not None:
        rotation = rotation.fused(smallest)
    x = randn(rows, rotation.num_features)
    kept = x.clone()
    assert torch.allclose(rotation.rotate_columns(x), x @ dense.T, rtol=0, atol=1e-13)
    for columns in (x.T, x.T.contiguous()):
        assert torch.allclose(rotation.rotate_rows(columns), dense @ x.T, rtol=0, atol=1e-13)
    assert torch.equal(x, kept)


@properties
@given(butterflies(), SEEDS)
def test_rotations_are_orthogonal_with_determinant_one(shape, seed):
    rotation, _ = build(shape, seed)
    dense = rotation.dense()
    assert rotation.residual() < 1e-13
    assert close(dense.T @ dense, eye(len(dense)))
    assert torch.linalg.det(dense).item() == pytest.approx(1, abs=1e-11)


def test_the_residual_shows_what_is_not_orthogonal():
    rotation, _ = build((2, 4, 4))
    rotation.factors[1].blocks[2] *= 1.5
    assert rotation.residual() == pytest.approx(1.25)


@properties
@given(butterflies(), st.data())
def test_factors_couple_contiguous_groups_and_may_be_restricted_to_them(shape, data):
    m, _, b = shape
    rotation, dense = build(shape)
    n = rotation.num_features
    group = b * 2 ** (m - 1)
    assert torch.equal(couple(rotation.factors), torch.arange(n).view(-1, group))
    for i, j in combinations(range(m + 1), 2):
        assert couple(rotation.factors[i:j]).shape[1] == b * 2 ** (j - i - 1)
    start = data.draw(st.integers(0, n // group - 1)) * group
    stop = data.draw(st.integers(start // group + 1, n // group)) * group
    for form in (rotation, rotation.fused()):
        assert close(form.restrict(start, stop).dense(), dense[start:stop, start:stop])


@properties
@given(butterflies())
def test_the_butterfly_is_that_of_peft(shape):
    m, count, b = shape
    for i in range(m):
        # P[r, perm[r]] = 1 in P @ blockdiag @ P^T, so feature r is row perm[r] of the block diagonal.
        perm = peft_boft.BOFTLayer.block_butterfly_perm(None, count * b, count // 2**i, b // 2, m - 1)
        assert torch.equal(butterfly_index(i, count, b), torch.argsort(perm).view(count, b))


@pytest.mark.parametrize("shape", [(1, 5, 3), (2, 2, 6), (3, 8, 4), (4, 8, 2)])
def test_the_rotation_is_what_a_layer_of_peft_computes(shape):
    m, count, b = shape
    enable_butterflies_on_cpu()
    config = BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, init_weights=False)
    layer = peft_boft.Linear(torch.nn.Linear(count * b, 3), "default", config).double()
    raw = layer.boft_R["default"].detach()
    rotation = Rotation(tuple(Factor(cayley(skew(raw[i])), butterfly_index(i, count, b)) for i in range(m)))
    assert close(rotation.dense(), layer.get_delta_weight("default")[0].detach())
    assert close(butterfly_matrix(raw), rotation.dense())


@pytest.mark.parametrize("impossible", [(1, 3, 4), (1, 2, 3), (2, 2, 4), (3, 12, 2)])
def test_there_are_no_other_butterflies(impossible):
    with pytest.raises(ValueError, match="no butterfly factor"):
        butterfly_index(*impossible)


# Factors over any partition of the features


@properties
@given(partitions(), st.integers(1, 3))
def test_a_factor_is_the_matrix_of_its_definition(index, rows):
    factor = random_factor(index)
    x = randn(rows, index.numel())
    assert close(factor.rotate_columns(x), x @ matrix(factor).T)
    assert close(factor.rotate_rows(x.T), matrix(factor) @ x.T)


@pytest.mark.parametrize(
    "index",
    [
        [[0, 2, 4, 6], [1, 3, 5, 7]],  # interleaved
        [[4, 5, 6, 7], [0, 1, 2, 3]],  # whole blocks swapped
        [[0, 1, 4, 5], [2, 3, 6, 7]],  # runs of two
        [[0, 1, 2, 3], [5, 4, 6, 7]],  # runs of two, but for one
        [[1, 2, 3, 4], [5, 6, 7, 0]],  # runs that begin between the aligned places
        [[0, 1, 2, 3], [6, 7, 4, 5]],  # a block of four neighbours, and one of two and two
        [[3, 2, 1, 0], [7, 6, 5, 4]],  # backwards
    ],
)
def test_features_are_gathered_in_runs_where_there_are_any(index):
    factor = random_factor(torch.tensor(index))
    x = randn(3, 8)
    assert close(factor.rotate_columns(x), x @ matrix(factor).T)
    assert close(factor.rotate_rows(x.T), matrix(factor) @ x.T)


@pytest.mark.parametrize(("count", "size", "wide"), [(8, 4, 16), (6, 6, 18), (5, 4, 4), (3, 2, 2), (2, 16, 16)])
def test_small_blocks_are_laid_side_by_side_where_they_fill_larger_ones(count, size, wide):
    factor = random_factor(torch.randperm(count * size, generator=torch.Generator().manual_seed(0)).view(count, size))
    widened = widen(factor, 16)
    assert widened.block_size == wide
    assert torch.equal(matrix(widened), matrix(factor))


@properties
@given(butterflies(), SEEDS)
def test_fusing_does_not_need_groups_of_neighbours(shape, seed):
    rotation, dense = build(shape)
    place = torch.randperm(rotation.num_features, generator=torch.Generator().manual_seed(seed))
    moved = Rotation(tuple(Factor(f.blocks, place[f.index]) for f in rotation.factors))
    expected = torch.empty_like(dense)
    expected[place[:, None], place] = dense
    x = randn(2, len(dense))
    for form in (moved, moved.fused(), moved.fused(16), Rotation((moved.groups(),))):
        assert close(form.rotate_columns(x), x @ expected.T)
        assert close(form.rotate_rows(x.T), expected @ x.T)


@properties
@given(st.data(), st.sampled_from([6, 12, 16]))
def test_groups_are_the_connected_features(data, n):
    factors = [random_factor(data.draw(partitions(n))) for _ in range(data.draw(st.integers(1, 3)))]
    groups = {frozenset([i]) for i in range(n)}
    for block in (set(row) for f in factors for row in f.index.tolist()):
        touched = {g for g in groups if g & block}
        groups = groups - touched | {frozenset().union(*touched)}
    if len({len(g) for g in groups}) > 1:
        with pytest.raises(ValueError, match="different sizes"):
            couple(factors)
        return
    found = couple(factors)
    assert found.tolist() == sorted(sorted(g) for g in groups)
    product = eye(n)
    for factor in factors:
        product = matrix(factor) @ product
    assert close(matrix(fuse(factors)), product)


def test_groups_of_different_sizes_are_refused():
    pairs = random_factor(torch.tensor([[0, 1], [2, 3], [4, 5]]))
    crossed = random_factor(torch.tensor([[1, 2], [0, 3], [4, 5]]))
    with pytest.raises(ValueError, match="different sizes"):
        couple([pairs, crossed])


def test_a_rotation_moves_to_another_dtype():
    rotation, dense = build((2, 4, 4))
    narrow = rotation.to("cpu", torch.float32)
    assert narrow.dense().dtype is torch.float32
    assert close(narrow.dense().double(), dense, 1e-6)
    assert rotation.dense().dtype is FLOAT64


# Cayley


@properties
@given(st.integers(1, 12), SEEDS)
def test_the_cayley_transform(b, seed):
    a = randn(3, 2, b, b, seed=seed)
    s = skew(a)
    q = cayley(s)
    symmetric = randn(b, b, seed=seed + 1)
    assert torch.equal(s, -s.mT)
    assert torch.equal(skew(s), s)
    assert close(q, (eye(b) - s) @ torch.linalg.inv(eye(b) + s), 1e-12)
    assert close(cayley(q), s, 1e-9), "its own inverse"
    assert close(cayley(-s), q.mT)
    assert close(cayley(skew(a + symmetric + symmetric.T)), q, 1e-12)
    assert close(cayley(torch.zeros(b, b, dtype=FLOAT64)), eye(b), 0)


@pytest.mark.parametrize("norm", [1e-8, 1.0, 1e3, 1e6])
def test_the_cayley_transform_is_orthogonal_however_large_its_argument(norm):
    s = skew(randn(4, 32, 32))
    s = s * (norm / torch.linalg.matrix_norm(s, ord=2)[:, None, None])
    q = cayley(s)
    assert close(q.mT @ q, eye(32).expand(4, 32, 32), 1e-12 * max(1.0, norm))
    assert torch.allclose(torch.linalg.det(q), torch.ones(4, dtype=FLOAT64))


# Stages


def plan_cost(runs: list[tuple[int, int]], size: dict[tuple[int, int], int]) -> float:
    return sum(TORCH_COSTS.of(size[run]) + (GATHER_COST if run[0] else 0) for run in runs)


@properties
@given(st.integers(1, 7), st.data())
def test_the_plan_is_the_cheapest_of_all(m, data):
    pairs = list(combinations(range(m + 1), 2))
    size = data.draw(
        st.one_of(
            st.sampled_from([2, 6, 8, 32, 128]).map(lambda b: {(i, j): b * 2 ** (j - i - 1) for i, j in pairs}),
            st.lists(st.integers(1, 2048), min_size=len(pairs), max_size=len(pairs)).map(
                lambda sizes: dict(zip(pairs, sizes, strict=True))
            ),
        )
    )
    runs = plan_stages(m, lambda i, j: size[i, j])
    every = [list(pairwise([0, *cuts, m])) for count in range(m) for cuts in combinations(range(1, m), count)]
    assert runs in every, "runs cover the factors in order"
    assert plan_cost(runs, size) == pytest.approx(min(plan_cost(r, size) for r in every))


def test_the_cost_of_a_stage_passes_through_what_was_measured():
    for (low, cost), (high, next_cost) in pairwise(STAGE_COST.items()):
        assert TORCH_COSTS.of(low) == pytest.approx(cost)
        assert cost < TORCH_COSTS.of((low + high) // 2) < next_cost
    largest = max(STAGE_COST)
    assert TORCH_COSTS.of(2 * largest) > TORCH_COSTS.of(largest)


# Rounding

# Bits of precision, smallest normal exponent, and largest value.
FORMATS = {
    torch.bfloat16: (8, -126, (2 - 2**-7) * 2.0**127),
    torch.float16: (11, -14, 65504.0),
    torch.float32: (24, -126, (2 - 2**-23) * 2.0**127),
}
NARROW = [torch.bfloat16, torch.float16]


def nearest(x: float, dtype: torch.dtype) -> float:
    """Round ``x`` once, by rational arithmetic."""
    if not math.isfinite(x) or x == 0:
        return x
    precision, lowest, largest = FORMATS[dtype]
    exponent = max(math.frexp(x)[1] - 1, lowest)
    quantum = Fraction(2) ** (exponent - precision + 1)
    rounded = round(abs(Fraction(x)) / quantum) * quantum  # ties to even
    return math.copysign(math.inf if rounded > largest else float(rounded), x)


def same(x: Tensor, y: Tensor) -> bool:
    """Whether all elements are the same value, NaN and the signs of zeros included."""
    x, y = x.double(), y.double()
    return torch.equal(x.nan_to_num(7e77), y.nan_to_num(7e77)) and torch.equal(
        x.signbit() | x.isnan(), y.signbit() | y.isnan()
    )


@properties
@given(
    st.lists(
        st.one_of(
            st.floats(width=64),
            st.floats(min_value=-7e4, max_value=7e4),
            st.floats(min_value=-1e-4, max_value=1e-4),
            st.floats(min_value=-(2.0**-125), max_value=2.0**-125),
        ),
        min_size=1,
    ),
    st.sampled_from(list(FORMATS)),
)
def test_rounding_is_that_of_exact_arithmetic(values, dtype):
    expected = torch.tensor([nearest(v, dtype) for v in values], dtype=FLOAT64)
    assert same(round_once(torch.tensor(values, dtype=FLOAT64), dtype), expected)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e-39, 1e38])
def test_random_values_round_as_in_exact_arithmetic(dtype, scale):
    x = randn(2000) * scale
    assert same(round_once(x, dtype), torch.tensor([nearest(v, dtype) for v in x.tolist()], dtype=FLOAT64))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", NARROW)
def test_between_all_neighbours_the_nearest_is_taken(dtype, sign):
    """Between each two neighbouring values of the format, from zero to infinity: at the tie and close around it."""
    pattern = torch.arange(torch.tensor(math.inf, dtype=dtype).view(torch.int16).item() + 1, dtype=torch.int16)
    value = pattern.view(dtype) * sign
    low, high = value[:-1], value[1:]
    exact = value.double()
    # Past the largest value, rounding goes on as if there were a next one.
    exact[-1] = 2 * exact[-2] - exact[-3]
    tie = (exact[:-1] + exact[1:]) / 2
    toward_low, toward_high = torch.nextafter(tie, exact[:-1]), torch.nextafter(tie, exact[1:])
    even = torch.where(pattern[:-1] % 2 == 0, low, high)
    assert same(round_once(exact[:-1], dtype), low)
    assert same(round_once(tie, dtype), even)
    assert same(round_once(toward_low, dtype), low)
    assert same(round_once(toward_high, dtype), high)
    for fraction in (2.0**-10, 2.0**-20, 2.0**-28):
        gap = (exact[1:] - exact[:-1]) * fraction
        assert same(round_once(tie - gap, dtype), low)
        assert same(round_once(tie + gap, dtype), high)


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        (torch.bfloat16, 1 + 2**-8 + 2**-40, 1 + 2**-7),
        (torch.bfloat16, 1 + 3 * 2**-8 - 2**-40, 1 + 2**-7),
        (torch.float16, 1 + 2**-11 + 2**-40, 1 + 2**-10),
        (torch.float16, 65520 - 2**-20, 65504),
        (torch.bfloat16, 2.0**-126 - 2.0**-134 - 2.0**-170, 127 * 2.0**-133),  # to the largest subnormal
    ],
)
def test_what_torch_rounds_twice_is_rounded_once(dtype, value, expected):
    x = torch.tensor(value, dtype=FLOAT64)
    assert round_once(x, dtype).item() == expected
    assert x.to(dtype).item() != expected


@pytest.mark.parametrize("dtype", [*FORMATS, FLOAT64])
def test_special_values_stay_what_they_are(dtype):
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -1e-320, 1.5], dtype=FLOAT64)
    # A NaN that is one by its lowest bit alone.
    x = torch.cat([x, torch.tensor([0x7FF0000000000001], dtype=torch.int64).view(FLOAT64)])
    expected = [0.0, -0.0, math.inf, -math.inf, math.nan, -1e-320 if dtype is FLOAT64 else -0.0, 1.5, math.nan]
    assert same(round_once(x, dtype), torch.tensor(expected, dtype=FLOAT64))


@pytest.mark.parametrize("dtype", [*FORMATS, FLOAT64])
@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.T, lambda x: x[::2, 1], lambda x: x[0, 0], lambda x: x[:0]])
def test_any_shape_is_rounded_and_none_is_changed(dtype, make):
    x = make(randn(4, 6) * torch.tensor([1.0, 2.0**-130, 1.0, 1e-7, 1.0, 1e300], dtype=FLOAT64))
    kept = x.clone()
    rounded = round_once(x, dtype)
    assert rounded.dtype is dtype
    assert rounded.shape == x.shape
    assert torch.equal(x, kept)
    one_by_one = [round_once(v.clone(), dtype) for v in x.flatten()]
    assert torch.equal(rounded.flatten(), torch.stack(one_by_one) if one_by_one else rounded.flatten())


@pytest.mark.parametrize("dtype", NARROW)
def test_float32_is_rounded_once_by_its_cast(dtype):
    x = (randn(2000) * torch.logspace(-45, 38, 2000, dtype=FLOAT64)).float()
    expected = torch.tensor([nearest(v, dtype) for v in x.tolist()], dtype=FLOAT64)
    assert same(round_once(x, dtype), expected)


def test_large_blocks_are_right_whatever_was_done_to_the_threads() -> None:
    """In a process of its own: torch's batched LU is wrong once a number of threads was set."""
    code = """
import torch
from boft_export.linalg.batched_lu import inverse, log_determinant, solve
from boft_export.linalg.cayley import cayley, skew
torch.set_num_threads(1)
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
for n in (63, 64, 160, 300):
    eye = torch.eye(n, dtype=torch.float64)
    q = cayley(skew(torch.randn(2, 2, n, n, generator=generator, dtype=torch.float64) * 0.1))
    assert q.shape == (2, 2, n, n)
    assert (q.mT @ q - eye).abs().max() < 1e-12
    assert (inverse(q) - q.mT).abs().max() < 1e-12
    assert (solve(q, q @ q) - q).abs().max() < 1e-12
    sign, log = log_determinant(q)
    assert sign.shape == (2, 2) and (sign == 1).all() and log.abs().max() < 1e-10
"""
    subprocess.run([sys.executable, "-c", code], check=True)
