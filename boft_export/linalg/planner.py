"""Choosing how many dense stages a product of sparse factors is applied in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

# Nanoseconds per weight element for one dense stage of the given size, float64 on one core, torch's batched product
# in tiles of TILE_ELEMENTS (benchmarks/stages.py prints this table). What matters is the ratios.
STAGE_COST = {16: 2.3, 32: 3.1, 64: 4.0, 128: 7.0, 256: 12.8, 512: 28.9}

# Blocks smaller than this are laid side by side in one block of this size: the zeros cost less than the small products.
SMALLEST_STAGE = 16

# What a stage costs beside its product where its features are not neighbours: two gathers, of short runs.
GATHER_COST = 1.0


@dataclass(frozen=True)
class Costs:
    """What it costs to apply stages, for one way of doing it.

    Attributes:
        stages: Cost per weight element of a stage, by its size, ascending; two sizes at least.
        smallest: Blocks smaller than this are laid side by side in one of this size.
        gather: What a stage whose features are not neighbours costs besides.
    """

    stages: Mapping[int, float]
    smallest: int
    gather: float

    def of(self, size: int) -> float:
        """Return the cost of a stage of ``size``, interpolated in log-log between the measured sizes."""
        size = max(size, self.smallest)
        steps = list(pairwise(self.stages.items()))
        (low, cost), (high, next_cost) = next((s for s in steps if size <= s[1][0]), steps[-1])
        t = math.log(size / low) / math.log(high / low)
        return math.exp((1 - t) * math.log(cost) + t * math.log(next_cost))


TORCH_COSTS = Costs(STAGE_COST, SMALLEST_STAGE, GATHER_COST)
# Of the compiled kernel (AVX-512; benchmarks/fold_kernel.py), less what a fold without any stage costs. It gathers from
# anywhere as it multiplies.
KERNEL_COSTS = Costs(
    {4: 0.19, 8: 0.34, 16: 0.63, 32: 1.21, 64: 2.31, 128: 4.5, 256: 9.1, 512: 19.5}, smallest=4, gather=0.1
)


def plan_stages(
    num_factors: int, run_size: Callable[[int, int], int], costs: Costs = TORCH_COSTS
) -> list[tuple[int, int]]:
    """Return the cheapest way to fuse neighbouring factors into dense stages, as an FFT planner picks radices.

    Args:
        num_factors: Number m of factors.
        run_size: ``run_size(i, j)``, the number of features that factors i to j - 1 couple.
        costs: What stages cost.

    Returns:
        Half-open runs (i, j) that cover 0..m in order; each becomes one stage.
    """
    best: list[tuple[float, list[tuple[int, int]]]] = [(0.0, [])]
    for j in range(1, num_factors + 1):
        candidates = [
            (best[i][0] + costs.of(run_size(i, j)) + (costs.gather if i else 0.0), [*best[i][1], (i, j)])
            for i in range(j)
        ]
        best.append(min(candidates, key=lambda c: c[0]))
    return best[-1][1]
