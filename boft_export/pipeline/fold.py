"""The fold itself: a run of a tensor's elements in, rotated, scaled and rounded elements out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from boft_export.adapters import View
from boft_export.linalg.rounding import round_once
from boft_export.pipeline.layers import LayerOperator
from boft_export.planning import Step


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


def fold(
    mixture: Sequence[tuple[Tensor, float]],
    steps: Sequence[tuple[Step, LayerOperator]],
    start: int,
    dtype: torch.dtype,
    *,
    compute: torch.dtype,
    device: torch.device,
    tile: int,
) -> tuple[Tensor, list[Measure]]:
    """Apply steps to a run of a tensor's elements and round the result once.

    Args:
        mixture: What the elements are a weighted sum of: each one's elements, flat, on the CPU, and its weight.
        steps: The steps in order, each with its operator.
        start: The element of the tensor at which they begin; a whole number of tiles into its segment.
        dtype: The output's dtype.
        compute: The dtype to compute in.
        device: Where to compute.
        tile: Elements to compute at once. Tiles lie at fixed places in the tensor, so that the sums, and with them the
            last bits, don't depend on how the work is cut.

    Returns:
        The new elements, flat, on the CPU, and what was done to each tile: whoever adds that up in the tensor's order
        gets the same sums however the work is cut.
    """
    count = mixture[0][0].numel()
    out = torch.empty(count, dtype=dtype)
    measures = []
    for offset in range(0, count, tile):
        run = [(m[offset : offset + tile], weight) for m, weight in mixture]
        x, y = unrounded(run, steps, start + offset, compute=compute, device=device)
        rounded = round_once(y, dtype)
        out[offset : offset + tile] = rounded
        measures.append(_measure(x, y, rounded.to(compute)))
    return out, measures


def unrounded(
    mixture: Sequence[tuple[Tensor, float]],
    steps: Sequence[tuple[Step, LayerOperator]],
    start: int,
    *,
    compute: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return a run's elements before and after the steps, flat, in ``compute``, not yet rounded.

    Arguments are those of ``fold``; the run is whole granules of its segment.
    """
    x = _mix(mixture, device, compute)
    y = x
    for step, operator in steps:
        y = _apply(step, operator, y, start)
    return x, y


def _mix(mixture: Sequence[tuple[Tensor, float]], device: torch.device, compute: torch.dtype) -> Tensor:
    """Return a weighted sum of tiles; one tile alone is converted and nothing more."""
    # The copy also puts the tile at an aligned address, which some BLAS kernels' order of summation depends on.
    tiles = [tile.to(device=device, dtype=compute, copy=True) for tile, _ in mixture]
    if len(tiles) == 1:
        return tiles[0]
    total = torch.zeros_like(tiles[0])
    for tile, (_, weight) in zip(tiles, mixture, strict=True):
        total.add_(tile, alpha=weight)
    return total


def _apply(step: Step, operator: LayerOperator, flat: Tensor, start: int) -> Tensor:
    """Apply one step to a tile that begins at element ``start`` of the tensor."""
    rotation, scale = operator.rotation, operator.scale
    before = flat
    if step.view is View.INPUT:
        x = flat.view(-1, step.layer.num_features)
        first = (start - step.start) // x.shape[1]
        x = rotation.rotate_columns(x)
        if scale is not None:
            x = x * scale[first : first + x.shape[0], None]
    else:
        x = flat.view(-1, step.layer.num_outputs or 1)
        first = (start - step.start) // x.shape[1]
        x = rotation.restrict(first, first + x.shape[0]).rotate_rows(x)
        if scale is not None:
            x = x * scale
    after = x.reshape(-1)
    return after if operator.weight == 1 else (1 - operator.weight) * before + operator.weight * after


def _measure(x: Tensor, y: Tensor, rounded: Tensor) -> Measure:
    elements, damaged, unsound = x.numel(), 0, 0
    rounding = _squares(rounded - y)
    if not math.isfinite(rounding):
        # Infinities, as in a mask, are taken over as they are; what was done is measured on the other elements.
        finite = torch.isfinite(x)
        damaged = int((~torch.isfinite(rounded) & finite).sum())
        unsound = int((~finite).sum())
        x, y, rounded = x[finite], y[finite], rounded[finite]
        rounding = _squares(rounded - y)
    return Measure(elements, int((rounded != x).sum()), _squares(x), _squares(y - x), rounding, damaged, unsound)


def _squares(x: Tensor) -> float:
    # In float32 the squares of large weights overflow.
    x = x.to(torch.float64)
    return float(torch.dot(x, x))
