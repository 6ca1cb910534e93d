"""PEFT's OFT against PEFT's own merge, and against the formulas of older releases written out."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import read_folder, write_adapter, write_checkpoint
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import boft_export
from boft_export.adapters import AdapterLayer
from boft_export.errors import BoftExportError, InputError, UsageError
from boft_export.linalg.cayley import cayley, from_triangle, shrink
from boft_export.linalg.neumann import expected_residual, polynomial
from boft_export.pipeline import layers
from boft_export.planning import SourcedAdapter
from boft_export.planning.inputs import Sources

PRE = "base_model.model."
# What PEFT 0.16 and 0.17 write; from 0.18 on there is peft_version too.
OLD = {"peft_type": "OFT", "oft_block_size": 4, "r": 0, "coft": False, "eps": 6e-5, "block_share": False}
V16 = OLD | {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5}
V18 = V16 | {"peft_version": "0.18.0"}
# What support.write_adapter writes by itself, of BOFT.
DROPPED = ("peft_version", "boft_block_num")


class Net(nn.Module):
    """One of each kind that OFT adapts."""

    def __init__(self, n: int = 24) -> None:
        super().__init__()
        self.up = nn.Linear(n, 20)
        self.down = nn.Linear(20, 7, bias=False)
        self.conv = nn.Conv2d(n, 6, 1, stride=2)
        self.words = nn.Embedding(11, n)
        self.head = nn.Linear(7, 3)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1234)


def adapt(net: nn.Module, **config: Any) -> PeftModel:
    """Put a random adapter into a copy of ``net``, in its dtype; whatever PEFT would train differs from its start."""
    settings = {"target_modules": ["up", "down", "conv", "words"], "oft_block_size": 4, "init_weights": False} | config
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Invalid")
        model = get_peft_model(copy.deepcopy(net), OFTConfig(**settings)).to(net.up.weight.dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def merged_by_peft(model: PeftModel) -> dict[str, Tensor]:
    """Return what PEFT's own merge gives in float64; the model stays as it is."""
    return {k: v.detach() for k, v in copy.deepcopy(model).double().merge_and_unload().state_dict().items()}


def merge(folder: Path, net: nn.Module, model: PeftModel) -> dict[str, Tensor]:
    base = write_checkpoint(folder / "base", net.state_dict())
    model.save_pretrained(folder / "adapter")
    boft_export.merge(base, folder / "adapter", folder / "out")
    return read_folder(folder / "out")


OPTIONS = {
    **{f"{t} terms": {"num_cayley_neumann_terms": t} for t in range(2, 8)},
    "exact": {"use_cayley_neumann": False},
    "block size 2": {"oft_block_size": 2},
    "odd block size": {"oft_block_size": 5},
    "one block": {"oft_block_size": 24},
    "by number": {"r": 4, "oft_block_size": 0},
    "adjusted number": {"r": 7, "oft_block_size": 0},
    "shared": {"block_share": True},
    "shared, exact": {"block_share": True, "use_cayley_neumann": False},
    "bound": {"coft": True, "eps": 0.3},
    "bound, exact": {"coft": True, "eps": 0.3, "use_cayley_neumann": False},
    "bound, shared": {"coft": True, "eps": 0.3, "block_share": True},
    "default bound": {"coft": True},
    "biases and a module": {"bias": "all", "modules_to_save": ["head"]},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_like_peft_in_float64(tmp_path: Path, option: str) -> None:
    net = Net().double()
    model = adapt(net, **OPTIONS[option])
    oracle = merged_by_peft(model)

    found = merge(tmp_path, net, model)

    assert found.keys() == oracle.keys()
    # PEFT computes COFT's bound in float32 whatever the weights are in.
    tolerance = 1e-7 if "bound" in option else 1e-14
    for name, exact in oracle.items():
        assert exact.dtype is found[name].dtype is torch.float64
        assert found[name].shape == exact.shape
        assert (found[name] - exact).abs().max() <= tolerance * exact.abs().max(), name
    for name in ("up", "down", "conv", "words"):
        changed = (found[f"{name}.weight"] - net.state_dict()[f"{name}.weight"]).abs().max()
        assert changed > (1e-6 if option == "default bound" else 1e-3), name


@pytest.mark.parametrize("exact", [True, False])
def test_like_peft_from_float32(tmp_path: Path, *, exact: bool) -> None:
    net = Net()
    model = adapt(net, use_cayley_neumann=not exact)
    oracle = merged_by_peft(model)
    for name, value in merge(tmp_path, net, model).items():
        assert value.dtype is torch.float32
        assert (value - oracle[name]).abs().max() <= 1e-7 * oracle[name].abs().max(), name


@pytest.mark.parametrize(("n", "size"), [(30, 3), (26, 2), (23, 1), (5, 5)])
def test_sizes_that_peft_adjusts(tmp_path: Path, n: int, size: int) -> None:
    """Where the block size divides no layer, PEFT takes another; 1, without anything to train, where n is prime."""
    net = Net(n).double()
    model = adapt(net)
    oracle = merged_by_peft(model)

    found = merge(tmp_path, net, model)

    shapes = {g.pattern: g.block_size for g in boft_export.inspect(tmp_path / "adapter").layers}
    assert (shapes["up"], shapes["down"]) == (size, 4)
    for name, exact in oracle.items():
        assert (found[name] - exact).abs().max() <= 1e-14 * exact.abs().max(), name
    assert torch.equal(found["up.weight"], net.up.weight) == (size == 1)


# The formulas of older releases


def skew_of_rows(row: Sequence[float], b: int) -> Tensor:
    q = torch.zeros(b, b, dtype=torch.float64)
    entries = iter(row)
    for i in range(b):
        for j in range(i + 1, b):
            q[i, j] = next(entries)
            q[j, i] = -q[i, j]
    assert next(entries, None) is None
    return q


def old_neumann(q: Tensor, terms: int) -> Tensor:
    """PEFT 0.16 and 0.17: I + 2 Q + ... + 2 Q^(t-1)."""
    powers = [torch.linalg.matrix_power(q, k) for k in range(terms)]
    return powers[0] + 2 * sum(powers[1:], start=torch.zeros_like(q))


def exact_cayley(q: Tensor) -> Tensor:
    eye = torch.eye(len(q), dtype=torch.float64)
    return (eye - q) @ torch.linalg.inv(eye + q)


def run(folder: Path, weight: Tensor, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """Merge one layer in float64."""
    base = write_checkpoint(folder / "base", {"up.weight": weight})
    adapter = write_adapter(
        folder / "adapter",
        {f"{PRE}up.{k}": v for k, v in parts.items()},
        config,
        drop=tuple(k for k in DROPPED if k not in config),
    )
    boft_export.merge(base, adapter, folder / "out")
    return read_folder(folder / "out")["up.weight"]


def rand(*shape: int, std: float = 0.2) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * std


@pytest.mark.parametrize("terms", range(2, 8))
def test_series_of_016_and_017(tmp_path: Path, terms: int) -> None:
    weight, rows = rand(5, 12), rand(3, 6)
    rotation = torch.block_diag(*(old_neumann(skew_of_rows(r.tolist(), 4), terms) for r in rows))

    found = run(tmp_path / "old", weight, {"oft_R.weight": rows}, V16 | {"num_cayley_neumann_terms": terms})
    new = run(tmp_path / "new", weight, {"oft_R.weight": rows}, V18 | {"num_cayley_neumann_terms": terms})

    assert (found - weight @ rotation.T).abs().max() < 1e-14
    assert ((found - new).abs().max() > 1e-4) == (terms > 2)


@pytest.mark.parametrize("config", [V16, V18], ids=["0.17", "0.18"])
def test_exact_and_series_have_opposite_signs(tmp_path: Path, config: Mapping[str, Any]) -> None:
    weight, rows = rand(5, 12), rand(3, 6, std=0.02)
    rotation = torch.block_diag(*(exact_cayley(skew_of_rows(r.tolist(), 4)) for r in rows))
    exact = run(tmp_path / "exact", weight, {"oft_R.weight": rows}, config | {"use_cayley_neumann": False})
    series = run(tmp_path / "series", weight, {"oft_R.weight": rows}, config)
    assert (exact - weight @ rotation.T).abs().max() < 1e-14
    assert (series - weight @ rotation).abs().max() < 1e-4
    assert (series - exact).abs().max() > 1e-2


@pytest.mark.parametrize("kernel", [None, 1, 3])
@pytest.mark.parametrize("option", ["plain", "shared", "bound"])
def test_layers_of_014_and_015(tmp_path: Path, kernel: int | None, option: str) -> None:
    """diag(s) W Q^T over full matrices A; convolutions of any kernel, which was a weight's own then."""
    shape = (5, 12) if kernel is None else (5, 12 // kernel, kernel, kernel)
    weight = rand(*shape)
    n = weight[0].numel()
    rows, scale = rand(1 if option == "shared" else n // 4, 4, 4), 1 + rand(5, 1)
    config = OLD | {"block_share": option == "shared", "coft": option == "bound", "eps": 0.1}
    blocks = []
    for a in rows.expand(n // 4, 4, 4):
        bound = 0.1 * math.ceil(5 / (n // 4)) ** 2 / math.sqrt(n // 4)
        if option == "bound" and a.norm() > bound:
            a = a * bound / a.norm()  # noqa: PLW2901  # the projection
        blocks.append(exact_cayley((a - a.T) / 2))
    exact = (scale * (weight.reshape(5, -1) @ torch.block_diag(*blocks).T)).reshape(shape)

    found = run(tmp_path, weight, {"oft_r": rows, "oft_s": scale}, config)

    assert (found - exact).abs().max() < 1e-14
    assert (found - weight).abs().max() > 1e-3


# What is refused


def test_a_convolution_with_a_kernel_is_refused_for_what_peft_trains(tmp_path: Path) -> None:
    """Even an adapter that rotates nothing changes such a convolution in PEFT, so that no merge can be right."""
    net = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3)})
    model = get_peft_model(copy.deepcopy(net), OFTConfig(target_modules=["conv"], oft_block_size=4))
    x = torch.randn(1, 4, 6, 6)
    adapted = model.base_model.model["conv"](x)
    assert (adapted - net["conv"](x)).abs().max() > 0.1
    base = write_checkpoint(tmp_path / "base", net.state_dict())
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"conv: conv.weight is a 3x3 convolution: PEFT trains .* unfolding"):
        boft_export.merge(base, tmp_path / "adapter", tmp_path / "out")


TRIANGLE = {"oft_R.weight": torch.zeros(3, 6)}
SQUARE = {"oft_r": torch.zeros(3, 4, 4), "oft_s": torch.ones(5, 1)}
REFUSED = {
    "wrong triangle": ({"oft_R.weight": torch.zeros(3, 5)}, V18, "has shape [3, 5]: expected (blocks, size"),
    "wrong width": ({"oft_R.weight": torch.zeros(2, 6)}, V18, "rotates 8 features, up.weight has 12"),
    "shared and no divisor": (
        {"oft_R.weight": torch.zeros(1, 10)},
        V18 | {"block_share": True},
        "rotates a block of 5 again and again, up.weight has 12",
    ),
    "not shared": ({"oft_R.weight": torch.zeros(1, 6)}, V18, "rotates 4 features"),
    "flat": ({"oft_R.weight": torch.zeros(18)}, V18, "ZeRO-3"),
    "empty": ({"oft_R.weight": torch.zeros(0)}, V18, "ZeRO-3"),
    "no rows": ({"oft_R.weight": torch.zeros(0, 6)}, V18, "ZeRO-3"),
    "0-d": ({"oft_R.weight": torch.tensor(1.0)}, V18, "ZeRO-3"),
    "integers": ({"oft_R.weight": torch.zeros(3, 6, dtype=torch.int32)}, V18, "expected a floating-point dtype"),
    "not finite": ({"oft_R.weight": torch.full((3, 6), math.nan)}, V18, "18 of 18 values are not finite"),
    "vast": ({"oft_R.weight": torch.full((3, 6), 1e200, dtype=torch.float64)}, V18, "too large to give a rotation"),
    "both kinds": (TRIANGLE | {"oft_embedding_R.weight": torch.zeros(3, 6)}, V18, "expected oft_R.weight, or"),
    "no oft_R": ({}, V18, "expected oft_R.weight keys"),
    "only oft_s": ({"oft_s": torch.ones(5, 1)}, OLD, "has oft_s: expected"),
    "only oft_r": ({"oft_r": torch.zeros(3, 4, 4)}, OLD, "has oft_r: expected"),
    "no squares": (SQUARE | {"oft_r": torch.zeros(3, 4, 5)}, OLD, "expected (blocks, size, size) and (out, 1)"),
    "wrong scales": (SQUARE | {"oft_s": torch.ones(5, 2)}, OLD, "expected (blocks, size, size) and (out, 1)"),
    "other scales": (SQUARE | {"oft_s": torch.ones(6, 1)}, OLD, "scales 6 outputs, up.weight has 5"),
    "unknown bound": (
        SQUARE | {"oft_r": torch.zeros(1, 4, 4)},
        OLD | {"coft": True, "block_share": True},
        "coft and block_share",
    ),
    "no bound": (TRIANGLE, V18 | {"coft": True, "eps": None}, "eps in its config is None"),
    "no terms": (TRIANGLE, V18 | {"num_cayley_neumann_terms": None}, "num_cayley_neumann_terms in its config is None"),
    "unknown release": (TRIANGLE, OLD, "names neither PEFT's release nor use_cayley_neumann"),
    "no release": (TRIANGLE, V18 | {"peft_version": "main"}, "names neither PEFT's release nor"),
    "between releases": (TRIANGLE, V18 | {"peft_version": "0.17.2.dev0@1a2b3c"}, "between 0.17 and 0.18"),
    "BOFT's": (TRIANGLE | {"boft_R": torch.zeros(1, 3, 4, 4)}, V18, "another method's tensor"),
    "LoRA's": (TRIANGLE | {"lora_A.weight": torch.zeros(2, 12)}, V18, "another method's tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    parts, config, message = REFUSED[case]
    with pytest.raises(BoftExportError) as caught:
        run(tmp_path, rand(5, 12), parts, config)
    assert isinstance(caught.value, InputError)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_output_side_of_013_is_refused_once_for_all_layers(tmp_path: Path) -> None:
    config = {k: v for k, v in OLD.items() if k != "oft_block_size"} | {"r": 3}
    with pytest.raises(InputError, match=r"^adapter: it is of PEFT 0.7 to 0.13, .* outputs") as caught:
        run(tmp_path, rand(12, 12), {"oft_r": torch.zeros(3, 4, 4), "0.oft_r": torch.zeros(3, 4, 4)}, config)
    assert "release that trained it" in str(caught.value.hint)


@pytest.mark.parametrize("parts", [TRIANGLE, SQUARE], ids=["triangle", "square"])
def test_without_a_config_nothing_is_guessed(tmp_path: Path, parts: Mapping[str, Tensor]) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({f"{PRE}up.{k}": v for k, v in parts.items()}, folder / "adapter_model.safetensors")
    base = write_checkpoint(tmp_path / "base", {"up.weight": rand(5, 12)})
    with pytest.raises(InputError, match="it has no config") as caught:
        boft_export.merge(base, folder, tmp_path / "out")
    assert "adapter_config.json" in str(caught.value.hint)


@pytest.mark.parametrize("config", [OLD | {"use_cayley_neumann": False}, V18 | {"peft_version": "0.17.2.dev0"}])
def test_what_no_release_changed_needs_no_release(tmp_path: Path, config: Mapping[str, Any]) -> None:
    rows = rand(3, 6)
    config = config | {"num_cayley_neumann_terms": 2}
    found = run(tmp_path, torch.eye(12, dtype=torch.float64), {"oft_R.weight": rows}, config)
    q = [skew_of_rows(r.tolist(), 4) for r in rows]
    exact = config["use_cayley_neumann"] is False
    blocks = [exact_cayley(x) if exact else torch.eye(4, dtype=torch.float64) + 2 * x for x in q]
    assert (found - torch.block_diag(*blocks).T).abs().max() < 1e-14


# What else is in the file


def notices(folder: Path) -> dict[str, str]:
    return {n.code: str(n) for n in boft_export.plan(folder / "base", folder / "adapter").notices}


@pytest.mark.parametrize(("version", "lost"), [("0.20.0", True), (None, True), ("0.21.0", False)])
@pytest.mark.parametrize("bias", ["all", "oft_only"])
def test_biases_that_peft_did_not_save(tmp_path: Path, version: str | None, bias: str, *, lost: bool) -> None:
    run(tmp_path, rand(5, 12), {"oft_R.weight": rand(3, 6)}, V16 | {"bias": bias, "peft_version": version})
    assert ("lost-bias" in notices(tmp_path)) == lost


def test_trained_biases_are_taken(tmp_path: Path) -> None:
    net = Net()
    model = adapt(net, bias="oft_only")
    found = merge(tmp_path, net, model)
    assert torch.equal(found["up.bias"], merged_by_peft(model)["up.bias"].float())
    assert not torch.equal(found["up.bias"], net.up.bias)
    assert torch.equal(found["head.bias"], net.head.bias)


def test_another_adapter_that_leaked_is_left_out(tmp_path: Path) -> None:
    weight, rows = rand(5, 12), rand(3, 6)
    leaked = {"oft_R.second.weight": rand(3, 6), "oft_R.weight": rows}
    found = run(tmp_path / "leaked", weight, leaked, V18)
    assert torch.equal(found, run(tmp_path / "clean", weight, {"oft_R.default.weight": rows}, V18))
    assert "second" in notices(tmp_path / "leaked")["dropped-key"]


def test_a_base_weight_beneath_an_embedding_is_put_in_first(tmp_path: Path) -> None:
    """PEFT saves a targeted embedding's own weight too, as it does where the vocabulary was resized."""
    net = Net().double()
    model = adapt(net, target_modules=["words"])
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    own = rand(11, 24)
    save_file(load_file(file) | {f"{PRE}words.base_layer.weight": own}, file, metadata={"format": "pt"})
    base = write_checkpoint(tmp_path / "base", net.state_dict())
    boft_export.merge(base, tmp_path / "adapter", tmp_path / "out")
    rotation = model.base_model.model.words.get_delta_weight("default").detach()
    assert (read_folder(tmp_path / "out")["words.weight"] - own @ rotation).abs().max() < 1e-14


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_side_of_a_tie(tmp_path: Path, target: str) -> None:
    """PEFT trains the other side as it was; its own merge into the shared tensor would change both."""
    size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    tokens = torch.arange(10)[None]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = model(tokens).logits
        adapted = get_peft_model(
            model, OFTConfig(target_modules=[target, "q_proj"], oft_block_size=4, init_weights=False)
        ).eval()
        adapted.save_pretrained(tmp_path / "adapter")
        boft_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        logits = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()(tokens).logits
        trained = adapted(tokens).logits
    assert (logits - trained).abs().max() < 1e-6
    assert (trained - before).abs().max() > 1e-2


# Weights that are fused on disk: there are no output scales that would tell the parts' sizes

FUSED = {"qkv_proj": {"q_proj": 8, "k_proj": 4, "v_proj": 4}, "gate_up_proj": {"gate_proj": 6, "up_proj": 6}}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("config", [HEADS, {"text_config": HEADS}], ids=["flat", "nested"])
def test_parts_of_a_fused_weight(tmp_path: Path, fused: str, config: Mapping[str, Any]) -> None:
    parts = FUSED[fused]
    weight = rand(sum(parts.values()), 12)
    rows = {part: rand(3, 6) for part in parts}
    base = write_checkpoint(tmp_path / "base", {f"layers.0.{fused}.weight": weight}, {"model_type": "x"} | config)
    tensors = {f"{PRE}layers.0.{part}.oft_R.weight": r for part, r in rows.items()}
    adapter = write_adapter(tmp_path / "adapter", tensors, V16 | {"num_cayley_neumann_terms": 3}, drop=DROPPED)
    boft_export.merge(base, adapter, tmp_path / "out")
    pieces = []
    for part, piece in zip(parts, weight.split(list(parts.values())), strict=True):
        rotation = torch.block_diag(*(old_neumann(skew_of_rows(r.tolist(), 4), 3) for r in rows[part]))
        pieces.append(piece @ rotation.T)
    found = read_folder(tmp_path / "out")[f"layers.0.{fused}.weight"]
    assert (found - torch.cat(pieces)).abs().max() < 1e-14


@pytest.mark.parametrize("config", [{}, {"num_attention_heads": 3}, {"num_attention_heads": 0}])
def test_parts_of_unknown_size(tmp_path: Path, config: Mapping[str, Any]) -> None:
    base = write_checkpoint(tmp_path / "base", {"0.qkv_proj.weight": rand(16, 12)}, {"model_type": "x"} | config)
    adapter = write_adapter(tmp_path / "adapter", {f"{PRE}0.k_proj.oft_R.weight": rand(3, 6)}, V18)
    with pytest.raises(InputError, match=r"0.k_proj: is fused .* 0.qkv_proj.weight"):
        boft_export.merge(base, adapter, tmp_path / "out")


# Residuals


@pytest.mark.parametrize("b", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("std", [1e-3, 0.1, 0.7])
@pytest.mark.parametrize("series", [(1,), (1, 2), (1, 2, 2), (1, 2, 2, 1), (1, 2, 2, 2, 1), (1, 2, 2, 2, 2, 2)])
def test_expected_residual_is_what_is_measured(b: int, std: float, series: tuple[float, ...]) -> None:
    s = from_triangle(rand(5, b * (b - 1) // 2, std=std), b)
    r = polynomial(s, series)
    measured = torch.linalg.matrix_norm(r.mT @ r - torch.eye(b, dtype=torch.float64), 2).max()
    expected = expected_residual(s, series)
    assert abs(expected - float(measured)) <= 1e-13 * max(1.0, expected)
    if b > 1 and series != (1,):
        assert expected > 0


def test_residual_of_nothing() -> None:
    assert expected_residual(torch.zeros(3, 4, 4, dtype=torch.float64), (1, 2, 2, 1)) == 0
    assert expected_residual(torch.zeros(0, 4, 4, dtype=torch.float64), (1, 2, 2, 1)) == 0


def test_a_long_series_comes_to_the_transposed_cayley_transform() -> None:
    s = from_triangle(rand(3, 6, std=0.1), 4)
    assert (polynomial(s, (1, *[2] * 60)) - cayley(s).mT).abs().max() < 1e-14


def test_shrinking_keeps_directions() -> None:
    a = rand(4, 3, 3)
    a[0] = 0
    a[1] *= 1e-3
    found = shrink(a, 0.25)
    assert torch.equal(found[:2], a[:2])
    assert (torch.linalg.matrix_norm(found[2:]) - 0.25).abs().max() < 1e-15
    assert (found[2:] * a[2:] >= 0).all()
    assert not shrink(a, 0.0).any()


def opened(folder: Path) -> tuple[SourcedAdapter, dict[str, AdapterLayer]]:
    source = Sources().adapter(folder)
    return source, {x.module: x for x in source.adapter.layers}


@pytest.mark.parametrize("option", ["4 terms", "exact", "shared", "bound", "adjusted number"])
def test_expected_residual_of_layers(tmp_path: Path, option: str) -> None:
    model = adapt(Net(), **OPTIONS[option])
    model.save_pretrained(tmp_path)
    source, found = opened(tmp_path)
    assert len(found) == 4
    for module, layer in found.items():
        rotation = layers.build_layer(source, layer).rotation.dense()
        eye = torch.eye(len(rotation), dtype=torch.float64)
        measured = float(torch.linalg.matrix_norm(rotation.T @ rotation - eye, 2))
        expected = layers.expected_residual(source, layer)
        assert abs(measured - expected) < 1e-13, module
        assert (expected == 0) == (option == "exact")


def test_expected_residual_of_damaged_values(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", {f"{PRE}up.oft_R.weight": torch.full((3, 6), math.inf)}, V18)
    source, found = opened(tmp_path / "a")
    with pytest.raises(InputError, match="up: the values"):
        layers.expected_residual(source, found["up"])


# Part of the way


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    net = Net()
    adapt(net).save_pretrained(tmp_path / "adapter")
    return write_checkpoint(tmp_path / "base", net.state_dict()), tmp_path / "adapter"


@pytest.mark.parametrize("path", ["geodesic", "factorwise", "cayley", "truncate"])
@pytest.mark.parametrize("how", [{"alpha": 0.5}, {"alphas": [0, 0.5, 1]}, {"alpha_map": {"up.weight": 0.3}}], ids=str)
def test_paths_of_rotations_refuse_a_series(pair: tuple[Path, Path], path: str, how: dict[str, Any]) -> None:
    output = pair[0].parent / "out"
    with pytest.raises(UsageError, match="only nearly orthogonal") as caught:
        boft_export.interpolate(*pair, output, path=path, **how)
    assert "--path linear" in str(caught.value.hint)
    assert not output.exists()


@pytest.mark.parametrize("path", ["geodesic", "factorwise", "cayley", "truncate", "linear"])
def test_both_ends_are_on_every_path(pair: tuple[Path, Path], path: str) -> None:
    folder = pair[0].parent
    boft_export.merge(*pair, folder / "merged")
    boft_export.interpolate(*pair, folder / "out", alphas=[0, 1], path=path)
    for end, other in (("alpha-0", folder / "base"), ("alpha-1", folder / "merged")):
        one, two = read_folder(folder / "out" / end), read_folder(other)
        assert all(torch.equal(one[k], two[k]) for k in two)


def test_the_linear_path_goes_between(pair: tuple[Path, Path]) -> None:
    folder = pair[0].parent
    boft_export.merge(*pair, folder / "merged")
    boft_export.interpolate(*pair, folder / "out", 0.25, path="linear")
    base, merged, found = (read_folder(folder / f) for f in ("base", "merged", "out"))
    for name in base:
        exact = 0.75 * base[name].double() + 0.25 * merged[name].double()
        assert (found[name] - exact).abs().max() <= 1e-7 * exact.abs().max()


def test_exact_transforms_go_along_the_geodesic(tmp_path: Path) -> None:
    net = Net().double()
    model = adapt(net, use_cayley_neumann=False)
    base = write_checkpoint(tmp_path / "base", net.state_dict())
    model.save_pretrained(tmp_path / "adapter")
    boft_export.interpolate(base, tmp_path / "adapter", tmp_path / "half", 0.5)
    boft_export.interpolate(tmp_path / "half", tmp_path / "adapter", tmp_path / "whole", 0.5)
    found = read_folder(tmp_path / "whole")
    for name, exact in merged_by_peft(model).items():
        assert (found[name] - exact).abs().max() <= 1e-13 * exact.abs().max(), name


# What is shown


def test_inspection_and_rotations(tmp_path: Path) -> None:
    model = adapt(Net(), block_share=True)
    model.save_pretrained(tmp_path / "adapter")
    found = boft_export.inspect(tmp_path / "adapter")
    assert found.details["format"] == "PEFT OFT, Neumann series 1 2 2 2 1"
    assert {(g.pattern, g.num_factors, g.block_size) for g in found.layers} == {
        (module, 1, 4) for module in ("up", "down", "conv", "words")
    }
    written = {r.module: r for r in boft_export.write_rotations(tmp_path / "adapter", tmp_path / "r.safetensors")}
    # A shared block is written once: how often it is repeated only a weight tells.
    assert written["up"].num_features == written["up"].group_size == 4
    assert written["up"].residual > 1e-6
    peft = model.base_model.model.up.get_delta_weight("default").detach()
    assert (load_file(tmp_path / "r.safetensors")["up.rotation"] - peft[:4, :4]).abs().max() < 1e-6


def test_the_manifest_tells_what_was_done(pair: tuple[Path, Path]) -> None:
    output = pair[0].parent / "out"
    boft_export.merge(*pair, output)
    manifest = json.loads((output / "boft_export.json").read_text())
    record = manifest["tensors"]["up.weight"]
    assert record["steps"][0]["parametrization"] == "neumann"
    assert record["orthogonality_residual"] > 1e-6
    assert "neumann-series" in {n["code"] for n in manifest["notices"]}
