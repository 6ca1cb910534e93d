"""What a merge makes of every kind of input: the right values, the right notice, or a refusal that leaves nothing."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BOFTConfig, get_peft_model
from peft_cpu import enable_butterflies_on_cpu
from safetensors.torch import load_file, save_file
from support import boft_tensors, butterfly_matrix, expected_merge, read_folder, write_adapter, write_checkpoint
from torch import Tensor, nn

from boft_export.adapters import ReadOptions, View
from boft_export.errors import BoftExportError, CheckFailedError, DamagedFileError, InputError, Level, UsageError
from boft_export.pipeline.interpolate import interpolate
from boft_export.pipeline.merge import MergeResult, merge
from boft_export.planning.inputs import Sources
from boft_export.validation.model import Outcome
from boft_export.validation.validate import validate

OUT, IN = 8, 16
Q, NORM = "model.layers.0.self_attn.q_proj", "model.layers.0.input_layernorm.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PRE = "base_model.model."
R, S = f"{PRE}{Q}.boft_R", f"{PRE}{Q}.boft_s"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": OUT}
TIED = {**LLAMA, "tie_word_embeddings": True}
UNTIED = {**LLAMA, "tie_word_embeddings": False}
# How the config of PEFT 0.13 and earlier is told from today's.
OLD_PEFT = ("exclude_modules", "peft_version")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(*modules: str, out: int = OUT) -> dict[str, Tensor]:
    """A base with a linear layer for each module, and a norm that nothing adapts."""
    return {NORM: rand(IN, seed=9)} | {f"{m}.weight": rand(out, IN, seed=i) for i, m in enumerate(modules or (Q,))}


def layer(module: str = Q, **options: Any) -> dict[str, Tensor]:
    return boft_tensors(module, IN, OUT, **options)


@dataclass
class Desk:
    """A folder with a base, adapters and, if all goes well, an output."""

    root: Path

    def base(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, shards: int = 1) -> Path:
        return write_checkpoint(self.root / "base", tensors, config, shards)

    def adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, **options: Any) -> Path:
        return write_adapter(self.root / options.pop("name", "adapter"), tensors, config, **options)

    def merge(self, *adapters: str, **options: Any) -> MergeResult:
        options = {"base": self.root / "base", "output": self.root / "out", "jobs": 1, "device": "cpu", **options}
        inputs = options.pop("base"), [self.root / a for a in adapters or ("adapter",)]
        result = merge(*inputs, **options)
        assert_ends_of_the_path(result, *inputs, **options)
        assert_valid(*inputs, options["output"], options.get("sources"))
        return result

    def refuse(self, *parts: str, error: type[BoftExportError] = InputError, **options: Any) -> BoftExportError:
        """Merge, which must fail with ``parts`` in the message, and without a trace on disk."""
        before = snapshot(self.root)
        with pytest.raises(error) as caught:
            self.merge(*options.pop("adapters", ()), **options)
        assert type(caught.value) is error
        assert [p for p in parts if p not in caught.value.message] == [], caught.value.message
        assert snapshot(self.root) == before
        return caught.value

    def tensors(self) -> dict[str, Tensor]:
        return read_folder(self.root / "out")

    def config(self) -> dict[str, Any]:
        return json.loads((self.root / "out" / "config.json").read_text())


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def assert_ends_of_the_path(result: MergeResult, base: Any, adapters: list[Path], output: Path, **options: Any) -> None:
    """Whatever is merged can be interpolated, too: at 0 it is the base, at 1 the merge, byte for byte."""
    with tempfile.TemporaryDirectory() as folder:
        ends = Path(folder) / "ends"
        interpolate(base, adapters, ends, alphas=(0, 1), path="factorwise", **options)
        zero, one = (ends / f"alpha-{alpha}" for alpha in (0, 1))
        merged = sorted(p.relative_to(output) for p in output.rglob("*.safetensors"))
        assert merged == sorted(p.relative_to(one) for p in one.rglob("*.safetensors"))
        assert all((one / p).read_bytes() == (output / p).read_bytes() for p in merged)
        written = {k: v for p in merged for k, v in load_file(zero / p).items()}
        for tensor in result.plan.tensors:
            if tensor.base is not None and tensor.base.dtype == tensor.dtype:
                # What the adapter adds to a vocabulary is there at any alpha.
                shared = min(tensor.base.nbytes, written[tensor.name].nbytes)
                expected = bytearray(shared)
                tensor.base.read_into(memoryview(expected))
                found = written[tensor.name].reshape(-1).view(torch.uint8).numpy().tobytes()[:shared]
                assert found == bytes(expected), tensor.name


def assert_valid(base: Any, adapters: list[Path], output: Path, sources: Sources | None) -> None:
    """Whatever is merged passes every check of a validation, with its manifest and without it."""
    manifest = output / "boft_export.json"
    content = manifest.read_bytes()
    for kept in (True, False):
        if not kept:
            manifest.unlink()
        found = validate(adapters, base=base, merged=output, sources=sources)
        assert [c for c in found.checks if c.outcome is not Outcome.PASS and c.level is Level.ERROR] == []
    manifest.write_bytes(content)


def snapshot(root: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


def codes(found: MergeResult | BoftExportError, level: Level) -> set[str]:
    notices = found.plan.notices if isinstance(found, MergeResult) else found.notices
    return {n.code for n in notices if n.level is level}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= 1e-7 * expected.abs().max()


def assert_rounded_once(actual: Tensor, exact: Tensor) -> None:
    """No neighbour in ``actual``'s dtype is nearer to the exact value."""
    error = (actual.double() - exact).abs()
    for end in (float("inf"), float("-inf")):
        neighbour = torch.nextafter(actual, torch.full_like(actual, end))
        assert (error <= (neighbour.double() - exact).abs()).all()


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@dataclass
class Refusal:
    """An adapter that can't be merged, what the error must name, and whether there is a next step to hint at."""

    adapter: Mapping[str, Tensor]
    says: Sequence[str]
    code: str
    base: Mapping[str, Tensor] | None = None
    config: Mapping[str, Any] | None = None
    hint: bool = True


def with_value(key: str, value: float) -> dict[str, Tensor]:
    tensors = layer()
    tensors[key].view(-1)[3] = value
    return tensors


REFUSED = {
    "module matches nothing": Refusal(
        layer("model.layers.0.self_attn.k_proj"),
        ["model.layers.0.self_attn.k_proj", "near matches", f"{Q}.weight"],
        "no-match",
    ),
    "module of a layer too many": Refusal(
        layer() | layer("model.layers.1.self_attn.q_proj"),
        ["model.layers.1.self_attn.q_proj", "near matches", f"{Q}.weight"],
        "no-match",
    ),
    "key nobody consumes": Refusal(layer() | {f"{PRE}{Q}.extra": rand(3)}, [f"{PRE}{Q}.extra"], "unused-key"),
    "key of another method": Refusal(
        layer() | {f"{PRE}{Q}.lora_A.weight": rand(3, 3)}, [f"{PRE}{Q}.lora_A.weight"], "foreign-key", hint=False
    ),
    "the same key twice": Refusal(layer() | {f"{Q}.boft_R": rand(2, 4, 4, 4)}, [R, "two spellings"], "double-key"),
    "the same replacement twice": Refusal(
        layer() | {f"{PRE}{NORM}": rand(IN), f"{PRE}{NORM}.default": rand(IN)}, [f"{PRE}{NORM}"], "double-key"
    ),
    "the same weight twice": Refusal(
        layer() | {f"{PRE}{Q}.weight": rand(OUT, IN), f"{PRE}{Q}.base_layer.weight": rand(OUT, IN)},
        [f"{PRE}{Q}.weight", f"{PRE}{Q}.base_layer.weight"],
        "double-key",
    ),
    "R without s": Refusal({R: layer()[R]}, [Q, "boft_R", "no boft_s"], "incomplete-layer"),
    "s without R": Refusal({S: layer()[S]}, [Q, "boft_s", "no boft_R"], "incomplete-layer"),
    "zero-size": Refusal({R: torch.zeros(0), S: torch.zeros(0)}, [Q, "[0]", "ZeRO-3"], "sharded-save"),
    "one-dimensional": Refusal({R: torch.zeros(128), S: torch.zeros(8)}, [Q, "[128]", "ZeRO-3"], "sharded-save"),
    "zero-size replacement": Refusal(
        layer() | {f"{PRE}{NORM}": torch.zeros(0)}, [f"{PRE}{NORM}", "[0]"], "sharded-save"
    ),
    "flat embedding": Refusal(
        {f"{PRE}{EMBED}": rand(OUT * IN)},
        [EMBED, f"[{OUT * IN}]", f"[{OUT}, {IN}]"],
        "replacement-shape",
        {EMBED: rand(OUT, IN)},
        {"modules_to_save": ["embed_tokens"]},
    ),
    "flat head of a tied base": Refusal(
        {f"{PRE}{HEAD}": rand(OUT * IN)}, [HEAD, f"[{OUT * IN}]"], "replacement-shape", {EMBED: rand(OUT, IN)}
    ),
    "R is no stack of blocks": Refusal({R: rand(4, 4, 4), S: layer()[S]}, [Q, "[4, 4, 4]"], "layer-shape", hint=False),
    "blocks are not square": Refusal(
        {R: rand(1, 4, 4, 2), S: layer()[S]}, [Q, "[1, 4, 4, 2]"], "layer-shape", hint=False
    ),
    "two factors of odd blocks": Refusal({R: rand(2, 4, 3, 3), S: layer()[S]}, [Q, "even"], "layer-shape", hint=False),
    "three factors of two blocks": Refusal(
        {R: rand(3, 2, 8, 8), S: layer()[S]}, [Q, "multiple of 4"], "layer-shape", hint=False
    ),
    "s is a matrix": Refusal({R: layer()[R], S: rand(2, 4)}, [Q, "[2, 4]", "(out, 1)"], "layer-shape", hint=False),
    "integer blocks": Refusal({R: layer()[R].long(), S: layer()[S]}, [R, "I64"], "adapter-dtype", hint=False),
    "other input size": Refusal(boft_tensors(Q, 32, OUT), [Q, "32", "16"], "layer-shape"),
    "other output size": Refusal(boft_tensors(Q, IN, 4), [Q, "4", f"{Q}.weight", "8"], "layer-shape", hint=False),
    "transposed weight": Refusal(layer(), [Q, "transposed", "Conv1D"], "layer-shape", {f"{Q}.weight": rand(IN, OUT)}),
    "conv1d weight": Refusal(
        layer(), [Q, "3 dimensions"], "layer-shape", {f"{Q}.weight": rand(OUT, IN, 1)}, hint=False
    ),
    "non-square conv": Refusal(
        boft_tensors(Q, 8 * 9, OUT), [Q, "72", "non-square"], "layer-shape", {f"{Q}.weight": rand(OUT, 8, 3, 5)}
    ),
    "grouped conv": Refusal(
        boft_tensors(Q, 8 * 9, OUT), [Q, "72", "grouped"], "layer-shape", {f"{Q}.weight": rand(OUT, 4, 3, 3)}
    ),
    "NaN in R": Refusal(with_value(R, float("nan")), [R, "1 of 128", "not finite"], "not-finite"),
    "infinity in s": Refusal(with_value(S, float("inf")), [S, "1 of 8", "not finite"], "not-finite"),
    "quantised to int8": Refusal(
        layer(), [Q, "U8", "quantised"], "quantised-base", {f"{Q}.weight": torch.zeros(OUT, IN, dtype=torch.uint8)}
    ),
    "quantised to fp8": Refusal(
        layer(), [Q, "F8_E4M3", "quantised"], "quantised-base", {f"{Q}.weight": rand(OUT, IN).to(torch.float8_e4m3fn)}
    ),
    "replaces integers by floats": Refusal(
        {f"{PRE}{NORM}": rand(IN)},
        [NORM, "F32", "I64"],
        "replacement-dtype",
        {NORM: torch.zeros(IN, dtype=torch.int64)},
        hint=False,
    ),
    "replacement of another shape": Refusal(
        layer() | {f"{PRE}{NORM}": rand(IN + 1)}, [NORM, "[17]", "[16]"], "replacement-shape"
    ),
    "trained module of another width": Refusal(
        layer() | {f"{PRE}score.weight": rand(2, IN + 1)},
        ["score.weight", "[2, 17]", "[2, 16]"],
        "replacement-shape",
        model() | {"score.weight": rand(2, IN)},
        {"modules_to_save": ["score"]},
    ),
    "two prefixes fit": Refusal(
        layer("layers.0.q"),
        ["layers.0.q.weight", "encoder.layers.0.q.weight", "decoder.layers.0.q.weight"],
        "ambiguous-name",
        model("encoder.layers.0.q", "decoder.layers.0.q"),
    ),
    "two modules, one tensor": Refusal(
        layer("layers.0.q") | layer("model.layers.0.q"),
        ["model.layers.0.q", "layers.0.q.weight"],
        "double-match",
        model("layers.0.q"),
        hint=False,
    ),
    "a fused weight and a part of it": Refusal(
        boft_tensors("attn.qkv_proj", IN, 24) | layer("attn.q_proj"),
        ["attn.q_proj", "attn.qkv_proj"],
        "double-match",
        {"attn.qkv_proj.weight": rand(24, IN)},
        hint=False,
    ),
    "no tensors": Refusal({}, ["boft_R"], "empty-adapter", hint=False),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(desk: Desk, case: Refusal) -> None:
    desk.base(case.base or model())
    desk.adapter(case.adapter, case.config)
    error = desk.refuse(*case.says)
    assert error.exit_code == 3
    assert case.code in codes(error, Level.ERROR)
    assert bool(error.hint) is case.hint


def test_all_problems_are_reported_at_once(desk: Desk) -> None:
    desk.base(model())
    desk.adapter(layer("model.x") | {R: layer()[R], f"{PRE}foo.weight": rand(2)})
    error = desk.refuse("3 problems", "model.x", Q, "foo.weight")
    assert codes(error, Level.ERROR) == {"no-match", "incomplete-layer", "unused-key"}


def test_a_base_with_packed_weights_is_told_from_a_wrong_one(desk: Desk) -> None:
    desk.base({f"{Q}.qweight": torch.zeros(2, OUT, dtype=torch.int32)}, {"quantization_config": {"bits": 4}})
    desk.adapter(layer())
    hint = desk.refuse(Q, f"{Q}.qweight").hint
    assert hint is not None
    assert "full-precision" in hint


def test_damaged_values_are_reported_together(desk: Desk) -> None:
    desk.base(model())
    desk.adapter(with_value(R, float("nan")) | {S: torch.full((OUT, 1), float("inf"))})
    desk.refuse("2 problems", R, S)


def test_overflow_of_the_output_dtype_is_refused(desk: Desk) -> None:
    desk.base(model())
    desk.adapter(layer() | {S: torch.full((OUT, 1), 1e6)})
    error = desk.refuse(f"{Q}.weight", "not finite as F16", dtype="float16")
    assert error.hint is not None
    assert "float32" in error.hint
    desk.merge()
    assert desk.tensors()[f"{Q}.weight"].isfinite().all()


def test_an_effect_lost_in_rounding_is_a_failed_check(desk: Desk) -> None:
    desk.base({k: v.bfloat16() for k, v in model().items()})
    desk.adapter({R: layer(std=1e-6)[R], S: torch.ones(OUT, 1)})
    error = desk.refuse("no element", error=CheckFailedError)
    assert error.exit_code == 1
    assert error.hint is not None


@pytest.mark.parametrize("kind", ["LORA", "HRA", "LOHA"])
def test_another_method_is_refused_with_what_is_supported(desk: Desk, kind: str) -> None:
    desk.base(model())
    desk.adapter({f"{PRE}{Q}.lora_A.weight": rand(4, IN)}, {"peft_type": kind})
    assert desk.refuse("adapter", f"peft_type {kind}", "supported are PEFT BOFT").hint is not None


# What is merged: the adapter's tensors, its config, and what is said of it.
IDENTITY = {R: torch.zeros(2, 4, 4, 4), S: torch.ones(OUT, 1)}
MERGED = {
    "plain": (layer(), {}, None),
    "more factors in the config": (layer(m=1), {"boft_n_butterfly_factor": 2}, (Level.WARNING, "config-disagrees")),
    "other block size in the config": (layer(), {"boft_block_size": 8}, (Level.WARNING, "config-disagrees")),
    "other block number in the config": (layer(), {"boft_block_num": 2}, (Level.WARNING, "config-disagrees")),
    "zero in s": (with_value(S, 0.0), {}, (Level.WARNING, "zero-scale")),
    "untrained": (IDENTITY, {}, (Level.WARNING, "untrained")),
    "symmetric blocks": ({R: torch.ones(2, 4, 4, 4), S: torch.ones(OUT, 1)}, {}, (Level.WARNING, "untrained")),
    "only scales trained": (IDENTITY | {S: layer()[S]}, {}, None),
    "odd blocks, one factor": (boft_tensors(Q, IN, OUT, m=1, b=1) | layer(m=1, b=2), {}, None),
    "three factors": (layer(m=3), {}, None),
    "biases lost": (layer(), {"bias": "boft_only", "peft_version": "0.20.0"}, (Level.WARNING, "lost-bias")),
    "no biases to lose": (layer(), {"bias": "boft_only"}, None),
    "s is a row": ({R: layer()[R], S: layer()[S].T.contiguous()}, {}, None),
    "permutations saved": (layer() | {f"{PRE}{Q}.boft_P": rand(2, IN, IN)}, {}, None),
    "keys end in default": ({f"{k}.default": v for k, v in layer().items()}, {}, None),
    "keys without prefix": ({k.removeprefix(PRE): v for k, v in layer().items()}, {}, None),
    "compiled model": ({k.replace(PRE, f"{PRE}_orig_mod."): v for k, v in layer().items()}, {}, None),
    "half-precision adapter": ({k: v.half() for k, v in layer().items()}, {}, (Level.WARNING, "narrow-adapter")),
    "another adapter leaked": (
        layer() | {f"{k}.second": v for k, v in layer(seed=5).items()},
        {},
        (Level.INFO, "dropped-key"),
    ),
    "the default one leaked": (
        layer() | {f"{k}.default": v for k, v in layer(seed=5).items()},
        {},
        (Level.INFO, "dropped-key"),
    ),
    "another one's bias leaked": (
        layer() | {f"{R}.x": rand(2, 4, 4, 4), f"{PRE}score.modules_to_save.x.bias": rand(3)},
        {},
        (Level.INFO, "dropped-key"),
    ),
    "another base": (layer(), {"base_model_name_or_path": "org/other"}, (Level.WARNING, "other-base")),
    "the same base elsewhere": (layer(), {"base_model_name_or_path": "/somewhere/else/base/"}, None),
}


@pytest.mark.parametrize(("tensors", "config", "notice"), MERGED.values(), ids=MERGED)
def test_merges_rightly_and_says_what_is_odd(
    desk: Desk, tensors: dict[str, Tensor], config: dict[str, Any], notice: tuple[Level, str] | None
) -> None:
    base = model()
    desk.base(base)
    desk.adapter(tensors, config)
    result = desk.merge()
    out = desk.tensors()
    plain = {k.replace("_orig_mod.", "").removesuffix(".default"): v for k, v in reversed(tensors.items())}
    own = {key: plain.get(key, plain.get(key.removeprefix(PRE))) for key in (R, S)}
    assert_close(out[f"{Q}.weight"], expected_merge(base[f"{Q}.weight"], own))
    assert same_bytes(out[NORM], base[NORM])
    assert out.keys() == base.keys()
    warned = codes(result, Level.WARNING)
    if notice is None:
        assert warned == set()
    else:
        assert notice[1] in codes(result, notice[0])
        assert warned <= {notice[1]}


def test_an_untrained_adapter_leaves_the_bytes(desk: Desk) -> None:
    base = model()
    desk.base(base)
    desk.adapter(IDENTITY)
    desk.merge()
    assert all(same_bytes(base[k], v) for k, v in desk.tensors().items())


def test_a_config_that_disagrees_is_one_notice_for_all_layers(desk: Desk) -> None:
    modules = [f"model.layers.{i}.q" for i in range(5)]
    desk.base(model(*modules))
    desk.adapter({k: v for m in modules for k, v in layer(m, m=1).items()}, {"boft_n_butterfly_factor": 2})
    found = [n for n in desk.merge().plan.notices if n.code == "config-disagrees"]
    assert len(found) == 1
    assert "5 of 5" in found[0].message


def test_another_revision_is_said(desk: Desk) -> None:
    # The cache's own layout is what a revision is known from.
    commits = "1111111aaaaaaa", "2222222bbbbbbb"
    folder = desk.root / "hub" / "models--org--net" / "snapshots"
    write_checkpoint(folder / commits[0], model())
    refs = folder.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(commits[0])
    desk.adapter(layer(), {"base_model_name_or_path": "org/net", "revision": commits[1]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(desk.root / "hub"))
        result = desk.merge(base="org/net", sources=Sources(offline=True))
    assert any(commits[1] in n.message for n in result.plan.notices if n.code == "other-base")


# Convolutions

CONV, FEATURES = "conv", 8 * 9


def conv_tensors(p: bool) -> dict[str, Tensor]:
    tensors = boft_tensors(CONV, FEATURES, OUT)
    tensors[f"{PRE}{CONV}.boft_s"] = tensors[f"{PRE}{CONV}.boft_s"].T.contiguous()
    return tensors | ({f"{PRE}{CONV}.boft_P": torch.eye(FEATURES).repeat(2, 1, 1)} if p else {})


@pytest.mark.parametrize(
    ("drop", "permutations", "flag", "view"),
    [
        ((), False, None, View.INPUT),
        (("peft_version",), False, None, View.INPUT),
        (OLD_PEFT, False, None, View.RESHAPED),
        (OLD_PEFT, True, None, View.RESHAPED),
        ((), True, View.INPUT, View.INPUT),
        ((), True, View.RESHAPED, View.RESHAPED),
        ((*OLD_PEFT, "peft_type"), False, View.RESHAPED, View.RESHAPED),
        ((), False, View.RESHAPED, View.RESHAPED),
    ],
)
def test_a_convolution_means_what_its_release_meant(
    desk: Desk, drop: tuple[str, ...], permutations: bool, flag: View | None, view: View
) -> None:
    weight, tensors = rand(OUT, 8, 3, 3), conv_tensors(permutations)
    desk.base({f"{CONV}.weight": weight})
    desk.adapter(tensors, drop=drop)
    desk.merge(sources=Sources(options=ReadOptions(conv_view=flag)))
    rotation = butterfly_matrix(tensors[f"{PRE}{CONV}.boft_R"])
    scale = tensors[f"{PRE}{CONV}.boft_s"].double()
    expected = {
        View.INPUT: scale.T * (weight.double().view(OUT, FEATURES) @ rotation.T),
        View.RESHAPED: (rotation @ weight.double().view(FEATURES, OUT)) * scale,
    }
    assert_close(desk.tensors()[f"{CONV}.weight"], expected[view].reshape(weight.shape))


@pytest.mark.parametrize(("drop", "permutations"), [((), True), ((*OLD_PEFT, "peft_type"), False)])
def test_a_convolution_of_unknown_meaning_asks_for_the_flag(
    desk: Desk, drop: tuple[str, ...], permutations: bool
) -> None:
    desk.base({f"{CONV}.weight": rand(OUT, 8, 3, 3)})
    desk.adapter(conv_tensors(permutations), drop=drop)
    error = desk.refuse(CONV, "convolution")
    assert error.hint is not None
    assert "--conv-view" in error.hint


# Ties between embedding and head


def embeddings(*, head: bool = False, rows: int = OUT) -> dict[str, Tensor]:
    return {EMBED: rand(rows, IN, seed=1)} | ({HEAD: rand(rows, IN, seed=2)} if head else {})


@pytest.mark.parametrize(
    ("config", "unset"),
    [
        (TIED, [()]),
        ({"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, [()]),
        (
            {"architectures": ["XForConditionalGeneration"], "text_config": {"tie_word_embeddings": True}},
            [(), ("text_config",)],
        ),
        ({**TIED, "text_config": {"model_type": "x"}}, [(), ("text_config",)]),
    ],
    ids=["llama", "tied by default", "nested", "nested default"],
)
def test_a_rotated_tied_head_is_written_and_untied(
    desk: Desk, config: dict[str, Any], unset: list[tuple[str, ...]]
) -> None:
    base = model() | embeddings()
    desk.base(base, config)
    desk.adapter(layer() | layer("lm_head"))
    desk.merge()
    out, written = desk.tensors(), desk.config()
    assert_close(out[HEAD], expected_merge(base[EMBED], layer("lm_head")))
    assert same_bytes(out[EMBED], base[EMBED])
    for path in unset:
        part = written
        for key in path:
            part = part[key]
        assert part["tie_word_embeddings"] is False


@pytest.mark.parametrize("on_disk", [False, True], ids=["left out", "on disk"])
@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_one_side_of_a_tie_is_replaced(desk: Desk, module: str, on_disk: bool) -> None:
    base, trained = model() | embeddings(), rand(OUT, IN, seed=7)
    base |= {HEAD: base[EMBED].clone()} if on_disk else {}
    desk.base(base, TIED)
    desk.adapter(layer() | {f"{PRE}{module}.weight": trained}, {"modules_to_save": [module.rpartition(".")[2]]})
    desk.merge()
    expected = {EMBED: base[EMBED], HEAD: base[EMBED], f"{module}.weight": trained}
    assert all(same_bytes(desk.tensors()[k], v) for k, v in expected.items())
    assert desk.config()["tie_word_embeddings"] is False
    assert desk.config()["architectures"] == TIED["architectures"]


@pytest.mark.parametrize("on_disk", [False, True], ids=["left out", "on disk"])
def test_both_sides_replaced_alike_stay_tied(desk: Desk, on_disk: bool) -> None:
    base, trained = model() | embeddings(), rand(OUT, IN, seed=7)
    base |= {HEAD: base[EMBED].clone()} if on_disk else {}
    desk.base(base, TIED)
    desk.adapter(layer() | {f"{PRE}{k}": trained.clone() for k in (EMBED, HEAD)})
    desk.merge()
    assert desk.tensors().keys() == base.keys()
    assert same_bytes(desk.tensors()[EMBED], trained)
    assert desk.config() == TIED


def test_both_sides_replaced_differently_are_untied(desk: Desk) -> None:
    trained = {EMBED: rand(OUT, IN, seed=7), HEAD: rand(OUT, IN, seed=8)}
    desk.base(model() | embeddings(), TIED)
    desk.adapter(layer() | {f"{PRE}{k}": v for k, v in trained.items()})
    desk.merge()
    assert all(same_bytes(desk.tensors()[k], v) for k, v in trained.items())
    assert desk.config()["tie_word_embeddings"] is False


def test_an_untied_head_keeps_the_embeddings_dtype(desk: Desk) -> None:
    base = {k: v.bfloat16() for k, v in model().items()} | {EMBED: rand(4, IN)}
    desk.base(base, TIED)
    desk.adapter(layer() | {f"{PRE}{EMBED}": rand(4, IN, seed=7)})
    desk.merge()
    assert same_bytes(desk.tensors()[HEAD], base[EMBED])


@pytest.mark.parametrize("module", ["lm_head", "language_model.lm_head"])
@pytest.mark.parametrize("saved", [False, True], ids=["rotated", "replaced"])
def test_a_tied_head_is_written_in_the_layout_of_the_base(desk: Desk, module: str, saved: bool) -> None:
    embedding = "language_model.model.embed_tokens.weight"
    base, trained = model() | {embedding: rand(OUT, IN)}, rand(OUT, IN, seed=7)
    desk.base(base, {"architectures": ["PaliGemmaForConditionalGeneration"], "text_config": {}})
    head = {f"{PRE}{module}.weight": trained} if saved else layer(module)
    desk.adapter(layer() | head, {"modules_to_save": ["lm_head"]} if saved else {})
    desk.merge()
    expected = trained.double() if saved else expected_merge(base[embedding], head)
    assert_close(desk.tensors()["language_model.lm_head.weight"], expected)
    assert desk.tensors().keys() == base.keys() | {"language_model.lm_head.weight"}
    assert desk.config()["tie_word_embeddings"] is False


BLOOM = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "tie_word_embeddings": True}


@pytest.mark.parametrize("saved", [False, True], ids=["head rotated", "embedding replaced"])
def test_a_bare_base_is_untied_under_its_full_names(desk: Desk, saved: bool) -> None:
    base, trained = model("h.0.dense") | {"word_embeddings.weight": rand(OUT, IN)}, rand(OUT, IN, seed=7)
    desk.base(base, BLOOM)
    extra = {f"{PRE}transformer.word_embeddings.weight": trained} if saved else layer("lm_head")
    config = {"modules_to_save": ["word_embeddings"]} if saved else {}
    desk.adapter(layer("transformer.h.0.dense") | extra, config)
    desk.merge()
    out, embedding = desk.tensors(), base["word_embeddings.weight"]
    assert out.keys() == {f"transformer.{k}" for k in base} | {HEAD}
    assert same_bytes(out["transformer.word_embeddings.weight"], trained if saved else embedding)
    assert_close(out[HEAD], embedding.double() if saved else expected_merge(embedding, extra))
    assert desk.config()["tie_word_embeddings"] is False


@pytest.mark.parametrize("adapted", ["lm_head", "shared"])
def test_a_scaled_tied_head_is_refused(desk: Desk, adapted: str) -> None:
    desk.base(
        model() | {"shared.weight": rand(OUT, IN)},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": True},
    )
    extra = layer("lm_head") if adapted == "lm_head" else {f"{PRE}shared.weight": rand(OUT, IN, seed=3)}
    desk.adapter(layer() | extra)
    assert desk.refuse("lm_head.weight", "tied to shared.weight", "computes otherwise").hint is not None


def test_a_head_of_its_own_is_rotated_like_any_other(desk: Desk) -> None:
    base = model() | embeddings(head=True)
    desk.base(base, UNTIED)
    desk.adapter(layer() | layer("lm_head"))
    desk.merge()
    assert_close(desk.tensors()[HEAD], expected_merge(base[HEAD], layer("lm_head")))
    assert desk.config() == UNTIED


# Vocabularies


@pytest.mark.parametrize("rows", [OUT + 3, OUT - 3], ids=["grows", "shrinks"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_resized_vocabulary_is_taken_with_its_tokenizer(desk: Desk, rows: int, tied: bool) -> None:
    base = model() | embeddings(head=not tied)
    config = {**(TIED if tied else UNTIED), "text_config": {"vocab_size": OUT}, "audio_config": {"vocab_size": 99}}
    folder = desk.base(base, config)
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (folder / name).write_text("base's")
    trained = embeddings(head=not tied, rows=rows)
    adapter = desk.adapter(layer() | {f"{PRE}{k}": v for k, v in trained.items()})
    (adapter / "tokenizer.json").write_text("adapter's")
    (adapter / "added_tokens.json").write_text("{}")
    result = desk.merge()
    assert all(same_bytes(desk.tensors()[k], v) for k, v in trained.items())
    assert desk.tensors().keys() == base.keys()
    sizes = {"vocab_size": rows, "text_config": {"vocab_size": rows}}
    assert desk.config() == {**config, **sizes}
    assert (desk.root / "out" / "tokenizer.json").read_text() == "adapter's"
    assert (desk.root / "out" / "added_tokens.json").exists()
    assert not (desk.root / "out" / "special_tokens_map.json").exists()
    assert codes(result, Level.WARNING) == ({"vocabulary"} if rows < OUT else set())


def test_a_resized_vocabulary_without_a_tokenizer_is_said(desk: Desk) -> None:
    desk.base(model() | embeddings(), TIED)
    desk.adapter(layer() | {f"{PRE}{EMBED}": rand(OUT + 1, IN)})
    assert codes(desk.merge(), Level.WARNING) == {"tokenizer"}


def test_a_tokenizer_beside_an_adapter_of_the_same_vocabulary_is_not_taken(desk: Desk) -> None:
    (desk.base(model()) / "tokenizer.json").write_text("base's")
    (desk.adapter(layer()) / "tokenizer.json").write_text("adapter's")
    desk.merge()
    assert (desk.root / "out" / "tokenizer.json").read_text() == "base's"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_head_resized_without_its_embedding_is_refused(desk: Desk, tied: bool) -> None:
    # PEFT saves lm_head.base_layer.weight and no embedding where the head is a target and nobody asks for more.
    desk.base(model() | embeddings(head=not tied), TIED if tied else UNTIED)
    head = boft_tensors("lm_head", IN, OUT + 2) | {f"{PRE}lm_head.base_layer.weight": rand(OUT + 2, IN)}
    desk.adapter(layer() | head)
    error = desk.refuse(HEAD, EMBED, f"{OUT + 2}", f"{OUT}")
    assert error.hint is not None
    assert "save_embedding_layers" in error.hint


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_base_weight_is_substituted_and_then_rotated(desk: Desk, tied: bool) -> None:
    desk.base(model() | embeddings(head=not tied), TIED if tied else UNTIED)
    head = boft_tensors("lm_head", IN, OUT + 2)
    trained = {EMBED: rand(OUT + 2, IN, seed=5), "lm_head.base_layer.weight": rand(OUT + 2, IN, seed=6)}
    desk.adapter(layer() | head | {f"{PRE}{k}": v for k, v in trained.items()})
    desk.merge()
    assert_close(desk.tensors()[HEAD], expected_merge(trained["lm_head.base_layer.weight"], head))
    assert same_bytes(desk.tensors()[EMBED], trained[EMBED])
    assert desk.config() == {**UNTIED, "vocab_size": OUT + 2}


# Biases and modules trained in full

BERT = "bert.encoder.layer.0.attention.self.query"
BERT_CONFIG = {"model_type": "bert", "architectures": ["BertModel"]}


def bert(prefix: str = "bert.") -> dict[str, Tensor]:
    names = {"encoder.layer.0.attention.self.query.weight": rand(OUT, IN), "embeddings.LayerNorm.weight": rand(IN)}
    names |= {"encoder.layer.0.attention.self.query.bias": rand(OUT, seed=1), "embeddings.LayerNorm.bias": rand(IN)}
    return {prefix + k: v for k, v in names.items()}


def test_the_biases_of_an_adapter_with_all_of_them(desk: Desk) -> None:
    extra = {
        "bert.relative_attention_bias.weight": rand(4, 2),
        "classifier.weight": rand(2, IN),
        "classifier.bias": rand(2),
    }
    desk.base(bert() | extra)
    trained = {
        f"{BERT}.base_layer.bias": rand(OUT, seed=11),
        "bert.embeddings.LayerNorm.bias": rand(IN, seed=12),
        "bert.relative_attention_bias.weight": rand(4, 2, seed=13),
        "classifier.weight": rand(2, IN, seed=13),
        "classifier.bias": rand(2, seed=14),
        "classifier.modules_to_save.bias": rand(2, seed=14),
        "classifier.original_module.bias": rand(2, seed=15),
    }
    config = {"bias": "all", "modules_to_save": ["classifier"]}
    desk.adapter(layer(BERT) | {f"{PRE}{k}": v for k, v in trained.items()}, config)
    result = desk.merge()
    out = desk.tensors()
    assert_close(out[f"{BERT}.weight"], expected_merge(bert()[f"{BERT}.weight"], layer(BERT)))
    assert same_bytes(out[f"{BERT}.bias"], trained[f"{BERT}.base_layer.bias"])
    for name in ("bert.embeddings.LayerNorm.bias", *extra):
        assert same_bytes(out[name], trained[name])
    dropped = {n.subject for n in result.plan.notices if n.code == "dropped-key"}
    assert dropped == {f"{PRE}classifier.{k}.bias" for k in ("modules_to_save", "original_module")}


def test_old_names_of_layer_norms_are_found(desk: Desk) -> None:
    base = {k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v for k, v in bert().items()}
    desk.base(base)
    trained = rand(IN, seed=12)
    desk.adapter(layer(BERT) | {f"{PRE}bert.embeddings.LayerNorm.bias": trained}, {"bias": "all"})
    desk.merge()
    assert same_bytes(desk.tensors()["bert.embeddings.LayerNorm.beta"], trained)
    assert desk.tensors().keys() == base.keys()


@pytest.mark.parametrize("prefix", ["bert.", ""], ids=["with prefix", "bare"])
@pytest.mark.parametrize("known", ["class", "task", "nothing"])
def test_a_head_that_the_base_lacks_is_added(desk: Desk, prefix: str, known: str) -> None:
    desk.base(bert(prefix), BERT_CONFIG, shards=2)
    head = {"classifier.weight": rand(3, IN, seed=4), "classifier.bias": rand(3, seed=5)}
    config = {
        "modules_to_save": ["classifier", "score"],
        "auto_mapping": {"base_model_class": "BertForSequenceClassification"} if known == "class" else None,
        "task_type": "SEQ_CLS" if known == "task" else None,
    }
    desk.adapter(layer(BERT) | {f"{PRE}{k}": v for k, v in head.items()}, config)
    result = desk.merge()
    out, written = desk.tensors(), desk.config()
    assert out.keys() == bert().keys() | head.keys()
    assert_close(out[f"{BERT}.weight"], expected_merge(bert()[f"{BERT}.weight"], layer(BERT)))
    assert all(same_bytes(out[k], v) for k, v in head.items())
    index = json.loads((desk.root / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == out.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in out.values())
    assert written["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert written["architectures"] == ["BertModel" if known == "nothing" else "BertForSequenceClassification"]
    assert codes(result, Level.WARNING) == ({"architecture"} if known == "nothing" else set())


@pytest.mark.parametrize("labels", [2, 3])
def test_labels_are_counted_by_the_last_weight_of_a_head(desk: Desk, labels: int) -> None:
    head = {"dense.weight": rand(IN, IN), "dense.bias": rand(IN), "out_proj.weight": rand(labels, IN)}
    base = {**BERT_CONFIG, "architectures": ["RobertaForSequenceClassification"]}
    desk.base(bert() | {f"classifier.{k}": torch.zeros_like(v) for k, v in head.items()}, base)
    desk.adapter(
        layer(BERT) | {f"{PRE}classifier.{k}": v for k, v in head.items()}, {"modules_to_save": ["classifier"]}
    )
    desk.merge()
    assert all(same_bytes(desk.tensors()[f"classifier.{k}"], v) for k, v in head.items())
    assert len(desk.config().get("id2label", (0, 1))) == labels


def test_labels_keep_their_names_where_their_number_stays(desk: Desk) -> None:
    config = {**BERT_CONFIG, "id2label": {"0": "no", "1": "yes"}}
    desk.base(bert() | {"classifier.weight": rand(2, IN)}, config)
    desk.adapter(layer(BERT) | {f"{PRE}classifier.weight": rand(2, IN, seed=3)}, {"modules_to_save": ["classifier"]})
    desk.merge()
    assert desk.config() == config


def test_a_module_that_grew_is_taken_with_a_warning(desk: Desk) -> None:
    desk.base(model() | {"boxes.weight": rand(4, IN)})
    desk.adapter(layer() | {f"{PRE}boxes.weight": rand(6, IN, seed=3)}, {"modules_to_save": ["boxes"]})
    assert codes(desk.merge(), Level.WARNING) == {"resized-module"}
    assert same_bytes(desk.tensors()["boxes.weight"], rand(6, IN, seed=3))


def test_a_trained_module_is_replaced_under_another_prefix(desk: Desk) -> None:
    # Nothing else in the adapter shows that the base's names lack the prefix.
    base, trained = bert(""), rand(IN, seed=4)
    desk.base(base)
    desk.adapter({f"{PRE}bert.embeddings.LayerNorm.weight": trained}, {"modules_to_save": ["LayerNorm"]})
    desk.merge()
    assert same_bytes(desk.tensors()["embeddings.LayerNorm.weight"], trained)
    assert desk.tensors().keys() == base.keys()


def test_a_counter_in_a_trained_module_is_replaced(desk: Desk) -> None:
    desk.base(model() | {"bn.weight": rand(3), "bn.num_batches_tracked": torch.tensor(5)})
    trained = {"bn.weight": rand(3, seed=4), "bn.num_batches_tracked": torch.tensor(7)}
    desk.adapter(layer() | {f"{PRE}{k}": v for k, v in trained.items()}, {"modules_to_save": ["bn"]})
    desk.merge()
    assert all(torch.equal(desk.tensors()[k], v) for k, v in trained.items())


@pytest.mark.parametrize(
    ("name", "config"), [(f"{BERT}.bias", {"bias": "all"}), (EMBED, {"modules_to_save": ["embed_tokens"]})]
)
def test_an_adapter_without_rotations_is_merged(desk: Desk, name: str, config: dict[str, Any]) -> None:
    base = bert() | embeddings()
    desk.base(base)
    trained = torch.randn_like(base[name])
    desk.adapter({f"{PRE}{name}": trained}, config)
    result = desk.merge()
    assert same_bytes(desk.tensors()[name], trained)
    actions = [r["action"] for r in result.manifest["tensors"].values()]
    assert sorted(actions) == ["copy"] * (len(base) - 1) + ["replace"]


# Weights fused on disk

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def test_a_fused_weight_is_rotated_by_its_parts(desk: Desk) -> None:
    rows = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "gate_proj": 12, "up_proj": 12}
    base = {f"{ATTENTION}.qkv_proj.weight": rand(16, IN), f"{MLP}.gate_up_proj.weight": rand(24, IN, seed=1)}
    desk.base(base)
    parts = {"q_proj": ATTENTION, "v_proj": ATTENTION, "gate_proj": MLP, "up_proj": MLP}
    layers = {p: boft_tensors(f"{owner}.{p}", IN, rows[p], seed=i) for i, (p, owner) in enumerate(parts.items())}
    desk.adapter({k: v for tensors in layers.values() for k, v in tensors.items()})
    desk.merge()
    out = desk.tensors()
    qkv, qkv_base = (t[f"{ATTENTION}.qkv_proj.weight"] for t in (out, base))
    assert_close(qkv[:8], expected_merge(qkv_base[:8], layers["q_proj"]))
    assert torch.equal(qkv[8:12], qkv_base[8:12])
    assert_close(qkv[12:], expected_merge(qkv_base[12:], layers["v_proj"]))
    mlp, mlp_base = (t[f"{MLP}.gate_up_proj.weight"] for t in (out, base))
    assert_close(mlp[:12], expected_merge(mlp_base[:12], layers["gate_proj"]))
    assert_close(mlp[12:], expected_merge(mlp_base[12:], layers["up_proj"]))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"q_proj": 15}, ["15", "16 rows"]),
        ({"q_proj": 20}, ["20", "16 rows"]),
        ({"v_proj": 8}, ["8", "16 rows"]),
        ({"q_proj": 12, "v_proj": 4}, ["q_proj", "v_proj", "qkv_proj"]),
        ({"k_proj": 4, "v_proj": 2}, ["k_proj", "v_proj", "qkv_proj"]),
        ({"q_proj": 2}, ["2", "16 rows"]),
    ],
)
def test_impossible_sizes_of_a_fused_weight_are_refused(desk: Desk, sizes: dict[str, int], says: list[str]) -> None:
    desk.base({f"{ATTENTION}.qkv_proj.weight": rand(16, IN)})
    desk.adapter({k: v for p, n in sizes.items() for k, v in boft_tensors(f"{ATTENTION}.{p}", IN, n).items()})
    assert desk.refuse("qkv_proj.weight", *says).exit_code == 3


def test_halves_of_different_size_are_refused(desk: Desk) -> None:
    desk.base({f"{MLP}.gate_up_proj.weight": rand(24, IN)})
    desk.adapter(boft_tensors(f"{MLP}.gate_proj", IN, 16))
    desk.refuse("gate_up_proj.weight", "16", "24 rows")


# Names


@pytest.mark.parametrize(
    ("trained", "on_disk"),
    [
        (["bert.encoder.layer.0.query"], ["encoder.layer.0.query"]),
        (["encoder.layer.0.query"], ["bert.encoder.layer.0.query"]),
        (["model.layers.0.q"], ["layers.0.q"]),
        (["layers.0.q"], ["model.layers.0.q"]),
        (["transformer.h.0.q"], ["h.0.q"]),
        (["h.0.q"], ["transformer.h.0.q"]),
        (["model.language_model.layers.0.q", "model.visual.blocks.0.qkv"], ["model.layers.0.q", "visual.blocks.0.qkv"]),
        (
            ["model.language_model.layers.0.q", "model.vision_tower.layers.0.q", "lm_head"],
            ["language_model.model.layers.0.q", "vision_tower.layers.0.q", "language_model.lm_head"],
        ),
        (["language_model.model.layers.0.q", "visual.blocks.0.qkv"], ["model.layers.0.q", "visual.blocks.0.qkv"]),
        (["model.language_model.layers.0.q"], ["model.text_model.layers.0.q"]),
    ],
    ids=lambda names: names[0],
)
def test_names_that_differ_by_a_prefix_are_found(desk: Desk, trained: list[str], on_disk: list[str]) -> None:
    base = model(*on_disk)
    desk.base(base)
    layers = [layer(name, seed=i) for i, name in enumerate(trained)]
    desk.adapter({k: v for tensors in layers for k, v in tensors.items()})
    result = desk.merge()
    for name, tensors in zip(on_disk, layers, strict=True):
        assert_close(desk.tensors()[f"{name}.weight"], expected_merge(base[f"{name}.weight"], tensors))
    assert desk.tensors().keys() == base.keys()
    assert "rename" in codes(result, Level.INFO)
    assert result.manifest["adapters"][0]["renames"]


# Several adapters


def test_several_adapters_apply_in_order_and_are_rounded_once(desk: Desk) -> None:
    base, adapters = rand(64, 64).bfloat16(), [boft_tensors(Q, 64, 64, seed=i, m=i) for i in (1, 2)]
    desk.base({f"{Q}.weight": base})
    for i, tensors in enumerate(adapters):
        desk.adapter(tensors, name=f"adapter{i}")
    desk.merge("adapter0", "adapter1")
    exact = expected_merge(expected_merge(base, adapters[0]), adapters[1])
    assert_rounded_once(desk.tensors()[f"{Q}.weight"], exact)


def test_a_later_replacement_of_a_rotated_weight_is_refused(desk: Desk) -> None:
    desk.base(model())
    desk.adapter(layer())
    desk.adapter({f"{PRE}{Q}.weight": rand(OUT, IN)}, name="second")
    assert desk.refuse(f"{Q}.weight", "second", adapters=("adapter", "second")).hint is not None


def test_the_last_of_two_replacements_counts(desk: Desk) -> None:
    desk.base(model())
    desk.adapter(layer() | {f"{PRE}{NORM}": rand(IN, seed=1)})
    desk.adapter({f"{PRE}{NORM}": rand(IN, seed=2)}, name="second")
    result = desk.merge("adapter", "second")
    assert same_bytes(desk.tensors()[NORM], rand(IN, seed=2))
    assert codes(result, Level.WARNING) == {"replaced-twice"}


@pytest.mark.parametrize("default", [True, False], ids=["default at the root", "one in a folder"])
def test_the_adapter_of_a_folder_that_is_meant_is_taken(desk: Desk, default: bool) -> None:
    base = model()
    desk.base(base)
    if default:
        desk.adapter(layer())
    desk.adapter(layer(seed=5), name="adapter/second")
    result = desk.merge()
    expected = expected_merge(base[f"{Q}.weight"], layer(seed=0 if default else 5))
    assert_close(desk.tensors()[f"{Q}.weight"], expected)
    assert ("other-adapters" if default else "nested-adapter") in codes(result, Level.INFO)


@pytest.mark.parametrize(("folder", "name"), [("adapter", "default"), ("adapter/second", "second")])
def test_the_adapters_that_peft_saves_in_one_folder(desk: Desk, folder: str, name: str) -> None:
    enable_butterflies_on_cpu()
    net = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, OUT))
    base = {k: v.clone() for k, v in net.state_dict().items()}
    desk.base(base)
    config = BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["0"], init_weights=False)
    adapted = get_peft_model(net, config)
    adapted.add_adapter("second", config)
    adapted.save_pretrained(desk.root / "adapter")
    desk.merge(folder)
    for key, value in adapted.merge_and_unload(adapter_names=[name]).state_dict().items():
        assert torch.allclose(desk.tensors()[key], value, rtol=0, atol=1e-6)
        assert same_bytes(desk.tensors()[key], base[key]) is (key != "0.weight")


def test_what_peft_trains_without_its_extension(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the extension does not compile, PEFT trains one factor and saves a config that says otherwise.
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    net = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, OUT))
    desk.base(net.state_dict())
    config = BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["0"], init_weights=False)
    adapted = get_peft_model(net, config)
    adapted.save_pretrained(desk.root / "adapter")
    result = desk.merge()
    assert codes(result, Level.WARNING) == {"config-disagrees"}
    merged = adapted.merge_and_unload().state_dict()["0.weight"]
    assert torch.allclose(desk.tensors()["0.weight"], merged, rtol=0, atol=1e-6)


def test_several_adapters_and_no_default_ask_for_a_name(desk: Desk) -> None:
    desk.base(model())
    for name in ("first", "second"):
        desk.adapter(layer(), name=f"adapter/{name}")
    hint = desk.refuse("several adapters", "first", "second").hint
    assert hint is not None
    assert "first" in hint
    desk.merge("adapter/second")


def test_a_folder_without_an_adapter_is_refused(desk: Desk) -> None:
    desk.base(model())
    (desk.root / "adapter").mkdir()
    desk.refuse("adapter", "adapter_model.safetensors")
    save_file(model(), desk.root / "adapter" / "model.safetensors")
    assert desk.refuse("not an adapter").hint is not None


def test_an_adapter_in_the_place_of_the_base_is_refused(desk: Desk) -> None:
    desk.adapter(layer(), name="base")
    desk.adapter(layer())
    assert desk.refuse("base", "is an adapter").hint is not None


def test_an_adapter_without_a_config_is_known_by_its_keys(desk: Desk) -> None:
    base = model()
    desk.base(base)
    (desk.adapter(layer()) / "adapter_config.json").unlink()
    desk.merge()
    assert_close(desk.tensors()[f"{Q}.weight"], expected_merge(base[f"{Q}.weight"], layer()))


# Files


def as_bin(folder: Path, name: str) -> None:
    """Turn a folder's safetensors file into what torch.save writes."""
    (file,) = folder.glob("*.safetensors")
    torch.save(load_file(file), folder / name)
    file.unlink()


def test_bin_files_are_read(desk: Desk) -> None:
    base = model()
    as_bin(desk.base(base), "pytorch_model.bin")
    as_bin(desk.adapter(layer()), "adapter_model.bin")
    desk.merge()
    assert_close(desk.tensors()[f"{Q}.weight"], expected_merge(base[f"{Q}.weight"], layer()))
    assert same_bytes(desk.tensors()[NORM], base[NORM])
    assert not list((desk.root / "out").glob("*.bin"))


def test_bin_files_with_an_index_are_read(desk: Desk) -> None:
    base = model()
    folder = desk.base(base)
    (folder / "model.safetensors").unlink()
    files = {f"pytorch_model-{i}-of-2.bin": {k: v} for i, (k, v) in enumerate(base.items(), 1)}
    for name, part in files.items():
        torch.save(part, folder / name)
    weight_map = {k: name for name, part in files.items() for k in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    desk.adapter(layer())
    desk.merge()
    assert_index(desk, 2)
    assert_close(desk.tensors()[f"{Q}.weight"], expected_merge(base[f"{Q}.weight"], layer()))


def assert_index(desk: Desk, files: int) -> None:
    """The index is where loaders look for it, and true."""
    out = desk.root / "out"
    (index,) = out.glob("*.index.json")
    assert index.name == "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    assert len(set(weight_map.values())) == files
    for file in set(weight_map.values()):
        held = {k for k, f in weight_map.items() if f == file}
        assert load_file(out / file).keys() == held


class _Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("where", ["base/pytorch_model.bin", "adapter/adapter_model.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(desk: Desk, where: str, zipped: bool, tmp_path_factory: Any) -> None:
    marker = tmp_path_factory.mktemp("marker") / "ran"
    desk.base(model())
    desk.adapter(layer())
    file = desk.root / where
    for old in file.parent.glob("*.safetensors"):
        old.unlink()
    torch.save({"w": _Malicious(marker)}, file, _use_new_zipfile_serialization=zipped)
    error = desk.refuse(file.name, error=DamagedFileError)
    assert error.exit_code == 3
    assert error.hint is not None
    assert not marker.exists()


def test_a_pickle_of_other_things_is_refused(desk: Desk) -> None:
    desk.base(model())
    adapter = desk.adapter(layer())
    (adapter / "adapter_model.safetensors").unlink()
    with (adapter / "adapter_model.bin").open("wb") as file:
        pickle.dump({"w": 1}, file)
    desk.refuse("adapter_model.bin", error=DamagedFileError)


@pytest.mark.parametrize(
    ("output", "options"),
    [
        ("full", {}),
        ("base", {}),
        ("base", {"overwrite": True}),
        ("adapter", {"overwrite": True}),
        (".", {"overwrite": True}),
        ("base/out", {}),
        ("adapter/out", {}),
        ("base/config.json", {}),
        ("base/config.json", {"overwrite": True}),
    ],
)
def test_an_output_that_may_not_be_written_is_refused(desk: Desk, output: str, options: dict[str, Any]) -> None:
    desk.base(model())
    desk.adapter(layer())
    (desk.root / "full").mkdir()
    (desk.root / "full" / "file").write_text("kept")
    error = desk.refuse(output, error=UsageError, output=desk.root / output, **options)
    assert error.exit_code == 2


def test_overwrite_replaces_the_whole_folder_and_only_at_the_end(desk: Desk) -> None:
    base = model()
    desk.base(base)
    desk.adapter(with_value(R, float("nan")), name="broken")
    desk.adapter(layer())
    (desk.root / "out").mkdir()
    (desk.root / "out" / "old.txt").write_text("old")
    desk.refuse("not finite", adapters=("broken",), overwrite=True)
    desk.merge(overwrite=True)
    assert not (desk.root / "out" / "old.txt").exists()
    assert_close(desk.tensors()[f"{Q}.weight"], expected_merge(base[f"{Q}.weight"], layer()))
    assert sorted(p.name for p in desk.root.iterdir()) == ["adapter", "base", "broken", "out"]


@pytest.mark.parametrize("ref", [None, "-"])
def test_the_base_is_taken_from_the_adapters_config(desk: Desk, ref: str | None) -> None:
    base = model()
    desk.base(base)
    desk.adapter(layer(), {"base_model_name_or_path": str(desk.root / "base")})
    desk.merge(base=ref)
    assert_close(desk.tensors()[f"{Q}.weight"], expected_merge(base[f"{Q}.weight"], layer()))


def test_an_adapter_that_names_no_base_needs_one(desk: Desk) -> None:
    desk.adapter(layer())
    assert desk.refuse("adapter", "base", error=UsageError, base=None).hint is not None


@pytest.mark.parametrize("shards", [1, 3])
def test_the_output_is_split_anew(desk: Desk, shards: int) -> None:
    base = model(*(f"model.layers.{i}.q" for i in range(6)))
    desk.base(base, shards=shards)
    desk.adapter(layer("model.layers.0.q"))
    desk.merge(max_shard_size=1200)
    assert_index(desk, 3)
    for file in (desk.root / "out").glob("*.safetensors"):
        assert sum(t.nbytes for t in load_file(file).values()) <= 1200
    assert all(same_bytes(desk.tensors()[k], v) for k, v in base.items() if k != "model.layers.0.q.weight")
    (desk.root / "out").rename(desk.root / "split")
    desk.merge(max_shard_size="1GB")
    assert [p.name for p in (desk.root / "out").glob("model*")] == ["model.safetensors"]
    joined = desk.tensors()
    assert all(same_bytes(v, joined[k]) for k, v in read_folder(desk.root / "split").items())


def test_a_single_numbered_file_keeps_its_index(desk: Desk) -> None:
    folder, name = desk.base(model()), "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / name)
    index = json.dumps({"weight_map": dict.fromkeys(model(), name)})
    (folder / "model.safetensors.index.json").write_text(index)
    desk.adapter(layer())
    desk.merge()
    assert_index(desk, 1)


@pytest.mark.parametrize("names", ["model-{}-of-2", "net-0.5b-{:05d}-of-000002", "part_{}"])
def test_the_index_is_where_loaders_look_for_it(desk: Desk, names: str) -> None:
    base = model()
    folder = desk.base(base)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, (key, value) in enumerate(base.items()):
        weight_map[key] = f"{names.format(i + 1)}.safetensors"
        save_file({key: value}, folder / weight_map[key])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    desk.adapter(layer())
    desk.merge()
    assert_index(desk, 2)


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_another_dtype_is_for_every_float_and_the_config(desk: Desk, name: str, dtype: torch.dtype) -> None:
    base = model() | {"ids": torch.arange(5), "mask": torch.tensor([True, False]), "half": rand(4).bfloat16()}
    config = {"torch_dtype": "float32", "text_config": {"dtype": "float32"}, "vision_config": {"x": 1}}
    desk.base(base, config)
    desk.adapter(layer())
    desk.merge(dtype=name)
    out = desk.tensors()
    weight = out.pop(f"{Q}.weight")
    assert_rounded_once(weight, expected_merge(base[f"{Q}.weight"], layer()))
    assert weight.dtype == dtype
    assert all(same_bytes(v, base[k].to(dtype) if base[k].is_floating_point() else base[k]) for k, v in out.items())
    assert desk.config() == {"torch_dtype": name, "text_config": {"dtype": name}, "vision_config": {"x": 1}}


def test_what_is_not_adapted_is_copied_byte_for_byte(desk: Desk) -> None:
    base = model() | {"ids": torch.arange(5), "nan": torch.tensor([float("nan"), -0.0]), "none": torch.zeros(0, 4)}
    folder = desk.base(base)
    files = {
        "config.json": b'{\r\n  "model_type": "test",  "b": 1.0e5\r\n}\r\n',
        "generation_config.json": b"{}\r\n",
        "tokenizer.json": "ä".encode("latin-1"),
        "chat_template.jinja": b"{{ x }}",
        "1_Pooling/config.json": b"{}",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    desk.adapter(layer())
    desk.merge()
    out = desk.tensors()
    assert all(same_bytes(v, out[k]) for k, v in base.items() if k != f"{Q}.weight")
    written = snapshot(desk.root / "out")
    own = {"model.safetensors", "README.md", "boft_export.json", "1_Pooling"}
    assert {k: v for k, v in written.items() if k not in own} == files


@pytest.mark.parametrize("file", ["README.md", "config.json", "boft_export.json"])
def test_no_local_path_is_written(desk: Desk, file: str) -> None:
    desk.base(model())
    elsewhere = "/home/someone/models/other-net"
    for name, trained_on in (("adapter", elsewhere), ("second", str(desk.root / "base"))):
        desk.adapter(layer(), {"base_model_name_or_path": trained_on}, name=name)
    result = desk.merge("adapter", "second")
    assert any("other-net" in n.message for n in result.plan.notices if n.code == "other-base")
    text = (desk.root / "out" / file).read_text()
    assert str(desk.root) not in text
    assert "/home/someone" not in text


def test_the_hub_id_of_the_base_is_written(desk: Desk) -> None:
    desk.base(model())
    desk.adapter(layer(), {"base_model_name_or_path": "org/base"})
    result = desk.merge()
    assert result.manifest["adapters"][0]["base_model"] == "org/base"
    assert "base_model: org/base\n" in (desk.root / "out" / "README.md").read_text()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_replacement_that_is_not_finite_is_refused(desk: Desk, value: float) -> None:
    bias = torch.zeros(OUT)
    bias[2] = value
    desk.base(model() | {f"{Q}.bias": torch.zeros(OUT)})
    desk.adapter(layer() | {f"{PRE}{Q}.base_layer.bias": bias}, {"bias": "all"})
    desk.refuse(f"{Q}.bias", "1 values", "not finite")


def test_infinities_of_the_base_are_taken_over(desk: Desk) -> None:
    mask = torch.full((4,), float("-inf"))
    desk.base(model() | {"mask": mask})
    desk.adapter(layer())
    desk.merge(dtype="float16")
    assert torch.equal(desk.tensors()["mask"], mask.half())


def test_beside_an_input_given_as_a_file_is_free(desk: Desk) -> None:
    folder = desk.base(model())
    desk.adapter(layer())
    desk.merge(base=folder / "model.safetensors", output=folder / "out")
    assert (folder / "out" / "model.safetensors").is_file()
    desk.refuse(
        "into the base's folder", base=folder / "model.safetensors", output=folder, overwrite=True, error=UsageError
    )


def test_a_quantised_base_keeps_its_dtypes(desk: Desk) -> None:
    desk.base(model(), {**LLAMA, "quantization_config": {"quant_method": "fp8"}})
    desk.adapter(layer())
    assert codes(desk.refuse("scales", dtype="float16"), Level.ERROR) == {"quantised-base"}


def test_an_addition_to_the_same_class_is_a_warning(desk: Desk) -> None:
    desk.base(model(), UNTIED)
    trained = {f"{PRE}model.layers.7.norm.weight": rand(IN)}
    desk.adapter(layer() | trained, {"modules_to_save": ["norm"], "task_type": "CAUSAL_LM"})
    assert codes(desk.merge(), Level.WARNING) == {"added"}


def test_a_head_for_another_task_names_its_class(desk: Desk) -> None:
    config = {"architectures": ["BertForSequenceClassification"], "model_type": "bert"}
    desk.base(model() | {"classifier.weight": rand(2, IN)}, config)
    trained = {f"{PRE}classifier.weight": rand(2, IN, seed=3)}
    desk.adapter(layer() | trained, {"modules_to_save": ["classifier"], "task_type": "TOKEN_CLS"})
    desk.merge()
    assert desk.config()["architectures"] == ["BertForTokenClassification"]


def test_only_leaked_rotations_are_refused(desk: Desk) -> None:
    desk.base(model() | {"head.weight": rand(2, IN)})
    leaked = {f"{k}.second": v for k, v in layer().items()}
    desk.adapter(leaked | {f"{PRE}head.weight": rand(2, IN)}, {"modules_to_save": ["head"]})
    desk.refuse("leaked", "second")


def test_settings_of_a_tokenizer_are_no_tokenizer(desk: Desk) -> None:
    folder = desk.base(model() | embeddings(), TIED)
    (folder / "tokenizer.json").write_text("base's")
    adapter = desk.adapter(layer() | {f"{PRE}{EMBED}": rand(OUT + 1, IN)})
    (adapter / "chat_template.jinja").write_text("{{ x }}")
    assert codes(desk.merge(), Level.WARNING) == {"tokenizer"}
    assert (desk.root / "out" / "tokenizer.json").read_text() == "base's"
