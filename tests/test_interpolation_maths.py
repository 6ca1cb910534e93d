"""The mathematics of interpolation: powers of rotations against exact oracles, the curves, and the powers of scales."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp
from support import butterfly_matrix, properties
from torch import Tensor

from boft_export.linalg.butterfly import butterfly_index
from boft_export.linalg.cayley import cayley, skew
from boft_export.linalg.interpolation import (
    CURVES,
    cayley_scaled,
    factorwise,
    geodesic,
    interpolate_rotation,
    interpolate_scale,
    linear,
    path_angles,
    truncate,
)
from boft_export.linalg.path import InterpolationPath
from boft_export.linalg.rotation import Factor, Rotation
from boft_export.linalg.spectrum import Spectrum

FLOAT64 = torch.float64
EPS = torch.finfo(FLOAT64).eps
SEEDS = st.integers(0, 1000)
# Standard deviations of the raw blocks, from what turns by a thousandth to what comes near to half a turn.
STDS = st.floats(-3, 0.477).map(lambda e: 10**e)
ALPHAS = st.floats(-2, 2)
FRACTIONS = st.floats(0, 1)
CurveFunction = Callable[[Rotation, float], Rotation]
ROTATING = [geodesic, factorwise, cayley_scaled, truncate]
curves = pytest.mark.parametrize("curve", ROTATING, ids=lambda f: f.__name__)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads only wait for each other in matrices as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def apart(x: Tensor, y: Tensor) -> float:
    assert x.shape == y.shape
    return float((x - y).abs().max())


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=FLOAT64, generator=torch.Generator().manual_seed(seed))


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=FLOAT64)


def residual(r: Tensor) -> float:
    return apart(r.mT @ r, eye(r.shape[-1]).expand_as(r))


def distance(p: Tensor, q: Tensor) -> Tensor:
    """The norm of log(P^T Q), by the eigenvalues of P^T Q."""
    return torch.linalg.eigvals(p.mT @ q).angle().norm(dim=-1)


@st.composite
def butterflies(draw: st.DrawFn, most: int = 32) -> tuple[int, int, int]:
    """m, D and b of a valid layer of about ``most`` features at most."""
    m = draw(st.integers(1, 4))
    b = draw(st.integers(1, most)) if m == 1 else 2 * draw(st.integers(1, max(1, most // 2**m)))
    return m, 2 ** (m - 1) * draw(st.integers(1, max(1, most // (b * 2 ** (m - 1))))), b


def raw_blocks(shape: tuple[int, int, int], std: float = 0.5, seed: int = 0) -> Tensor:
    m, count, b = shape
    return randn(m, count, b, b, seed=seed) * std


def build(raw: Tensor, *, generators: bool = True) -> Rotation:
    """The butterfly of raw blocks (m, D, b, b), with the generators of its factors or without."""
    m, count, b, _ = raw.shape
    s = skew(raw)
    return Rotation(
        tuple(Factor(cayley(s[i]), butterfly_index(i, count, b), s[i] if generators else None) for i in range(m))
    )


def factor_of(*blocks: Tensor) -> Factor:
    """The factor of some blocks alone, without a generator, on neighbouring features."""
    stacked = torch.stack(blocks)
    return Factor(stacked, torch.arange(stacked.shape[0] * stacked.shape[1]).view(stacked.shape[:2]))


def generated(s: Tensor) -> Factor:
    """The factor of one block with the generator ``s``."""
    return Factor(cayley(s)[None], torch.arange(len(s))[None], s[None])


def basis(n: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix."""
    return torch.linalg.qr(randn(n, n, seed=seed)).Q


def turns(angles: list[float], n: int, seed: int | None = None) -> Tensor:
    """The rotation of the planes (0, 1), (2, 3), ... by ``angles``, in a random basis where there is a ``seed``."""
    q = eye(n)
    for i, angle in enumerate(angles):
        c, s = math.cos(angle), math.sin(angle)
        q[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor([[c, -s], [s, c]], dtype=FLOAT64)
    return q if seed is None else basis(n, seed) @ q @ basis(n, seed).T


def generator(ws: list[float], n: int, seed: int | None = None) -> Tensor:
    """An exactly skew S whose planes turn by 2 atan(w), as ``turns`` counts them."""
    s = torch.zeros(n, n, dtype=FLOAT64)
    for i, w in enumerate(ws):
        s[2 * i, 2 * i + 1], s[2 * i + 1, 2 * i] = w, -w
    return s if seed is None else skew(basis(n, seed) @ s @ basis(n, seed).T)


# Groups and orthogonality


@properties
@given(butterflies(), STDS, SEEDS, st.booleans(), ALPHAS, ALPHAS)
def test_the_points_of_a_geodesic_are_a_group(shape, std, seed, generators, a, b):
    rotation = build(raw_blocks(shape, std, seed), generators=generators)
    for curve in [geodesic, factorwise] if shape[0] == 1 else [geodesic]:
        at_a, at_b = curve(rotation, a).dense(), curve(rotation, b).dense()
        assert apart(at_a @ at_b, curve(rotation, a + b).dense()) < 1e-12
        assert apart(at_a.T, curve(rotation, -a).dense()) < 1e-12
        assert apart(torch.linalg.inv(at_a), curve(rotation, -a).dense()) < 1e-12
        assert apart(curve(rotation, 1.0).dense(), rotation.dense()) < 1e-12


@properties
@given(butterflies(), STDS, SEEDS, st.booleans(), ALPHAS, ALPHAS)
def test_the_powers_of_each_factor_are_a_group(shape, std, seed, generators, a, b):
    for factor in build(raw_blocks(shape, std, seed), generators=generators).factors:
        at_a, at_b = factor.power(a).blocks, factor.power(b).blocks
        assert torch.equal(factor.power(a).index, factor.index)
        assert apart(at_a @ at_b, factor.power(a + b).blocks) < 1e-12
        assert apart(at_a.mT, factor.power(-a).blocks) < 1e-12
        assert apart(torch.linalg.inv(at_a), factor.power(-a).blocks) < 1e-12
        assert apart(factor.power(1.0).blocks, factor.blocks) < 1e-12


@curves
@properties
@given(butterflies(), STDS, SEEDS, st.booleans(), ALPHAS)
def test_curves_stay_among_the_rotations(curve, shape, std, seed, generators, alpha):
    rotation = build(raw_blocks(shape, std, seed), generators=generators)
    n = rotation.num_features
    point = curve(rotation, abs(alpha) / 2 if curve is truncate else alpha)
    assert residual(point.dense()) <= 1e-13 * n
    assert point.residual() <= 1e-13 * n
    sign, log = torch.linalg.slogdet(point.dense())
    assert sign == 1
    assert abs(log) <= 1e-13 * n


@properties
@given(butterflies(), STDS, SEEDS, ALPHAS)
def test_a_straight_line_is_the_mean_of_its_ends(shape, std, seed, alpha):
    rotation = build(raw_blocks(shape, std, seed))
    expected = (1 - alpha) * eye(rotation.num_features) + alpha * rotation.dense()
    assert apart(linear(rotation, alpha).dense(), expected) < 1e-13


@pytest.mark.parametrize("angle", [1e-3, 0.5, 2.0, math.pi])
@pytest.mark.parametrize("alpha", [-0.5, 0.25, 0.5, 1.5])
def test_a_straight_line_leaves_the_rotations(angle, alpha):
    line = linear(Rotation((factor_of(turns([angle], 3, seed=1)),)), alpha)
    lost = 2 * alpha * (1 - alpha) * (1 - math.cos(angle))
    lengths = torch.linalg.svdvals(line.dense()) ** 2
    expected = torch.tensor([1.0, 1 - lost, 1 - lost], dtype=FLOAT64)
    assert torch.allclose(lengths.sort().values, expected.sort().values, rtol=0, atol=1e-14)
    assert residual(line.dense()) > abs(lost) / 4 > 1e-8


# Distance and length


@properties
@given(butterflies(32), STDS, SEEDS, ALPHAS, st.floats(-0.99, 0.99))
def test_the_speed_of_a_geodesic_is_constant(shape, std, seed, a, fraction):
    rotation = build(raw_blocks(shape, std, seed))
    n = rotation.num_features
    # As far as the widest plane doesn't come back on its other side.
    b = a + fraction * math.pi / max(float(rotation.angles().abs().max()), 0.1)
    angles, size = rotation.angles(), rotation.angles().norm()
    assert angles.shape == rotation.groups().index.shape
    assert angles.abs().max() <= math.pi
    assert angles.sum(dim=1).abs().max() < 1e-13 * n, "in pairs of opposite sign"
    assert abs(size - distance(eye(n), rotation.dense())) < 1e-12 * n
    between = distance(geodesic(rotation, a).dense(), geodesic(rotation, b).dense())
    assert abs(between - abs(a - b) * size) < 1e-12 * n


def length(rotation: Rotation, path: str, steps: int = 18) -> float:
    """The length of a curve, as the sum of the distances between its points."""
    points = torch.stack([interpolate_rotation(rotation, i / steps, path).dense() for i in range(steps + 1)])
    return float(distance(points[:-1], points[1:]).sum())


@properties
@given(butterflies(12), STDS, SEEDS)
def test_no_curve_is_shorter_than_the_geodesic(shape, std, seed):
    rotation = build(raw_blocks(shape, std, seed))
    n = rotation.num_features
    shortest = length(rotation, "geodesic")
    assert abs(shortest - distance(eye(n), rotation.dense())) < 1e-11 * n
    for path in ("factorwise", "cayley", "truncate"):
        assert length(rotation, path) >= shortest - 1e-11 * n
        if shape[0] == 1 and path != "cayley":
            assert abs(length(rotation, path) - shortest) < 1e-11 * n


@pytest.mark.parametrize("path", ["factorwise", "cayley", "truncate"])
def test_the_ways_around_are_longer(path):
    rotation = build(raw_blocks((3, 4, 4)))
    assert length(rotation, path) > 1.05 * length(rotation, "geodesic")


@properties
@given(butterflies(24), STDS, SEEDS, FRACTIONS)
def test_the_angles_on_a_path_are_those_of_its_points(shape, std, seed, alpha):
    rotation = build(raw_blocks(shape, std, seed))
    for path in InterpolationPath:
        found = path_angles(rotation, alpha, path)
        assert found.abs().max() <= math.pi
        point = interpolate_rotation(rotation, alpha, path).dense()
        # An eigenvalue of the point has the argument of that of its nearest rotation; near 0 it has none.
        values = torch.linalg.eigvals(point)
        if values.abs().min() > 1e-2:
            assert apart(found.abs().flatten().sort().values, values.angle().abs().sort().values) < 1e-10


def test_the_angles_of_a_geodesic_come_back_on_the_other_side():
    rotation = Rotation((factor_of(turns([2.0, 0.5], 4, seed=1)),))
    found = path_angles(rotation, 2.0, "geodesic").flatten().sort().values
    expected = torch.tensor([4.0 - 2 * math.pi, -1.0, 1.0, 2 * math.pi - 4.0], dtype=FLOAT64)
    assert apart(found, expected) < 1e-14


# Oracles in float64


@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 3, 4), (2, 2, 4), (2, 2, 2), (3, 4, 4)])
@pytest.mark.parametrize("alpha", [0.3, 0.5, -0.8, 1.6])
@pytest.mark.parametrize("generators", [False, True])
def test_a_geodesic_is_what_matrix_functions_say(shape, alpha, generators):
    rotation = build(raw_blocks(shape, 0.3, seed=2), generators=generators)
    r = rotation.dense().numpy()
    point = geodesic(rotation, alpha).dense()
    assert apart(point, torch.from_numpy(scipy.linalg.expm(alpha * scipy.linalg.logm(r)))) < 1e-12
    assert apart(point, torch.from_numpy(scipy.linalg.fractional_matrix_power(r, alpha))) < 1e-12


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("alpha", [0.3, 0.5, -0.8, 1.6])
@pytest.mark.parametrize("generators", [False, True])
def test_the_power_of_a_factor_is_what_matrix_functions_say(size, alpha, generators):
    s = skew(randn(3, size, size, seed=3)) * 0.7
    factor = Factor(cayley(s), torch.arange(3 * size).view(size, 3).T, s if generators else None)
    for block, power in zip(factor.blocks, factor.power(alpha).blocks, strict=True):
        expected = scipy.linalg.expm(alpha * scipy.linalg.logm(block.numpy()))
        assert apart(power, torch.from_numpy(expected)) < 1e-12
        expected = scipy.linalg.fractional_matrix_power(block.numpy(), alpha)
        assert apart(power, torch.from_numpy(expected)) < 1e-12


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 2, 4), (3, 4, 2), (3, 4, 4)])
@pytest.mark.parametrize("alpha", [0.3, -0.8, 1.6])
def test_factorwise_is_the_product_of_the_powers(shape, alpha):
    rotation = build(raw_blocks(shape, 0.3, seed=4))
    product = eye(rotation.num_features)
    for factor in rotation.factors:
        dense = eye(rotation.num_features)
        for block, index in zip(factor.blocks, factor.index, strict=True):
            log = scipy.linalg.logm(block.numpy())
            dense[index[:, None], index] = torch.from_numpy(scipy.linalg.expm(alpha * log))
        product = dense @ product
    assert apart(factorwise(rotation, alpha).dense(), product) < 1e-12


# Oracles beyond float64


def change_error(s: Tensor, alpha: float, power: Tensor) -> tuple[Tensor, float]:
    """How far ``power`` - I is from the exact Q^alpha - I, and the largest entry of that change.

    Q is (I - S)(I + S)^-1 of exactly the given S: -iS = V diag(w) V^H is taken apart in 50 digits.
    """
    n = len(s)
    with mp.workdps(50):
        hermitian = mp.matrix(n, n)
        for i in range(n):
            for j in range(n):
                hermitian[i, j] = mp.mpc(0, -mp.mpf(s[i, j].item()))
        ws, v = mp.eighe(hermitian)
        factor = [mp.expj(-2 * mp.mpf(alpha) * mp.atan(w)) - 1 for w in ws]
        error = torch.empty_like(s)
        largest = mp.mpf(0)
        for i in range(n):
            for j in range(n):
                exact = mp.re(mp.fsum(v[i, k] * factor[k] * mp.conj(v[j, k]) for k in range(n)))
                error[i, j] = float(mp.mpf(power[i, j].item()) - (i == j) - exact)
                largest = max(largest, abs(exact))
        return error, float(largest)


nasty_alphas = pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0, -1.7])


def test_the_oracle_knows_a_plane_by_heart():
    for w, alpha in ((0.5, 0.3), (1e10, -1.7), (1e-9, 0.5)):
        angle = 2 * mpmath.atan(mpmath.mpf(w)) * alpha
        c, s = float(mpmath.cos(angle)), float(mpmath.sin(angle))
        error, largest = change_error(generator([w], 2), alpha, torch.tensor([[c, -s], [s, c]], dtype=FLOAT64))
        assert error.abs().max() < 1e-16
        assert largest == pytest.approx(max(abs(c - 1), abs(s)))


# Within 1e-8 of pi from w = 2e8 on, where the angle is pi - 2 / w.
FAR = [2e8, 1e10, 1e14]


@nasty_alphas
@pytest.mark.parametrize("w", FAR)
def test_a_plane_near_half_a_turn_is_exact(w, alpha):
    s = generator([w], 2)
    power = generated(s).power(alpha).blocks[0]
    assert change_error(s, alpha, power)[0].abs().max() < 1e-13
    assert residual(power) < 1e-13
    # The same beside planes that have nothing to do with it: a block of several scales, but not a dense one.
    s = generator([w, 0.5, 0.7], 7)
    assert change_error(s, alpha, generated(s).power(alpha).blocks[0])[0].abs().max() < 1e-13


@nasty_alphas
@pytest.mark.parametrize("w", [0.1, 0.5, 1.0, 3.0, 3e5, 3e6, *FAR])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_planes_of_equal_angles_are_exact(size, w, alpha):
    s = generator([w] * (size // 2), size, seed=4)
    power = generated(s).power(alpha).blocks[0]
    assert change_error(s, alpha, power)[0].abs().max() < 1e-13
    assert residual(power) < 1e-13


@nasty_alphas
@pytest.mark.parametrize("scale", [0.1, 1e9])
def test_planes_of_exactly_equal_angles_are_exact(scale, alpha):
    # The square of this is -25 to the bit.
    s = scale * torch.tensor([[0, -3, -4, 0], [3, 0, 0, -4], [4, 0, 0, 3], [0, 4, -3, 0]], dtype=FLOAT64)
    power = generated(s).power(alpha).blocks[0]
    assert change_error(s, alpha, power)[0].abs().max() < 1e-13
    assert residual(power) < 1e-13


@nasty_alphas
@pytest.mark.parametrize("size", [3, 5, 8])
@pytest.mark.parametrize("std", [1e-3, 0.1, 1.0, 3.0])
def test_generic_blocks_are_exact(std, size, alpha):
    s = skew(randn(size, size, seed=5) * std)
    assert change_error(s, alpha, generated(s).power(alpha).blocks[0])[0].abs().max() < 1e-13


@nasty_alphas
@pytest.mark.parametrize("ws", [[1e8], [1e8, 1e8, 1e8], [1e8, 0.5, 0.7], [1e10], [1e10, 0.5, 0.7]], ids=str)
def test_scales_mixed_in_one_block_cost_the_digits_between_them(ws, alpha):
    # Rounding S = 1e8 at all, be it in the last place, turns what lies in the planes of 0.5, or doesn't turn in a block
    # of odd size, by eps |S|. So that is what a decomposition of such a block can promise.
    s = generator(ws, 7, seed=6)
    error, _ = change_error(s, alpha, generated(s).power(alpha).blocks[0])
    assert error.abs().max() < 8 * EPS * max(ws)


@nasty_alphas
@pytest.mark.parametrize("ws", [[1e8], [1e8, 0.5, 0.7]], ids=str)
def test_scales_mixed_in_one_block_cost_no_orthogonality(ws, alpha):
    assert residual(generated(generator(ws, 7, seed=6)).power(alpha).blocks[0]) < 1e-13 * 7


@pytest.mark.parametrize("ws", [[1e10], [1e10, 0.5, 0.7], [1e14]], ids=str)
def test_vast_scales_mixed_in_one_block_cost_no_orthogonality(ws):
    assert residual(generated(generator(ws, 7, seed=6)).power(-1.7).blocks[0]) < 1e-13 * 7


# Within 1e-8 of 0 up to w = 5e-9, where the angle is 2 w.
NEAR = [5e-9, 1e-9, 1e-12, 1e-100]


@nasty_alphas
@pytest.mark.parametrize("w", NEAR)
@pytest.mark.parametrize("size", [2, 7, 8])
def test_a_small_change_keeps_its_relative_precision(size, w, alpha):
    s = generator([w, w / 3, 0.0, w][: size // 2], size, seed=7)
    error, largest = change_error(s, alpha, generated(s).power(alpha).blocks[0])
    # On the diagonal, 1 hides what is below its last place; the change is small against itself there.
    assert error.diagonal().abs().max() < EPS / 2
    assert error.fill_diagonal_(0).abs().max() < 1e-13 * largest


@nasty_alphas
@pytest.mark.parametrize("w", NEAR[:2])
def test_a_small_change_is_right_to_seven_digits_as_a_whole(w, alpha):
    s = generator([w] * 4, 8, seed=8)
    for factor in (generated(s), factor_of(cayley(s))):
        error, largest = change_error(s, alpha, factor.power(alpha).blocks[0])
        assert error.abs().max() < 1e-7 * largest


@nasty_alphas
@pytest.mark.parametrize("generators", [False, True])
def test_blocks_that_do_not_turn_stay_the_identity_to_the_bit(generators, alpha):
    s = torch.zeros(3, 5, 5, dtype=FLOAT64)
    s[1] = generator([0.5, 1e9], 5)
    factor = Factor(cayley(s), torch.arange(15).view(3, 5), s if generators else None)
    power = factor.power(alpha).blocks
    assert torch.equal(power[[0, 2]], eye(5).expand(2, 5, 5))
    assert apart(power[1], eye(5)) > 0.1
    assert torch.equal(factor.scaled(alpha).blocks[[0, 2]], eye(5).expand(2, 5, 5))


@curves
@pytest.mark.parametrize("generators", [False, True])
def test_blocks_of_one_feature_do_not_turn(curve, generators):
    rotation = build(raw_blocks((1, 6, 1), 3.0), generators=generators)
    assert torch.equal(curve(rotation, 0.3).dense(), eye(6))
    assert torch.equal(rotation.angles(), torch.zeros(6, 1, dtype=FLOAT64))


# Rotations without a generator, as products of factors are


def power_holds(r: Tensor) -> None:
    """Hold what any real powers of a rotation do, where which planes turn by pi is free."""
    n = r.shape[-1]
    factor = factor_of(*r.view(-1, n, n))
    bound = 1e-13 * n

    def power(alpha: float) -> Tensor:
        found = factor.power(alpha).blocks
        assert found.dtype is FLOAT64
        assert residual(found) < bound
        assert (torch.linalg.det(found) > 0).all()
        return found

    assert torch.equal(power(0.0), eye(n).expand_as(factor.blocks))
    assert apart(power(1.0), factor.blocks) < bound
    assert apart(power(0.5) @ power(0.5), factor.blocks) < bound
    assert apart(power(0.25) @ power(0.75), factor.blocks) < bound
    assert apart(power(0.3) @ power(-1.7), power(-1.4)) < bound
    assert apart(power(1.3).mT, power(-1.3)) < bound
    # No way is longer than half a turn in each plane.
    assert factor.spectrum.angles.abs().max() <= math.pi
    assert apart(distance(eye(n), power(0.5)), factor.spectrum.angles.norm(dim=1) / 2) < bound


def diagonal(opposite: int, n: int, seed: int | None = None) -> Tensor:
    """The matrix with eigenvalues -1 and 1, in a random basis where there is a ``seed``."""
    d = torch.ones(n, dtype=FLOAT64)
    d[:opposite] = -1
    return torch.diag(d) if seed is None else basis(n, seed) @ torch.diag(d) @ basis(n, seed).T


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8, 33])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_half_turns_have_powers(n, seed):
    for opposite in {2, n // 2 // 2 * 2, n // 2 * 2} - {0}:
        power_holds(diagonal(opposite, n, seed))


@pytest.mark.parametrize("delta", [1e-8, 1e-12, 1e-15, 0.0])
@pytest.mark.parametrize(
    "rest", [(2, []), (3, []), (4, ["near"]), (8, ["near"] * 3), (7, [2.0, 1e-9]), (9, ["near", 3.0, 0.1])], ids=str
)
def test_rotations_near_half_turns_have_powers(rest, delta):
    n, others = rest
    near = math.pi - delta
    angles = [near, *(near if angle == "near" else angle for angle in others)]
    target = turns(angles, n, seed=3)
    power_holds(target)
    # The product of two harmless rotations.
    first = cayley(skew(randn(n, n, seed=9)))
    power_holds((target @ first.T) @ first)
    index = torch.arange(n)[None]
    product = Rotation((Factor(first[None], index), Factor((target @ first.T)[None], index)))
    half = geodesic(product, 0.5).dense()
    assert apart(half @ half, target) < 1e-13 * n
    assert float(product.angles().abs().max()) == pytest.approx(near, abs=1e-13 * n)


@nasty_alphas
@pytest.mark.parametrize("delta", [1e-2, 1e-3, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12])
@pytest.mark.parametrize("others", [[], [0.5], [2.0, 1e-9]], ids=str)
def test_one_plane_near_half_a_turn_keeps_its_side(others, delta, alpha):
    angles = [math.pi - delta, *others]
    n = 2 * len(angles) + 1
    power = factor_of(turns(angles, n, seed=3)).power(alpha).blocks[0]
    assert apart(power, turns([alpha * angle for angle in angles], n, seed=3)) < 3e-14


@pytest.mark.parametrize("delta", [1e-8, 1e-12, 1e-15, 0.0])
def test_a_butterfly_may_come_near_half_a_turn(delta):
    # Its planes turn by the sum and by the difference of the angles of its factors.
    angle = (math.pi - delta) / 2
    block = turns([angle], 2)
    rotation = Rotation(tuple(Factor(torch.stack([block, block]), butterfly_index(i, 2, 2)) for i in range(2)))
    found = rotation.angles().abs().flatten().sort().values
    assert apart(found, torch.tensor([0.0, 0.0, math.pi - delta, math.pi - delta], dtype=FLOAT64)) < 1e-14
    half = geodesic(rotation, 0.5).dense()
    assert residual(half) < 4e-13
    assert apart(half @ half, rotation.dense()) < 4e-13
    if delta >= 1e-12:
        # Its factors commute, so that the product of their powers is the power of their product.
        for alpha in (0.3, -1.7):
            assert apart(geodesic(rotation, alpha).dense(), factorwise(rotation, alpha).dense()) < 1e-12


@pytest.mark.parametrize("n", [1, 3, 5, 7, 15])
def test_cyclic_permutations_of_odd_length_have_powers(n):
    r = eye(n).roll(1, 0)
    power_holds(r)
    step = factor_of(r).power(1 / n).blocks[0]
    assert apart(torch.linalg.matrix_power(step, n), r) < 1e-13 * n
    expected = sorted(abs(math.remainder(2 * math.pi * k / n, 2 * math.pi)) for k in range(n))
    assert apart(factor_of(r).spectrum.angles[0].abs().sort().values, torch.tensor(expected, dtype=FLOAT64)) < 1e-13


@properties
@given(st.integers(1, 9).flatmap(lambda n: st.permutations(range(n))))
def test_permutations_have_powers_where_they_are_even(order):
    r = eye(len(order))[list(order)]
    if torch.linalg.det(r) > 0:
        power_holds(r)
    else:
        with pytest.raises(ValueError, match="reflection"):
            factor_of(r).power(0.5)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 0.5, 2.7, math.pi - 1e-9, math.pi])
def test_repeated_angles_have_powers(angle):
    power_holds(turns([angle] * 4, 9, seed=5))
    power_holds(turns([angle, 0.3, angle, 0.3], 8, seed=5))


@properties
@given(st.integers(2, 12), SEEDS, st.floats(-0.01, 0.01))
def test_powers_do_not_depend_on_how_the_rotation_is_taken_apart(n, seed, beside):
    # On both sides of the angle from which on another decomposition is used.
    angles = [math.acos(-0.9) + beside, *(randn(max(n // 2 - 1, 0), seed=seed) * 0.8).tolist()]
    power_holds(turns(angles, n, seed))
    for alpha in (0.3, -1.7):
        power = factor_of(turns(angles, n, seed)).power(alpha).blocks[0]
        assert apart(power, turns([alpha * angle for angle in angles], n, seed)) < 1e-12


def test_blocks_near_half_turns_and_harmless_ones_do_not_disturb_each_other():
    harmless = [cayley(skew(randn(6, 6, seed=i)) * 0.4) for i in range(3)]
    near = [turns([math.pi - 1e-9, 0.4, 2.0], 6, seed=i) for i in range(2)]
    blocks = [harmless[0], near[0], eye(6), -eye(6), harmless[1], diagonal(4, 6, 1), near[1], harmless[2]]
    power_holds(torch.stack(blocks))
    together = factor_of(*blocks)
    angles = together.spectrum.angles
    for i, block in enumerate(blocks):
        alone = factor_of(block)
        assert apart(angles[i].abs().sort().values, alone.spectrum.angles[0].abs().sort().values) < 1e-13
        if i not in {3, 5}:
            assert apart(together.power(0.3).blocks[i], alone.power(0.3).blocks[0]) < 1e-13
    assert torch.equal(together.power(0.3).blocks[2], eye(6))


@nasty_alphas
def test_vast_generators_and_harmless_ones_do_not_disturb_each_other(alpha):
    harmless = [skew(randn(6, 6, seed=i)) for i in range(2)]
    s = torch.stack([harmless[0], generator([1e10] * 3, 6, seed=1), 0 * eye(6), generator([-3e7] * 3, 6), harmless[1]])
    factor = Factor(cayley(s), torch.arange(30).view(5, 6), s)
    for one, power in zip(s, factor.power(alpha).blocks, strict=True):
        assert change_error(one, alpha, power)[0].abs().max() < 1e-13


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_a_reflection_has_no_real_powers(n, seed):
    for opposite in range(1, n + 1, 2):
        reflection = diagonal(opposite, n, seed)
        with pytest.raises(ValueError, match="reflection"):
            Spectrum.of_rotation(reflection[None])
        rotation = Rotation((factor_of(eye(n), reflection, diagonal(n // 2 * 2, n, seed)),))
        for curve in (geodesic, factorwise):
            with pytest.raises(ValueError, match="reflection"):
                curve(rotation, 0.5)
        with pytest.raises(ValueError, match="reflection"):
            rotation.angles()


def test_reflections_may_make_a_rotation():
    index = torch.arange(4)[None]
    rotation = Rotation(tuple(Factor(diagonal(1, 4, seed)[None], index) for seed in (1, 2)))
    half = geodesic(rotation, 0.5).dense()
    assert residual(half) < 4e-13
    assert apart(half @ half, rotation.dense()) < 4e-13
    with pytest.raises(ValueError, match="reflection"):
        factorwise(rotation, 0.5)


def test_a_spectrum_takes_its_rotation_apart():
    for s in (skew(randn(3, 6, 6, seed=1)), skew(randn(3, 7, 7, seed=1)) * 1e3):
        q = cayley(s)
        for spectrum in (Spectrum.of_generator(s), Spectrum.of_rotation(q)):
            vectors, values = spectrum.vectors, torch.polar(torch.ones_like(spectrum.angles), spectrum.angles)
            assert residual_of_unitary(vectors) < 1e-13
            assert ((vectors * values[:, None, :]) @ vectors.mH - q).abs().max() < 1e-11


def residual_of_unitary(v: Tensor) -> float:
    return float((v.mH @ v - torch.eye(v.shape[-1], dtype=v.dtype)).abs().max())


# The ends


@curves
@properties
@given(butterflies(), STDS, SEEDS, st.booleans())
def test_every_curve_begins_at_the_identity_to_the_bit(curve, shape, std, seed, generators):
    rotation = build(raw_blocks(shape, std, seed), generators=generators)
    for zero in (0, 0.0, -0.0):
        assert torch.equal(curve(rotation, zero).dense(), eye(rotation.num_features))


@pytest.mark.parametrize("curve", [geodesic, factorwise, truncate], ids=lambda f: f.__name__)
def test_curves_to_half_turns_begin_at_the_identity_too(curve):
    rotation = Rotation((factor_of(-eye(4), diagonal(2, 4, 1), turns([math.pi - 1e-12] * 2, 4, 1)),))
    assert torch.equal(curve(rotation, 0.0).dense(), eye(12))


@pytest.mark.parametrize("path", [*InterpolationPath, *(p.value for p in InterpolationPath)])
def test_every_path_ends_at_the_rotation_itself(path):
    rotation = build(raw_blocks((2, 4, 4)))
    assert interpolate_rotation(rotation, 1, path) is rotation
    assert interpolate_rotation(rotation, 1.0, path) is rotation
    # The curve of that name comes there.
    assert apart(CURVES[InterpolationPath(path)](rotation, 1.0).dense(), rotation.dense()) < 1e-13


def test_paths_go_by_their_names():
    rotation = build(raw_blocks((2, 4, 4)))
    named = {"geodesic": geodesic, "factorwise": factorwise, "cayley": cayley_scaled, "truncate": truncate}
    for path, curve in {**named, "linear": linear}.items():
        expected = curve(rotation, 0.3).dense()
        assert torch.equal(interpolate_rotation(rotation, 0.3, path).dense(), expected)
    assert torch.equal(interpolate_rotation(rotation, 0.3).dense(), geodesic(rotation, 0.3).dense())
    with pytest.raises(ValueError, match="shortcut"):
        interpolate_rotation(rotation, 1, "shortcut")


@properties
@given(st.integers(1, 24), st.integers(1, 3), STDS, SEEDS, st.booleans(), ALPHAS)
def test_of_one_factor_the_geodesic_is_the_power_of_the_factor(b, count, std, seed, generators, alpha):
    rotation = build(raw_blocks((1, count, b), std, seed), generators=generators)
    assert torch.equal(geodesic(rotation, alpha).dense(), factorwise(rotation, alpha).dense())
    assert geodesic(rotation, alpha).num_factors == 1


# Scaled generators


@properties
@given(butterflies(), STDS, SEEDS, ALPHAS)
def test_the_cayley_path_is_the_butterfly_of_scaled_weights(shape, std, seed, alpha):
    raw = raw_blocks(shape, std, seed)
    expected = butterfly_matrix(alpha * raw)
    assert apart(cayley_scaled(build(raw), alpha).dense(), expected) < 1e-11
    if std < 0.3:
        assert apart(cayley_scaled(build(raw, generators=False), alpha).dense(), expected) < 1e-11


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0, -1.7])
@pytest.mark.parametrize("ws", [[0.1, 0.5], [2.0, 2.0], [5.0, 1e-3], [1e-9, 1e-9]], ids=str)
@pytest.mark.parametrize("generators", [False, True])
def test_a_plane_goes_on_the_cayley_path_as_its_tangent(ws, alpha, generators):
    factor = generated(generator(ws, 5, seed=2))
    if not generators:
        factor = Factor(factor.blocks, factor.index)
    assert apart(factor.blocks[0], turns([2 * math.atan(w) for w in ws], 5, seed=2)) < 1e-13
    expected = turns([2 * math.atan(alpha * w) for w in ws], 5, seed=2)
    scaled = cayley_scaled(Rotation((factor,)), alpha)
    assert apart(scaled.dense(), expected) < 1e-13
    # Scaling goes on from there.
    assert apart(cayley_scaled(scaled, 0.7).dense(), turns([2 * math.atan(0.7 * alpha * w) for w in ws], 5, 2)) < 1e-13


@pytest.mark.parametrize("w", [1e8, 1e12, 1e17])
def test_the_generator_tells_what_the_blocks_no_longer_do(w):
    factor = generated(generator([w, -w], 4))
    scaled = cayley_scaled(Rotation((factor,)), 1 / w)
    assert apart(scaled.dense(), turns([math.pi / 2, -math.pi / 2], 4)) < 1e-13
    assert apart(scaled.factors[0].generator[0], generator([1.0, -1.0], 4)) < 1e-15
    # And the power knows the scaled one's.
    half = factor.scaled(0.5).power(0.5).blocks[0]
    assert apart(half, turns([math.atan(w / 2), -math.atan(w / 2)], 4)) < 1e-13


@pytest.mark.parametrize(
    "block", [-eye(2), -eye(4), diagonal(2, 3), eye(4)[[1, 0, 3, 2]]], ids=["-1", "-1, of 4", "diagonal", "swaps"]
)
def test_half_turns_are_on_no_cayley_path(block):
    rotation = Rotation((factor_of(eye(len(block)), block),))
    with pytest.raises(ValueError, match="eigenvalue -1"):
        cayley_scaled(rotation, 0.5)


@pytest.mark.parametrize("n", [3, 4, 7])
def test_half_turns_in_any_basis_are_on_no_cayley_path(n):
    with pytest.raises(ValueError, match="eigenvalue -1"):
        cayley_scaled(Rotation((factor_of(diagonal(2, n, seed=2)),)), 0.5)


@pytest.mark.parametrize("delta", [1e-2, 1e-4, 1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("others", [[], [0.5]], ids=str)
def test_near_half_a_turn_the_cayley_path_loses_digits_in_proportion(others, delta):
    # Without a generator it has to be found, and that is tan(angle / 2), about 2 / delta, of an angle rounded to eps.
    angles = [math.pi - delta, *others]
    n = 2 * len(angles) + 1
    rotation = Rotation((factor_of(turns(angles, n, seed=2)),))
    for alpha in (0.5, 2.0):
        expected = turns([2 * math.atan(alpha * math.tan(angle / 2)) for angle in angles], n, seed=2)
        assert apart(cayley_scaled(rotation, alpha).dense(), expected) < 20 * EPS / delta


# Truncated products


def many(m: int) -> Rotation:
    """A rotation of m factors over eight features in any order."""
    places = [torch.randperm(8, generator=torch.Generator().manual_seed(i)).view(2, 4) for i in range(m)]
    s = skew(randn(m, 2, 4, 4, seed=m))
    return Rotation(tuple(Factor(cayley(s[i]), places[i], s[i]) for i in range(m)))


def is_identity(factor: Factor, like: Factor) -> bool:
    return torch.equal(factor.blocks, eye(4).expand(2, 4, 4)) and torch.equal(factor.index, like.index)


def test_whole_factors_are_taken_as_they_are():
    uneven = 0
    for m in range(1, 50):
        rotation = many(m)
        for k in range(m + 1):
            uneven += k / m * m != k
            # Alpha as it may be written or added up.
            for alpha in {k / m, min(k * (1 / m), 1.0), float(f"{k / m:.15f}")}:
                factors = truncate(rotation, alpha).factors
                assert len(factors) == m
                assert all(new is old for new, old in zip(factors[:k], rotation.factors[:k], strict=True))
                dropped = zip(factors[k:], rotation.factors[k:], strict=True)
                assert all(is_identity(new, old) for new, old in dropped)
    assert uneven > 10, "or nothing is rounded here"


@properties
@given(st.integers(1, 49), st.data(), st.floats(1e-6, 1 - 1e-6))
def test_between_whole_factors_the_one_on_the_boundary_goes_part_of_its_way(m, data, fraction):
    k = data.draw(st.integers(0, m - 1))
    rotation = many(m)
    factors = truncate(rotation, (k + fraction) / m).factors
    assert len(factors) == m
    assert all(new is old for new, old in zip(factors[:k], rotation.factors[:k], strict=True))
    assert apart(factors[k].blocks, rotation.factors[k].power(fraction).blocks) < 1e-12
    assert torch.equal(factors[k].index, rotation.factors[k].index)
    assert not is_identity(factors[k], rotation.factors[k])
    assert all(is_identity(new, old) for new, old in zip(factors[k + 1 :], rotation.factors[k + 1 :], strict=True))


@pytest.mark.parametrize("beside", [1e-9, -1e-9])
def test_beside_whole_factors_is_not_taken_for_whole(beside):
    rotation = many(4)
    point = truncate(rotation, 0.5 + beside).dense()
    moved = apart(point, truncate(rotation, 0.5).dense())
    assert 1e-10 < moved < 1e-7


@properties
@given(butterflies(24), SEEDS, FRACTIONS)
def test_the_truncated_product_is_that_of_its_factors(shape, seed, alpha):
    rotation = build(raw_blocks(shape, seed=seed))
    expected = eye(rotation.num_features)
    for i, factor in enumerate(rotation.factors):
        exponent = min(max(alpha * len(rotation.factors) - i, 0.0), 1.0)
        expected = Rotation((factor.power(exponent),)).dense() @ expected
    assert apart(truncate(rotation, alpha).dense(), expected) < 1e-12


@pytest.mark.parametrize("alpha", [-1e-9, -1.0, 1 + 1e-9, 2.0, math.nan, math.inf])
def test_there_are_no_factors_outside_of_the_product(alpha):
    with pytest.raises(ValueError, match="outside of"):
        truncate(many(3), alpha)


# Scales


@properties
@given(st.lists(st.floats(-100, 100), min_size=1), st.floats(-3, 3))
def test_scales_go_in_proportion_where_they_can(values, alpha):
    scale = torch.tensor(values, dtype=FLOAT64)
    kept = scale.clone()
    found = interpolate_scale(scale, alpha)
    assert torch.equal(scale, kept)
    assert not found.isnan().any()
    for s, new in zip(values, found.tolist(), strict=True):
        if s <= 0:
            assert new == pytest.approx(1 + alpha * (s - 1), rel=1e-15, abs=1e-13)
        elif s > 1e-90:
            assert new == pytest.approx(s**alpha, rel=1e-13)


@properties
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_scales_begin_at_one_and_end_at_themselves(values):
    scale = torch.tensor([*values, 0.0, -0.0, -1.5, 5e-324, 0.1], dtype=FLOAT64)
    for zero in (0, 0.0, -0.0):
        assert torch.equal(interpolate_scale(scale, zero), torch.ones_like(scale))
    for one in (1, 1.0):
        assert torch.equal(interpolate_scale(scale, one).view(torch.int64), scale.view(torch.int64)), "to the bit"


@pytest.mark.parametrize("alpha", [-2.0, -1.0, -0.5, 1e-9, 0.3, 0.5, 1.5, 2.0])
def test_scales_that_are_not_positive_go_straight(alpha):
    scale = torch.tensor([[-1.5], [-1e-300], [-0.0], [0.0]], dtype=FLOAT64)
    found = interpolate_scale(scale, alpha)
    assert torch.allclose(found, 1 + alpha * (scale - 1), rtol=1e-15, atol=0)
    assert found.isfinite().all()
    assert found.shape == scale.shape


@properties
@given(st.floats(1e-3, 1e3), ALPHAS, ALPHAS)
def test_powers_of_scales_are_a_group(value, a, b):
    scale = torch.tensor([value], dtype=FLOAT64)
    product = interpolate_scale(scale, a) * interpolate_scale(scale, b)
    assert torch.allclose(product, interpolate_scale(scale, a + b), rtol=1e-13, atol=0)


# Where the features lie


@properties
@given(butterflies(), SEEDS, ALPHAS, st.booleans())
def test_powers_do_not_need_groups_of_neighbours(shape, seed, alpha, generators):
    rotation = build(raw_blocks(shape, seed=seed), generators=generators)
    n = rotation.num_features
    place = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    moved = Rotation(tuple(Factor(f.blocks, place[f.index], f.generator) for f in rotation.factors))
    for path in ("geodesic", "factorwise", "cayley", "truncate", "linear"):
        at = abs(alpha) / 2 if path == "truncate" else alpha
        point = interpolate_rotation(rotation, at, path).dense()
        expected = torch.empty_like(point)
        expected[place[:, None], place] = point
        assert apart(interpolate_rotation(moved, at, path).dense(), expected) < 1e-12
    power, dense = rotation.power(alpha).dense(), torch.empty(n, n, dtype=FLOAT64)
    dense[place[:, None], place] = power
    x = randn(2, n)
    assert apart(moved.power(alpha).rotate_columns(x), x @ dense.T) < 1e-12
    assert apart(moved.power(alpha).rotate_rows(x.T), dense @ x.T) < 1e-12


@properties
@given(st.integers(1, 8), st.integers(1, 6), SEEDS, ALPHAS, st.data())
def test_the_power_of_a_part_is_the_part_of_the_power(b, count, seed, alpha, data):
    (factor,) = build(raw_blocks((1, count, b), 3.0, seed)).factors
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    part = factor.restrict(start * b, stop * b)
    assert torch.equal(part.generator, factor.generator[start:stop])
    assert apart(part.power(alpha).blocks, factor.power(alpha).restrict(start * b, stop * b).blocks) < 1e-13
    assert apart(part.scaled(alpha).blocks, factor.scaled(alpha).restrict(start * b, stop * b).blocks) < 1e-13
    rotation = Rotation((factor,)).restrict(start * b, stop * b)
    assert torch.equal(geodesic(rotation, alpha).dense(), Rotation((part.power(alpha),)).dense())


def test_a_part_near_half_a_turn_keeps_its_generator():
    # What tells these two from each other is lost in their blocks, which are both -1 to rounding.
    s = torch.stack([generator([w, w], 4, seed=3) for w in (1e17, -1e17)])
    factor = Factor(cayley(s), torch.arange(8).view(2, 4), s)
    for i, side in enumerate((1, -1)):
        half = factor.restrict(4 * i, 4 * i + 4).power(0.5).blocks[0]
        assert apart(half, turns([side * math.pi / 2] * 2, 4, seed=3)) < 1e-13
