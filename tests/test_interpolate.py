"""Interpolation end to end: every path against its formula written out, sweeps, maps, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import BOFTConfig, get_peft_model
from peft_cpu import enable_butterflies_on_cpu
from safetensors.torch import load_file, save_file
from scipy.linalg import expm, logm
from support import boft_tensors, butterfly_matrix, read_folder, write_adapter, write_checkpoint
from torch import Tensor, nn

import boft_export

PATHS = list(boft_export.InterpolationPath)
ORTHOGONAL = [p for p in PATHS if p != "linear"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
PRE = "base_model.model."


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# The paths, by dense matrices and scipy


def power(r: Tensor, alpha: float) -> Tensor:
    return torch.from_numpy(expm(alpha * np.real(logm(r.numpy()))))


def factors(blocks: Tensor) -> list[Tensor]:
    """The dense matrix of each factor of a boft_R: the formula, with the other factors untrained."""
    alone = [torch.zeros_like(blocks) for _ in blocks]
    for i, part in enumerate(alone):
        part[i] = blocks[i]
    return [butterfly_matrix(part) for part in alone]


def chain(matrices: list[Tensor]) -> Tensor:
    product = torch.eye(len(matrices[0]), dtype=torch.float64)
    for matrix in matrices:
        product = matrix @ product
    return product


def truncated(blocks: Tensor, alpha: float) -> Tensor:
    count = alpha * len(blocks)
    return chain([power(f, min(1.0, max(0.0, count - i))) for i, f in enumerate(factors(blocks))])


ROTATION: dict[str, Callable[[Tensor, float], Tensor]] = {
    "geodesic": lambda blocks, alpha: power(butterfly_matrix(blocks), alpha),
    "factorwise": lambda blocks, alpha: chain([power(f, alpha) for f in factors(blocks)]),
    "cayley": lambda blocks, alpha: butterfly_matrix(alpha * blocks.double()),
    "truncate": truncated,
}


def interpolated(weight: Tensor, trained: Mapping[str, Tensor], alpha: float, path: str) -> Tensor:
    """Return a layer's weight at ``alpha``, float64, for (out, n) or a convolution."""
    blocks, scale = (next(v for k, v in trained.items() if k.endswith(end)) for end in ("boft_R", "boft_s"))
    w, s = weight.double().flatten(1), scale.double().reshape(-1, 1)
    if path == "linear":
        result = (1 - alpha) * w + alpha * s * (w @ butterfly_matrix(blocks).T)
    else:
        bent = torch.where(s > 0, s.clamp_min(0) ** alpha, 1 + alpha * (s - 1))
        result = bent * (w @ ROTATION[path](blocks, alpha).T)
    return result.view(weight.shape)


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    """No neighbour in ``found``'s dtype is nearer to the exact value, by more than float64's own error."""
    assert found.shape == exact.shape
    error, slack = (found.double() - exact).abs(), 1e-13 * exact.abs().max()
    for end in (float("inf"), float("-inf")):
        neighbour = torch.nextafter(found, torch.full_like(found, end))
        assert (error <= (neighbour.double() - exact).abs() + slack).all()


# Module, outputs, features, factors, block size; the last one is a convolution.
LAYERS = {"one": (24, 30, 1, 5), "two": (20, 32, 2, 4), "three": (16, 48, 3, 4), "conv": (12, 72, 2, 6)}


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, Path]:
    """A float32 base with a convolution, and an adapter for it with a scale of each sign, a bias and a head."""
    tensors = {f"{k}.weight": randn(out, n, seed=i) for i, (k, (out, n, _, _)) in enumerate(LAYERS.items())}
    tensors["conv.weight"] = randn(12, 8, 3, 3)
    tensors |= {"two.bias": randn(20, seed=5), "head.weight": randn(5, 8, seed=6), "norm.weight": randn(9, seed=7)}
    trained = {}
    for seed, (module, (out, n, m, b)) in enumerate(LAYERS.items()):
        trained |= boft_tensors(module, n, out, m=m, b=b, seed=seed)
    trained[f"{PRE}one.boft_s"][:3, 0] = torch.tensor([-0.5, 0.0, 1.0])
    trained[f"{PRE}two.base_layer.bias"] = randn(20, seed=8)
    trained[f"{PRE}head.weight"] = randn(5, 8, seed=9)
    config = {"bias": "all", "modules_to_save": ["head"]}
    return write_checkpoint(tmp_path / "base", tensors, shards=2), write_adapter(tmp_path / "adapter", trained, config)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_tensor_is_the_formula_rounded_once(
    mixed: tuple[Path, Path], tmp_path: Path, path: str, dtype: str
) -> None:
    base, adapter = mixed
    alphas = (0.3, 0.5, 0.85)
    boft_export.interpolate(base, adapter, tmp_path / "out", alphas=alphas, path=path, dtype=dtype)
    before, trained = read_folder(base), load_file(adapter / "adapter_model.safetensors")
    for alpha in alphas:
        found = read_folder(tmp_path / "out" / f"alpha-{alpha}")
        assert {t.dtype for t in found.values()} == {DTYPES[dtype]}
        for module in LAYERS:
            own = {k: v for k, v in trained.items() if f".{module}.boft" in k}
            assert_rounded_once(found[f"{module}.weight"], interpolated(before[f"{module}.weight"], own, alpha, path))
        for name, key in (("two.bias", "two.base_layer.bias"), ("head.weight", "head.weight")):
            exact = (1 - alpha) * before[name].double() + alpha * trained[PRE + key].double()
            assert_rounded_once(found[name], exact)
        assert torch.equal(found["norm.weight"], before["norm.weight"].to(DTYPES[dtype]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("written", [None, "bfloat16", "float16", "float32"])
def test_the_ends_are_base_and_merge(
    mixed: tuple[Path, Path], tmp_path: Path, path: str, stored: str, written: str | None
) -> None:
    """At 0 the files of the base, at 1 those of the merge, byte for byte."""
    base, adapter = mixed
    for file in base.glob("*.safetensors"):
        save_file({k: v.to(DTYPES[stored]) for k, v in load_file(file).items()}, file, {"format": "pt"})
    boft_export.merge(base, adapter, tmp_path / "merged", dtype=written)
    boft_export.interpolate(base, adapter, tmp_path / "ends", alphas=(0, 1), path=path, dtype=written)
    boft_export.interpolate(base, adapter, tmp_path / "one", 1, path=path, dtype=written)
    assert weight_files(tmp_path / "ends" / "alpha-1") == weight_files(tmp_path / "merged")
    assert weight_files(tmp_path / "one") == weight_files(tmp_path / "merged")
    if written in (None, stored):
        assert weight_files(tmp_path / "ends" / "alpha-0") == weight_files(base)
    else:
        for name, tensor in read_folder(tmp_path / "ends" / "alpha-0").items():
            assert_rounded_once(tensor, read_folder(base)[name].double())


@pytest.mark.parametrize("path", PATHS)
def test_convolutions_of_old_adapters_are_rotated_from_the_other_side(tmp_path: Path, path: str) -> None:
    """Up to PEFT 0.13 the weight's bytes are (n, out), and the rotation is on their left."""
    weight = randn(16, 4, 3, 3)
    trained = boft_tensors("conv", 36, 16, m=2, b=6)
    base = write_checkpoint(tmp_path / "base", {"conv.weight": weight})
    adapter = write_adapter(tmp_path / "adapter", trained, drop=("exclude_modules", "peft_version"))
    boft_export.interpolate(base, adapter, tmp_path / "out", alphas=(0, 0.4, 1), path=path)
    boft_export.merge(base, adapter, tmp_path / "merged")
    exact = interpolated(weight.reshape(36, 16).T, trained, 0.4, path).T.reshape(weight.shape)
    assert_rounded_once(read_folder(tmp_path / "out" / "alpha-0.4")["conv.weight"], exact)
    assert weight_files(tmp_path / "out" / "alpha-0") == weight_files(base)
    assert weight_files(tmp_path / "out" / "alpha-1") == weight_files(tmp_path / "merged")


@pytest.mark.parametrize("path", PATHS)
def test_each_adapter_goes_its_own_way(tmp_path: Path, path: str) -> None:
    weight = randn(8, 24)
    one, other = boft_tensors("a", 24, 8, m=2, b=6, seed=1), boft_tensors("a", 24, 8, m=3, b=2, seed=2)
    base = write_checkpoint(tmp_path / "base", {"a.weight": weight})
    adapters = [write_adapter(tmp_path / name, t) for name, t in (("one", one), ("other", other))]
    result = boft_export.interpolate(base, adapters, tmp_path / "out", alphas=[(0.5, 0.2), (1, 0), 0.3], path=path)
    assert [o.folder.name for o in result.outputs] == ["alpha-0.5_0.2", "alpha-1_0", "alpha-0.3"]
    for output, (a, b) in zip(result.outputs, [(0.5, 0.2), (1, 0), (0.3, 0.3)], strict=True):
        exact = interpolated(interpolated(weight, one, a, path), other, b, path)
        assert_rounded_once(read_folder(output.folder)["a.weight"], exact)
    boft_export.merge(base, adapters[0], tmp_path / "first")
    assert weight_files(tmp_path / "out" / "alpha-1_0") == weight_files(tmp_path / "first")


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_truncated_at_whole_factors_it_is_the_merge_of_the_first_ones(tmp_path: Path, m: int) -> None:
    """The adapter whose other factors are zeroed, with its scales' power, merged: bit for bit."""
    trained = boft_tensors("a", 96, 40, m=m, b=6)
    base = write_checkpoint(tmp_path / "base", {"a.weight": randn(40, 96)})
    adapter = write_adapter(tmp_path / "adapter", trained)
    blocks, scale = (trained[f"{PRE}a.{k}"] for k in ("boft_R", "boft_s"))
    for k in range(1, m):
        zeroed = blocks.clone()
        zeroed[k:] = 0
        parts = {f"{PRE}a.boft_R": zeroed, f"{PRE}a.boft_s": scale.double() ** (k / m)}
        boft_export.merge(base, write_adapter(tmp_path / f"first-{k}", parts), tmp_path / f"merged-{k}")
        boft_export.interpolate(base, adapter, tmp_path / f"out-{k}", k / m, path="truncate")
        assert weight_files(tmp_path / f"out-{k}") == weight_files(tmp_path / f"merged-{k}")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("m", [1, 2, 3])
def test_the_cayley_path_is_peft_with_its_parameters_scaled(tmp_path: Path, m: int) -> None:
    """PEFT itself, with boft_R times alpha and boft_s to its power."""
    enable_butterflies_on_cpu()
    torch.manual_seed(0)
    net = nn.ModuleDict({"first": nn.Linear(32, 20)})
    config = BOFTConfig(
        target_modules=["first"], boft_block_size=4, boft_n_butterfly_factor=m, init_weights=False, bias="none"
    )
    base = write_checkpoint(tmp_path / "base", net.state_dict())
    model = get_peft_model(net, config)
    with torch.no_grad():
        model.base_model.model["first"].boft_s["default"].uniform_(0.5, 2)
    model.save_pretrained(tmp_path / "adapter")
    boft_export.interpolate(base, tmp_path / "adapter", tmp_path / "out", 0.4, path="cayley")
    model.double()
    with torch.no_grad():
        layer = model.base_model.model["first"]
        layer.boft_R["default"].mul_(0.4)
        layer.boft_s["default"].pow_(0.4)
    expected = model.merge_and_unload()["first"].weight
    found = read_folder(tmp_path / "out")["first.weight"]
    assert (found.double() - expected).abs().max() <= 1e-7 * expected.abs().max()


# What adapters bring beside rotations


def test_rows_that_the_base_lacks_are_taken_whole(tmp_path: Path) -> None:
    old, new = randn(8, 16), randn(11, 16, seed=1)
    config = {"model_type": "llama", "architectures": ["LlamaModel"], "vocab_size": 8, "tie_word_embeddings": False}
    base = write_checkpoint(tmp_path / "base", {"model.embed_tokens.weight": old, "a.weight": randn(4, 16)}, config)
    trained = boft_tensors("a", 16, 4) | {f"{PRE}model.embed_tokens.weight": new}
    adapter = write_adapter(tmp_path / "adapter", trained)
    boft_export.interpolate(base, adapter, tmp_path / "out", alphas=(0, 0.25, 1))
    for alpha in (0, 0.25, 1):
        found = read_folder(tmp_path / "out" / f"alpha-{alpha}")["model.embed_tokens.weight"]
        assert_rounded_once(found[:8], (1 - alpha) * old.double() + alpha * new[:8].double())
        assert torch.equal(found[8:], new[8:])


def test_a_base_weight_that_is_substituted_is_interpolated_and_then_rotated(tmp_path: Path) -> None:
    old, new = randn(8, 16), randn(8, 16, seed=1)
    trained = boft_tensors("a", 16, 8)
    base = write_checkpoint(tmp_path / "base", {"a.weight": old})
    adapter = write_adapter(tmp_path / "adapter", trained | {f"{PRE}a.base_layer.weight": new})
    boft_export.interpolate(base, adapter, tmp_path / "out", 0.3)
    exact = interpolated(0.7 * old.double() + 0.3 * new.double(), trained, 0.3, "geodesic")
    assert_rounded_once(read_folder(tmp_path / "out")["a.weight"], exact)


def test_a_head_that_leaves_its_tie_starts_from_the_embedding(tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    embedding, head = randn(8, 16), randn(8, 16, seed=1)
    base = write_checkpoint(tmp_path / "base", {"model.embed_tokens.weight": embedding}, config)
    adapter = write_adapter(tmp_path / "adapter", {f"{PRE}lm_head.weight": head}, {"modules_to_save": ["lm_head"]})
    boft_export.interpolate(base, adapter, tmp_path / "out", alphas=(0, 0.5))
    halfway = read_folder(tmp_path / "out" / "alpha-0.5")
    assert torch.equal(read_folder(tmp_path / "out" / "alpha-0")["lm_head.weight"], embedding)
    assert_rounded_once(halfway["lm_head.weight"], (embedding.double() + head.double()) / 2)
    assert torch.equal(halfway["model.embed_tokens.weight"], embedding)


def test_of_two_replacements_each_goes_on_from_the_one_before(tmp_path: Path) -> None:
    old, first, second = (randn(4, 8, seed=i) for i in range(3))
    base = write_checkpoint(tmp_path / "base", {"head.weight": old})
    adapters = [
        write_adapter(tmp_path / str(i), {f"{PRE}head.weight": t}, {"modules_to_save": ["head"]})
        for i, t in enumerate((first, second))
    ]
    boft_export.interpolate(base, adapters, tmp_path / "out", alphas=[(0.5, 0.2), (1, 0), (0, 1)])
    mixed = 0.8 * (0.5 * old.double() + 0.5 * first.double()) + 0.2 * second.double()
    assert_rounded_once(read_folder(tmp_path / "out" / "alpha-0.5_0.2")["head.weight"], mixed)
    assert torch.equal(read_folder(tmp_path / "out" / "alpha-1_0")["head.weight"], first)
    assert torch.equal(read_folder(tmp_path / "out" / "alpha-0_1")["head.weight"], second)


def test_a_tie_holds_only_where_both_sides_come_by_the_same_way(tmp_path: Path) -> None:
    """The first adapter replaces the embedding alone, the second both alike: without the second, they are apart."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    old, first, second = (randn(8, 16, seed=i) for i in range(3))
    base = write_checkpoint(tmp_path / "base", {"model.embed_tokens.weight": old}, config)
    embed, head = f"{PRE}model.embed_tokens.weight", f"{PRE}lm_head.weight"
    one = write_adapter(tmp_path / "one", {embed: first}, {"modules_to_save": ["embed_tokens"]})
    both = {"modules_to_save": ["embed_tokens", "lm_head"]}
    two = write_adapter(tmp_path / "two", {embed: second, head: second.clone()}, both)
    boft_export.merge(base, one, tmp_path / "merged")
    boft_export.interpolate(base, [one, two], tmp_path / "out", alphas=[(1, 0), (1, 1)])
    found, merged = read_folder(tmp_path / "out" / "alpha-1_0"), read_folder(tmp_path / "merged")
    assert found.keys() == merged.keys()
    assert all(torch.equal(found[k], merged[k]) for k in merged)
    assert torch.equal(read_folder(tmp_path / "out" / "alpha-1")["lm_head.weight"], second)


def test_a_map_may_not_take_a_tie_apart(tmp_path: Path) -> None:
    """Both sides are on disk and replaced alike: a loader would take one of them for both."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    names, old, new = ("model.embed_tokens.weight", "lm_head.weight"), randn(8, 16), randn(8, 16, seed=1)
    base = write_checkpoint(tmp_path / "base", {n: old.clone() for n in names}, config)
    both = {"modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = write_adapter(tmp_path / "adapter", {PRE + n: new.clone() for n in names}, both)
    with pytest.raises(boft_export.InputError, match="apart"):
        boft_export.interpolate(base, adapter, tmp_path / "out", 0.5, alpha_map={"lm_head.weight": 0})
    assert not (tmp_path / "out").exists()
    boft_export.interpolate(base, adapter, tmp_path / "out", alpha_map=dict.fromkeys(names, 0.5))
    found = read_folder(tmp_path / "out")
    assert torch.equal(found[names[0]], found[names[1]])


def test_what_is_too_large_to_measure_is_merged_all_the_same(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"a.weight": randn(8, 16).double() * 1e200})
    adapter = write_adapter(tmp_path / "adapter", boft_tensors("a", 16, 8))
    result = boft_export.interpolate(base, adapter, tmp_path / "out", 0.5)
    record = json.loads((tmp_path / "out" / "boft_export.json").read_text())["tensors"]["a.weight"]
    assert record["relative_change"] is record["rounding_loss"] is None
    assert boft_export.measure_path(result).layers[0].points[0].relative_change is None


def test_infinities_of_the_base_are_no_damage_of_the_adapter(tmp_path: Path) -> None:
    old, new = randn(8), randn(8, seed=1)
    old[2] = -torch.inf
    base = write_checkpoint(tmp_path / "base", {"a.weight": randn(8, 16), "a.bias": old})
    trained = boft_tensors("a", 16, 8) | {f"{PRE}a.base_layer.bias": new}
    boft_export.interpolate(base, write_adapter(tmp_path / "adapter", trained), tmp_path / "out", 0.5)
    assert read_folder(tmp_path / "out")["a.bias"][2] == -torch.inf
    trained[f"{PRE}a.base_layer.bias"][3] = torch.inf
    with pytest.raises(boft_export.InputError, match="not finite"):
        boft_export.interpolate(base, write_adapter(tmp_path / "bad", trained), tmp_path / "no", 0.5)


def test_a_resized_convolution_of_an_old_adapter_is_merged(tmp_path: Path) -> None:
    """Its groups of features lie across rows, so the base's fewer rows can't be mixed in: that is said."""
    new, trained = randn(12, 4, 3, 3, seed=1), boft_tensors("conv", 36, 12, m=1, b=9)
    base = write_checkpoint(tmp_path / "base", {"conv.weight": randn(5, 4, 3, 3)})
    one = write_adapter(tmp_path / "one", {f"{PRE}conv.weight": new}, {"modules_to_save": ["conv"]})
    two = write_adapter(tmp_path / "two", trained, drop=("exclude_modules", "peft_version"))
    boft_export.merge(base, [one, two], tmp_path / "merged")
    result = boft_export.interpolate(base, [one, two], tmp_path / "out", alphas=(0.5, 1))
    exact = interpolated(new.reshape(36, 12).T, trained, 0.5, "geodesic").T.reshape(new.shape)
    assert_rounded_once(read_folder(tmp_path / "out" / "alpha-0.5")["conv.weight"], exact)
    assert weight_files(tmp_path / "out" / "alpha-1") == weight_files(tmp_path / "merged")
    assert "added-whole" in {n.code for n in result.plan.notices}


def test_counters_are_not_mixed(tmp_path: Path) -> None:
    old, new = {"bn.steps": torch.tensor([3]), "bn.weight": randn(4)}, {"bn.steps": torch.tensor([8])}
    base = write_checkpoint(tmp_path / "base", old)
    trained = {f"{PRE}{k}": v for k, v in (new | {"bn.weight": randn(4, seed=1)}).items()}
    adapter = write_adapter(tmp_path / "adapter", trained, {"modules_to_save": ["bn"]})
    boft_export.interpolate(base, adapter, tmp_path / "out", alphas=(0, 0.5))
    assert read_folder(tmp_path / "out" / "alpha-0")["bn.steps"].item() == 3
    assert read_folder(tmp_path / "out" / "alpha-0.5")["bn.steps"].item() == 8


def test_what_the_base_lacks_is_added_at_any_alpha_and_said(tmp_path: Path) -> None:
    head = randn(3, 16)
    base = write_checkpoint(tmp_path / "base", {"a.weight": randn(8, 16)})
    adapter = write_adapter(
        tmp_path / "adapter", boft_tensors("a", 16, 8) | {f"{PRE}head.weight": head}, {"modules_to_save": ["head"]}
    )
    result = boft_export.interpolate(base, adapter, tmp_path / "out", 0.5)
    assert torch.equal(read_folder(tmp_path / "out")["head.weight"], head)
    assert "added-whole" in {n.code for n in result.plan.notices}


# Sweeps


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Some 40 MB in four files, most of them adapted; no test may change them."""
    folder = tmp_path_factory.mktemp("large")
    shapes = {"up": (4096, 1024, 2, 4), "down": (1024, 4096, 3, 8), "out": (1000, 1024, 1, 16)}
    tensors: dict[str, Tensor] = {"embed.weight": randn(8000, 1024).bfloat16()}
    trained: dict[str, Tensor] = {}
    for seed, (module, (out, n, m, b)) in enumerate(shapes.items()):
        tensors[f"{module}.weight"] = randn(out, n, seed=seed).bfloat16()
        trained |= boft_tensors(module, n, out, m=m, b=b, std=0.05, seed=seed)
    return write_checkpoint(folder / "base", tensors, shards=4), write_adapter(folder / "adapter", trained)


FIVE = (0, 0.25, 0.5, 0.75, 1)


def test_a_sweep_writes_what_single_runs_write(large: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = large
    result = boft_export.interpolate(base, adapter, tmp_path / "sweep", alphas=FIVE)
    assert [o.folder.name for o in result.outputs] == ["alpha-0", "alpha-0.25", "alpha-0.5", "alpha-0.75", "alpha-1"]
    for output, alpha in zip(result.outputs, FIVE, strict=True):
        boft_export.interpolate(base, adapter, tmp_path / "single", alpha, overwrite=True)
        assert digests(output.folder) == digests(tmp_path / "single")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["single", "sweep"]


@pytest.mark.parametrize("options", [{"jobs": 1}, {"jobs": 3}, {"jobs": 1, "max_memory": "least"}])
def test_a_sweep_is_the_same_however_it_is_cut(
    large: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    base, adapter = large
    expected = boft_export.interpolate(base, adapter, tmp_path / "expected", alphas=FIVE, path="factorwise", jobs=2)
    if "max_memory" in options:
        options = {**options, "max_memory": least_memory(base, adapter, tmp_path, path="factorwise")}
    boft_export.interpolate(base, adapter, tmp_path / "out", alphas=FIVE, path="factorwise", **options)
    assert digests(tmp_path / "out") == digests(expected.output)


def least_memory(base: Path, adapter: Path, tmp_path: Path, **options: Any) -> int:
    """Return the least memory that a sweep on one thread says it needs."""
    options = {"alphas": FIVE, "jobs": 1, "max_memory": 1, **options}
    with pytest.raises(boft_export.ResourceError) as failure:
        boft_export.interpolate(base, adapter, tmp_path / "none", **options)
    found = re.search(r"needs ([\d,]+)", failure.value.message)
    assert found
    return int(found[1].replace(",", ""))


# Runs an interpolation in a process of its own and prints what it read and the most memory it had.
MEASURED = """
import json, sys
import boft_export
def figure(file, key):
    with open(file) as lines:
        return int(next(line.split()[1] for line in lines if line.startswith(key)))
before = figure("/proc/self/io", "rchar")
boft_export.interpolate(**json.loads(sys.argv[1]))
print(figure("/proc/self/io", "rchar") - before, figure("/proc/self/status", "VmHWM") * 1024)
"""


def measured(**arguments: Any) -> tuple[int, int]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURED, json.dumps(arguments, default=str)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    read, memory = done.stdout.split()
    return int(read), int(memory)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what is read")
def test_a_sweep_reads_the_base_once_and_keeps_to_its_memory(large: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = large
    size = sum(p.stat().st_size for p in base.iterdir())
    single, _ = measured(base=base, adapters=adapter, output=tmp_path / "single", alpha=0.5, jobs=1)
    for path in ("geodesic", "cayley"):
        limit = least_memory(base, adapter, tmp_path, path=path)
        arguments = {"base": base, "adapters": adapter, "output": tmp_path / path, "path": path, "alphas": FIVE}
        read, memory = measured(**arguments, jobs=1, max_memory=limit)
        assert size <= read < 1.1 * size + single - size
        assert memory <= limit


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not say how much memory was used")
def test_many_outputs_keep_to_their_memory(tmp_path: Path) -> None:
    """What is written to hundreds of files at once counts for each, and is not held any longer than it counts."""
    tensors = {"embed.weight": randn(3000, 1024).bfloat16(), "a.weight": randn(8, 16)}
    trained = boft_tensors("a", 16, 8) | {f"{PRE}embed.weight": randn(3000, 1024, seed=1).bfloat16()}
    base = write_checkpoint(tmp_path / "base", tensors)
    adapter = write_adapter(tmp_path / "adapter", trained, {"modules_to_save": ["embed"]})
    many = [i / 300 for i in range(301)]
    limit = least_memory(base, adapter, tmp_path, alphas=many)
    arguments = {"base": base, "adapters": adapter, "output": tmp_path / "out", "alphas": many}
    assert measured(**arguments, jobs=1, max_memory=limit)[1] <= limit


def test_a_sweep_is_all_or_nothing_and_goes_on(large: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = large
    output = tmp_path / "out"

    def stop(done: int, total: int, _name: str) -> None:
        if done > 0.6 * total:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        boft_export.interpolate(base, adapter, output, alphas=FIVE, progress=stop)
    assert not output.exists()
    with pytest.raises(boft_export.UsageError, match="other inputs or settings"):
        boft_export.interpolate(base, adapter, output, alphas=FIVE[1:], resume=True)
    with pytest.raises(boft_export.UsageError, match="other inputs or settings"):
        boft_export.interpolate(base, adapter, output, alphas=FIVE, path="cayley", resume=True)
    result = boft_export.interpolate(base, adapter, output, alphas=FIVE, resume=True)
    assert result.resumed
    assert {r.split("/")[0] for r in result.resumed} == {f"alpha-{a}" for a in FIVE}
    boft_export.interpolate(base, adapter, tmp_path / "whole", alphas=FIVE)
    assert digests(output) == digests(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_alphas_may_be_numbers_of_any_kind(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = boft_export.interpolate(base, adapter, tmp_path / "out", alphas=np.linspace(0, 1, 3))
    assert [o.folder.name for o in result.outputs] == ["alpha-0", "alpha-0.5", "alpha-1"]


def test_progress_counts_all_outputs(large: tuple[Path, Path], tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    boft_export.interpolate(
        *large, tmp_path / "out", alphas=FIVE, progress=lambda done, total, _: calls.append((done, total))
    )
    written = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*.safetensors"))
    assert calls[-1] == (written, written)
    assert [c[0] for c in calls] == sorted({c[0] for c in calls})


def test_each_folder_says_what_it_is(base: Path, adapter: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"path": "factorwise", "alpha_map": {"layers.0.*": 0.75}}
    boft_export.interpolate(base, adapter, tmp_path / "out", alphas=(0.25, 0.5), **options)
    for alpha in (0.25, 0.5):
        folder = tmp_path / "out" / f"alpha-{alpha}"
        record = json.loads((folder / "boft_export.json").read_text())
        assert record["command"] == "interpolate"
        assert record["settings"]["alpha"] == [alpha]
        assert record["settings"]["path"] == "factorwise"
        assert record["settings"]["alpha_map"] == {"layers.0.*": [0.75]}
        assert record["tensors"]["layers.0.up.weight"]["steps"][0]["alpha"] == 0.75
        assert record["tensors"]["layers.1.up.weight"]["steps"][0]["alpha"] == alpha
        hashed = {k: v["sha256"] for k, v in record["files"].items()}
        assert hashed == {k: v for k, v in digests(folder).items() if k.endswith(".safetensors")}
        card = (folder / "README.md").read_text()
        assert f"alpha = {alpha} of the way" in card
        assert "factorwise path, some tensors as far as a map says" in card
        assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "boft_export.json").exists()


# Strength by layer


def test_the_last_match_of_a_map_wins(base: Path, adapter: Path, tmp_path: Path) -> None:
    alpha_map = {"layers.*": 0.5, "layers.1.*": 1.0, "*.1.down.weight": 0.0}
    boft_export.interpolate(base, adapter, tmp_path / "out", 0.25, alpha_map=alpha_map)
    boft_export.interpolate(base, adapter, tmp_path / "ends", alphas=(0, 0.5, 1))
    found = read_folder(tmp_path / "out")
    ends = {a: read_folder(tmp_path / "ends" / f"alpha-{a}") for a in (0, 0.5, 1)}
    for name, alpha in (("0.up", 0.5), ("0.down", 0.5), ("1.up", 1), ("1.down", 0)):
        assert torch.equal(found[f"layers.{name}.weight"], ends[alpha][f"layers.{name}.weight"])


def test_what_a_map_leaves_out_goes_all_the_way_without_an_alpha(base: Path, adapter: Path, tmp_path: Path) -> None:
    boft_export.interpolate(base, adapter, tmp_path / "out", alpha_map={"layers.0.*": 0.0})
    boft_export.merge(base, adapter, tmp_path / "merged")
    found, merged, before = (read_folder(p) for p in (tmp_path / "out", tmp_path / "merged", base))
    assert torch.equal(found["layers.0.up.weight"], before["layers.0.up.weight"])
    assert torch.equal(found["layers.1.up.weight"], merged["layers.1.up.weight"])


def test_a_map_may_tell_adapters_apart(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    inputs = base, [adapter, other]
    boft_export.interpolate(*inputs, tmp_path / "out", 0, alpha_map={"layers.0.up.weight": (0, 1)})
    boft_export.merge(base, other, tmp_path / "merged")
    found, merged = read_folder(tmp_path / "out"), read_folder(tmp_path / "merged")
    assert torch.equal(found["layers.0.up.weight"], merged["layers.0.up.weight"])
    assert torch.equal(found["layers.1.up.weight"], read_folder(base)["layers.1.up.weight"])


# What is said, and what is refused


@pytest.mark.parametrize("path", [p for p in PATHS if p != "truncate"])
def test_beyond_base_and_tuned_is_said_aloud(mixed: tuple[Path, Path], tmp_path: Path, path: str) -> None:
    base, adapter = mixed
    result = boft_export.interpolate(base, adapter, tmp_path / "out", alphas=(-0.5, 1.5), path=path)
    assert [o.folder.name for o in result.outputs] == ["alpha--0.5", "alpha-1.5"]
    (notice,) = [n for n in result.plan.notices if n.code == "extrapolation"]
    assert notice.level is boft_export.Level.WARNING
    assert "-0.5, 1.5" in notice.message
    trained = load_file(adapter / "adapter_model.safetensors")
    own = {k: v for k, v in trained.items() if ".two.boft" in k}
    for alpha in (-0.5, 1.5):
        found = read_folder(tmp_path / "out" / f"alpha-{alpha}")["two.weight"]
        assert_rounded_once(found, interpolated(read_folder(base)["two.weight"], own, alpha, path))


def test_within_base_and_tuned_nothing_is_said(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = boft_export.interpolate(base, adapter, tmp_path / "out", alphas=FIVE)
    assert result.plan.notices == ()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, boft_export.UsageError, "how far"),
        ({"alpha": 0.5, "alphas": (0.5,)}, boft_export.UsageError, "both"),
        ({"alphas": ()}, boft_export.UsageError, "no alpha"),
        ({"alpha": float("nan")}, boft_export.UsageError, "not a finite number"),
        ({"alpha": float("inf")}, boft_export.UsageError, "not a finite number"),
        ({"alpha": (0.5, 0.5)}, boft_export.UsageError, "2 alphas"),
        ({"alpha": "0.5"}, boft_export.UsageError, "is not a number"),
        ({"alphas": [None]}, boft_export.UsageError, "is not a number"),
        ({"alpha": 10**400}, boft_export.UsageError, "is not a number"),
        ({"alphas": np.linspace(0, 1, 3), "path": "straight"}, boft_export.UsageError, "not one of"),
        ({"alpha": ()}, boft_export.UsageError, "0 alphas"),
        ({"alphas": (0.5, 0.25, 0.5)}, boft_export.UsageError, "more than once"),
        ({"alpha": 1.01, "path": "truncate"}, boft_export.UsageError, "outside of"),
        ({"alpha": 0.5, "path": "straight"}, boft_export.UsageError, "not one of"),
        (
            {"alpha": 0.5, "path": "truncate", "alpha_map": {"layers.0.*": -1}},
            boft_export.UsageError,
            "outside of",
        ),
        ({"alpha": 0.5, "alpha_map": {"layers.0.*": float("nan")}}, boft_export.UsageError, "not a finite number"),
        ({"alpha": 0.5, "alpha_map": {"layer.0.*": 1}}, boft_export.InputError, "matches no tensor"),
        ({"alpha": 0.5, "alpha_map": {"*.norm.weight": 1}}, boft_export.InputError, "matches no tensor"),
        ({"alpha": 0.5, "alpha_map": {"layers.0.*": (1, 0)}}, boft_export.UsageError, "2 alphas"),
    ],
)
def test_what_can_not_be_done_is_refused(
    base: Path, adapter: Path, tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message) as caught:
        boft_export.interpolate(base, adapter, tmp_path / "out", **arguments)
    assert type(caught.value) is error
    assert sorted(tmp_path.rglob("*")) == before


def test_an_effect_lost_in_rounding_is_said_of_its_alpha(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A small step may vanish in the output's precision: that is no failure, as it would be of a whole merge."""
    trained = load_file(adapter / "adapter_model.safetensors")
    faint = {k: torch.ones_like(t) if k.endswith("boft_s") else t * 0.1 for k, t in trained.items()}
    save_file(faint, adapter / "adapter_model.safetensors")
    result = boft_export.interpolate(base, adapter, tmp_path / "out", alphas=(1e-9, 1))
    (notice,) = [n for n in result.plan.notices if n.code == "lost-effect"]
    assert notice.subject == "alpha 1e-09"
    assert weight_files(tmp_path / "out" / "alpha-1e-09") == weight_files(base)
    save_file({k: t * 1e-9 if "_R" in k else t for k, t in faint.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(boft_export.CheckFailedError, match="changed no element"):
        boft_export.interpolate(base, adapter, tmp_path / "again", 1)


# The library's rotations


def test_rotations_can_be_read_and_bent(adapter: Path) -> None:
    trained = load_file(adapter / "adapter_model.safetensors")
    found = list(boft_export.read_rotations(adapter, layer="layers.0.*"))
    assert {r.module for r in found} == {"layers.0.up", "layers.0.down"}
    for layer in found:
        blocks = trained[f"{PRE}{layer.module}.boft_R"]
        assert torch.equal(layer.scale, trained[f"{PRE}{layer.module}.boft_s"].double().reshape(-1))
        assert (layer.rotation.dense() - butterfly_matrix(blocks)).abs().max() < 1e-13
        assert (layer.rotation.power(0.3).dense() - ROTATION["geodesic"](blocks, 0.3)).abs().max() < 1e-12
        for path in ORTHOGONAL:
            bent = boft_export.interpolate_rotation(layer.rotation, 0.3, path).dense()
            assert (bent - ROTATION[path](blocks, 0.3)).abs().max() < 1e-12
