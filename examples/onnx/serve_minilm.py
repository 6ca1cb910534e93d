"""Embeds sentences with MiniLM's graph: ONNX Runtime, NumPy and a tokenizer, and no PyTorch."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

# Docstrings of pathlib and of socket. The adapter was trained on others of these modules.
SENTENCES = [
    "Whether this path is a socket.",
    "Return a new path with the file name changed.",
    "True if the SocketIO is open for writing.",
    "Resolve host and port into list of address info entries.",
]


def embed(folder: Path, sentences: list[str]) -> NDArray[np.float32]:
    """Returns a unit vector for each sentence: the graph pools and normalises."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(256)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    rows = tokenizer.encode_batch(sentences)
    inputs = {
        "input_ids": np.array([row.ids for row in rows]),
        "attention_mask": np.array([row.attention_mask for row in rows]),
        "token_type_ids": np.array([row.type_ids for row in rows]),
    }
    (embeddings,) = session.run(["sentence_embedding"], inputs)
    return np.asarray(embeddings)


def main() -> None:
    """Prints how similar sentences are to each other."""
    parser = argparse.ArgumentParser(description="Compare sentences by their embeddings.")
    parser.add_argument("folders", type=Path, nargs="+", help="folders that boft-export onnx wrote")
    args = parser.parse_args()
    width = max(map(len, SENTENCES))
    for folder in args.folders:
        embeddings = embed(folder, SENTENCES)
        print(folder)
        for sentence, cosines in zip(SENTENCES, embeddings @ embeddings.T, strict=True):
            print(f"  {sentence:{width}}", *(f"{cosine:5.2f}" for cosine in cosines))


if __name__ == "__main__":
    main()
