"""What ``boft-export interpolate --eval`` runs on each checkpoint: the task of this example, in two figures."""

from __future__ import annotations

import torch
from classify import accuracy, labels, prototype_logits
from data import load
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()


def evaluate(model_dir: str) -> dict[str, float]:
    """Classifies the test texts.

    Returns:
        accuracy: The share of texts whose module is found.
        margin: By how much the right module's similarity exceeds that of the best wrong one, on average.
    """
    split = load()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModel.from_pretrained(model_dir, dtype=torch.float32)
    logits = prototype_logits(model, tokenizer, split)
    right = torch.nn.functional.one_hot(labels(split.test), logits.shape[1]).bool()
    margin = logits[right] - logits.masked_fill(right, -torch.inf).amax(1)
    return {"accuracy": accuracy(logits, split.test), "margin": margin.mean().item()}
