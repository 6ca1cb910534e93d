"""Trains the BOFT adapter of this example on a CPU: MiniLM learns to tell standard-library modules apart.

Takes some twelve minutes on two cores, about half of it spent by PEFT on multiplying rotations as dense matrices.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch
from base import model_folder
from classify import accuracy, class_sums, embed, labels, prototype_logits
from data import CLASSES, MAX_WORDS, Split, Text, load
from peft import BOFTConfig, PeftModel, TaskType, get_peft_model
from peft_cpu import enable_butterflies_on_cpu
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

BASE = "sentence-transformers/all-MiniLM-L6-v2"
BLOCK_SIZE = 8
FACTORS = 2
# Every linear layer of the encoder but not the pooler's, which mean pooling passes by: that one is "pooler.dense".
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
TEXTS_PER_CLASS = 12
LEARNING_RATE = 5e-3
SCALE = 20.0

CARD = """\
---
base_model: {base}
library_name: peft
tags:
- boft
---

# Which standard-library module is this docstring from?

A BOFT adapter for [all-MiniLM-L6-v2](https://huggingface.co/{base}), made to have something real to
merge: `train.py` in the folder above trained it with PEFT on a CPU. Embeddings are pooled by their mean and normalised,
as in the base model. A docstring is assigned to the module with the most similar prototype, which is the mean embedding
of that module's training texts.

|                  | accuracy on {n_test} test texts |
|------------------|--------------------------------|
| base model       | {base_accuracy:.1%}                          |
| with the adapter | {accuracy:.1%}                          |

- Data: the first {words} words of the docstrings of {n_classes} modules of Python {python}, the module's
  own name masked; {n_train} texts to train on.
- Adapter: {factors} butterfly factors of {block_size}x{block_size} blocks, and a scale per output feature, on every
  linear layer of the encoder; {parameters:,} numbers in float32. The median block rotates by up to
  {median:.0f} degrees, the strongest by {maximum:.0f}.
- Training: {epochs} epochs ({minutes:.0f} minutes on {threads} threads) of leave-one-out prototype classification,
  batches of {batch}, Adam at {learning_rate} with cosine decay, seed {seed}.
- Versions: peft {peft}, torch {torch}, transformers {transformers}.

PEFT needs CUDA for more than one butterfly factor. Without it, PEFT 0.21 makes a one-factor adapter of this one's
configuration, which the weights then do not fit; `peft_cpu.py` in the folder above is a way around that.
"""


def leave_one_out_loss(embeddings: Tensor, classes: Tensor) -> Tensor:
    """Returns the cross-entropy of classifying each text of a batch by the prototypes of the others."""
    sums = class_sums(embeddings, classes)
    similarity = embeddings @ normalize(sums, dim=-1).T
    # A prototype that the text itself is part of would be similar to it whatever the weights.
    own = (embeddings * normalize(sums[classes] - embeddings, dim=-1)).sum(1, keepdim=True)
    return cross_entropy(SCALE * similarity.scatter(1, classes.unsqueeze(1), own), classes)


def draw_batch(train: list[Text]) -> list[Text]:
    """Draws the same number of texts from each class."""
    shuffled = [train[int(i)] for i in torch.randperm(len(train))]
    return [
        text
        for label in range(len(CLASSES))
        for text in [text for text in shuffled if text.label == label][:TEXTS_PER_CLASS]
    ]


def fit(model: PeftModel, tokenizer: PreTrainedTokenizerBase, split: Split, epochs: int) -> None:
    """Trains the adapter for as many batches as hold that many times the number of training texts."""
    steps = epochs * math.ceil(len(split.train) / (TEXTS_PER_CLASS * len(CLASSES)))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    started = time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        texts = draw_batch(split.train)
        loss = leave_one_out_loss(embed(model, tokenizer, texts), labels(texts))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        print(f"step {step}/{steps}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)


def rotation_degrees(model: PeftModel) -> Tensor:
    """Returns the largest angle, in degrees, by which each rotation block of the adapter turns anything."""
    blocks = torch.cat([p.detach().flatten(0, 1) for name, p in model.named_parameters() if ".boft_R." in name])
    # The Cayley transform turns an eigenvalue i*t of a skew-symmetric matrix into a rotation by 2*atan(t).
    t = torch.linalg.matrix_norm(0.5 * (blocks - blocks.mT), ord=2)
    return torch.rad2deg(2 * torch.atan(t))


def main() -> None:
    """Trains, evaluates and saves the adapter."""
    parser = argparse.ArgumentParser(description="Train the example's BOFT adapter.")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training texts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of batches and dropout (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "adapter", help="where to save it (default: %(default)s)"
    )
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    logging.disable_progress_bar()
    enable_butterflies_on_cpu()
    split = load()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    base = AutoModel.from_pretrained(model_folder())
    base_accuracy = accuracy(prototype_logits(base, tokenizer, split), split.test)
    print(f"{len(CLASSES)} classes, {len(split.train)} training texts, {len(split.test)} test texts")
    print(f"base accuracy {base_accuracy:.1%}", flush=True)

    config = BOFTConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        target_modules=TARGETS,
        boft_block_size=BLOCK_SIZE,
        boft_n_butterfly_factor=FACTORS,
        bias="none",
    )
    model = get_peft_model(base, config)
    # PEFT noted the folder that the base was loaded from, which says nothing to anyone else.
    model.active_peft_config.base_model_name_or_path = BASE
    started = time.monotonic()
    fit(model, tokenizer, split, args.epochs)
    minutes = (time.monotonic() - started) / 60
    tuned_accuracy = accuracy(prototype_logits(model, tokenizer, split), split.test)
    degrees = rotation_degrees(model)
    print(f"tuned accuracy {tuned_accuracy:.1%}, rotations of up to {degrees.max():.1f} degrees")

    model.save_pretrained(args.out, save_embedding_layers=False)
    card = CARD.format(
        base=BASE,
        n_test=len(split.test),
        n_train=len(split.train),
        n_classes=len(CLASSES),
        words=MAX_WORDS,
        base_accuracy=base_accuracy,
        accuracy=tuned_accuracy,
        python=platform.python_version(),
        factors=FACTORS,
        block_size=BLOCK_SIZE,
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        median=degrees.median().item(),
        maximum=degrees.max().item(),
        epochs=args.epochs,
        minutes=minutes,
        threads=torch.get_num_threads(),
        batch=TEXTS_PER_CLASS * len(CLASSES),
        learning_rate=LEARNING_RATE,
        seed=args.seed,
        **{package: version(package) for package in ("peft", "torch", "transformers")},
    )
    # In place of the form that PEFT leaves to be filled in.
    (args.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
