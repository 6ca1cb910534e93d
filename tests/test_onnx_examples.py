"""The examples that serve graphs: they say what PyTorch says, and what the adapters taught."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from base import model_folder
from generate import generate
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from serve_minilm import SENTENCES, embed
from weather import DAYS, PIRATE, PLAIN, reports, train

import boft_export

MINILM_ADAPTER = Path(__file__).parent.parent / "examples" / "minilm" / "adapter"
# A city of each sky on a Sunday, of which the adapter has read nothing.
PROMPTS = [text.partition(":")[0] + ":" for text in reports(PLAIN, DAYS[-1:])[::5]]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]


@pytest.fixture(scope="module")
def weather(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and adapter of the weather reports after fewer steps, and their graphs."""
    folder = tmp_path_factory.mktemp("weather")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(folder, base_steps=200, adapter_steps=150)
    torch.set_num_threads(threads)
    boft_export.export_onnx(folder / "base", (), folder / "plain")
    boft_export.export_onnx(folder / "base", folder / "adapter", folder / "pirate", base_onnx=folder / "plain")
    return folder


def continued(folder: Path, adapter: Path | None, prompt: str) -> str:
    """Return what transformers makes of a prompt."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**tokens, max_new_tokens=64, do_sample=False)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_graphs_write_what_transformers_does(weather: Path, prompt: str) -> None:
    plain, pirate = generate(weather / "plain", prompt), generate(weather / "pirate", prompt)
    assert plain == continued(weather / "base", None, prompt)
    assert pirate == continued(weather / "base", weather / "adapter", prompt)
    assert plain in reports(PLAIN, DAYS)
    assert pirate in reports(PIRATE, DAYS)


def test_embeddings_from_the_graph_are_those_of_the_merged_model(tmp_path: Path) -> None:
    boft_export.export_onnx(model_folder(), MINILM_ADAPTER, tmp_path / "graph", task="sentence-similarity")
    boft_export.merge(model_folder(), MINILM_ADAPTER, tmp_path / "merged")
    served = embed(tmp_path / "graph", SENTENCES)
    merged = SentenceTransformer(str(tmp_path / "merged"), device="cpu").encode(SENTENCES)
    base = SentenceTransformer(str(model_folder()), device="cpu").encode(SENTENCES)
    assert np.abs(served - merged).max() < 1e-5
    assert np.abs(served - base).max() > 0.05
    # The adapter puts a module's docstrings together; by the base a path that is a socket belongs to the sockets.
    assert (served[0] @ served[1:].T).argmax() == 0
    assert (base[0] @ base[1:].T).argmax() == 1
