"""The fold of one layer: PEFT's own, ours by torch and ours by the compiled kernel.

A square weight in bfloat16, m factors of blocks of b. By turns, each way folds the same weight; figures are medians.
PEFT's ``merge`` makes R from what was trained each time, and so does "R, fold ms" here; "fold ms" is what a layer's
size adds, once R is there. Both stand beside PEFT's ``merge``: how many times as fast. Ours writes correctly rounded
results and takes the sums that a manifest has, too. "Fold" writes into memory that is there, as the merge's buffers
are; "R, fold" into a new result, as PEFT does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from folding import fold_by_kernel, fold_by_torch, layer_of
from measured import interleaved, print_table, write_figures
from numpy.typing import NDArray
from peft import BOFTConfig
from peft.tuners.boft.layer import Linear
from torch import Tensor, nn

from boft_export import Factor, Rotation, native
from boft_export.adapters import View
from boft_export.linalg.butterfly import butterfly_index
from boft_export.linalg.cayley import cayley, skew
from boft_export.linalg.planner import KERNEL_COSTS, TORCH_COSTS, Costs
from boft_export.pipeline.allocator import keep_tiles_free_chunks

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "minilm"))
from peft_cpu import enable_butterflies_on_cpu


def rotation(trained: Tensor, costs: Costs) -> Rotation:
    """Return R of PEFT's ``boft_R`` (m, D, b, b), in the stages that cost least, as a merge makes it without torch."""
    blocks = cayley(skew(trained.numpy().astype(np.float64)))
    size = blocks.shape[-1]
    factors = (Factor(q, butterfly_index(i, len(q), size, np)) for i, q in enumerate(blocks))
    return Rotation(tuple(factors)).fused(costs.smallest, costs)


@dataclass(frozen=True)
class Way:
    """How a layer is folded: by what, on how many threads, and the bytes that R takes."""

    by: str
    threads: int
    held: int
    fold: Callable[[], Tensor]
    whole: Callable[[], Tensor]

    def __str__(self) -> str:
        """Return a name that no other way has."""
        return f"{self.by}, {self.threads}"


def ours(trained: Tensor, scale: NDArray[np.float64], weight: Tensor, threads: int) -> Iterator[Way]:
    """Yield our ways on so many threads: fold with an R that is there, and with one that is made each time."""
    pool = ThreadPoolExecutor(threads)
    layer = layer_of(weight, View.INPUT, len(trained), trained.shape[-1])

    def by_torch() -> Callable[[], Tensor]:
        turned = rotation(trained, TORCH_COSTS).tensors()
        return fold_by_torch(layer, View.INPUT, turned, scale, weight, pool)

    def by_kernel() -> Callable[[], Tensor]:
        return fold_by_kernel(layer, View.INPUT, rotation(trained, KERNEL_COSTS), scale, weight, pool)

    ways = {"torch": (by_torch, TORCH_COSTS)}
    if kernel := native.instruction_set():
        ways[kernel] = by_kernel, KERNEL_COSTS
    for by, (ready, costs) in ways.items():
        held = sum(f.blocks.nbytes for f in rotation(trained, costs).factors)
        yield Way(by, threads, held, ready(), lambda ready=ready: ready()())  # type: ignore[misc]


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """Return a function that says how many milliseconds something takes."""

    def run() -> float:
        started = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - started)

    return run


def times(theirs: Sequence[float], own: Sequence[float]) -> float:
    """Return how many times as fast we are: the median of ratios within a round."""
    return statistics.median(a / b for a, b in zip(theirs, own, strict=True))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--factors", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=5, help="of PEFT; others are done ten times as often")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    n, m, b = args.features, args.factors, args.block_size
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    keep_tiles_free_chunks()
    enable_butterflies_on_cpu()
    weight = (torch.randn(n, n) * 0.02).bfloat16()
    base = nn.Linear(n, n, bias=False).bfloat16()
    config = BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, init_weights=False)
    peft = Linear(base, "default", config)
    # A PEFT model holds its adapter in float32, whatever the base's dtype.
    peft.boft_R.float()
    peft.boft_s.float()
    trained, scale = peft.boft_R["default"].data, peft.boft_s["default"].data.double().numpy().ravel()

    @torch.no_grad()
    def merge() -> Tensor:
        base.weight.data = weight
        peft.merged_adapters.clear()
        peft.merge()
        return base.weight.data

    reference = Way("PEFT", args.threads, peft.boft_P.nbytes, merge, merge)
    counts = sorted({1, args.threads})
    ways = [way for threads in counts for way in ours(trained, scale, weight, threads)]
    results = [way.fold() for way in ways]
    if any(not torch.equal(result, results[0]) for result in results):
        sys.exit("the results of our ways differ")

    def often(work: Callable[[], object], repeats: int) -> Callable[[], float]:
        return lambda: statistics.median(timed(work)() for _ in range(repeats))

    peft_ms = {str(reference): often(merge, 1)}
    folds = interleaved(peft_ms | {str(way): often(way.fold, 10) for way in ways}, args.runs)
    wholes = interleaved({str(way): often(way.whole, 10) for way in ways}, args.runs)
    wholes[str(reference)] = folds[str(reference)]
    rows: list[dict[str, object]] = []
    for way in (reference, *ways):
        fold, whole = folds[str(way)], wholes[str(way)]
        row: dict[str, object] = {
            "by": way.by,
            "threads": way.threads,
            "fold ms": statistics.median(fold),
            "ns/element": 1e6 * statistics.median(fold) / n**2,
            "times PEFT": times(folds[str(reference)], fold),
            "R, fold ms": statistics.median(whole),
            "R too": times(folds[str(reference)], whole),
            "R, MB": way.held / 1e6,
        }
        rows.append(row)
    print(f"one layer, {n} x {n}, m = {m}, b = {b}, bfloat16, {args.runs} runs")
    print_table(rows)
    apart = float(torch.ne(merge(), results[0]).double().mean())
    print(f"{apart:.2%} of PEFT's elements are another bfloat16 than the correctly rounded one")
    write_figures(args.json, {"layer": rows, "features": n, "factors": m, "block_size": b, "differing": apart})


if __name__ == "__main__":
    main()
