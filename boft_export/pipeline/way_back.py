"""Undoing a fold as soon as it is done: what comes back, and what is missing of what was folded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from boft_export.linalg.bits import as_integers, from_order, to_order
from boft_export.linalg.rounding import round_once
from boft_export.pipeline.corrections import corrections
from boft_export.pipeline.fold import unrounded
from boft_export.pipeline.layers import LayerCache, LayerOperator
from boft_export.pipeline.measure import Measure
from boft_export.pipeline.memory import TILE_ELEMENTS
from boft_export.pipeline.undo import Block
from boft_export.planning import Segment, Step

# Of so many tiles one is tried.
_TRIED = 8


@dataclass(frozen=True)
class WayBack:
    """The way back from folds.

    Attributes:
        there: The operators that fold.
        back: Those that undo.
        compute: The dtype to compute in.
    """

    there: LayerCache
    back: LayerCache
    compute: torch.dtype

    def go(
        self,
        result: Tensor,
        source: Tensor,
        steps: Sequence[tuple[Step, float]],
        segment: Segment,
        start: int,
        device: torch.device,
        *,
        correct: bool,
        tried: bool,
    ) -> tuple[Measure, list[Block]]:
        """Return how much of a run comes back, and the corrections that the rest needs.

        Args:
            result: The folded elements, flat, on the CPU.
            source: What was folded.
            steps: The steps of the fold, each with its alpha.
            segment: Where the run is.
            start: Its first element; a whole number of tiles into the segment.
            device: Where to compute.
            correct: Make corrections.
            tried: Try on some tiles how many elements a fold and an unfold keep.
        """
        there = [(s, self.there.get(s, a, device)) for s, a in steps]
        back = [(s, self.back.get(s, a, device)) for s, a in reversed(steps)]
        tile = segment.tile(TILE_ELEMENTS[device.type])

        def apply(x: Tensor, operators: Sequence[tuple[Step, LayerOperator]], offset: int) -> Tensor:
            return unrounded([(x, 1.0)], operators, start + offset, compute=self.compute, device=device)[1]

        measure = Measure(returned=0)
        blocks: list[Block] = []
        for offset in range(0, result.numel(), tile):
            folded, original = result[offset : offset + tile], source[offset : offset + tile]
            undone = apply(folded, back, offset)
            given = round_once(undone, original.dtype).cpu()
            measure += Measure(returned=_same(given, original))
            if correct:
                blocks += corrections(original, undone, given, start + offset)
            if tried and (start + offset - segment.start) // tile % _TRIED == 0:
                # What was folded is made of what came of it; each element's neighbour is not, and is as good.
                other = from_order(to_order(folded) + 1, folded.dtype)
                merged = round_once(apply(other, back, offset), original.dtype)
                again = round_once(apply(merged, there, offset), folded.dtype).cpu()
                measure += Measure(tried=other.numel(), kept=_same(again, other))
        return measure, blocks


def _same(one: Tensor, other: Tensor) -> int:
    return int((as_integers(one) == as_integers(other)).sum())
