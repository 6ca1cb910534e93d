"""The example's adapter on the real MiniLM: merged, it embeds as base and adapter do."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import sentence_transformers
import torch
import transformers
from base import model_folder
from peft_cpu import enable_butterflies_on_cpu

import boft_export

ADAPTER = Path(__file__).parent.parent / "examples" / "minilm" / "adapter"
TEXTS = ["Return a shallow copy of the list.", "Open a socket and listen.", "Compile a regular expression pattern."]


def embed(model: torch.nn.Module) -> torch.Tensor:
    """Return the texts' embeddings, pooled and normalised as the model's own modules say."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder())
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_merged_minilm_embeds_as_base_and_adapter(tmp_path: Path) -> None:
    out = tmp_path / "out"
    boft_export.merge(model_folder(), ADAPTER, out)
    enable_butterflies_on_cpu()
    base = transformers.AutoModel.from_pretrained(model_folder(), dtype=torch.float32)
    plain = embed(base)
    adapted = embed(peft.PeftModel.from_pretrained(base, ADAPTER))
    merged = torch.as_tensor(sentence_transformers.SentenceTransformer(str(out), device="cpu").encode(TEXTS))
    assert (merged - adapted).abs().max() < 1e-5
    assert (merged - plain).abs().max() > 0.05
    files = {p.relative_to(model_folder()) for p in Path(model_folder()).rglob("*") if p.is_file()}
    assert files <= {p.relative_to(out) for p in out.rglob("*") if p.is_file()}
