"""Merged checkpoints of many architectures, loaded by transformers: their logits are those of PEFT's unmerged model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import BOFTConfig, PeftModel, TaskType, get_peft_model
from peft_cpu import enable_butterflies_on_cpu
from support import read_folder
from torch import Tensor
from transformers import PreTrainedModel

import boft_export

enable_butterflies_on_cpu()

pytestmark = [
    # PEFT asks transformers for an attribute by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT's own advice where a tied head is adapted, which is what some cases do.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
    # The untrained weight under an adapted head goes into the adapter's file, and PEFT says so.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

TOLERANCE = 1e-5
# The sizes that most configs name alike.
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
SWIN = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2}
IMAGE_TOKEN = 60


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, IMAGE_TOKEN, (2, 9))}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def to_and_from() -> dict[str, Tensor]:
    return {**tokens(), "decoder_input_ids": torch.randint(3, IMAGE_TOKEN, (2, 5))}


def llava_inputs() -> dict[str, Tensor]:
    ids = torch.tensor([[1, *[IMAGE_TOKEN] * 16, 5, 6, 7]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}


def qwen2_vl_inputs() -> dict[str, Tensor]:
    ids = torch.tensor([[5, 62, *[IMAGE_TOKEN] * 4, 63, 6, 7]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def build(name: str, **config: Any) -> Callable[[], PreTrainedModel]:
    """Return what makes a model of class ``name``; its config's class is told by the model's own."""

    def make() -> PreTrainedModel:
        kind = getattr(transformers, name)
        return kind(kind.config_class(**config))

    return make


def llava() -> PreTrainedModel:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**GROUPED),
        vision_config=transformers.CLIPVisionConfig(**IMAGE, projection_dim=16),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(
        # transformers 4 knows the same setting by another name.
        text_config={**GROUPED, "rope_parameters": rope, "rope_scaling": rope},
        vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=IMAGE_TOKEN,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


@dataclass(frozen=True)
class Case:
    """One architecture and what is adapted in it."""

    make: Callable[[], PreTrainedModel]
    targets: list[str]
    inputs: Callable[[], dict[str, Tensor]] = tokens
    auto: str = "AutoModelForCausalLM"
    boft: Mapping[str, Any] = field(default_factory=dict)
    shard_size: str | None = None


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

# Where transformers 4 and 5 call a module by different names, both are there; PEFT takes the ones that it finds.
CASES = {
    "llama": Case(build("LlamaForCausalLM", **GROUPED), ATTENTION + MLP, shard_size="20KB"),
    "llama-biases": Case(build("LlamaForCausalLM", **GROUPED, attention_bias=True), ATTENTION, boft={"bias": "all"}),
    "llama-tied": Case(build("LlamaForCausalLM", **GROUPED, tie_word_embeddings=True), ATTENTION),
    "llama-head": Case(build("LlamaForCausalLM", **GROUPED), [*ATTENTION, "lm_head"], shard_size="20KB"),
    "llama-tied-head": Case(build("LlamaForCausalLM", **GROUPED, tie_word_embeddings=True), ["q_proj", "lm_head"]),
    "qwen2": Case(build("Qwen2ForCausalLM", **GROUPED), ATTENTION + MLP),
    "qwen2-tied-head": Case(build("Qwen2ForCausalLM", **GROUPED, tie_word_embeddings=True), ["v_proj", "lm_head"]),
    "qwen3": Case(build("Qwen3ForCausalLM", **GROUPED, head_dim=8), ATTENTION, shard_size="20KB"),
    "mistral": Case(build("MistralForCausalLM", **GROUPED), ATTENTION + MLP),
    "llama-embedding": Case(
        build("LlamaForCausalLM", **GROUPED), ["q_proj"], boft={"modules_to_save": ["embed_tokens", "lm_head"]}
    ),
    "llama-tied-embedding": Case(
        build("LlamaForCausalLM", **GROUPED, tie_word_embeddings=True),
        ["q_proj"],
        boft={"modules_to_save": ["embed_tokens"]},
    ),
    "mixtral": Case(build("MixtralForCausalLM", **GROUPED, num_local_experts=4), ATTENTION),
    "phi3": Case(build("Phi3ForCausalLM", **GROUPED), ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "gemma2": Case(build("Gemma2ForCausalLM", **GROUPED, head_dim=8), ATTENTION + MLP),
    "gpt-neox": Case(build("GPTNeoXForCausalLM", **TEXT), ["query_key_value", "dense", "dense_4h_to_h"]),
    "gpt-neox-head": Case(build("GPTNeoXForCausalLM", **TEXT), ["query_key_value", "lm_head", "embed_out"]),
    "gpt-neox-tied-head": Case(
        build("GPTNeoXForCausalLM", **TEXT, tie_word_embeddings=True), ["dense_4h_to_h", "lm_head", "embed_out"]
    ),
    "opt": Case(
        build("OPTForCausalLM", **TEXT, ffn_dim=48, word_embed_proj_dim=32), ["q_proj", "out_proj", "fc1", "fc2"]
    ),
    "opt-tied-head": Case(build("OPTForCausalLM", **TEXT, ffn_dim=48, word_embed_proj_dim=32), ["fc1", "lm_head"]),
    "gpt-j": Case(
        build("GPTJForCausalLM", **TEXT, n_layer=2, n_head=4, n_embd=32, rotary_dim=4), ["q_proj", "fc_out", "lm_head"]
    ),
    "bloom": Case(build("BloomForCausalLM", **TEXT, n_layer=2, n_head=4), ["query_key_value", "dense_h_to_4h"]),
    "bloom-tied-head": Case(build("BloomForCausalLM", **TEXT, n_layer=2, n_head=4), ["dense_h_to_4h", "lm_head"]),
    "falcon": Case(build("FalconForCausalLM", **TEXT), ["query_key_value", "dense", "dense_4h_to_h"]),
    "bert": Case(
        build("BertForSequenceClassification", **TEXT, num_labels=3),
        ["query", "value", "dense"],
        auto="AutoModelForSequenceClassification",
    ),
    "bert-masked": Case(
        build("BertForMaskedLM", **TEXT, is_decoder=False), ["query", "key"], auto="AutoModelForMaskedLM"
    ),
    "roberta": Case(
        build("RobertaForTokenClassification", **TEXT, num_labels=3),
        ["query", "value"],
        auto="AutoModelForTokenClassification",
        boft={"modules_to_save": ["classifier"]},
    ),
    "t5": Case(
        build("T5ForConditionalGeneration", vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        ["q", "v", "wo"],
        to_and_from,
        "AutoModelForSeq2SeqLM",
        shard_size="40KB",
    ),
    "vit": Case(
        build("ViTForImageClassification", **IMAGE, num_labels=3),
        ["q_proj", "v_proj", "fc1", "query", "value", "intermediate.dense", "projection"],
        image,
        "AutoModelForImageClassification",
    ),
    "dinov2": Case(
        build("Dinov2ForImageClassification", **IMAGE, mlp_ratio=2, num_labels=3),
        ["q_proj", "o_proj", "fc2", "query", "projection"],
        image,
        "AutoModelForImageClassification",
    ),
    "deit": Case(
        build("DeiTForImageClassification", **IMAGE, num_labels=3),
        ["k_proj", "fc2", "key", "projection"],
        image,
        "AutoModelForImageClassification",
        boft={"modules_to_save": ["classifier"]},
    ),
    "swin": Case(
        build("SwinForImageClassification", **SWIN, num_labels=3),
        ["q_proj", "o_proj", "fc1", "query", "projection"],
        image,
        "AutoModelForImageClassification",
    ),
    "llava": Case(llava, [*ATTENTION, "linear_1", "patch_embedding"], llava_inputs, "AutoModelForImageTextToText"),
    "llava-head": Case(llava, ["down_proj", "lm_head"], llava_inputs, "AutoModelForImageTextToText"),
    "qwen2-vl": Case(qwen2_vl, [*ATTENTION, "qkv", "fc1"], qwen2_vl_inputs, "AutoModelForImageTextToText"),
    "qwen2-vl-head": Case(qwen2_vl, ["up_proj", "lm_head"], qwen2_vl_inputs, "AutoModelForImageTextToText"),
}
FACTORS = {
    1: {"boft_block_size": 8, "boft_n_butterfly_factor": 1},
    3: {"boft_block_size": 4, "boft_n_butterfly_factor": 3},
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    """The same numbers in every run, and no progress bars."""
    torch.manual_seed(5)
    transformers.utils.logging.disable_progress_bar()


@torch.no_grad()
def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Move every parameter off its start, where biases are 0, norms 1, and weights too small for a logit to show."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def adapt(model: PreTrainedModel, **config: Any) -> PeftModel:
    """Put a random adapter into ``model``; whatever PEFT would train differs from its start."""
    adapted = get_peft_model(model, BOFTConfig(**({"init_weights": False} | config)))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "boft_" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return adapted.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    result = model(**inputs)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def load(folder: Path, auto: str, unused: str | None = None) -> PreTrainedModel:
    """Load a checkpoint; each parameter must be there, and each tensor used, but for those of module ``unused``."""
    model, info = getattr(transformers, auto).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    info["unexpected_keys"] = [k for k in info["unexpected_keys"] if unused is None or f".{unused}." not in k]
    assert not any(info.values()), info
    return model.eval()


def check(base: Path, adapter: Path, output: Path, expected: Tensor, inputs: Mapping[str, Tensor], auto: str) -> None:
    before = logits(load(base, auto), inputs)
    assert (before - expected).abs().max() > 100 * TOLERANCE

    boft_export.merge(base, adapter, output)

    after = logits(load(output, auto), inputs)
    assert (after - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("m", FACTORS)
@pytest.mark.parametrize("name", CASES)
def test_logits(tmp_path: Path, name: str, m: int) -> None:
    case = CASES[name]
    model = spread(case.make())
    model.save_pretrained(tmp_path / "base", **({"max_shard_size": case.shard_size} if case.shard_size else {}))
    assert (tmp_path / "base" / "model.safetensors.index.json").is_file() == bool(case.shard_size)
    adapted = adapt(model, target_modules=case.targets, **FACTORS[m], **case.boft)
    adapted.save_pretrained(tmp_path / "adapter")
    inputs = case.inputs()

    check(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", logits(adapted, inputs), inputs, case.auto)


BARE = {
    "bert": ("Bert", TEXT, ["query", "value"], tokens, "AutoModelForSequenceClassification"),
    "roberta": ("Roberta", TEXT, ["query", "value"], tokens, "AutoModelForSequenceClassification"),
    "vit": ("ViT", IMAGE, ["q_proj", "query", "projection"], image, "AutoModelForImageClassification"),
    "dinov2": ("Dinov2", {**IMAGE, "mlp_ratio": 2}, ["fc1", "projection"], image, "AutoModelForImageClassification"),
}


@pytest.mark.parametrize("name", BARE)
def test_head_trained_on_a_bare_encoder(tmp_path: Path, name: str) -> None:
    """The base has no classifier; the output has the adapter's, with its labels, and loads as what was trained."""
    family, config, targets, inputs, auto = BARE[name]
    spread(build(f"{family}Model", **config)()).save_pretrained(tmp_path / "base")
    model = getattr(transformers, auto).from_pretrained(tmp_path / "base", num_labels=3)
    adapted = adapt(model, target_modules=targets, modules_to_save=["classifier"], **FACTORS[3])
    adapted.save_pretrained(tmp_path / "adapter")
    given = inputs()
    expected = logits(adapted, given)
    assert expected.shape == (2, 3)

    boft_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")

    # An encoder's pooler stays in the file, though some classifiers have no use for it.
    merged = load(tmp_path / "out", auto, unused="pooler")
    assert merged.config.num_labels == 3
    assert merged.config.architectures == [type(model).__name__]
    assert (logits(merged, given) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("bare", [True, False])
def test_task_type_names_the_head(tmp_path: Path, *, bare: bool) -> None:
    """With a task type PEFT saves the classifier on its own account, and no class in the config."""
    full = spread(build("BertForSequenceClassification", **TEXT, num_labels=3)())
    (full.bert if bare else full).save_pretrained(tmp_path / "base")
    adapted = adapt(full, target_modules=["query"], task_type=TaskType.SEQ_CLS, **FACTORS[1])
    adapted.save_pretrained(tmp_path / "adapter")
    inputs = tokens()

    boft_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")

    merged = load(tmp_path / "out", "AutoModelForSequenceClassification")
    assert (logits(merged, inputs) - logits(adapted, inputs)).abs().max() <= TOLERANCE
    assert merged.config.architectures == ["BertForSequenceClassification"]


@pytest.mark.parametrize("tied", [True, False])
def test_grown_vocabulary(tmp_path: Path, *, tied: bool) -> None:
    model = spread(build("LlamaForCausalLM", **GROUPED, tie_word_embeddings=tied)())
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70, mean_resizing=False)
    adapted = adapt(spread(model), target_modules=["q_proj", "v_proj"], **FACTORS[3])
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    inputs = {"input_ids": torch.randint(3, 70, (2, 9))}
    # What the adapter does not carry stays the base's.
    trained = ("embed_tokens", "lm_head", "boft")
    with torch.no_grad():
        before = read_folder(tmp_path / "base")
        for key, value in adapted.base_model.model.named_parameters():
            if not any(part in key for part in trained):
                value.copy_(before[key.replace(".base_layer", "")])

    boft_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")

    merged = load(tmp_path / "out", "AutoModelForCausalLM")
    assert merged.config.vocab_size == 70
    assert merged.config.tie_word_embeddings is tied
    assert (logits(merged, inputs) - logits(adapted, inputs)).abs().max() <= TOLERANCE


def test_scaled_tied_head_is_refused(tmp_path: Path) -> None:
    """T5 scales the input of a tied head; untied by a merge, it would not, so there is no right output."""
    model = spread(CASES["t5"].make())
    model.save_pretrained(tmp_path / "base")
    adapt(model, target_modules=["lm_head"], **FACTORS[1]).save_pretrained(tmp_path / "adapter")

    with pytest.raises(boft_export.InputError, match="tied"):
        boft_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
