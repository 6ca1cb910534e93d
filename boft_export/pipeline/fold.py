"""The fold itself: a run of a tensor's elements in, rotated, scaled and rounded elements out."""

from __future__ import annotations

import contextlib
import math
import queue
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from boft_export.adapters import View
from boft_export.linalg.rounding import round_once
from boft_export.pipeline.layers import LayerOperator
from boft_export.pipeline.measure import Measure
from boft_export.planning import Step


def fold(
    mixture: Sequence[tuple[Tensor, float]],
    steps: Sequence[tuple[Step, LayerOperator]],
    start: int,
    out: Tensor,
    *,
    compute: torch.dtype,
    device: torch.device,
    tile: int,
) -> list[Measure]:
    """Apply steps to a run of a tensor's elements and round the result once.

    Args:
        mixture: What the elements are a weighted sum of: each one's elements, flat, on the CPU, and its weight.
        steps: The steps in order, each with its operator.
        start: The element of the tensor at which they begin; a whole number of tiles into its segment.
        out: Where the new elements go, flat, on the CPU.
        compute: The dtype to compute in.
        device: Where to compute.
        tile: Elements to compute at once. Tiles lie at fixed places in the tensor, so that the sums, and with them the
            last bits, don't depend on how the work is cut.

    Returns:
        What was done to each tile: whoever adds that up in the tensor's order gets the same sums however the work is
        cut.
    """
    measures = []
    with _own_stream(device):
        for offset in range(0, out.numel(), tile):
            run = [(m[offset : offset + tile], weight) for m, weight in mixture]
            x, y = unrounded(run, steps, start + offset, compute=compute, device=device)
            rounded = round_once(y, out.dtype)
            out[offset : offset + tile].copy_(rounded, non_blocking=True)
            measures.append(_measure(x, y, rounded.to(compute)))
    return measures


# On a GPU: one's copies go on beside another's products, and no more tiles than that are in its memory at once.
_STREAMS = 3


@lru_cache
def _streams(device: torch.device) -> queue.SimpleQueue[torch.cuda.Stream]:
    streams: queue.SimpleQueue[torch.cuda.Stream] = queue.SimpleQueue()
    for _ in range(_STREAMS):
        streams.put(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    return streams


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Compute on a stream that no other thread uses meanwhile; at the end, all is done."""
    if device.type != "cuda":
        yield
        return
    streams = _streams(device)
    stream = streams.get()
    try:
        # Rotations are put there on the default stream.
        stream.wait_stream(torch.cuda.default_stream(device))
        with torch.cuda.stream(stream):
            yield
    finally:
        # Also where something failed: buffers that are still copied from or to must not be used again.
        stream.synchronize()
        streams.put(stream)


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
    tiles = [tile.to(device, non_blocking=True).to(compute, copy=True) for tile, _ in mixture]
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
            x.mul_(scale[first : first + x.shape[0], None])
    else:
        x = flat.view(-1, step.layer.num_outputs or 1)
        first = (start - step.start) // x.shape[1]
        x = rotation.restrict(first, first + x.shape[0]).rotate_rows(x)
        if scale is not None:
            x.mul_(scale)
    after = x.reshape(-1)
    return after if operator.weight == 1 else (1 - operator.weight) * before + operator.weight * after


def _measure(x: Tensor, y: Tensor, rounded: Tensor) -> Measure:
    elements, damaged, unsound = x.numel(), 0, 0
    scratch = rounded - y
    rounding = _squares(scratch)
    if not math.isfinite(rounding):
        # Infinities, as in a mask, are taken over as they are; what was done is measured on the other elements.
        finite = torch.isfinite(x)
        damaged = int((~torch.isfinite(rounded) & finite).sum())
        unsound = int((~finite).sum())
        x, y, rounded = x[finite], y[finite], rounded[finite]
        scratch = rounded - y
        rounding = _squares(scratch)
    change = _squares(torch.sub(y, x, out=scratch))
    # Faster than comparing.
    changed = int(torch.count_nonzero(torch.sub(rounded, x, out=scratch)))
    return Measure(elements, changed, _squares(x), change, rounding, damaged, unsound)


def _squares(x: Tensor) -> float:
    # In float32 the squares of large weights overflow.
    x = x.to(torch.float64)
    return float(torch.dot(x, x))
