"""Checks a merged MiniLM on the task of this example: it has to classify exactly as the base with its adapter does."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from classify import accuracy, prototype_logits
from data import CLASSES, load
from peft import PeftModel
from peft_cpu import enable_butterflies_on_cpu
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

TOLERANCE = 1e-4


def main() -> int:
    """Compares the base, the base with its adapter unmerged, and the merged checkpoint.

    Returns:
        0 if the merged checkpoint gives the logits of base and adapter, and not those of the base; else 1.
    """
    parser = argparse.ArgumentParser(description="Compare a merged MiniLM with its base and adapter.")
    parser.add_argument("base", type=Path, help="folder of the base checkpoint")
    parser.add_argument("adapter", type=Path, help="folder of the PEFT adapter")
    parser.add_argument("merged", type=Path, help="folder of the merged checkpoint")
    args = parser.parse_args()

    logging.disable_progress_bar()
    # PEFT asks transformers for something by its old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    enable_butterflies_on_cpu()
    split = load()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    base = AutoModel.from_pretrained(args.base, dtype=torch.float32)
    merged = AutoModel.from_pretrained(args.merged, dtype=torch.float32)
    # The base goes first: PEFT puts the adapter's layers into the model that it is given.
    base_logits = prototype_logits(base, tokenizer, split)
    adapted_logits = prototype_logits(PeftModel.from_pretrained(base, args.adapter), tokenizer, split)
    merged_logits = prototype_logits(merged, tokenizer, split)

    table = Table(title=f"{len(split.test)} docstrings, {len(CLASSES)} modules to choose from")
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    table.add_column("largest |logit difference|\nto base + adapter", justify="right")
    table.add_column("same answer as\nbase + adapter", justify="right")
    for name, logits in [("base", base_logits), ("base + adapter", adapted_logits), ("merged", merged_logits)]:
        difference = (logits - adapted_logits).abs().max().item()
        agreement = (logits.argmax(1) == adapted_logits.argmax(1)).float().mean().item()
        table.add_row(name, f"{accuracy(logits, split.test):.1%}", f"{difference:.1e}", f"{agreement:.1%}")

    faithful = torch.allclose(merged_logits, adapted_logits, rtol=0, atol=TOLERANCE)
    changed = not torch.allclose(merged_logits, base_logits, rtol=0, atol=TOLERANCE)
    if not changed:
        table.caption = "merged is still the base"
    else:
        table.caption = f"merged is {'' if faithful else 'NOT '}base + adapter to within {TOLERANCE:.0e}"
    Console().print(table)
    return 0 if faithful and changed else 1


if __name__ == "__main__":
    sys.exit(main())
