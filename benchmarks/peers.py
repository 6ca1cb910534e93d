"""Merges of whole models beside the peers': PEFT, and mergekit, which merges adapters by way of PEFT.

A Llama of random bfloat16 weights that fits into memory several times over, adapters of one and of two butterfly
factors. Each is a process of its own and they take turns; figures are medians. What a model of 7 billion weights would
take PEFT is computed, never measured: its time from its dense products, at the rate seen here, and its memory from the
matrices that it holds. ``layer.py`` measures the fold of a layer alone.

mergekit runs in an environment of its own (.ci/setup-mergekit); without one it is left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from measured import (
    PROGRAM,
    QUIET,
    Run,
    interleaved,
    make_checkpoint,
    measure,
    middle,
    print_table,
    ratio,
    settle,
    write_figures,
)

ROOT = Path(__file__).parents[1]
OURS, PEFT, MERGEKIT = "boft-export", "PEFT", "mergekit"
# What is adapted of Llama-2-7B, outputs and inputs, in each of its layers.
LARGE_LAYERS, LARGE_GB = 32, 13.48
LARGE = {
    "qv": [(4096, 4096)] * 2,
    "linear": [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)],
}


@dataclass(frozen=True)
class Case:
    """Medians of one checkpoint and adapter: GB of the base, outputs and inputs of what is adapted."""

    factors: int
    targets: str
    size: float
    folded: list[tuple[int, int]]
    runs: dict[str, Run]


def peft_flops(folded: list[tuple[int, int]], num_factors: int) -> float:
    """Return the operations of PEFT's dense products: two for each factor, the factors' product, and that with W."""
    return sum(2.0 * n**3 * (3 * num_factors - 1) + 2.0 * out * n**2 for out, n in folded)


def peft_bytes(folded: list[tuple[int, int]], num_factors: int) -> float:
    """Return the bytes of PEFT's matrices: permutations, which all layers keep, and a merge's products."""
    kept = sum(4.0 * num_factors * n**2 for _, n in folded)
    return kept + max(4.0 * (3 * num_factors + 1) * n**2 + 10.0 * out * n for out, n in folded)


def adapted(work: Path) -> list[tuple[int, int]]:
    """Return outputs and inputs of each layer that an adapter adapts."""
    with (work / "adapter" / "adapter_model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    blocks = {k.removesuffix(".boft_R"): v["shape"] for k, v in header.items() if k.endswith(".boft_R")}
    return [(header[f"{k}.boft_s"]["shape"][0], shape[1] * shape[2]) for k, shape in blocks.items()]


def commands(work: Path, mergekit: Path | None) -> dict[str, list[str]]:
    """Return the command of each way to merge."""
    base, adapter, out = (str(work / name) for name in ("base", "adapter", "out"))
    found = {
        OURS: [PROGRAM, "merge", base, adapter, "-o", out, "-q"],
        PEFT: [sys.executable, str(Path(__file__).with_name("by_peft.py")), base, adapter, out],
    }
    if mergekit is not None:
        asked = {"merge_method": "passthrough", "dtype": "bfloat16", "models": [{"model": f"{base}+{adapter}"}]}
        (work / "mergekit.yml").write_text(json.dumps(asked))
        cache = ["--lora-merge-cache", str(work / "cache"), "--no-copy-tokenizer"]
        found[MERGEKIT] = [str(mergekit), str(work / "mergekit.yml"), out, *cache]
    return found


def clear(work: Path) -> None:
    """Take away what a merge wrote."""
    for name in ("out", "cache"):
        shutil.rmtree(work / name, ignore_errors=True)


def refusal(work: Path, command: list[str]) -> str:
    """Run a command and return why it failed; nothing where it did not."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    clear(work)
    if not done.returncode:
        return ""
    if "size mismatch" in done.stderr:
        return "refuses: size mismatch of boft_R, as PEFT without its CUDA extension"
    return f"fails: {done.stderr.strip().splitlines()[-1]}"


def measure_case(
    work: Path, size: float, mergekit: Path | None, args: argparse.Namespace, factors: int, targets: str
) -> tuple[Case, list[dict[str, object]]]:
    """Measure all ways on one checkpoint and one adapter; return medians and the table's rows."""
    asked = commands(work, mergekit)
    row: dict[str, object] = {"m": factors, "targets": targets}
    notes = {name: refusal(work, asked[name]) for name in asked if name == MERGEKIT and factors > 1}

    def once(name: str) -> Callable[[], Run]:
        def run() -> Run:
            clear(work)
            settle(work / "base")
            return measure(name, size, asked[name], environment=QUIET)

        return run

    found = interleaved({name: once(name) for name in asked if not notes.get(name)}, args.runs)
    clear(work)
    ours = middle(found[OURS])
    rows = []
    for name, runs in found.items():
        run = middle(runs)
        above = run.peak_mb if name == OURS else run.peak_mb - 1000 * size
        rows.append(
            {"by": name, **row, "GB": round(size, 2), "seconds": run.seconds, "times ours": ratio(runs, found[OURS])}
            | {"peak MB": run.peak_mb, "above base": above, "memory": above / ours.peak_mb, "note": ""}
        )
    empty = dict.fromkeys(("seconds", "times ours", "peak MB", "above base", "memory"))
    rows += [{"by": n, **row, "GB": round(size, 2), **empty, "note": note} for n, note in notes.items() if note]
    case = Case(factors, targets, size, adapted(work), {name: middle(runs) for name, runs in found.items()})
    return case, [{**r, "runs": [asdict(run) for run in found.get(str(r["by"]), [])]} for r in rows]


def extrapolated(cases: list[Case]) -> list[dict[str, object]]:
    """Return what Llama-2-7B would take PEFT, by the line through the smallest and the largest case.

    What a process starts with is in both. What it takes us is measured by ``merge.py``.
    """
    small, last = cases[0], cases[-1]
    m, targets = last.factors, last.targets
    large = peft_flops(LARGE[targets] * LARGE_LAYERS, m)
    (x0, y0), (x1, y1) = ((peft_flops(c.folded, m), c.runs[PEFT].seconds) for c in (small, last))
    seconds = y1 + (large - x1) * (y1 - y0) / (x1 - x0) if x1 > x0 else y1 * large / x1
    # What its matrices leave unexplained here is the base, once, and the libraries.
    rest = last.runs[PEFT].peak_mb - (peft_bytes(last.folded, m) + last.size * 1e9) / 1e6
    above = peft_bytes(LARGE[targets] * LARGE_LAYERS, m) / 1e6 + rest
    found = {"by": PEFT, "m": m, "targets": targets, "GB": LARGE_GB, "seconds": seconds, "times ours": None}
    found |= {"peak MB": above + 1000 * LARGE_GB, "above base": above, "memory": None}
    return [{**found, "note": f"extrapolated; {rest:+.0f} MB unexplained here"}]


def main() -> None:
    """Measure each case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--shape", default="llama-1b", help="one of those in synthetic.py")
    parser.add_argument("--targets", nargs="+", choices=["qv", "linear"], default=["qv", "linear"])
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--runs", type=int, default=1, help="PEFT takes minutes for each")
    parser.add_argument("--mergekit", type=Path, default=ROOT / ".venv-mergekit" / "bin" / "mergekit-yaml")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    mergekit = args.mergekit if args.mergekit.exists() else None
    if mergekit is None:
        print("mergekit is left out: .ci/setup-mergekit makes its environment")
    rows: list[dict[str, object]] = []

    def tell(found: list[dict[str, object]]) -> None:
        print()
        print_table([{k: v for k, v in row.items() if k != "runs"} for row in found])
        rows.extend(found)

    for factors, targets in product(args.factors, args.targets):
        cases = []
        for size in sorted(args.gigabytes):
            with tempfile.TemporaryDirectory(dir=args.folder) as name:
                made = {"shape": args.shape, "gigabytes": size, "block_size": args.block_size}
                actual = make_checkpoint(Path(name), factors=factors, targets=targets, **made)
                case, found = measure_case(Path(name), actual, mergekit, args, factors, targets)
            cases.append(case)
            tell(found)
        tell(extrapolated(cases))
    write_figures(args.json, {"peers": rows, "shape": args.shape, "block_size": args.block_size})


if __name__ == "__main__":
    main()
