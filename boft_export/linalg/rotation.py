"""The one form every adapter is read into: a product of sparse orthogonal factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Self

from boft_export.linalg.arrays import Array, namespace
from boft_export.linalg.cayley import cayley, skew
from boft_export.linalg.planner import TORCH_COSTS, Costs, plan_stages

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from boft_export.linalg.spectrum import Spectrum

# A generator of this size, found from a rotation, is rounding: float64 can't tell the rotation from a half turn.
_POLE = 1e13
_HALF_TURN = "a block has the eigenvalue -1, which no Cayley transform gives"


@dataclass(frozen=True)
class Factor:
    """An n-by-n matrix M that mixes features only within small blocks: M[index[d], index[d]] = blocks[d].

    Its arrays are torch's tensors, or all of them numpy's: those are made, fused and measured, and no more.

    Attributes:
        blocks: Dense blocks, shape (B, k, k).
        index: The features of each block, shape (B, k), int64; a partition of range(n), so n = B k.
        generator: Skew-symmetric S with blocks = (I - S)(I + S)^-1, shape (B, k, k), where they were made of it: near
            an angle of pi it tells more than the blocks do.
    """

    blocks: Array
    index: Array
    generator: Array | None = None

    @property
    def num_features(self) -> int:
        """The size n of the matrix."""
        return int(self.index.shape[0] * self.index.shape[1])

    @property
    def block_size(self) -> int:
        """The number k of features that a block mixes."""
        return int(self.index.shape[1])

    @cached_property
    def spectrum(self) -> Spectrum:
        """Planes and angles of the blocks, which must be rotations; found once, for powers of any exponent."""
        from boft_export.linalg.spectrum import Spectrum

        if self.generator is not None:
            return Spectrum.of_generator(self.generator)
        return Spectrum.of_rotation(self.blocks)

    def power(self, alpha: float) -> Self:
        """Return M^alpha: each block turns by ``alpha`` times its angles. For any real ``alpha``, -1 the inverse.

        Raises:
            ValueError: If a block has determinant -1.
        """
        return type(self)(self.spectrum.power(alpha), self.index)

    def scaled(self, alpha: float) -> Self:
        """Return the factor whose blocks' skew generators are ``alpha`` times this one's.

        Raises:
            ValueError: If a block has the eigenvalue -1, which no generator gives.
        """
        generator = self.generator
        if generator is None:
            try:
                # The Cayley transform is its own inverse.
                found = cayley(self.blocks)
            except namespace(self.blocks).linalg.LinAlgError as error:
                raise ValueError(_HALF_TURN) from error
            if abs(found).max() > _POLE:
                raise ValueError(_HALF_TURN)
            generator = skew(found)
        return type(self)(cayley(alpha * generator), self.index, alpha * generator)

    def identity(self) -> Self:
        """Return the identity in the shape of this factor."""
        return type(self)(namespace(self.blocks).broadcast_to(_eye_like(self.blocks), self.blocks.shape), self.index)

    @cached_property
    def _gather(self) -> tuple[int, Array, Array] | None:
        """Run length, runs in block order and their inverse; None where blocks are neighbours already.

        Features are moved in the longest aligned runs that all blocks share, not one by one.
        """
        flat = self.index.reshape(-1)
        n = self.num_features
        order = namespace(flat).arange(n, device=flat.device)
        if bool((flat == order).all()):
            return None
        run = 1
        while self.block_size % (2 * run) == 0:
            starts = flat.view(-1, 2 * run)
            if (starts[:, 0] % (2 * run)).any() or (starts - starts[:, :1] != order[: 2 * run]).any():
                break
            run *= 2
        runs = flat[::run] // run
        return run, runs, runs.argsort()

    def prepare(self) -> None:
        """Compute what ``rotate_columns`` needs, on the current stream of a GPU and not on that of who comes first."""
        _ = self._gather

    def rotate_columns(self, x: Tensor) -> Tensor:
        """Return X M^T for ``x`` of shape (r, n): each row of X is rotated on its own."""
        rows, n = x.shape
        gather = self._gather
        if gather is not None:
            run, runs, inverse = gather
            x = x.reshape(rows, n // run, run).index_select(1, runs)
        x = x.reshape(rows, *self.index.shape).transpose(0, 1)
        x = x.bmm(self.blocks.mT).transpose(0, 1)
        if gather is not None:
            x = x.reshape(rows, n // run, run).index_select(1, inverse)
        return x.reshape(rows, n)

    def rotate_rows(self, x: Tensor) -> Tensor:
        """Return M X for ``x`` of shape (n, c)."""
        import torch

        columns = x.shape[1]
        y = torch.bmm(self.blocks, x[self.index.reshape(-1)].view(*self.index.shape, columns))
        return torch.empty_like(x).index_copy_(0, self.index.reshape(-1), y.view(x.shape))

    def tensors(self) -> Self:
        """Return the factor of numpy arrays as one of tensors on the CPU, which share their memory."""
        import torch

        generator = None if self.generator is None else torch.from_numpy(self.generator)
        return type(self)(torch.from_numpy(self.blocks), torch.from_numpy(self.index), generator)

    def residual(self) -> float:
        """Return max |M^T M - I| over all blocks."""
        return float(abs(self.blocks.mT @ self.blocks - _eye_like(self.blocks)).max())

    def restrict(self, start: int, stop: int) -> Self:
        """Return the factor on features start..stop.

        Raises:
            ValueError: If a block lies only partly in them.
        """
        within = (self.index >= start) & (self.index < stop)
        inside = within[:, 0]
        if (within != inside[:, None]).any():
            raise ValueError(f"features {start} to {stop} cut a block in two")
        generator = None if self.generator is None else self.generator[inside]
        return type(self)(self.blocks[inside], self.index[inside] - start, generator)


def couple(factors: Sequence[Factor]) -> Array:
    """Return the groups of features that ``factors`` together couple, shape (groups, g), rows ascending.

    Raises:
        ValueError: If the groups differ in size, so that no one dense stage can hold them.
    """
    xp = namespace(factors[0].index)
    label = xp.arange(factors[0].num_features, device=factors[0].index.device)
    while True:
        before = label
        for factor in factors:
            lowest = xp.amin(label[factor.index], axis=1, keepdims=True)
            label = xp.empty_like(label)
            label[factor.index] = lowest
        # Of one factor, the blocks themselves.
        if len(factors) == 1 or bool((before == label).all()):
            break
    counts = xp.bincount(label)
    counts = counts[counts > 0]
    if (counts != counts[0]).any():
        raise ValueError("the factors couple groups of different sizes")
    return xp.argsort(label, stable=True).reshape(-1, int(counts[0]))


def fuse(factors: Sequence[Factor], index: Array | None = None) -> Factor:
    """Return the product of ``factors`` (the first is applied first) as one factor with larger dense blocks.

    Args:
        factors: One or more.
        index: What ``couple`` gives of them, where it is known.
    """
    first, *others = factors
    if not others:
        return first
    xp = namespace(first.blocks)
    index = couple(factors) if index is None else index
    groups, size = index.shape
    slot = xp.empty_like(index.reshape(-1))
    slot[index.reshape(-1)] = xp.arange(groups * size, device=index.device)
    # All features of a block lie in one group, so its rows of the product do too.
    product = xp.zeros((groups * size, size), dtype=first.blocks.dtype, device=first.blocks.device)
    rows = slot[first.index]
    product[rows[:, :, None], rows[:, None, :] % size] = first.blocks
    for factor in others:
        rows = slot[factor.index]
        product[rows] = factor.blocks @ product[rows]
    return Factor(product.reshape(groups, size, size), index)


def widen(factor: Factor, size: int) -> Factor:
    """Return the same factor with neighbouring blocks laid side by side in blocks of at least ``size``.

    Where the number of blocks doesn't allow it, the factor is returned as it is.
    """
    count, small = factor.index.shape
    together = -(-size // small)
    if together == 1 or count % together:
        return factor
    xp = namespace(factor.blocks)
    shape = (count // together, together, small, together, small)
    blocks = xp.zeros(shape, dtype=factor.blocks.dtype, device=factor.blocks.device)
    place = xp.arange(together, device=factor.blocks.device)
    blocks[:, place, :, place, :] = factor.blocks.reshape(-1, together, small, small).swapaxes(0, 1)
    wide = together * small
    return Factor(blocks.reshape(-1, wide, wide), factor.index.reshape(-1, wide))


def _eye_like(blocks: Array) -> Array:
    return namespace(blocks).eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)


@dataclass(frozen=True)
class Rotation:
    """R = M_{m-1} ... M_1 M_0, a product of sparse factors over the same n features.

    Attributes:
        factors: M_0 first, the order in which they are applied.
    """

    factors: tuple[Factor, ...]

    @property
    def num_features(self) -> int:
        """The size n of R."""
        return self.factors[0].num_features

    @property
    def num_factors(self) -> int:
        """The number m of factors."""
        return len(self.factors)

    @cached_property
    def _groups(self) -> Factor:
        return fuse(self.factors)

    def power(self, alpha: float) -> Rotation:
        """Return R^alpha = exp(alpha log R) as one factor, for any real ``alpha``; -1 gives the inverse.

        Each coupled group of g features is taken apart on its own: O(n g^2) once, and the same again for each power.

        Raises:
            ValueError: If a group has determinant -1.
        """
        return Rotation((self._groups.power(alpha),))

    def angles(self) -> Tensor:
        """Return the angles by which R turns its planes, shape (groups, g), each plane's as a pair of opposite sign.

        Their norm is that of log R: the distance of R from the identity along the rotations.

        Raises:
            ValueError: If a group has determinant -1.
        """
        return self._groups.spectrum.angles

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Rotation:
        """Return the rotation on ``device`` with blocks in ``dtype``, to be applied; in its own memory where it can."""
        return Rotation(tuple(Factor(f.blocks.to(device, dtype), f.index.to(device)) for f in self.factors))

    def tensors(self) -> Rotation:
        """Return the rotation of numpy arrays as one of tensors on the CPU, which share their memory."""
        return Rotation(tuple(f.tensors() for f in self.factors))

    def arrays(self) -> Rotation:
        """Return the rotation of tensors on the CPU as one of numpy arrays, to be applied, which share their memory."""
        return Rotation(tuple(Factor(f.blocks.numpy(), f.index.numpy()) for f in self.factors))

    def rotate_columns(self, x: Tensor) -> Tensor:
        """Return X R^T for ``x`` of shape (r, n)."""
        for factor in self.factors:
            x = factor.rotate_columns(x)
        return x

    def rotate_rows(self, x: Tensor) -> Tensor:
        """Return R X for ``x`` of shape (n, c)."""
        for factor in self.factors:
            x = factor.rotate_rows(x)
        return x

    def restrict(self, start: int, stop: int) -> Rotation:
        """Return R on features start..stop, which must be a union of coupled groups."""
        return Rotation(tuple(f.restrict(start, stop) for f in self.factors))

    def fused(self, smallest: int = 1, costs: Costs = TORCH_COSTS) -> Rotation:
        """Return the same rotation in the dense stages that cost least to apply.

        Args:
            smallest: Lay smaller blocks side by side up to this size, which ``restrict`` may then not take apart.
            costs: What stages cost.
        """
        factors = self.factors
        coupled = {(i, j): couple(factors[i:j]) for i in range(len(factors)) for j in range(i + 2, len(factors) + 1)}
        coupled |= {(i, i + 1): f.index for i, f in enumerate(factors)}
        runs = plan_stages(len(factors), lambda i, j: coupled[i, j].shape[1], costs)
        return Rotation(tuple(widen(fuse(factors[i:j], coupled[i, j]), smallest) for i, j in runs))

    def groups(self) -> Factor:
        """Return R as one factor: the dense orthogonal product of each coupled group, n/g matrices of g by g."""
        return self._groups

    def dense(self) -> Tensor:
        """Return R as an n-by-n matrix: O(n^2) memory, for inspection and as the oracle; never needed to merge."""
        import torch

        like = self.factors[0].blocks
        return self.rotate_rows(torch.eye(self.num_features, dtype=like.dtype, device=like.device))

    def residual(self) -> float:
        """Return max |M^T M - I| over all blocks of all factors: 0 for an exactly orthogonal rotation."""
        return max(f.residual() for f in self.factors)
