"""What a fold did to the elements of a tensor, as sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """What a fold did to a run of elements, as sums that add up over runs.

    Attributes:
        elements: How many there are.
        changed: How many differ from the source's in the output's dtype.
        source: Sum of the source's squares.
        change: Sum of squares of exact result minus source.
        rounding: Sum of squares of rounded minus exact result.
        damaged: How many are not finite though the source's are.
        unsound: How many of the source's are not finite.
        returned: How many the way back gives again, bit for bit; None where it was not gone.
        tried: How many were tried whether they would survive the way there and back.
        kept: How many of those did.
    """

    elements: int = 0
    changed: int = 0
    source: float = 0.0
    change: float = 0.0
    rounding: float = 0.0
    damaged: int = 0
    unsound: int = 0
    returned: int | None = None
    tried: int = 0
    kept: int = 0

    @classmethod
    def of_sums(cls, sums: Sequence[float]) -> Measure:
        """Return what the kernel measured: elements, changed, source, change, rounding, damaged, unsound."""
        elements, changed, source, change, rounding, damaged, unsound = sums
        return cls(int(elements), int(changed), source, change, rounding, int(damaged), int(unsound))

    def __add__(self, other: Measure) -> Measure:
        """Return the measure of both runs together."""
        return Measure(
            self.elements + other.elements,
            self.changed + other.changed,
            self.source + other.source,
            self.change + other.change,
            self.rounding + other.rounding,
            self.damaged + other.damaged,
            self.unsound + other.unsound,
            other.returned if self.returned is None else self.returned + (other.returned or 0),
            self.tried + other.tried,
            self.kept + other.kept,
        )

    @property
    def relative_change(self) -> float | None:
        """||dW|| / ||W||; None where the squares of huge values have no sum."""
        return _root(self.change, self.source) if self.source else 0.0

    @property
    def rounding_loss(self) -> float | None:
        """||rounding error|| / ||dW||; None where nothing was to change."""
        return _root(self.rounding, self.change)


def _root(part: float, whole: float) -> float | None:
    """Return sqrt(part / whole); None where there is no whole, or the squares of huge values have no sum."""
    return math.sqrt(part / whole) if whole and math.isfinite(part) and math.isfinite(whole) else None
