"""Continues a text with the graph of a causal model: ONNX Runtime, NumPy and a tokenizer, and no PyTorch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def generate(folder: Path, prompt: str, count: int = 64) -> str:
    """Appends the likeliest token at most ``count`` times; what went in before is kept as keys and values."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = json.loads((folder / "config.json").read_text())["eos_token_id"]
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    past = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past_key_values")}
    cache = {name: np.zeros((1, heads, 0, size), np.float32) for name, (_, heads, _, size) in past.items()}
    text = step = np.array([tokenizer.encode(prompt).ids])
    for _ in range(count):
        positions = np.arange(text.shape[1] - step.shape[1], text.shape[1])[None]
        fed = {"input_ids": step, "attention_mask": np.ones_like(text), "position_ids": positions}
        logits, *present = session.run(None, fed | cache)
        cache = dict(zip(cache, present, strict=True))
        step = logits[:, -1:].argmax(-1)
        if step[0, 0] == end:
            break
        text = np.hstack([text, step])
    return str(tokenizer.decode(text[0].tolist()))


def main() -> None:
    """Prints what each graph makes of the prompt."""
    parser = argparse.ArgumentParser(description="Continue a text with exported graphs.")
    parser.add_argument("prompt", help="how the text begins")
    parser.add_argument("folders", type=Path, nargs="+", help="folders that boft-export onnx wrote")
    args = parser.parse_args()
    for folder in args.folders:
        print(f"{folder}: {generate(folder, args.prompt)}")


if __name__ == "__main__":
    main()
