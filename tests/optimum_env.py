"""What runs beside optimum only: its classes load our folders, and its exporter is one of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from base import model_folder
from optimum.onnxruntime import (
    ORTModelForCausalLM,
    ORTModelForFeatureExtraction,
    ORTModelForSeq2SeqLM,
    ORTModelForSequenceClassification,
)
from sentence_transformers import SentenceTransformer
from support import boft_tensors, write_adapter
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from boft_export import export_onnx

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "feature-extraction": lambda: BertModel(BertConfig(**SIZES)),
    "text-classification": lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)),
    "text-generation": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "text2text-generation": lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)),
}
GREEDY = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """Returns a folder with a task's tiny model as it was exported, each export once, and the model."""
    folder, done = tmp_path_factory.mktemp("made"), {}

    def make(task: str, exporter: str = "dynamo") -> tuple[Path, Any]:
        if (task, exporter) not in done:
            torch.manual_seed(0)
            model = MODELS[task]().eval()
            model.save_pretrained(folder / task)
            result = export_onnx(folder / task, (), folder / f"{task}-{exporter}", task=task, exporter=exporter)
            done[task, exporter] = result.output, model
        return done[task, exporter]

    return make


def inputs() -> dict[str, Any]:
    ids = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("exporter", ["dynamo", "optimum"])
@pytest.mark.parametrize(
    ("task", "kind", "output"),
    [
        ("feature-extraction", ORTModelForFeatureExtraction, "last_hidden_state"),
        ("text-classification", ORTModelForSequenceClassification, "logits"),
    ],
)
def test_an_encoder_loads_and_gives_the_models_outputs(
    made: Any, task: str, kind: Any, output: str, exporter: str
) -> None:
    folder, model = made(task, exporter)
    with torch.no_grad():
        torch.testing.assert_close(kind.from_pretrained(folder)(**inputs())[output], model(**inputs())[output])


@pytest.mark.parametrize("exporter", ["dynamo", "optimum"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("task", "kind"), [("text-generation", ORTModelForCausalLM), ("text2text-generation", ORTModelForSeq2SeqLM)]
)
def test_generation_gives_the_models_tokens(made: Any, task: str, kind: Any, exporter: str, *, use_cache: bool) -> None:
    folder, model = made(task, exporter)
    served = (
        kind.from_pretrained(folder) if task == "text-generation" else kind.from_pretrained(folder, use_cache=use_cache)
    )
    found = served.generate(**inputs(), **GREEDY, use_cache=use_cache)
    assert torch.equal(found, model.generate(**inputs(), **GREEDY))


def test_sentence_transformers_serves_a_folder_as_it_is(tmp_path: Path) -> None:
    result = export_onnx(model_folder(), (), tmp_path / "out", task="feature-extraction")
    texts = ["a first sentence", "and another one, which is longer"]
    served = SentenceTransformer(str(result.output), backend="onnx").encode(texts)
    np.testing.assert_allclose(served, SentenceTransformer(str(model_folder()), device="cpu").encode(texts), atol=1e-5)


def test_optimum_exports_a_model_with_its_adapter_folded_in(made: Any, tmp_path: Path) -> None:
    folder, _ = made("feature-extraction")
    adapter = write_adapter(tmp_path / "adapter", boft_tensors("encoder.layer.0.attention.self.query", 32, 32, seed=0))
    base = folder.parent / "feature-extraction"
    result = export_onnx(base, adapter, tmp_path / "out", exporter="optimum", quantize="int8")
    assert [a.kind for a in result.agreements] == ["int8"]
    assert not [f for f in (tmp_path / "out").rglob("*") if f.suffix == ".safetensors"]
    assert str(tmp_path).encode() not in (tmp_path / "out" / "model.onnx").read_bytes()
