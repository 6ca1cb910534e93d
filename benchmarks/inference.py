"""What merging buys where a model runs: base, base with the adapter unmerged, and merged.

A Llama of random weights writes tokens one by one with a cache, and all-MiniLM-L6-v2 embeds a text of 16 tokens, on a
few threads of the CPU in float32. PEFT's unmerged layers make R anew in each forward. They take turns; figures are
medians. How far the merged model's outputs are from the unmerged one's is shown beside them, as a share of the largest.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measured import PROGRAM, interleaved, make_checkpoint, print_table, write_figures
from peft import PeftModel
from precision import convert, minilm, write_adapter
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "minilm"))
from peft_cpu import enable_butterflies_on_cpu

LENGTH = 16
Forward = Callable[[], Tensor]


def merged(base: Path, adapter: Path, output: Path) -> Path:
    """Merge with the program."""
    subprocess.run([PROGRAM, "merge", str(base), str(adapter), "-o", str(output), "-q"], check=True)
    return output


def write_tokens(model: Any, count: int) -> Forward:  # noqa: ANN401  # transformers is untyped
    """Return what writes ``count`` tokens after a short prompt and gives the last logits."""
    prompt = torch.arange(3, 3 + LENGTH)[None]

    @torch.inference_mode()
    def run() -> Tensor:
        tokens, cache = prompt, None
        for _ in range(count):
            out = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            # Always the same tokens, so that all models have the same to do.
            tokens, cache = prompt[:, :1], out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits

    return run


def embed(model: Any) -> Forward:  # noqa: ANN401  # transformers is untyped
    """Return what embeds one text."""
    tokens = torch.arange(1000, 1000 + LENGTH)[None]

    @torch.inference_mode()
    def run() -> Tensor:
        states: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        return states

    return run


def compare(name: str, factors: int, models: dict[str, Any], work: Callable[[Any], Forward], runs: int) -> list[Any]:
    """Time models by turns and return a row for each."""
    forwards = {by: work(model.eval()) for by, model in models.items()}
    outputs = {by: forward() for by, forward in forwards.items()}

    def timed(forward: Forward) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            forward()
            return time.perf_counter() - started

        return run

    found = interleaved({by: timed(forward) for by, forward in forwards.items()}, runs)
    exact = outputs["unmerged"]
    return [
        {
            "model": name,
            "m": factors,
            "by": by,
            "seconds": statistics.median(times),
            "of base": statistics.median(t / b for t, b in zip(times, found["base"], strict=True)),
            "from unmerged": float((outputs[by] - exact).abs().max() / exact.abs().max()),
        }
        for by, times in found.items()
    ]


def main() -> None:
    """Measure both models and print a table."""
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-300m", help="of the Llama, one of those in synthetic.py")
    parser.add_argument("--gigabytes", type=float, default=0.75, help="of the Llama in bfloat16")
    parser.add_argument("--targets", choices=["qv", "linear"], default="qv", help="what is adapted of the Llama")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    enable_butterflies_on_cpu()
    rows: list[dict[str, Any]] = []
    for factors in args.factors:
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            made = {"shape": args.shape, "gigabytes": args.gigabytes, "factors": factors, "targets": args.targets}
            make_checkpoint(root, **made)
            # In float32, the bases are what both merges are exact to.
            llama = convert(root / "base", root / "llama", "float32")
            small = convert(minilm(), root / "minilm", "float32")
            turned = write_adapter(root / "turned", small, factors, 8, 0.05)
            for label, auto, base, adapter, work in (
                ("Llama", AutoModelForCausalLM, llama, root / "adapter", args.tokens),
                ("MiniLM", AutoModel, small, turned, 0),
            ):
                whole = merged(base, adapter, root / f"{label} merged")
                models = {
                    "base": auto.from_pretrained(base, dtype=torch.float32),
                    "unmerged": PeftModel.from_pretrained(auto.from_pretrained(base, dtype=torch.float32), adapter),
                    "merged": auto.from_pretrained(whole, dtype=torch.float32),
                }
                found = compare(label, factors, models, partial(write_tokens, count=work) if work else embed, args.runs)
                rows += [{**row, "tokens/s": work / row["seconds"] if work else None} for row in found]
    print(f"{args.threads} threads; Llama: {args.tokens} tokens after {LENGTH}, {args.targets} adapted")
    print_table(rows)
    write_figures(args.json, {"inference": rows, "threads": args.threads, "shape": args.shape, "targets": args.targets})


if __name__ == "__main__":
    main()
