"""Classification by prototypes: a text belongs to the class whose mean training embedding it is most similar to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from data import CLASSES, Split, Text
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot
from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 48
# PEFT builds every layer's rotation anew in each forward pass, so few large batches cost less than many small ones.
BATCH = 512


def embed(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text]) -> Tensor:
    """Returns one unit vector per text, pooled as all-MiniLM-L6-v2 was trained to be: by the mean over its tokens."""
    tokens = tokenizer(
        [text.words for text in texts], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    states: Tensor = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def embed_all(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text]) -> Tensor:
    """Embeds any number of texts for evaluation, texts of like length together to save on padding."""
    model.eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].words))
    with torch.inference_mode():
        parts = [
            embed(model, tokenizer, [texts[i] for i in order[start : start + BATCH]])
            for start in range(0, len(order), BATCH)
        ]
    return torch.cat(parts)[torch.tensor(order).argsort()]


def labels(texts: Sequence[Text]) -> Tensor:
    """Returns the texts' classes, by number."""
    return torch.tensor([text.label for text in texts])


def class_sums(embeddings: Tensor, classes: Tensor) -> Tensor:
    """Adds up the embeddings of each class; the prototypes are the directions of these sums."""
    return one_hot(classes, len(CLASSES)).to(embeddings.dtype).T @ embeddings


def prototype_logits(model: nn.Module, tokenizer: PreTrainedTokenizerBase, split: Split) -> Tensor:
    """Returns the cosine similarity of each test text to the prototype of each class."""
    embeddings = embed_all(model, tokenizer, [*split.train, *split.test])
    train, test = embeddings[: len(split.train)], embeddings[len(split.train) :]
    return test @ normalize(class_sums(train, labels(split.train)), dim=-1).T


def accuracy(logits: Tensor, texts: Sequence[Text]) -> float:
    """Returns the share of texts whose class has the largest logit."""
    return (logits.argmax(1) == labels(texts)).float().mean().item()
