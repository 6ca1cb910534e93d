"""The one form every adapter is read into: a product of sparse orthogonal factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from boft_export.linalg.cayley import cayley, skew
from boft_export.linalg.planner import plan_stages
from boft_export.linalg.spectrum import Spectrum

# A generator of this size, found from a rotation, is rounding: float64 can't tell the rotation from a half turn.
_POLE = 1e13
_HALF_TURN = "a block has the eigenvalue -1, which no Cayley transform gives"


@dataclass(frozen=True)
class Factor:
    """An n-by-n matrix M that mixes features only within small blocks: M[index[d], index[d]] = blocks[d].

    Attributes:
        blocks: Dense blocks, shape (B, k, k).
        index: The features of each block, shape (B, k), int64; a partition of range(n), so n = B k.
        generator: Skew-symmetric S with blocks = (I - S)(I + S)^-1, shape (B, k, k), where they were made of it: near
            an angle of pi it tells more than the blocks do.
    """

    blocks: Tensor
    index: Tensor
    generator: Tensor | None = None

    @property
    def num_features(self) -> int:
        """The size n of the matrix."""
        return self.index.numel()

    @property
    def block_size(self) -> int:
        """The number k of features that a block mixes."""
        return self.index.shape[1]

    @cached_property
    def spectrum(self) -> Spectrum:
        """Planes and angles of the blocks, which must be rotations; found once, for powers of any exponent."""
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
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # public, but not marked so
                raise ValueError(_HALF_TURN) from error
            if found.abs().amax() > _POLE:
                raise ValueError(_HALF_TURN)
            generator = skew(found)
        return type(self)(cayley(alpha * generator), self.index, alpha * generator)

    def identity(self) -> Self:
        """Return the identity in the shape of this factor."""
        eye = torch.eye(self.block_size, dtype=self.blocks.dtype, device=self.blocks.device)
        return type(self)(eye.expand_as(self.blocks), self.index)

    @cached_property
    def _gather(self) -> tuple[int, Tensor, Tensor] | None:
        """Run length, runs in block order and their inverse; None where blocks are neighbours already.

        Features are moved in the longest aligned runs that all blocks share, not one by one.
        """
        flat = self.index.reshape(-1)
        n = flat.numel()
        order = torch.arange(n, device=flat.device)
        if torch.equal(flat, order):
            return None
        run = 1
        while self.block_size % (2 * run) == 0:
            starts = flat.view(-1, 2 * run)
            if (starts[:, 0] % (2 * run)).any() or (starts - starts[:, :1] != order[: 2 * run]).any():
                break
            run *= 2
        runs = flat[::run] // run
        return run, runs, torch.argsort(runs)

    def rotate_columns(self, x: Tensor) -> Tensor:
        """Return X M^T for ``x`` of shape (r, n): each row of X is rotated on its own."""
        rows, n = x.shape
        gather = self._gather
        if gather is not None:
            run, runs, inverse = gather
            x = x.reshape(rows, n // run, run).index_select(1, runs)
        x = x.reshape(rows, *self.index.shape).transpose(0, 1)
        x = torch.bmm(x, self.blocks.mT).transpose(0, 1)
        if gather is not None:
            x = x.reshape(rows, n // run, run).index_select(1, inverse)
        return x.reshape(rows, n)

    def rotate_rows(self, x: Tensor) -> Tensor:
        """Return M X for ``x`` of shape (n, c)."""
        columns = x.shape[1]
        y = torch.bmm(self.blocks, x[self.index.reshape(-1)].view(*self.index.shape, columns))
        return torch.empty_like(x).index_copy_(0, self.index.reshape(-1), y.view(x.shape))

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


def couple(factors: Sequence[Factor]) -> Tensor:
    """Return the groups of features that ``factors`` together couple, shape (groups, g), rows ascending.

    Raises:
        ValueError: If the groups differ in size, so that no one dense stage can hold them.
    """
    n = factors[0].num_features
    label = torch.arange(n, device=factors[0].index.device)
    while True:
        before = label.clone()
        for factor in factors:
            lowest = label[factor.index].amin(dim=1, keepdim=True)
            label[factor.index] = lowest.expand_as(factor.index)
        if torch.equal(before, label):
            break
    counts = torch.bincount(label, minlength=n)
    counts = counts[counts > 0]
    if (counts != counts[0]).any():
        raise ValueError("the factors couple groups of different sizes")
    return torch.argsort(label, stable=True).view(-1, int(counts[0]))


def fuse(factors: Sequence[Factor]) -> Factor:
    """Return the product of ``factors`` (the first is applied first) as one factor with larger dense blocks."""
    if len(factors) == 1:
        return factors[0]
    index = couple(factors)
    groups, size = index.shape
    slot = torch.empty(index.numel(), dtype=torch.int64, device=index.device)
    slot[index.reshape(-1)] = torch.arange(index.numel(), device=index.device)
    like = factors[0].blocks
    product = torch.eye(size, dtype=like.dtype, device=like.device).repeat(groups, 1)
    for factor in factors:
        rows = slot[factor.index]
        # All features of a block lie in one group, so its rows of the product do too.
        product[rows] = torch.bmm(factor.blocks, product[rows])
    return Factor(product.view(groups, size, size), index)


def widen(factor: Factor, size: int) -> Factor:
    """Return the same factor with neighbouring blocks laid side by side in blocks of at least ``size``.

    Where the number of blocks doesn't allow it, the factor is returned as it is.
    """
    count, small = factor.index.shape
    together = -(-size // small)
    if together == 1 or count % together:
        return factor
    blocks = factor.blocks.new_zeros(count // together, together, small, together, small)
    blocks.diagonal(dim1=1, dim2=3).copy_(factor.blocks.view(-1, together, small, small).permute(0, 2, 3, 1))
    wide = together * small
    return Factor(blocks.view(-1, wide, wide), factor.index.reshape(-1, wide))


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
        """Return the rotation on ``device`` with blocks in ``dtype``."""
        return Rotation(tuple(Factor(f.blocks.to(device, dtype), f.index.to(device)) for f in self.factors))

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

    def fused(self, smallest: int = 1) -> Rotation:
        """Return the same rotation in the dense stages that cost least to apply.

        Args:
            smallest: Lay smaller blocks side by side up to this size, which ``restrict`` may then not take apart.
        """
        sizes = {
            (i, j): couple(self.factors[i:j]).shape[1]
            for i in range(len(self.factors))
            for j in range(i + 1, len(self.factors) + 1)
        }
        runs = plan_stages(len(self.factors), lambda i, j: sizes[i, j])
        return Rotation(tuple(widen(fuse(self.factors[i:j]), smallest) for i, j in runs))

    def groups(self) -> Factor:
        """Return R as one factor: the dense orthogonal product of each coupled group, n/g matrices of g by g."""
        return self._groups

    def dense(self) -> Tensor:
        """Return R as an n-by-n matrix: O(n^2) memory, for inspection and as the oracle; never needed to merge."""
        like = self.factors[0].blocks
        return self.rotate_rows(torch.eye(self.num_features, dtype=like.dtype, device=like.device))

    def residual(self) -> float:
        """Return max |M^T M - I| over all blocks of all factors: 0 for an exactly orthogonal rotation."""
        worst = 0.0
        for factor in self.factors:
            eye = torch.eye(factor.block_size, dtype=factor.blocks.dtype, device=factor.blocks.device)
            worst = max(worst, float((torch.bmm(factor.blocks.mT, factor.blocks) - eye).abs().max()))
        return worst
