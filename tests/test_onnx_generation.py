"""Exporting models that generate text: what the graphs compute and generate is what transformers does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_generation import DECODERS, SEQ2SEQ, greedy, greedy_seq2seq, save_adapter, save_model

from boft_export import export_onnx, merge
from boft_export.errors import InputError
from boft_export.models.loading import quiet_transformers
from boft_export.onnx.export import ExportResult
from boft_export.onnx.session import Session

TOKENS = 64


@dataclass(frozen=True)
class Exported:
    """A model's export.

    Attributes:
        name: The architecture.
        folder: Where the graphs are.
        tuned: The checkpoint that they stand for.
        result: What the export returned.
    """

    name: str
    folder: Path
    tuned: Path
    result: ExportResult


def export(name: str, folder: Path) -> Exported:
    with quiet_transformers():
        model = save_model(folder / "base", name)
    base, tuned = folder / "base", folder / "tuned"
    # No adapter of PEFT fits GPT-2, whose linear layers are stored transposed.
    adapter = save_adapter(folder / "adapter", model) if name != "GPT2" else None
    result = export_onnx(base, adapter or (), folder / "out")
    if adapter is None:
        return Exported(name, folder / "out", base, result)
    merge(base, adapter, tuned)
    return Exported(name, folder / "out", tuned, result)


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=SEQ2SEQ)
def seq2seq(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def question() -> tuple[np.ndarray, np.ndarray]:
    """Three rows of tokens with their mask, two of them padded left."""
    ids = np.random.default_rng(1).integers(1, 99, (3, 12))
    mask = np.ones_like(ids)
    mask[0, :5] = mask[2, :2] = 0
    return ids * mask, mask


@pytest.fixture
def quiet() -> Iterator[None]:
    with quiet_transformers():
        yield


def generated(kind: str, folder: Path, question: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return what transformers generates."""
    import transformers

    model = getattr(transformers, kind).from_pretrained(folder).eval()
    ids, mask = map(torch.from_numpy, question)
    made = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=TOKENS)
    return made.numpy()


def test_one_graph_serves_prefill_and_decode(decoder: Exported) -> None:
    (agreement,) = decoder.result.agreements
    assert agreement.output == "logits"
    assert agreement.relative_difference <= 1e-5
    assert decoder.result.task == "text-generation"
    graph = Session(decoder.folder / "model.onnx")
    cache = [f"{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    positions = ["position_ids"] * (decoder.name != "Bloom")
    assert list(graph.inputs) == ["input_ids", "attention_mask", *positions, *(f"past_key_values.{n}" for n in cache)]
    assert graph.outputs == ["logits", *(f"present.{n}" for n in cache)]
    assert graph.inputs["input_ids"].shape == ["batch_size", "sequence_length"]
    assert graph.inputs["attention_mask"].shape == ["batch_size", "total_sequence_length"]
    past = graph.inputs["past_key_values.1.value"].shape
    assert (past[0], past[2]) == ("batch_size", "past_sequence_length")


@pytest.mark.usefixtures("quiet")
def test_a_decoder_generates_the_same_tokens_as_in_transformers(
    decoder: Exported, question: tuple[np.ndarray, np.ndarray]
) -> None:
    wanted = generated("AutoModelForCausalLM", decoder.tuned, question)
    assert wanted.shape == (3, 12 + TOKENS)
    assert np.array_equal(greedy(decoder.folder, *question, TOKENS), wanted)


def test_encoder_and_decoder_are_graphs_of_their_own_with_one_set_of_weights(seq2seq: Exported) -> None:
    assert {a.output for a in seq2seq.result.agreements} == {"last_hidden_state", "logits"}
    assert max(a.relative_difference for a in seq2seq.result.agreements) <= 1e-5
    assert seq2seq.result.task == "text2text-generation"
    encoder, first, later = (
        Session(seq2seq.folder / f"{n}.onnx") for n in ("encoder_model", "decoder_model", "decoder_with_past_model")
    )
    decoders = [f"{i}.decoder.{kind}" for i in range(2) for kind in ("key", "value")]
    both = [f"{i}.{part}.{kind}" for i in range(2) for part in ("decoder", "encoder") for kind in ("key", "value")]
    assert list(encoder.inputs) == ["input_ids", "attention_mask"]
    assert encoder.outputs == ["last_hidden_state"]
    assert list(first.inputs) == ["encoder_attention_mask", "input_ids", "encoder_hidden_states"]
    assert first.outputs == ["logits", *(f"present.{n}" for n in both)]
    assert list(later.inputs) == ["encoder_attention_mask", "input_ids", *(f"past_key_values.{n}" for n in both)]
    assert later.outputs == ["logits", *(f"present.{n}" for n in decoders)]
    weights = sum(f.stat().st_size for f in seq2seq.folder.glob("*.onnx.data"))
    stored = sum(f.stat().st_size for f in seq2seq.tuned.glob("*.safetensors"))
    # Each weight begins on a page of its own.
    assert weights < stored + 4096 * 100


@pytest.mark.usefixtures("quiet")
def test_encoder_and_decoder_answer_with_the_same_tokens_as_in_transformers(
    seq2seq: Exported, question: tuple[np.ndarray, np.ndarray]
) -> None:
    wanted = generated("AutoModelForSeq2SeqLM", seq2seq.tuned, question)
    assert wanted.shape == (3, 1 + TOKENS)
    assert np.array_equal(greedy_seq2seq(seq2seq.folder, *question, int(wanted[0, 0]), TOKENS), wanted)


def test_a_sliding_window_does_not_see_what_lies_before_it(tmp_path: Path) -> None:
    with quiet_transformers():
        save_model(tmp_path / "base", "Mistral")
    export_onnx(tmp_path / "base", (), tmp_path / "out")
    graph = Session(tmp_path / "out" / "model.onnx")
    ids = torch.randint(1, 99, (1, 30), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 99
    mask, positions = torch.ones_like(ids), torch.arange(30)[None]
    past = {n: torch.zeros(1, 2, 0, 12) for n in graph.inputs if n.startswith("past")}
    one, two = (
        graph.run({"input_ids": x, "attention_mask": mask, "position_ids": positions, **past})["logits"]
        for x in (ids, other)
    )
    # Two layers of a window of 5 see 8 tokens back.
    assert torch.equal(one[:, 9:], two[:, 9:])
    assert not torch.equal(one[:, 8], two[:, 8])


def test_adapters_of_one_factor_and_of_several_apply_in_turn(tmp_path: Path) -> None:
    with quiet_transformers():
        model = save_model(tmp_path / "base", "Llama")
    adapters = [save_adapter(tmp_path / f"adapter-{m}", model, m) for m in (1, 3)]
    alone = export_onnx(tmp_path / "base", adapters[0], tmp_path / "one")
    both = export_onnx(tmp_path / "base", adapters, tmp_path / "both")
    assert max(a.relative_difference for r in (alone, both) for a in r.agreements) <= 1e-5


def test_half_precision_stays_close_to_the_model(tmp_path: Path) -> None:
    with quiet_transformers():
        model = save_model(tmp_path / "base", "Llama", initializer_range=0.1)
    adapter = save_adapter(tmp_path / "adapter", model)
    (agreement,) = export_onnx(tmp_path / "base", adapter, tmp_path / "out", dtype="float16").agreements
    assert agreement.kind == "float16"
    assert agreement.relative_difference <= 5e-3


def test_a_model_that_keeps_no_keys_and_values_is_refused(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    with quiet_transformers():
        config = MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, state_size=4)
        MambaForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="keys and values"):
        export_onnx(tmp_path / "base", (), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_made_of_several_is_refused_as_one_that_generates_text(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text | sizes, vision_config=vision, image_token_index=98)
    with quiet_transformers():
        Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="made of several models"):
        export_onnx(tmp_path / "base", (), tmp_path / "out", task="text-generation")
    assert not (tmp_path / "out").exists()
