"""Telling from Gram matrices whether one matrix is another one rotated: W' = diag(s) W R^T for some orthogonal R.

There is such an R exactly if W' W'^T = diag(s) W W^T diag(s): if the angles between rows are the same. R itself is
never needed. Rows are brought to length 1 first, so that each counts alike; s is then the ratio of their lengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Up to here all pairs of rows are compared; of more rows, this many random sums.
EXACT_ROWS = 64
SKETCH_ROWS = 16
# The elements of a sketch, so that very long rows don't take too much memory.
_SKETCH_ELEMENTS = 1 << 21
_SEED = 20240229
# The mean of (spacing of the dtype / value)^2 where a value's logarithm is equally likely anywhere between two powers
# of two, as a share of eps^2; by whichever else they are spread, it is between 1/4 and 1.
_SPACING = 3 / (8 * math.log(2))
# What single-precision arithmetic in the making of W' leaves at most, relative to the Gram matrix.
_FLOOR = 4 * 2.0**-24
# How many times the expected noise is still noise: for what the model leaves out, and for chance, which of few
# conditions has more to say: the deviation of a norm of q independent normal numbers is 1 / sqrt(2 q).
_MODEL_SLACK = 1.5
_CHANCE = 5.0


@dataclass(frozen=True)
class Rounding:
    """What rounding to a dtype adds to a value, as noise.

    Attributes:
        relative: The variance of a value's rounding error, relative to the value's square.
        absolute: The variance among the smallest values, whose spacing is fixed.
    """

    relative: float
    absolute: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> Rounding:
        """Return that of a float dtype."""
        info = torch.finfo(dtype)
        return cls(_SPACING * info.eps**2 / 12, (info.smallest_normal * info.eps) ** 2 / 12)


@dataclass(frozen=True)
class GramResult:
    """Whether W' is W rotated and its rows scaled.

    Attributes:
        scale: s, shape (rows,), float64: 1 for rows that are zero in both, infinite for those that are zero in W alone.
            s and -s are the same with -R for R, so that most of s is taken to be positive.
        residual: |G' - G|_F / |G|_F of the Gram matrices of W' and W with rows of length 1; infinite where a row of
            zeros became one that is not.
        noise: What of that the rounding of W' is expected to make.
        conditions: How many independent numbers were compared. 0: any W' would have fit, and nothing can be told.
    """

    scale: Tensor
    residual: float
    noise: float
    conditions: int

    @property
    def limit(self) -> float:
        """The largest residual that rounding explains."""
        chance = _CHANCE / math.sqrt(2 * self.conditions) if self.conditions else 0.0
        return self.noise * _MODEL_SLACK * (1 + chance)

    @property
    def holds(self) -> bool | None:
        """Whether W' = diag(s) W R^T within rounding; None where that can't be told."""
        return self.residual <= self.limit if self.conditions else None


class RunningGram:
    """What is summed up of pieces of W and W'."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        self._sums = torch.zeros(*shape, dtype=dtype)

    def merge(self, other: RunningGram) -> None:
        """Add what another one of the same kind has summed up of other pieces."""
        self._sums += other._sums


class ExactGram(RunningGram):
    """The test by all pairs of rows, for few rows; the columns come in any pieces.

    Args:
        rows: How many rows there are.
        width: How many columns.
        rounding: The rounding of W'.
    """

    def __init__(self, rows: int, width: int, rounding: Rounding) -> None:
        # Gram matrices of W, of W', and of the squares of W'.
        super().__init__(3, rows, rows)
        self._width = width
        self._rounding = rounding

    def add(self, old: Tensor, new: Tensor) -> None:
        """Add some columns of W and W', shape (rows, any), float64."""
        self._sums[0].addmm_(old, old.T)
        self._sums[1].addmm_(new, new.T)
        squares = new.square()
        self._sums[2].addmm_(squares, squares.T)

    def result(self) -> GramResult:
        """Compare what was added."""
        old, new, fourth = self._sums
        lengths, new_lengths = old.diagonal().sqrt(), new.diagonal().sqrt()
        scale = row_scale(lengths, new_lengths)
        kept = (lengths > 0) & (new_lengths > 0)
        a, b = lengths[kept], new_lengths[kept]
        g = old[kept][:, kept] / (a[:, None] * a)
        g_new = new[kept][:, kept] / (b[:, None] * b)
        sign = _signs(g, g_new)
        # Squares of W' are summed over its unit rows: sum_j (sum_i u_ij^2)^2.
        concentration = float((fourth[kept][:, kept] / (b[:, None] * b) ** 2).sum())
        smallest = float((self._rounding.absolute / b**2).sum()) * len(b)
        scale[kept] *= sign
        g_new = g_new * sign[:, None] * sign
        conditions = _conditions(int(kept.sum()), self._width)
        return _compare(scale, g, g_new, concentration, smallest, self._rounding, conditions)


class SketchedGram(RunningGram):
    """The test by random sums of rows, for many rows; the rows come in any pieces.

    Y = O W / |W| has few rows, of which each is the sum of all unit rows of W with random signs O. A pair of rows whose
    angle has changed changes Y Y^T. It takes 2 k operations for an element, for k random sums.

    Args:
        width: How many columns there are.
        rounding: The rounding of W'.
        dtype: What to sum up in. float32 does for pieces of narrower dtypes, whose rounding is far above its own; what
            pieces are merged into should be float64.
    """

    def __init__(self, width: int, rounding: Rounding, dtype: torch.dtype = torch.float64) -> None:
        # Y of W and of W'.
        super().__init__(2, max(4, min(SKETCH_ROWS, _SKETCH_ELEMENTS // max(width, 1))), width, dtype=dtype)
        self._width = width
        self._rounding = rounding

    def add(self, first: int, old: Tensor, new: Tensor, lengths: Tensor, new_lengths: Tensor) -> None:
        """Add some rows of W and W'.

        Args:
            first: The number of their first row; where pieces begin must not depend on chance.
            old: Rows of W, shape (any, width), of the dtype that sums are of.
            new: The same rows of W'.
            lengths: Their lengths, shape (any,), float64.
            new_lengths: The same of W'; with a minus sign where s is negative.
        """
        generator = torch.Generator().manual_seed(_SEED + first)
        signs = torch.randint(0, 2, (self._sums.shape[1], len(old)), generator=generator).mul_(2).sub_(1)
        kept = (lengths > 0) & (new_lengths != 0)
        self._sums[0].addmm_(torch.where(kept, signs / lengths, 0.0).to(old.dtype), old)
        self._sums[1].addmm_(torch.where(kept, signs / new_lengths, 0.0).to(new.dtype), new)

    def result(self, lengths: Tensor, new_lengths: Tensor) -> GramResult:
        """Compare what was added.

        Args:
            lengths: Of all rows of W, shape (rows,), float64.
            new_lengths: Of all rows of W', with the signs that ``add`` was given.
        """
        scale = row_scale(lengths, new_lengths)
        kept = (lengths > 0) & (new_lengths != 0)
        sums = self._sums.shape[1]
        old, new = self._sums @ self._sums.mT
        concentration = float(self._sums[1].square().sum(0).square().sum())
        smallest = float((self._rounding.absolute / new_lengths[kept] ** 2).sum()) * float(new.trace()) * sums
        pairs = sums * (sums + 1) // 2 if sums <= self._width else _free(sums, self._width)
        conditions = min(_conditions(int(kept.sum()), self._width), pairs)
        return _compare(scale, old, new, concentration, smallest, self._rounding, conditions)


def row_scale(lengths: Tensor, new_lengths: Tensor) -> Tensor:
    """Return s from the lengths of rows before and after; 1 for 0 / 0."""
    return torch.where((lengths == 0) & (new_lengths == 0), 1.0, new_lengths / lengths)


def row_signs(old: Tensor, new: Tensor, references: tuple[Tensor, Tensor], rounding: Rounding) -> Tensor:
    """Return the signs of s for rows, from the angles they have with a few others; 1 where they can't be told.

    Args:
        old: Unit rows of W, shape (any, width), float64.
        new: The same rows of W'.
        references: Some unit rows of W, and the same of W' without the signs that s has there.
        rounding: The rounding of W'.
    """
    cosines = old @ references[0].T
    size = cosines.square().sum(1)
    agreement = (cosines * (new @ references[1].T)).sum(1)
    negative = (agreement < -size / 2) & (size > rounding.relative * len(references[0]))
    return torch.where(negative, -1.0, 1.0).to(old.dtype)


def _signs(gram: Tensor, new: Tensor) -> Tensor:
    """Return the signs of s from Gram matrices of unit rows: those with which they agree best.

    G' * G = s s^T * G^2, element by element, has the eigenvector s * p of the largest eigenvalue, where p is that of
    G^2, which is positive by Perron and Frobenius.
    """
    if not len(gram):
        return gram.new_ones(0)
    vector = torch.linalg.eigh(gram * new).eigenvectors[:, -1]
    # Rows at right angles to all that matter have no sign to be told.
    vector = torch.where(vector.abs() > 1e-3 * vector.abs().max(), vector, 0.0)
    if (vector < 0).sum() > (vector > 0).sum():
        vector = -vector
    return torch.where(vector < 0, -1.0, 1.0).to(gram.dtype)


def _free(rows: int, width: int) -> int:
    """Return how many numbers a matrix holds of which a rotation of its rows changes none."""
    return rows * width - width * (width - 1) // 2 if rows > width else rows * (rows + 1) // 2


def _conditions(rows: int, width: int) -> int:
    """Return how many numbers must agree for rows to be others rotated, beside their lengths."""
    return max(_free(rows, width) - rows, 0) if width else 0


def _compare(
    scale: Tensor,
    old: Tensor,
    new: Tensor,
    concentration: float,
    smallest: float,
    rounding: Rounding,
    conditions: int,
) -> GramResult:
    """Return a result.

    Rounding errors N make of Y Y^T the sum Y Y^T + N Y^T + Y N^T + N N^T. In column j of N each element has a variance
    proportional to |Y_j|^2, or fixed among the smallest numbers, and so |N Y^T + Y N^T|_F^2 is expected to be
    2 (relative sum_j |Y_j|^4 + smallest).

    Args:
        scale: s.
        old: G of unit rows, or of sums of them.
        new: The same of W'.
        concentration: sum_j |Y_j|^4.
        smallest: The same for errors of fixed variance.
        rounding: The rounding of W'.
        conditions: How many numbers are compared.
    """
    whole = float(torch.linalg.matrix_norm(old)) if len(old) else 0.0
    if not whole:
        residual = math.inf if bool(torch.isinf(scale).any()) else 0.0
        return GramResult(scale, residual, _FLOOR, 0 if residual == 0 else max(conditions, 1))
    noise = math.sqrt(2 * (rounding.relative * concentration + smallest)) / whole + rounding.relative + _FLOOR
    residual = float(torch.linalg.matrix_norm(new - old)) / whole
    if bool(torch.isinf(scale).any()):
        return GramResult(scale, math.inf, noise, max(conditions, 1))
    return GramResult(scale, residual, noise, conditions)
