"""The fold of one layer: PEFT's own, ours by torch and ours by the compiled kernel.

A square weight in bfloat16, m factors of blocks of b. By turns, each way folds the same weight; figures are medians.
PEFT's ``merge`` makes R from what was trained each time, and so does "R, fold ms" here; "fold ms" is what a layer's
size adds, once R is there. Both stand beside PEFT's ``merge``: how many times as fast. Ours writes correctly rounded
results and takes the sums that a manifest has, too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from measured import interleaved, print_table, write_figures
from peft import BOFTConfig
from peft.tuners.boft.layer import Linear
from torch import Tensor, nn

from boft_export import Factor, Rotation, native
from boft_export.linalg.butterfly import butterfly_index
from boft_export.linalg.cayley import cayley, skew
from boft_export.linalg.rounding import round_once
from boft_export.pipeline.allocator import keep_tiles_free_chunks

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "minilm"))
from peft_cpu import enable_butterflies_on_cpu

# Features of a dense stage, and elements of a tile of the torch path, as the merge has them.
STAGE, TILE = 16, 1 << 17


def rotation(trained: Tensor) -> Rotation:
    """Return R of PEFT's ``boft_R`` (m, D, b, b), in few dense stages."""
    blocks = cayley(skew(trained.double()))
    size = blocks.shape[-1]
    factors = (Factor(q, butterfly_index(i, len(q), size)) for i, q in enumerate(blocks))
    return Rotation(tuple(factors)).fused(STAGE)


def program(turned: Rotation) -> native.Program:
    """Return R as the compiled kernel takes it."""
    stages = [native.Stage(f.blocks.numpy(), f.index.numpy()) for f in turned.factors]
    return native.Program(stages, turned.num_features)


def fold_by_torch(turned: Rotation, scale: Tensor, weight: Tensor) -> Tensor:
    """Return diag(s) W R^T, a tile at a time."""
    rows = max(1, TILE // weight.shape[1])
    out = torch.empty_like(weight)
    for i in range(0, len(weight), rows):
        x = turned.rotate_columns(weight[i : i + rows].double()) * scale[i : i + rows]
        out[i : i + rows] = round_once(x, weight.dtype)
    return out


def fold_by_kernel(made: native.Program, scale: Tensor, weight: Tensor, pool: ThreadPoolExecutor, parts: int) -> Tensor:
    """Return diag(s) W R^T, an equal part of the rows by each thread."""
    out = torch.empty_like(weight)
    source, target, scales = weight.view(torch.int16).numpy(), out.view(torch.int16).numpy(), scale.numpy().ravel()
    step = -(-len(weight) // parts)

    def part(first: int) -> None:
        rows = slice(first, first + step)
        native.fold_rows(made, source[rows], "BF16", target[rows], "BF16", scale=scales[rows], tile_rows=32)

    list(pool.map(part, range(0, len(weight), step)))
    return out


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """Return a function that says how many milliseconds something takes."""

    def run() -> float:
        started = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - started)

    return run


def differing(found: Tensor, other: Tensor) -> float:
    """Return the share of elements that differ."""
    return float((found != other).double().mean())


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
    trained, scale = peft.boft_R["default"].data, peft.boft_s["default"].data.double()

    @torch.no_grad()
    def merge() -> None:
        base.weight.data = weight
        peft.merged_adapters.clear()
        peft.merge()

    turned = rotation(trained)
    made = program(turned)
    pool = ThreadPoolExecutor(args.threads)
    ways: dict[str, tuple[int, Callable[[], object], Callable[[], object]]] = {
        "PEFT": (args.threads, merge, merge),
        "torch": (
            args.threads,
            lambda: fold_by_torch(turned, scale, weight),
            lambda: fold_by_torch(rotation(trained), scale, weight),
        ),
    }
    if kernel := native.instruction_set():
        for parts in sorted({1, args.threads}):
            ways[f"{kernel}, {parts} thread{'s' * (parts > 1)}"] = (
                parts,
                lambda p=parts: fold_by_kernel(made, scale, weight, pool, p),  # type: ignore[misc]
                lambda p=parts: fold_by_kernel(program(rotation(trained)), scale, weight, pool, p),  # type: ignore[misc]
            )

    def often(work: Callable[[], object], times: int) -> Callable[[], float]:
        return lambda: statistics.median(timed(work)() for _ in range(times))

    times = {name: 1 if name == "PEFT" else 10 for name in ways}
    folds = interleaved({name: often(fold, times[name]) for name, (_, fold, _) in ways.items()}, args.runs)
    wholes = interleaved(
        {name: often(whole, times[name]) for name, (_, _, whole) in ways.items() if name != "PEFT"}, args.runs
    )
    wholes["PEFT"] = folds["PEFT"]
    merge()
    ours = fold_by_torch(turned, scale, weight)
    if kernel and differing(fold_by_kernel(made, scale, weight, pool, args.threads), ours):
        sys.exit("the kernel's results are not those of torch")
    held = {"PEFT": peft.boft_P.nbytes, "torch": sum(f.blocks.nbytes for f in turned.factors)}
    rows: list[dict[str, object]] = []
    for name, (threads, _, _) in ways.items():
        fold, whole = statistics.median(folds[name]), statistics.median(wholes[name])
        row: dict[str, object] = {
            "by": name,
            "threads": threads,
            "fold ms": fold,
            "ns/element": 1e6 * fold / n**2,
            "times PEFT": statistics.median(p / f for p, f in zip(folds["PEFT"], folds[name], strict=True)),
            "R, fold ms": whole,
            "R too": statistics.median(p / w for p, w in zip(folds["PEFT"], wholes[name], strict=True)),
            "R, MB": held.get(name, made.nbytes) / 1e6,
        }
        rows.append(row)
    print(f"one layer, {n} x {n}, m = {m}, b = {b}, bfloat16, {args.runs} runs")
    print_table(rows)
    apart = differing(base.weight.data, ours)
    print(f"{apart:.2%} of PEFT's elements are another bfloat16 than the correctly rounded one")
    write_figures(args.json, {"layer": rows, "features": n, "factors": m, "block_size": b, "differing": apart})


if __name__ == "__main__":
    main()
