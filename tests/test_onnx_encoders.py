"""Exporting what does not generate: text, image and sentence encoders, a UNet, and classes that no task is made for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from base import model_folder
from safetensors.torch import load_file, save_file
from support import boft_tensors, write_adapter

from boft_export import ExportResult, export_onnx, merge
from boft_export.errors import InputError, Level, UsageError
from boft_export.onnx.session import Session
from boft_export.onnx.tasks import TASKS, find_task
from boft_export.onnx.tasks.pooling import SWITCHES, Pooling, read_pooling

MINILM_ADAPTER = Path(__file__).parent.parent / "examples" / "minilm" / "adapter"
TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 40,
}  # fmt: skip
IMAGE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 24, "attention_head_dim": 4, "norm_num_groups": 4,
    "mid_block_type": None,
}  # fmt: skip
# Factors of an adapter: one, and several.
FACTORS = pytest.mark.parametrize("factors", [1, 2])

Save = Callable[..., Path]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Tiny models gain nothing from more, and lose where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Return what writes a random model of a class to a folder."""

    def write(name: str, config: Mapping[str, Any], *, library: str = "transformers", **more: Any) -> Path:
        found = pytest.importorskip(library)
        torch.manual_seed(0)
        kind = getattr(found, name)
        model = kind(**config) if library == "diffusers" else kind(kind.config_class(**config, **more))
        # Weights that tell rows and columns, and layers, apart.
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


def adapter_for(base: Path, folder: Path, pattern: str, factors: int) -> Path:
    """Write a trained adapter for the layers of a checkpoint whose names match."""
    weights = {k: v for file in base.glob("*.safetensors") for k, v in load_file(file).items()}
    found = [n.removesuffix(".weight") for n in weights if re.search(pattern, n) and n.endswith(".weight")]
    assert found
    tensors = {}
    for seed, name in enumerate(found):
        out, n = weights[f"{name}.weight"].shape
        tensors |= boft_tensors(name, n, out, m=factors, b=4, seed=seed)
    return write_adapter(folder, tensors)


def check(result: ExportResult, task: str, *outputs: str, told: tuple[str, ...] = ()) -> None:
    """See that a graph has these outputs, all as near to the model's as rounding allows, with an adapter that shows."""
    assert result.task == task
    assert [a.output for a in result.agreements] == list(outputs)
    for agreement in result.agreements:
        assert agreement.cases >= 3
        assert agreement.relative_difference <= 1e-5
        assert agreement.largest_magnitude > 0.01
    assert [n.code for n in result.plan.notices if n.level is not Level.INFO] == list(told)
    session = Session(result.output / "model.onnx")
    assert session.outputs == list(outputs)


@FACTORS
def test_bert_embeds_as_base_and_adapter(save: Save, tmp_path: Path, factors: int) -> None:
    base = save("BertModel", TEXT)
    adapter = adapter_for(base, tmp_path / "adapter", r"query|value|output\.dense", factors)
    check(export_onnx(base, adapter, tmp_path / "out"), "feature-extraction", "last_hidden_state")


@FACTORS
def test_vit_sees_as_base_and_adapter(save: Save, tmp_path: Path, factors: int) -> None:
    base = save("ViTForImageClassification", IMAGE, num_labels=5)
    adapter = adapter_for(base, tmp_path / "adapter", r"query|value|q_proj|v_proj", factors)
    check(export_onnx(base, adapter, tmp_path / "out"), "image-classification", "logits")


@FACTORS
def test_dinov2_sees_as_base_and_adapter(save: Save, tmp_path: Path, factors: int) -> None:
    base = save("Dinov2Model", IMAGE)
    adapter = adapter_for(base, tmp_path / "adapter", r"query|value|q_proj|v_proj|fc", factors)
    result = export_onnx(base, adapter, tmp_path / "out")
    check(result, "image-feature-extraction", "last_hidden_state", "pooler_output")
    assert Session(tmp_path / "out" / "model.onnx").inputs["pixel_values"].shape == ["batch_size", 3, 16, 16]


@FACTORS
def test_a_unet_denoises_as_base_and_adapter(save: Save, tmp_path: Path, factors: int) -> None:
    base = save("UNet2DConditionModel", UNET, library="diffusers")
    adapter = adapter_for(base, tmp_path / "adapter", r"to_[qkv]|to_out", factors)
    check(export_onnx(base, adapter, tmp_path / "out"), "unet", "out_sample")
    inputs = Session(tmp_path / "out" / "model.onnx").inputs
    assert inputs["sample"].shape == ["batch_size", 4, "height", "width"]
    assert inputs["timestep"].shape == [1]
    assert inputs["encoder_hidden_states"].shape == ["batch_size", "sequence_length", 24]


@pytest.mark.parametrize(
    ("kind", "task", "outputs"),
    [
        ("BertForMaskedLM", "fill-mask", ("logits",)),
        ("RobertaForSequenceClassification", "text-classification", ("logits",)),
        ("DistilBertForTokenClassification", "token-classification", ("logits",)),
        ("ElectraForQuestionAnswering", "question-answering", ("start_logits", "end_logits")),
    ],
)
def test_a_text_task_is_found_by_the_class(
    save: Save, tmp_path: Path, kind: str, task: str, outputs: tuple[str, ...]
) -> None:
    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4} if kind.startswith("Distil") else {}
    base = save(kind, TEXT | sizes)
    adapter = adapter_for(base, tmp_path / "adapter", r"query|q_lin", 2)
    check(export_onnx(base, adapter, tmp_path / "out"), task, *outputs)


def test_another_task_leaves_out_what_its_class_has_not(save: Save, tmp_path: Path) -> None:
    """Of a classifier, the features: the class is another, and no pooler was trained for it."""
    base = save("ViTForImageClassification", IMAGE, num_labels=5)
    adapter = adapter_for(base, tmp_path / "adapter", r"query|q_proj", 2)
    result = export_onnx(base, adapter, tmp_path / "out", task="image-feature-extraction")
    check(result, "image-feature-extraction", "last_hidden_state")


def test_a_convolutional_network_takes_images_of_any_size(save: Save, tmp_path: Path) -> None:
    base = save("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]})
    check(export_onnx(base, (), tmp_path / "out"), "image-classification", "logits")
    session = Session(tmp_path / "out" / "model.onnx")
    assert session.inputs["pixel_values"].shape == ["batch_size", 3, "height", "width"]
    # What normalises a batch is learnt, too.
    weights = load_file(base / "model.safetensors")
    assert any(k.endswith("running_var") for k in weights)
    assert session.run({"pixel_values": torch.zeros(1, 3, 50, 70)})["logits"].shape == (1, 2)


def test_a_class_without_a_task_comes_out_with_all_its_tensors(save: Save, tmp_path: Path) -> None:
    # With this end of a text, what stands for it is the token with the largest number, and never padding.
    parts = {"text_config": TEXT | {"eos_token_id": 2}, "vision_config": IMAGE, "projection_dim": 16}
    base = save("CLIPModel", parts)
    adapter = adapter_for(base, tmp_path / "adapter", r"q_proj", 2)
    result = export_onnx(base, adapter, tmp_path / "out")
    assert result.task == "generic"
    assert [(n.level, n.code, n.subject) for n in result.plan.notices if n.level is not Level.INFO] == [
        (Level.WARNING, "generic-task", "CLIPModel")
    ]
    assert {a.output for a in result.agreements} == {
        "logits_per_image",
        "logits_per_text",
        "text_embeds",
        "image_embeds",
    }
    assert max(a.relative_difference for a in result.agreements) <= 1e-5
    assert list(Session(tmp_path / "out" / "model.onnx").inputs) == ["input_ids", "attention_mask", "pixel_values"]
    assert find_task(json.loads((base / "config.json").read_text()), "generic").notices == ()


@pytest.mark.slow
def test_minilm_is_exported_with_an_adapter_of_one_factor(tmp_path: Path) -> None:
    adapter = adapter_for(model_folder(), tmp_path / "adapter", r"query|value", 1)
    result = export_onnx(model_folder(), adapter, tmp_path / "out")
    check(result, "feature-extraction", "last_hidden_state")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_minilm_embeds_sentences_as_sentence_transformers(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    adapters = [MINILM_ADAPTER]
    result = export_onnx(model_folder(), adapters, tmp_path / "out", task="sentence-similarity")
    # The adapter names its base by its id on the Hub.
    check(result, "sentence-similarity", "token_embeddings", "sentence_embedding", told=("other-base",))
    merge(model_folder(), adapters, tmp_path / "merged")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    texts = ["Open a socket and listen.", "Return a shallow copy of the list, without what is in it.", "Sort."]
    expected = torch.as_tensor(model.encode(texts))
    inputs = {k: torch.as_tensor(np.asarray(v)) for k, v in model.tokenize(texts).items() if hasattr(v, "shape")}
    found = Session(tmp_path / "out" / "model.onnx").run(inputs)
    assert (found["sentence_embedding"] - expected).abs().max() <= 1e-5
    assert found["token_embeddings"].shape == (*inputs["input_ids"].shape, 384)


POOLINGS = [
    ({"pooling_mode": "cls"}, ["Normalize"], Pooling(("cls",), normalize=True)),
    ({"pooling_mode": ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]}, [],
     Pooling(("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"))),
    ({"pooling_mode_cls_token": False, "pooling_mode_max_tokens": True, "pooling_mode_lasttoken": True}, [],
     Pooling(("max", "lasttoken"))),
    ({"word_embedding_dimension": 32}, [], Pooling()),
]  # fmt: skip


def write_modules(folder: Path, config: Mapping[str, Any], kinds: list[str]) -> None:
    """Write what sentence-transformers keeps beside an encoder: its modules and how it pools."""
    kinds = ["Transformer", "Pooling", *kinds]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{k}" if i else "", "type": f"sentence_transformers.models.{k}"}
        for i, k in enumerate(kinds)
    ]
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("config", "more", "pooling"), POOLINGS)
def test_pooling_is_read_as_either_release_writes_it(
    tmp_path: Path, config: dict[str, Any], more: list[str], pooling: Pooling
) -> None:
    write_modules(tmp_path, config, more)
    assert read_pooling(tmp_path) == pooling


@pytest.mark.filterwarnings("ignore:Importing from 'sentence_transformers.models':DeprecationWarning")
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", SWITCHES)
def test_each_pooling_is_that_of_sentence_transformers(mode: str, normalize: bool) -> None:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Normalize
    from sentence_transformers.models import Pooling as Theirs

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 6, 8, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    expected = Theirs(8, pooling_mode=mode)({"token_embeddings": tokens, "attention_mask": mask})
    if normalize:
        expected = Normalize()(expected)
    found = Pooling((mode,), normalize=normalize).pool(tokens, mask)
    assert torch.allclose(found, expected["sentence_embedding"], rtol=0, atol=1e-6)


def test_all_poolings_are_one_graph_padded_on_either_side(save: Save, tmp_path: Path) -> None:
    base = save("MPNetModel", TEXT)
    write_modules(base, {"pooling_mode": list(SWITCHES)}, ["Normalize"])
    adapter = adapter_for(base, tmp_path / "adapter", r"attn\.q", 2)
    result = export_onnx(base, adapter, tmp_path / "out", task="sentence-similarity")
    check(result, "sentence-similarity", "token_embeddings", "sentence_embedding")
    outputs = Session(tmp_path / "out" / "model.onnx").run(
        {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    )
    assert outputs["sentence_embedding"].shape == (1, 6 * 32)
    assert abs(float(outputs["sentence_embedding"].norm()) - 1) < 1e-6


@pytest.mark.parametrize(
    ("config", "more", "told"),
    [
        ({"pooling_mode": "mean"}, ["Dense", "Normalize"], "Transformer, Pooling, Dense, Normalize"),
        ({"pooling_mode": "attention"}, [], "names the pooling attention"),
        ({"pooling_mode": "mean", "include_prompt": False}, [], "leaves prompts out"),
    ],
)
def test_modules_that_no_graph_is_made_of_are_refused(
    tmp_path: Path, config: dict[str, Any], more: list[str], told: str
) -> None:
    write_modules(tmp_path, config, more)
    with pytest.raises(InputError, match=told):
        find_task({}, "sentence-similarity", tmp_path)


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("BertModel", "feature-extraction"),
        ("ViTModel", "image-feature-extraction"),
        ("CLIPVisionModel", "image-feature-extraction"),
        ("CLIPTextModel", "feature-extraction"),
        ("CLIPModel", "generic"),
        ("LayoutLMv3ForTokenClassification", "generic"),
        ("WhisperForAudioClassification", "generic"),
        ("GPT2LMHeadModel", "text-generation"),
        ("ClassOfTomorrowForMaskedLM", "fill-mask"),
    ],
)
def test_a_task_is_found_by_what_a_class_is_called_and_takes(kind: str, task: str) -> None:
    assert find_task({"architectures": [kind]}).name == task


def test_the_unet_is_found_by_the_name_that_diffusers_gives_it() -> None:
    assert find_task({"_class_name": "UNet2DConditionModel"}).name == "unet"


@pytest.mark.parametrize("config", [{}, {"architectures": None}, {"architectures": ["ClassOfTomorrow"]}])
def test_a_config_that_tells_of_no_task_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="tells of no task") as caught:
        find_task(config)
    assert all(t.name in str(caught.value.hint) for t in TASKS)


def test_a_task_that_there_is_not_is_wrong_usage(save: Save, tmp_path: Path) -> None:
    base = save("BertModel", TEXT)
    with pytest.raises(UsageError, match="there is no task juggling"):
        export_onnx(base, (), tmp_path / "out", task="juggling")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_files_lack_what_its_task_needs_is_refused(save: Save, tmp_path: Path) -> None:
    base = save("BertModel", TEXT)
    with pytest.raises(
        InputError, match=r"parameters of BertForSequenceClassification are not in the files: classifier"
    ):
        export_onnx(base, (), tmp_path / "out", task="text-classification")
    file = base / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if "intermediate" not in k}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"2 of \d+ parameters of BertModel are not in the files"):
        export_onnx(base, (), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_class_with_inputs_of_its_own_is_refused(save: Save, tmp_path: Path) -> None:
    base = save(
        "PerceiverModel",
        {"num_latents": 4, "d_latents": 16, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 1},
    )
    with pytest.raises(InputError, match="PerceiverModel takes inputs, of which no samples can be made"):
        export_onnx(base, (), tmp_path / "out")


def test_one_rotation_serves_a_whole_batch(save: Save, tmp_path: Path) -> None:
    """Models that tell positions by rotating make one rotation for all rows; the operator wants one for each."""
    sizes = {"num_key_value_heads": 2, "pad_token_id": 0}
    base = save("LlamaModel", TEXT | sizes)
    check(export_onnx(base, (), tmp_path / "out"), "feature-extraction", "last_hidden_state")
