"""The merged model beside base and adapter: right merges pass, wrong ones don't, and hooks do what PEFT does."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import BOFTConfig, PeftModel, get_peft_model
from peft_cpu import enable_butterflies_on_cpu
from PIL import Image
from safetensors.torch import save_file
from support import butterfly_matrix, read_folder, write_adapter, write_checkpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

import boft_export
from boft_export.adapters import View
from boft_export.models.activation_hooks import PlainLayer, rotate_kernel, times_rotation, times_transpose
from boft_export.models.inputs import FunctionalInputs, make_batches
from boft_export.models.loading import CannotTellError, load_merged
from boft_export.models.reference import load_reference
from boft_export.pipeline.layers import build_layer
from boft_export.planning import FoldPlan
from boft_export.validation.functional import FunctionalLimits, check_functional, compare_functional, functional_checks
from boft_export.validation.model import Check, FunctionalFacts, Outcome

enable_butterflies_on_cpu()

pytestmark = [
    # PEFT asks transformers for an attribute by its old name, and has advice about tied and untrained heads.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are run fastest by one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BART = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": 2,
}  # fmt: skip
IMAGE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "num_labels": 3,
}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
ATTENTION = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Case:
    """A class of model, its settings, and what PEFT adapts of it."""

    name: str
    settings: dict[str, Any]
    targets: list[str]
    boft: dict[str, Any] = field(default_factory=dict)


CASES = {
    "llama": Case("LlamaForCausalLM", SMALL, [*ATTENTION, "down_proj", "lm_head"]),
    "llama-tied": Case("LlamaForCausalLM", SMALL | {"tie_word_embeddings": True}, [*ATTENTION, "lm_head"]),
    "llama-embedding": Case(
        "LlamaForCausalLM", SMALL | {"tie_word_embeddings": True}, ATTENTION, {"modules_to_save": ["embed_tokens"]}
    ),
    "classifier": Case(
        "BertForSequenceClassification",
        SMALL | {"num_labels": 3},
        ["query", "dense"],
        {"modules_to_save": ["classifier"], "bias": "all"},
    ),
    "answers": Case("BertForQuestionAnswering", SMALL, ["query"]),
    "encoder": Case("BertModel", SMALL, ["query", "value", "output.dense"]),
    "bart": Case("BartForConditionalGeneration", BART, [*ATTENTION, "fc1"]),
    "vit": Case("ViTForImageClassification", IMAGE, ["q_proj", "query", "fc1", "projection"]),
    "resnet": Case("ResNetForImageClassification", RESNET, ["layer.0.convolution", "layer.1.convolution"]),
}


@dataclass(frozen=True)
class Merge:
    """A finished merge and where it came from."""

    base: Path
    adapter: Path
    output: Path
    adapted: PeftModel

    @property
    def plan(self) -> FoldPlan:
        return boft_export.plan(self.base, self.adapter)

    def check(self, **options: Any) -> Check:
        return check_functional(self.plan, self.output, device="cpu", **options)[1][0]


@torch.no_grad()
def spread(model: torch.nn.Module) -> None:
    """Move parameters off their start, where weights are too small for a logit to show."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)


def merge(folder: Path, case: Case, m: int, dtype: str = "bfloat16", output: str | None = None) -> Merge:
    """Make a base and an adapter of random weights, and merge them."""
    torch.manual_seed(3)
    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, case.name)
    model = kind(kind.config_class(**case.settings)).eval()
    spread(model)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder / "base")
    settings = {"boft_block_size": 4, "boft_n_butterfly_factor": m, "init_weights": False, **case.boft}
    adapted = get_peft_model(model, BOFTConfig(target_modules=case.targets, **settings)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "boft_" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save_pretrained(folder / "adapter")
    boft_export.merge(folder / "base", folder / "adapter", folder / "out", device="cpu", dtype=output)
    return Merge(folder / "base", folder / "adapter", folder / "out", adapted)


def tamper(done: Merge, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the merged tensors on disk."""
    tensors = read_folder(done.output)
    change(tensors)
    save_file(tensors, done.output / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("m", "dtype"), [(1, "bfloat16"), (2, "float32"), (2, "bfloat16")])
@pytest.mark.parametrize("name", CASES)
def test_right_merges_pass(tmp_path: Path, name: str, m: int, dtype: str) -> None:
    done = merge(tmp_path, CASES[name], m, dtype)

    facts, checks = check_functional(done.plan, done.output, device="cpu")

    assert facts is not None
    assert [c.outcome for c in checks] == [Outcome.PASS]
    assert facts.largest_difference <= 2 * facts.noise < 0.2 * facts.effect
    convolutions = name in {"vit", "resnet"}
    assert facts.reference == ("peft" if m == 1 else "hooks and rotated kernels" if convolutions else "hooks")
    assert (facts.inputs, facts.samples) == ("random", 4)
    assert facts.outputs == ("embeddings" if name == "encoder" else "logits")
    assert (facts.top1_agreement is None) == (facts.kl_divergence is None) == (name == "encoder")
    assert 0.999 < facts.smallest_cosine <= 1 + 1e-12
    if dtype == "float32" and name != "encoder":
        assert facts.top1_agreement == 1
        assert facts.kl_divergence < 1e-9


@pytest.mark.parametrize("name", CASES)
def test_hooks_do_what_peft_does(tmp_path: Path, name: str) -> None:
    """With a stand-in for PEFT's extension, its own unmerged model of two factors is the oracle."""
    done = merge(tmp_path, CASES[name], 2, "float32")
    reference = load_reference(done.plan, CPU)
    assert reference.kind.startswith("hooks")
    for batch in make_batches(FunctionalInputs(samples=3), reference.model, done.output):
        with torch.no_grad():
            found = reference.model(**batch.arguments)[0]
            expected = done.adapted.get_base_model()(**batch.arguments)[0]
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
    reference.check_all_ran()


@pytest.mark.parametrize("m", [1, 2])
def test_adapters_in_order(tmp_path: Path, m: int) -> None:
    done = merge(tmp_path, Case("LlamaForCausalLM", SMALL, ATTENTION), m, "float32")
    done.adapted.add_adapter("style", done.adapted.peft_config["default"])
    done.adapted.save_pretrained(tmp_path / "adapter")
    adapters = [done.adapter, done.adapter / "style"]
    boft_export.merge(done.base, adapters, tmp_path / "both", device="cpu")

    for order, outcome in ((adapters, Outcome.PASS), (adapters[::-1], Outcome.FAIL), (adapters[:1], Outcome.FAIL)):
        facts, checks = check_functional(boft_export.plan(done.base, order), tmp_path / "both", device="cpu")
        assert checks[0].outcome is outcome
        assert facts is not None
        assert facts.reference == ("peft" if m == 1 else "hooks")


def refold(done: Merge, formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    """Return a change that folds each layer by another formula of W, R and s."""
    base, plan = read_folder(done.base), done.plan

    def change(tensors: dict[str, Tensor]) -> None:
        for tensor in plan.tensors:
            for step in tensor.steps:
                layer = build_layer(plan.adapters[0], step.layer)
                weight = base[tensor.name]
                folded = formula(weight.double(), layer.rotation.dense(), layer.scale)
                tensors[tensor.name] = folded.to(weight.dtype).contiguous()

    return change


FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "right": lambda w, r, s: s[:, None] * (w @ r.T),
    "base copied": lambda w, _r, _s: w,
    "other direction": lambda w, r, s: s[:, None] * (w @ r),
    "scale dropped": lambda w, r, _s: w @ r.T,
    "scale twice": lambda w, r, s: s[:, None] ** 2 * (w @ r.T),
    "rotation lost": lambda w, _r, s: s[:, None] * w,
}


@pytest.mark.parametrize("m", [1, 2])
def test_wrong_formulas_fail(tmp_path: Path, m: int) -> None:
    done = merge(tmp_path, Case("LlamaForCausalLM", SMALL, [*ATTENTION, "down_proj"]), m)
    for name, formula in FORMULAS.items():
        tamper(done, refold(done, formula))
        check = done.check()
        if name == "right":
            assert check.outcome is Outcome.PASS
            continue
        assert (check.outcome, check.finding) == (Outcome.FAIL, "functional-difference"), name
        assert check.measured["largest_difference"] > 2 * check.limits["largest_difference"], name


@pytest.mark.parametrize("m", [1, 2])
def test_one_skipped_layer_fails(tmp_path: Path, m: int) -> None:
    done = merge(tmp_path, CASES["classifier"], m)
    name = "bert.encoder.layer.1.attention.output.dense.weight"
    base = read_folder(done.base)[name]

    tamper(done, lambda tensors: tensors.update({name: base}))

    assert done.check().finding == "functional-difference"


def test_stale_head_and_lost_bias_fail(tmp_path: Path) -> None:
    done = merge(tmp_path / "tied", CASES["llama-tied"], 1)
    config = done.output / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    tamper(done, lambda tensors: tensors.__delitem__("lm_head.weight"))
    assert done.check().finding == "functional-difference"

    done = merge(tmp_path / "biases", CASES["classifier"], 2)
    base = read_folder(done.base)
    tamper(done, lambda tensors: tensors.update({k: v for k, v in base.items() if k.endswith(".bias")}))
    assert done.check().finding == "functional-difference"


def test_broken_merges_fail(tmp_path: Path) -> None:
    done = merge(tmp_path, CASES["llama"], 1)
    good = read_folder(done.output)
    name = "model.layers.0.self_attn.q_proj.weight"

    tamper(done, lambda tensors: tensors[name].fill_(float("nan")))
    check = done.check()
    assert (check.outcome, check.finding) == (Outcome.FAIL, "functional-broken")
    assert "not finite" in check.message

    save_file({k: v for k, v in good.items() if k != name}, done.output / "model.safetensors", {"format": "pt"})
    assert "q_proj.weight" in done.check().message

    save_file(good | {name: good[name][:8].clone()}, done.output / "model.safetensors", {"format": "pt"})
    assert done.check().finding == "functional-broken"


def test_merge_in_a_narrower_dtype_passes(tmp_path: Path) -> None:
    """Everything is rounded then, and not only what is folded."""
    done = merge(tmp_path, CASES["llama-embedding"], 1, "float32", output="bfloat16")
    assert done.check().outcome is Outcome.PASS
    assert done.check().measured["noise"] > 1e-3


def test_effect_within_rounding_is_inconclusive(tmp_path: Path) -> None:
    done = merge(tmp_path, CASES["llama"], 1)
    tensors = read_folder(done.adapter)
    for key, value in tensors.items():
        tensors[key] = value * 1e-4 if "boft_R" in key else torch.ones_like(value) if "boft_s" in key else value
    save_file(tensors, done.adapter / "adapter_model.safetensors", {"format": "pt"})
    tamper(done, lambda merged: merged.update(read_folder(done.base)))

    check = done.check()

    assert check.outcome is Outcome.INCONCLUSIVE
    assert "within rounding" in check.message


def tokenizer(folder: Path, words: list[str]) -> None:
    model = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, **{w: i for i, w in enumerate(words, 2)}}, "[UNK]"))
    model.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)
    fast.save_pretrained(folder)


def test_texts(tmp_path: Path) -> None:
    done = merge(tmp_path, CASES["llama"], 2)
    with pytest.raises(boft_export.InputError, match="no tokenizer"):
        done.check(inputs=FunctionalInputs(texts=("a",)))
    tokenizer(done.output, ["one", "two", "three"])
    (tmp_path / "texts.txt").write_text("one two three\n\ntwo\n" + "three " * 100)
    inputs = FunctionalInputs.from_text_file(tmp_path / "texts.txt")

    facts, checks = check_functional(done.plan, done.output, inputs, device="cpu")

    assert facts is not None
    assert (facts.inputs, facts.samples, checks[0].outcome) == ("text", 3, Outcome.PASS)
    (batch,) = make_batches(inputs, load_merged(done.output, CPU).model, done.output)
    # The third is cut to the positions that the model has.
    assert batch.arguments["attention_mask"].sum(1).tolist() == [3, 1, 60]
    assert batch.arguments["input_ids"][0, :4].tolist() == [2, 3, 4, 0]
    tokenizer(done.output, [f"w{i}" for i in range(60)])
    with pytest.raises(boft_export.InputError, match="token 61, the model has 40"):
        done.check(inputs=FunctionalInputs(texts=("w59",)))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(boft_export.InputError, match="no text"):
        FunctionalInputs.from_text_file(tmp_path / "empty.txt")


def test_images(tmp_path: Path) -> None:
    done = merge(tmp_path, CASES["vit"], 1)
    picture = tmp_path / "a.png"
    Image.effect_noise((20, 10), 90).save(picture)
    with pytest.raises(boft_export.InputError, match="no image processor"):
        done.check(inputs=FunctionalInputs(images=(picture,)))
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (done.output / "preprocessor_config.json").write_text(json.dumps(settings))

    facts, checks = check_functional(done.plan, done.output, FunctionalInputs(images=(picture,)), device="cpu")

    assert facts is not None
    assert (facts.inputs, facts.samples, checks[0].outcome) == ("images", 1, Outcome.PASS)
    with pytest.raises(boft_export.InputError, match=r"b\.png can't be read"):
        done.check(inputs=FunctionalInputs(images=(tmp_path / "b.png",)))
    assert done.check(inputs=FunctionalInputs(texts=("a",))).outcome is Outcome.INCONCLUSIVE


@pytest.mark.parametrize("padding", [0, None])
def test_random_tokens(tmp_path: Path, padding: int | None) -> None:
    done = merge(tmp_path, Case("LlamaForCausalLM", SMALL | {"pad_token_id": padding}, ATTENTION), 1)
    model = load_merged(done.output, CPU).model
    batches = make_batches(FunctionalInputs(samples=3, length=6), model, done.output)
    assert len(batches) == (1 if padding == 0 else 3)
    lengths = [int(n) for b in batches for n in b.arguments["attention_mask"].sum(1)]
    assert lengths == [6, 6, 3]
    for batch in batches:
        ids = batch.arguments["input_ids"][batch.arguments["attention_mask"].bool()]
        assert not set(ids.tolist()) & {1, padding}
        assert (ids == 2).sum() == len(batch.arguments["input_ids"])
    again = make_batches(FunctionalInputs(samples=3, length=6), model, done.output)
    assert torch.equal(again[0].arguments["input_ids"], batches[0].arguments["input_ids"])
    other = make_batches(FunctionalInputs(samples=3, length=6, seed=1), model, done.output)
    assert not torch.equal(other[0].arguments["input_ids"], batches[0].arguments["input_ids"])
    assert done.check(inputs=FunctionalInputs(samples=1, length=1)).outcome is Outcome.PASS


def test_wrong_requests() -> None:
    for wrong in ({"texts": ("a",), "images": (Path("b"),)}, {"samples": 0}, {"length": 0}):
        with pytest.raises(boft_export.UsageError):
            FunctionalInputs(**wrong)


FACTS = FunctionalFacts("peft", "random", 4, "logits", 0.003, 0.001, 0.5, 1e-6, 0.99, 0.9999)


@pytest.mark.parametrize(
    ("changes", "limits", "outcomes"),
    [
        ({}, {}, ["pass"]),
        ({"largest_difference": 0.005}, {}, ["fail"]),
        ({"largest_difference": 0.005}, {"noise_factor": 6}, ["pass"]),
        ({"largest_difference": float("nan")}, {}, ["fail"]),
        ({"effect": 0.004}, {}, ["inconclusive"]),
        ({"effect": 0.004, "largest_difference": 0.1}, {}, ["fail"]),
        ({}, {"max_kl": 1e-5, "min_top1": 0.9, "min_cosine": 0.9}, ["pass"] * 4),
        ({}, {"max_kl": 1e-7, "min_top1": 1, "min_cosine": 1}, ["pass", "fail", "fail", "fail"]),
        (
            {"kl_divergence": None, "top1_agreement": None},
            {"max_kl": 1, "min_top1": 0},
            ["pass"] + ["inconclusive"] * 2,
        ),
    ],
)
def test_judgement(changes: dict[str, Any], limits: dict[str, Any], outcomes: list[str]) -> None:
    checks = functional_checks(replace(FACTS, **changes), FunctionalLimits(**limits))
    assert [c.outcome.value for c in checks] == outcomes
    assert all((c.finding == "functional-difference") == (c.outcome is Outcome.FAIL) for c in checks)


def test_what_cannot_be_told_is_inconclusive(tmp_path: Path) -> None:
    done = merge(tmp_path / "a", CASES["llama"], 2)
    config = done.base / "config.json"
    kept = config.read_text()
    for changes, message in (
        ({"architectures": ["NoSuchModel"]}, "no class NoSuchModel"),
        ({"model_type": "no-such", "auto_map": {"AutoConfig": "evil.Config"}}, "no model that the installed"),
        ({"hidden_size": 32}, "can't be loaded"),
    ):
        config.write_text(json.dumps({**json.loads(kept), **changes}))
        check = done.check()
        assert check.outcome is Outcome.INCONCLUSIVE
        assert message in check.message
    plain = write_checkpoint(tmp_path / "plain", read_folder(done.base))
    (plain / "config.json").unlink()
    with pytest.raises(CannotTellError, match=r"no config\.json"):
        compare_functional(boft_export.plan(plain, done.adapter), done.output, FunctionalInputs(), device="cpu")
    with pytest.raises(boft_export.UsageError, match="device tpu"):
        check_functional(done.plan, done.output, device="tpu")


@pytest.mark.parametrize("m", [1, 2])
def test_layers_that_no_input_reaches_are_not_passed(tmp_path: Path, m: int) -> None:
    vision = {k: v for k, v in IMAGE.items() if k != "num_labels"}
    settings = {
        "text_config": transformers.LlamaConfig(**SMALL),
        "vision_config": transformers.CLIPVisionConfig(**vision, projection_dim=8),
        "image_token_id": 39,
        "vision_feature_layer": -1,
    }
    case = Case("LlavaForConditionalGeneration", settings, ["q_proj"])
    check = merge(tmp_path, case, m).check()
    assert check.outcome is Outcome.INCONCLUSIVE
    assert "not run by these inputs" in check.message


def test_says_nothing_and_leaves_no_trace(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = merge(tmp_path, CASES["classifier"], 1)
    log = transformers.utils.logging
    log.enable_progress_bar()
    state, verbosity = torch.get_rng_state(), log.get_verbosity()
    capfd.readouterr()

    assert done.check().outcome is Outcome.PASS

    assert capfd.readouterr() == ("", "")
    assert log.is_progress_bar_enabled()
    assert log.get_verbosity() == verbosity
    assert torch.equal(torch.get_rng_state(), state)


def test_without_the_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = merge(tmp_path, CASES["llama"], 1)
    plan = done.plan
    monkeypatch.setitem(sys.modules, "peft.tuners.boft", None)
    facts, checks = check_functional(plan, done.output, device="cpu")
    assert facts is not None
    assert (facts.reference, checks[0].outcome) == ("hooks", Outcome.PASS)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(boft_export.UsageError, match="transformers") as caught:
        check_functional(plan, done.output, device="cpu")
    assert caught.value.hint is not None
    assert "pip install" in caught.value.hint


@pytest.mark.parametrize(("m", "count", "size"), [(1, 5, 3), (1, 1, 2), (2, 2, 2), (2, 6, 4), (3, 8, 4), (4, 8, 2)])
def test_rotated_activations(m: int, count: int, size: int) -> None:
    trained = torch.randn(m, count, size, size, dtype=torch.float64)
    rotation = butterfly_matrix(trained)
    skew = (trained - trained.mT) / 2
    eye = torch.eye(size, dtype=torch.float64)
    blocks = (eye - skew) @ torch.linalg.inv(eye + skew)
    for shape in ((count * size,), (0, count * size), (3, 2, count * size)):
        x = torch.randn(shape, dtype=torch.float64)
        assert torch.allclose(times_rotation(x, blocks), x @ rotation, atol=1e-12)
        assert torch.allclose(times_transpose(x, blocks), x @ rotation.T, atol=1e-12)
    n = count * size
    weight, scale = torch.randn(7, n, 1, 1, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    today = rotate_kernel(weight, [PlainLayer(blocks, scale, View.INPUT)])
    assert torch.allclose(today.view(7, n), scale[:, None] * (weight.view(7, n) @ rotation.T), atol=1e-12)
    old = rotate_kernel(weight, [PlainLayer(blocks, scale, View.RESHAPED)])
    assert torch.allclose(old.view(n, 7), (rotation @ weight.view(n, 7)) * scale, atol=1e-12)


def test_old_convolutions(tmp_path: Path) -> None:
    """Up to PEFT 0.13 the same keys meant another rotation of a convolution; today's PEFT would get it wrong."""
    done = merge(tmp_path, CASES["resnet"], 1)
    tensors = read_folder(done.adapter)
    config = json.loads((done.adapter / "adapter_config.json").read_text())
    old = write_adapter(tmp_path / "old", tensors, config, drop=("exclude_modules", "peft_version"))
    boft_export.merge(done.base, old, tmp_path / "old-out", device="cpu")

    for adapter, output, outcome in (
        (old, tmp_path / "old-out", Outcome.PASS),
        (old, done.output, Outcome.FAIL),
        (done.adapter, tmp_path / "old-out", Outcome.FAIL),
    ):
        facts, checks = check_functional(boft_export.plan(done.base, adapter), output, device="cpu")
        assert checks[0].outcome is outcome
        assert facts is not None
        assert facts.reference == ("peft" if adapter is done.adapter else "hooks and rotated kernels")


def test_adapted_model_is_left_alone(tmp_path: Path) -> None:
    """The base and the adapter on disk are only read."""
    done = merge(tmp_path, CASES["llama"], 1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    done.check()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_grown_vocabulary_and_new_head(tmp_path: Path) -> None:
    """The base has neither the rows nor the head that the adapter brings."""
    torch.manual_seed(3)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    model.save_pretrained(tmp_path / "base")
    grown = copy.deepcopy(model)
    grown.resize_token_embeddings(44, mean_resizing=False)
    adapted = get_peft_model(grown, BOFTConfig(target_modules=ATTENTION, boft_block_size=4, init_weights=False))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    boft_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", device="cpu")
    done = Merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", adapted)
    assert done.check().outcome is Outcome.PASS

    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3)).eval()
    spread(bert)
    bert.bert.save_pretrained(tmp_path / "encoder")
    config = BOFTConfig(task_type="SEQ_CLS", target_modules=["query"], boft_block_size=4, init_weights=False)
    get_peft_model(bert, config).save_pretrained(tmp_path / "head")
    boft_export.merge(tmp_path / "encoder", tmp_path / "head", tmp_path / "classifier", device="cpu")
    done = Merge(tmp_path / "encoder", tmp_path / "head", tmp_path / "classifier", adapted)
    assert done.check().outcome is Outcome.PASS
