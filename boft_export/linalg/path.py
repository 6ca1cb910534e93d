"""The names of the curves from base to tuned."""

from __future__ import annotations

from enum import StrEnum


class InterpolationPath(StrEnum):
    """A curve R(alpha) from the identity (alpha = 0) to a trained rotation R (alpha = 1)."""

    GEODESIC = "geodesic"
    """exp(alpha log R): the shortest path among rotations, for each coupled group of R."""
    FACTORWISE = "factorwise"
    """Each block to its own power alpha: a product of geodesics."""
    CAYLEY = "cayley"
    """Each block's skew generator times alpha."""
    TRUNCATE = "truncate"
    """The first alpha m of the m factors, the boundary factor to a fractional power."""
    LINEAR = "linear"
    """(1 - alpha) W + alpha W': leaves the rotations."""
