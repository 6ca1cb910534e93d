"""How a tensor of one checkpoint differs from that of another: by how much, and by what kind of change."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ChangeKind(StrEnum):
    """What was done to a tensor."""

    IDENTICAL = "identical"
    """Nothing: its dtype and bytes are the same."""
    CONVERTED = "converted"
    """It was rounded once to another dtype."""
    ROUNDING = "rounding"
    """No element moved by more than one step of the dtype."""
    SCALE = "scale"
    """Its rows were scaled: W' = diag(s) W."""
    ROTATION = "rotation"
    """Its rows were rotated and scaled: W' = diag(s) W R^T."""
    ROTATION_OUTPUT = "rotation_output"
    """Its columns were rotated and scaled: W' = R W diag(s). Told from up to 64 of its columns."""
    EDIT = "edit"
    """Some rows, or elements of a vector, were changed; at least half are untouched."""
    REPLACEMENT = "replacement"
    """None of these: other values. A fused weight, each part of which has its own rotation, is taken for one."""
    UNKNOWN = "unknown"
    """It could not be told; the reason says why."""


@dataclass(frozen=True)
class TensorChange:
    """How a tensor B differs from A.

    Rows are those of the tensor seen as a matrix (out, everything else); a vector is one row. Elements that are not
    finite are left out of all sums.

    Attributes:
        kind: What was done.
        changed: How many elements of B are not bit for bit A's, rounded to B's dtype; None for dtypes of less than a
            byte.
        relative_change: |B - A| / |A|; None without values to compare, or where their squares have no sum. Infinite for
            a change from zeros.
        largest_ulp: By how many steps of B's dtype an element is off A's, at most.
        mean_angle: Between corresponding rows, in radians, over rows that are not zero.
        largest_angle: The largest of them.
        nonfinite: How many elements of A are NaN or infinite.
        nonfinite_new: How many of B.
        smallest_scale: Of s, the length of B's rows relative to A's: the smallest. Negative only where a rotation tells
            it. Of ``rotation_output``, s is that of the columns looked at.
        mean_scale: The mean.
        largest_scale: The largest.
        residual: How far the rows' angles to each other are from A's: see ``GramResult``.
        noise: What rounding alone makes of ``residual``.
        limit: The largest ``residual`` that rounding explains.
        reason: Why the kind is not known.
    """

    kind: ChangeKind
    changed: int | None = 0
    relative_change: float | None = 0.0
    largest_ulp: int | None = 0
    mean_angle: float | None = None
    largest_angle: float | None = None
    nonfinite: int = 0
    nonfinite_new: int = 0
    smallest_scale: float | None = None
    mean_scale: float | None = None
    largest_scale: float | None = None
    residual: float | None = None
    noise: float | None = None
    limit: float | None = None
    reason: str | None = None
