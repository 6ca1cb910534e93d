"""Undoing merges: how near to the base it comes, what it refuses, and that it is the same however it is run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from support import boft_tensors, butterfly_matrix, read_folder, write_adapter, write_checkpoint
from torch import Tensor
from typer.testing import CliRunner

import boft_export
from boft_export.adapters import View
from boft_export.cli import merge
from boft_export.cli import unmerge as cli
from boft_export.linalg.bits import as_integers, from_order, to_order
from boft_export.linalg.rounding import round_once
from boft_export.pipeline.corrections import corrections, put_right
from boft_export.pipeline.memory import TILE_ELEMENTS
from boft_export.pipeline.undo import UndoTensor
from boft_export.pipeline.unmerge import UnmergeResult, unmerge

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
PRE = "base_model.model."


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def weight_files(folder: Path) -> dict[str, str]:
    return {n: d for n, d in digests(folder).items() if n.endswith(".safetensors")}


def assert_near(found: Tensor, base: Tensor, roundings: int, gain: float = 1.0) -> None:
    """Each element is off by no more than an ulp, of its row's largest magnitude, for each rounding.

    Args:
        found: What came back.
        base: What was there.
        roundings: How often a whole weight was rounded on the way.
        gain: How much larger than the base a rounded weight's row was at most.
    """
    assert (found.dtype, found.shape) == (base.dtype, base.shape)
    largest = base.double().flatten(1).abs().amax(1, keepdim=True)
    ulp = largest * gain * torch.finfo(base.dtype).eps
    assert ((found.double() - base.double()).flatten(1).abs() <= roundings * ulp).all()


# Module, outputs, features, factors, block size; the last one is a convolution.
LAYERS = {"one": (24, 30, 1, 5), "two": (20, 32, 2, 4), "three": (16, 48, 3, 4), "conv": (12, 72, 2, 6)}


def layers_base(folder: Path, dtype: torch.dtype) -> Path:
    tensors = {f"{k}.weight": randn(out, n, seed=i).to(dtype) for i, (k, (out, n, _, _)) in enumerate(LAYERS.items())}
    tensors["conv.weight"] = randn(12, 8, 3, 3).to(dtype)
    tensors |= {"norm.weight": randn(9, seed=7).to(dtype), "steps": torch.arange(5), "none": torch.empty(0, 4)}
    folder = write_checkpoint(folder, tensors, shards=2)
    (folder / "tokenizer.json").write_bytes(b'{"a": 1}\r\n')
    return folder


def layers_adapter(folder: Path, config: Mapping[str, object] | None = None, seed: int = 0) -> Path:
    trained = {}
    for i, (module, (out, n, m, b)) in enumerate(LAYERS.items()):
        trained |= boft_tensors(module, n, out, m=m, b=b, seed=seed + i)
    trained[f"{PRE}one.boft_s"][0] = -0.5
    return write_adapter(folder, trained, config)


# How near it comes


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_view_comes_back(tmp_path: Path, dtype: str) -> None:
    base = layers_base(tmp_path / "base", DTYPES[dtype])
    adapter = layers_adapter(tmp_path / "adapter")
    boft_export.merge(base, adapter, tmp_path / "merged")
    result = unmerge(tmp_path / "merged", adapter, tmp_path / "out")
    before, after = read_folder(base), read_folder(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.split(".")[0] in LAYERS:
            # Arithmetic in float64 rounds more often than twice.
            assert_near(after[name], tensor, 8 if dtype == "float64" else 2)
            assert not torch.equal(after[name], read_folder(tmp_path / "merged")[name])
        else:
            assert torch.equal(after[name], tensor)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b'{"a": 1}\r\n'
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert result.identical is False
    assert [n for n in result.plan.notices if n.level != "info"] == []


@pytest.mark.parametrize(("m", "b"), [(1, 8), (2, 2), (2, 8), (3, 4), (4, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_random_layers(tmp_path: Path, dtype: str, m: int, b: int) -> None:
    for seed in range(3):
        folder = tmp_path / str(seed)
        weight = (randn(48, 64, seed=seed) * 10.0 ** randn(48, 1, seed=9 + seed)).to(DTYPES[dtype])
        base = write_checkpoint(folder / "base", {"a.weight": weight})
        trained = boft_tensors("a", 64, 48, m=m, b=b, std=0.1 * 4**seed, seed=seed)
        adapter = write_adapter(folder / "adapter", trained)
        boft_export.merge(base, adapter, folder / "merged")
        unmerge(folder / "merged", adapter, folder / "out")
        after = read_folder(folder / "out")["a.weight"]
        assert_near(after, weight, 2)
        if dtype == "float32":
            error = (after.double() - weight.double()).norm() / weight.double().norm()
            assert error < 2e-7


def test_it_is_the_formula_rounded_once(tmp_path: Path) -> None:
    weight = randn(24, 32).bfloat16()
    trained = boft_tensors("a", 32, 24, m=2, b=4)
    base, adapter = write_checkpoint(tmp_path / "b", {"a.weight": weight}), write_adapter(tmp_path / "a", trained)
    boft_export.merge(base, adapter, tmp_path / "merged")
    unmerge(tmp_path / "merged", adapter, tmp_path / "out")
    merged = read_folder(tmp_path / "merged")["a.weight"].double()
    exact = (merged @ butterfly_matrix(trained[f"{PRE}a.boft_R"])) / trained[f"{PRE}a.boft_s"].double()
    found = read_folder(tmp_path / "out")["a.weight"]
    error = (found.double() - exact).abs()
    for end in (float("inf"), float("-inf")):
        neighbour = torch.nextafter(found, torch.full_like(found, end))
        assert (error <= (neighbour.double() - exact).abs() + 1e-13).all()


def test_reshaped_convolutions_come_back(tmp_path: Path) -> None:
    """PEFT up to 0.13 rotated a convolution's bytes read as (n, out)."""
    weight = randn(12, 8, 3, 3)
    base = write_checkpoint(tmp_path / "base", {"conv.weight": weight})
    trained = boft_tensors("conv", 72, 12, m=2, b=6)
    trained[f"{PRE}conv.boft_s"] = trained[f"{PRE}conv.boft_s"].reshape(1, 12)
    adapter = write_adapter(tmp_path / "adapter", trained, {"peft_version": "0.12.0"}, drop=("exclude_modules",))
    sources = boft_export.Sources(options=boft_export.ReadOptions(conv_view=View.RESHAPED))
    boft_export.merge(base, adapter, tmp_path / "merged", sources=sources)
    unmerge(tmp_path / "merged", adapter, tmp_path / "out", sources=sources)
    after = read_folder(tmp_path / "out")["conv.weight"]
    assert float((after - weight).norm() / weight.norm()) < 2e-7
    assert not torch.allclose(read_folder(tmp_path / "merged")["conv.weight"], weight, atol=0.01)


def test_blocks_that_are_only_nearly_orthogonal(tmp_path: Path) -> None:
    """OFT's Neumann series: the transposed blocks would be off by far more than rounding."""
    weight = randn(24, 32)
    base = write_checkpoint(tmp_path / "base", {"a.weight": weight})
    config = {
        "peft_type": "OFT", "peft_version": "0.18.0", "oft_block_size": 8, "r": 4, "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5, "block_share": False, "coft": False, "fan_in_fan_out": False,
    }  # fmt: skip
    adapter = write_adapter(
        tmp_path / "adapter", {f"{PRE}a.oft_R.weight": randn(4, 28, seed=1) * 0.1}, config, drop=("boft_block_num",)
    )
    boft_export.merge(base, adapter, tmp_path / "merged", reversible=True)
    record = json.loads((tmp_path / "merged" / "boft_export.json").read_text())["tensors"]["a.weight"]
    assert record["orthogonality_residual"] > 1e-3
    assert unmerge(tmp_path / "merged", adapter, tmp_path / "exact").identical
    shutil.rmtree(tmp_path / "merged" / "boft_export.undo")
    unmerge(tmp_path / "merged", adapter, tmp_path / "out")
    assert_near(read_folder(tmp_path / "out")["a.weight"], weight, 2)


def test_several_adapters_and_only_the_last(tmp_path: Path) -> None:
    base = layers_base(tmp_path / "base", torch.float32)
    one, two = (layers_adapter(tmp_path / n, seed=s) for n, s in (("one", 0), ("two", 20)))
    boft_export.merge(base, one, tmp_path / "first")
    boft_export.merge(base, [one, two], tmp_path / "both")
    unmerge(tmp_path / "both", [one, two], tmp_path / "out")
    unmerge(tmp_path / "both", two, tmp_path / "last")
    for was, found in ((base, "out"), (tmp_path / "first", "last")):
        before, after = read_folder(was), read_folder(tmp_path / found)
        for module in LAYERS:
            assert_near(after[f"{module}.weight"], before[f"{module}.weight"], 4, 2)
    with pytest.raises(boft_export.InputError, match=r"was not made with these adapters.*in the order"):
        _raise_with_hint(lambda: unmerge(tmp_path / "both", [two, one], tmp_path / "x"))
    with pytest.raises(boft_export.InputError, match="was not made with these adapters"):
        unmerge(tmp_path / "both", one, tmp_path / "x")
    with pytest.raises(boft_export.InputError, match="was not made with these adapters"):
        unmerge(tmp_path / "first", [one, two], tmp_path / "x")
    assert not (tmp_path / "x").exists()


def _raise_with_hint(call: object) -> None:
    try:
        call()  # type: ignore[operator]
    except boft_export.BoftExportError as error:
        raise type(error)(f"{error.message} {error.hint}") from None


def test_fused_rows(tmp_path: Path) -> None:
    """A layer may be some rows of a tensor; the others keep their bytes."""
    weight = randn(96, 32).bfloat16()
    base = write_checkpoint(tmp_path / "base", {"model.layers.0.self_attn.qkv_proj.weight": weight})
    trained = {}
    for seed, part in enumerate(("q_proj", "v_proj")):
        trained |= boft_tensors(f"model.layers.0.self_attn.{part}", 32, 32, seed=seed)
    adapter = write_adapter(tmp_path / "adapter", trained)
    boft_export.merge(base, adapter, tmp_path / "merged")
    unmerge(tmp_path / "merged", adapter, tmp_path / "out")
    after = read_folder(tmp_path / "out")["model.layers.0.self_attn.qkv_proj.weight"]
    assert_near(after, weight, 2)
    assert torch.equal(after[32:64], weight[32:64])


@pytest.mark.parametrize("path", ["geodesic", "factorwise", "cayley", "truncate"])
def test_an_interpolation(tmp_path: Path, path: str) -> None:
    base = layers_base(tmp_path / "base", torch.float32)
    one, two = (layers_adapter(tmp_path / n, seed=s) for n, s in (("one", 0), ("two", 20)))
    boft_export.interpolate(base, [one, two], tmp_path / "merged", (0.4, 0.75), path=path, alpha_map={"t*": (0.5, 0.0)})
    unmerge(tmp_path / "merged", [one, two], tmp_path / "out")
    before, after = read_folder(base), read_folder(tmp_path / "out")
    for module in LAYERS:
        assert_near(after[f"{module}.weight"], before[f"{module}.weight"], 4, 2)
        assert not torch.allclose(read_folder(tmp_path / "merged")[f"{module}.weight"], before[f"{module}.weight"])
    asked = json.loads((tmp_path / "out" / "boft_export.json").read_text())["settings"]
    assert (asked["path"], asked["alpha"], asked["alpha_map"]) == (path, [0.75, 0.4], {"t*": [0.0, 0.5]})


def test_a_linear_mixture_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    boft_export.interpolate(base, adapter, tmp_path / "half", 0.5, path="linear")
    boft_export.interpolate(base, adapter, tmp_path / "whole", 1, path="linear")
    with pytest.raises(boft_export.InputError, match="no rotation undoes that"):
        unmerge(tmp_path / "half", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    unmerge(tmp_path / "whole", adapter, tmp_path / "out")


@pytest.mark.parametrize(("merged", "out"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", None)])
def test_other_dtypes(base: Path, adapter: Path, tmp_path: Path, merged: str, out: str | None) -> None:
    boft_export.merge(base, adapter, tmp_path / "merged", dtype=merged)
    unmerge(tmp_path / "merged", adapter, tmp_path / "out", dtype=out)
    before, after = read_folder(base), read_folder(tmp_path / "out")
    assert {t.dtype for t in after.values()} == {DTYPES[out or merged]}
    for name in before:
        if merged == "float32":
            # A float32 has room for what a rotation makes of a bfloat16.
            assert torch.equal(after[name], before[name])
        else:
            assert torch.allclose(after[name].float(), before[name].float(), atol=0.05)


def test_the_expected_share_is_near_the_real_one(tmp_path: Path) -> None:
    for std in (0.002, 0.03, 0.3):
        folder = tmp_path / str(std)
        weight = randn(384, 256).bfloat16()
        base = write_checkpoint(folder / "base", {"a.weight": weight})
        adapter = write_adapter(folder / "adapter", boft_tensors("a", 256, 384, m=2, b=8, std=std))
        boft_export.merge(base, adapter, folder / "merged")
        result = unmerge(folder / "merged", adapter, folder / "out")
        share = float((read_folder(folder / "out")["a.weight"] == weight).double().mean())
        assert result.expected == pytest.approx(share, abs=0.03)
        boft_export.merge(folder / "out", adapter, folder / "again")
        merged, again = (read_folder(folder / n)["a.weight"] for n in ("merged", "again"))
        assert result.returned == float((merged == again).double().mean())


def test_an_untrained_adapter_changes_nothing(base: Path, tmp_path: Path) -> None:
    trained = boft_tensors("layers.0.up", 32, 24, std=0)
    trained[f"{PRE}layers.0.up.boft_s"] = torch.ones(24, 1)
    adapter = write_adapter(tmp_path / "adapter", trained)
    boft_export.merge(base, adapter, tmp_path / "merged")
    result = unmerge(tmp_path / "merged", adapter, tmp_path / "out")
    assert weight_files(tmp_path / "out") == weight_files(base)
    assert (result.identical, result.returned, result.expected) == (True, 1, 1)
    assert "untrained" in [n.code for n in result.plan.notices]


# What is refused


def test_scales_of_zero(base: Path, tmp_path: Path) -> None:
    trained = boft_tensors("layers.0.up", 32, 24) | boft_tensors("layers.1.up", 32, 24)
    trained[f"{PRE}layers.0.up.boft_s"][:3] = 0
    trained[f"{PRE}layers.1.up.boft_s"][5] = -1
    adapter = write_adapter(tmp_path / "adapter", trained)
    boft_export.merge(base, adapter, tmp_path / "merged")
    with pytest.raises(boft_export.InputError, match=r"layers\.0\.up: 3 of 24 output scales are 0"):
        unmerge(tmp_path / "merged", adapter, tmp_path / "out")
    # Half of the way, 0 is a half, and -1 is 0.
    boft_export.interpolate(base, adapter, tmp_path / "half", 0.5)
    with pytest.raises(boft_export.InputError, match=r"layers\.1\.up: 1 of 24 output scales are 0"):
        unmerge(tmp_path / "half", adapter, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "half", "merged"]


def test_another_checkpoint(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", boft_tensors("layers.0.up", 32, 24, seed=5))
    boft_export.merge(base, adapter, tmp_path / "merged")
    with pytest.raises(boft_export.InputError, match=r"was not made with these adapters: found other \(SHA-256"):
        unmerge(tmp_path / "merged", other, tmp_path / "out")
    unmerge(tmp_path / "merged", adapter, tmp_path / "out")
    with pytest.raises(boft_export.InputError, match=r"holds no adapter: .* made by unmerge"):
        unmerge(tmp_path / "out", adapter, tmp_path / "again")
    (tmp_path / "merged" / "boft_export.json").write_text('{"schema_version": 1}')
    with pytest.raises(boft_export.DamagedFileError, match=r"boft_export\.json has no settings"):
        unmerge(tmp_path / "merged", adapter, tmp_path / "again")
    (tmp_path / "merged" / "boft_export.json").unlink()
    result = unmerge(tmp_path / "merged", adapter, tmp_path / "again")
    assert [n.code for n in result.plan.notices if n.level == "warning"] == ["no-manifest"]
    assert weight_files(tmp_path / "again") == weight_files(tmp_path / "out")
    with pytest.raises(boft_export.UsageError, match="names no merged checkpoint"):
        unmerge("-", adapter, tmp_path / "x")


def test_a_file_changed_since_is_noted(base: Path, adapter: Path, tmp_path: Path) -> None:
    boft_export.merge(base, adapter, tmp_path / "merged")
    file = next((tmp_path / "merged").glob("*-00002-*"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    result = unmerge(tmp_path / "merged", adapter, tmp_path / "out")
    noted = [n.message for n in result.plan.notices if n.code == "changed-since"]
    assert len(noted) == 1
    assert file.name in noted[0]
    assert "changed-since" in (tmp_path / "out" / "boft_export.json").read_text()


@pytest.fixture
def replacing(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base with a head of two labels, an adapter with one of three, a bias, and a new embedding; and their merge."""
    tensors = {
        "enc.a.weight": randn(24, 32).bfloat16(),
        "enc.a.bias": randn(24, seed=1).bfloat16(),
        "model.embed_tokens.weight": randn(10, 32, seed=2).bfloat16(),
        "classifier.weight": randn(2, 32, seed=3).bfloat16(),
    }
    config = {"model_type": "test", "architectures": ["XForSequenceClassification"], "vocab_size": 10}
    base = write_checkpoint(tmp_path / "base", tensors, config)
    trained = boft_tensors("enc.a", 32, 24)
    trained[f"{PRE}enc.a.base_layer.bias"] = randn(24, seed=4)
    trained[f"{PRE}classifier.weight"] = randn(3, 32, seed=5)
    trained[f"{PRE}model.embed_tokens.weight"] = randn(12, 32, seed=6)
    adapter = write_adapter(
        tmp_path / "adapter", trained, {"bias": "all", "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    )
    boft_export.merge(base, adapter, tmp_path / "merged")
    return base, adapter, tmp_path / "merged"


def test_what_was_replaced(replacing: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, merged = replacing
    with pytest.raises(boft_export.InputError, match="3 tensors that an adapter replaced") as failure:
        unmerge(merged, adapter, tmp_path / "out")
    for name in ("classifier.weight", "enc.a.bias", "model.embed_tokens.weight"):
        assert name in failure.value.message
    assert not (tmp_path / "out").exists()

    kept = unmerge(merged, adapter, tmp_path / "kept", keep_replaced=True)
    assert [n.code for n in kept.plan.notices if n.level == "warning"] == ["kept-replaced"]
    tuned, before = read_folder(merged), read_folder(base)
    for name, tensor in read_folder(tmp_path / "kept").items():
        if name == "enc.a.weight":
            assert_near(tensor, before[name], 2)
        else:
            assert torch.equal(tensor, tuned[name])
    assert digests(tmp_path / "kept")["config.json"] == digests(merged)["config.json"]

    unmerge(merged, adapter, tmp_path / "whole", base=base)
    after = read_folder(tmp_path / "whole")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) or name == "enc.a.weight"
    assert digests(tmp_path / "whole")["config.json"] == digests(base)["config.json"]
    (tmp_path / "pickled").mkdir()
    torch.save(before, tmp_path / "pickled" / "pytorch_model.bin")
    unmerge(merged, adapter, tmp_path / "whole", base=tmp_path / "pickled", overwrite=True)
    assert all(torch.equal(t, after[n]) for n, t in read_folder(tmp_path / "whole").items())
    with pytest.raises(boft_export.UsageError, match="both given"):
        unmerge(merged, adapter, tmp_path / "x", base=base, keep_replaced=True)
    with pytest.raises(boft_export.UsageError, match="would write into the base's folder"):
        unmerge(merged, adapter, base, base=base, overwrite=True)
    other = write_checkpoint(tmp_path / "other", {n: t + 1 for n, t in before.items()})
    with pytest.raises(
        boft_export.InputError, match=r"other/model\.safetensors has SHA-256 .* the merge was made from"
    ):
        unmerge(merged, adapter, tmp_path / "x", base=other)
    with pytest.raises(boft_export.InputError, match="is no merge of"):
        unmerge(merged, adapter, tmp_path / "x", base=_wider(base, tmp_path / "wider"))


def _wider(base: Path, folder: Path) -> Path:
    return write_checkpoint(folder, read_folder(base) | {"extra": torch.ones(3)})


def test_what_was_replaced_must_be_there(replacing: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, adapter, merged = replacing
    file = merged / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(boft_export.InputError, match=r"classifier\.weight is not what the adapter brings"):
        unmerge(merged, adapter, tmp_path / "out", keep_replaced=True)
    (merged / "boft_export.json").unlink()
    del tensors["classifier.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(boft_export.InputError, match=r"it lacks classifier\.weight"):
        unmerge(merged, adapter, tmp_path / "out", keep_replaced=True)
    assert not (tmp_path / "out").exists()


def test_tied_weights(tmp_path: Path) -> None:
    """A merge gives a rotated head a tensor of its own; with the base it is gone again."""
    tensors = {"model.embed_tokens.weight": randn(16, 32), "model.norm.weight": randn(32)}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    base = write_checkpoint(tmp_path / "base", tensors, config)
    adapter = write_adapter(tmp_path / "adapter", boft_tensors("lm_head", 32, 16))
    boft_export.merge(base, adapter, tmp_path / "merged")
    assert "lm_head.weight" in read_folder(tmp_path / "merged")
    unmerge(tmp_path / "merged", adapter, tmp_path / "out")
    after = read_folder(tmp_path / "out")
    assert torch.equal(after["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert_near(after["lm_head.weight"], tensors["model.embed_tokens.weight"], 2)


# With a record of the merge


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_record_gives_the_bytes(tmp_path: Path, dtype: str) -> None:
    base = layers_base(tmp_path / "base", DTYPES[dtype])
    one, two = (layers_adapter(tmp_path / n, seed=s) for n, s in (("one", 0), ("two", 20)))
    boft_export.merge(base, [one, two], tmp_path / "plain")
    boft_export.merge(base, [one, two], tmp_path / "merged", reversible=True)
    assert weight_files(tmp_path / "merged") == weight_files(tmp_path / "plain")
    assert not (tmp_path / "plain" / "boft_export.undo").exists()
    result = unmerge(tmp_path / "merged", [one, two], tmp_path / "out")
    assert (result.identical, result.exact, result.expected, result.returned) == (True, True, 1, 1)
    assert weight_files(tmp_path / "out") == weight_files(base)
    assert not (tmp_path / "out" / "boft_export.undo").exists()


@pytest.mark.parametrize(("m", "b"), [(1, 8), (2, 2), (3, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_record_of_extreme_values(tmp_path: Path, dtype: str, m: int, b: int) -> None:
    """Zeros, signs of zero, subnormal numbers, infinities, and scales of 0 and of all sizes."""
    kind = DTYPES[dtype]
    weight = (randn(48, 64) * 10.0 ** randn(48, 1, seed=9)).to(kind)
    weight[0], weight[1], weight[2, ::3] = 0.0, -0.0, 0.0
    weight[3] = (randn(64) * torch.finfo(kind).tiny).to(kind)
    weight[4] = (randn(64) * torch.finfo(kind).smallest_normal * 2.0**-6).to(kind)
    weight[5] = float("inf")
    weight[6, 7] = torch.finfo(kind).max / 16
    base = write_checkpoint(tmp_path / "base", {"a.weight": weight, "one.weight": randn(1, 64).to(kind)})
    trained = boft_tensors("a", 64, 48, m=m, b=b) | boft_tensors("one", 64, 1, m=m, b=b, seed=1)
    trained[f"{PRE}a.boft_s"][8:12] = torch.tensor([[0.0], [1e-3], [-1.0], [1e-9]])
    adapter = write_adapter(tmp_path / "adapter", trained)
    boft_export.merge(base, adapter, tmp_path / "merged", reversible=True)
    result = unmerge(tmp_path / "merged", adapter, tmp_path / "out")
    assert result.identical
    assert weight_files(tmp_path / "out") == weight_files(base)


def test_a_record_has_what_was_replaced(replacing: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, merged = replacing
    boft_export.merge(base, adapter, merged, reversible=True, overwrite=True)
    result = unmerge(merged, adapter, tmp_path / "out")
    assert result.identical
    same = {"model.safetensors", "config.json"}
    assert {n: d for n, d in digests(tmp_path / "out").items() if n in same} == {
        n: d for n, d in digests(base).items() if n in same
    }
    kept = unmerge(merged, adapter, tmp_path / "kept", keep_replaced=True)
    assert kept.identical is False
    tuned, before = read_folder(merged), read_folder(base)
    after = read_folder(tmp_path / "kept")
    assert torch.equal(after["enc.a.weight"], before["enc.a.weight"])
    assert all(torch.equal(after[n], tuned[n]) for n in tuned.keys() - {"enc.a.weight"})


def test_a_record_of_ties_and_fused_rows(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": randn(16, 32).bfloat16(),
        "model.layers.0.self_attn.qkv_proj.weight": randn(96, 32, seed=1).bfloat16(),
    }
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    base = write_checkpoint(tmp_path / "base", tensors, config)
    trained = boft_tensors("lm_head", 32, 16) | boft_tensors("model.layers.0.self_attn.k_proj", 32, 32, seed=1)
    adapter = write_adapter(tmp_path / "adapter", trained)
    boft_export.merge(base, adapter, tmp_path / "merged", reversible=True)
    assert "lm_head.weight" in read_folder(tmp_path / "merged")
    assert unmerge(tmp_path / "merged", adapter, tmp_path / "out").identical
    assert weight_files(tmp_path / "out") == weight_files(base)
    assert digests(tmp_path / "out")["config.json"] == digests(base)["config.json"]


def test_a_record_of_a_bare_encoder(tmp_path: Path) -> None:
    """A head that is added gives the other tensors a prefix, which they lose again."""
    base = write_checkpoint(
        tmp_path / "base",
        {"encoder.a.weight": randn(24, 32).bfloat16(), "norm.weight": randn(7).bfloat16()},
        {"model_type": "bert", "architectures": ["BertModel"]},
    )
    trained = boft_tensors("bert.encoder.a", 32, 24) | {f"{PRE}classifier.weight": randn(3, 32)}
    adapter = write_adapter(tmp_path / "adapter", trained, {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"})
    boft_export.merge(base, adapter, tmp_path / "merged", reversible=True)
    assert set(read_folder(tmp_path / "merged")) == {"bert.encoder.a.weight", "bert.norm.weight", "classifier.weight"}
    assert unmerge(tmp_path / "merged", adapter, tmp_path / "out").identical
    assert weight_files(tmp_path / "out") == weight_files(base)
    plain = unmerge(tmp_path / "merged", adapter, tmp_path / "kept", keep_replaced=True)
    assert plain.exact
    assert torch.equal(read_folder(tmp_path / "kept")["bert.encoder.a.weight"], read_folder(base)["encoder.a.weight"])


def test_a_record_in_other_files(base: Path, adapter: Path, tmp_path: Path) -> None:
    boft_export.merge(base, adapter, tmp_path / "merged", reversible=True, max_shard_size=2500)
    result = unmerge(tmp_path / "merged", adapter, tmp_path / "out")
    assert (result.identical, result.exact) == (None, True)
    before, after = read_folder(base), read_folder(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_a_record_of_other_layouts(adapter: Path, base: Path, tmp_path: Path) -> None:
    """A pickled base becomes safetensors; a sentence-transformers tree keeps its weights in a folder."""
    tensors = read_folder(base)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(tensors, pickled / "pytorch_model.bin")
    tree = tmp_path / "tree"
    write_checkpoint(tree / "0_Transformer", tensors)
    (tree / "modules.json").write_text(json.dumps([{"path": "0_Transformer"}]))
    # Whoever wrote these headers spelled them otherwise.
    file = tree / "0_Transformer" / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8 : 8 + length]), indent=1).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    for origin, identical in ((pickled, None), (tree, True)):
        merged, out = (tmp_path / f"{origin.name}-{n}" for n in ("merged", "out"))
        boft_export.merge(origin, adapter, merged, reversible=True)
        result = unmerge(merged, adapter, out)
        assert (result.identical, result.exact) == (identical, True)
        weights = [p for p in out.rglob("*.safetensors") if "undo" not in str(p)]
        found = {k: v for p in weights for k, v in load_file(p).items()}
        assert all(torch.equal(found[n], t) for n, t in tensors.items())
        assert weights[0].read_bytes() == file.read_bytes() or origin == pickled


def test_another_tile_size_gives_the_same(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU folds at once is larger, so a record can't be for the tiles it was made in."""
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", 100)
    boft_export.merge(base, adapter, tmp_path / "merged", reversible=True)
    for target in (1, 100, 350, 1 << 17):
        monkeypatch.setitem(TILE_ELEMENTS, "cpu", target)
        assert unmerge(tmp_path / "merged", adapter, tmp_path / str(target)).identical


def test_where_a_record_is_not_used(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", boft_tensors("layers.0.up", 32, 24, seed=5))
    merged = tmp_path / "merged"
    boft_export.merge(base, [adapter, other], merged, reversible=True)
    for name, adapters, options, why in (
        ("last", other, {}, "all 2 adapters together"),
        ("wide", [adapter, other], {"dtype": "float32"}, "--dtype must be left out"),
        ("coarse", [adapter, other], {"compute_dtype": "float32"}, "more precisely than now"),
    ):
        result = unmerge(merged, adapters, tmp_path / name, **options)
        assert not result.exact
        assert [why in n.message for n in result.plan.notices if n.code == "record-unused"] == [True]
    shutil.rmtree(merged / "boft_export.undo")
    assert not unmerge(merged, [adapter, other], tmp_path / "without").exact
    with pytest.raises(boft_export.UsageError, match="another dtype is not reversible"):
        boft_export.merge(base, adapter, tmp_path / "x", reversible=True, dtype="float32")
    # A merge on top of a merge takes no record along that is not its own.
    boft_export.merge(base, adapter, tmp_path / "first", reversible=True)
    boft_export.merge(tmp_path / "first", other, tmp_path / "second")
    assert not (tmp_path / "second" / "boft_export.undo").exists()


def test_a_damaged_record(base: Path, adapter: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    boft_export.merge(base, adapter, merged, reversible=True)
    manifest = json.loads((merged / "boft_export.json").read_text())
    name = "boft_export.undo/model-00001-of-00002.undo"
    good = (merged / name).read_bytes()

    def refused(data: bytes, said: str, *, told: bool) -> None:
        (merged / name).write_bytes(data)
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} if told else manifest["undo"][name]
        changed = manifest | {"undo": manifest["undo"] | {name: entry}}
        (merged / "boft_export.json").write_text(json.dumps(changed))
        with pytest.raises(boft_export.InputError, match=said):
            unmerge(merged, adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(good[:-1], "bytes, boft_export.json says", told=False)
    refused(bytes([good[0] ^ 1]) + good[1:], "has SHA-256", told=False)
    for data in (
        b"",
        b"x",
        b"\xff" * 8,
        b"[]" + (2).to_bytes(8, "little"),
        good[:-8] + (1 << 60).to_bytes(8, "little"),
    ):
        refused(data, "not a sound file that undoes|ends at byte", told=True)
    length = int.from_bytes(good[-8:], "little")
    index = json.loads(good[-8 - length : -8])
    blocks, rest = good[: -8 - length], index["tensors"]
    first = next(n for n, e in rest.items() if e["blocks"])
    for key, value in (
        ("offset", 1 << 40), ("offset", -1), ("blocks", [[0, 1 << 40, 1]]), ("blocks", [[0, 1]]), ("dtype", "F7"),
        ("shape", [2, 2]), ("shape", "x"), ("name", 5), ("name", "other"), ("name", "layers.1.norm.weight"),
        ("blocks", [[0.5, 1, 1]]), ("dtype", "F32"),
    ):  # fmt: skip
        text = json.dumps(index | {"tensors": rest | {first: rest[first] | {key: value}}}).encode()
        refused(blocks + text + len(text).to_bytes(8, "little"), "sound|record|no tensor", told=True)
    for changed in (
        None,
        rest[first] | {"blocks": [[0, 0, 0], *rest[first]["blocks"]]},
        rest[first] | {"blocks": rest[first]["blocks"][:1] * 2},
        rest[first] | {"name": "\ud800"},
        *({"name": first, "dtype": d, "shape": s, "offset": 0, "blocks": None} for d, s in (
            ("F4", [3]), ("F32", [1] * 70_000), ("F32", [0, 1 << 70]), ("F32", [0, 1 << 61, 4]), ("BF16", [1, 2]),
        )),
    ):  # fmt: skip
        text = json.dumps(index | {"tensors": rest | {first: changed}}).encode()
        refused(blocks + text + len(text).to_bytes(8, "little"), "sound|record", told=True)
    broken = bytes(b ^ 0x55 for b in blocks)
    refused(broken + good[len(blocks) :], r"a block of .* can't be read", told=True)
    (merged / name).write_bytes(good)
    (merged / "boft_export.json").write_text(json.dumps(manifest))
    assert unmerge(merged, adapter, tmp_path / "out").identical
    # What was written on since can't be put right.
    file = merged / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(boft_export.DamagedFileError, match="not as they were written"):
        unmerge(merged, adapter, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    (merged / name).unlink()
    with pytest.raises(boft_export.DamagedFileError, match="is missing, though"):
        unmerge(merged, adapter, tmp_path / "again")


@pytest.mark.parametrize("size", [None, 1500])
def test_a_record_without_a_tensor_is_refused_in_any_layout(
    size: int | None, base: Path, adapter: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    boft_export.merge(base, adapter, merged, reversible=True)
    name = "boft_export.undo/model-00001-of-00002.undo"
    data = (merged / name).read_bytes()
    length = int.from_bytes(data[-8:], "little")
    index = json.loads(data[-8 - length : -8])
    gone = next(iter(index["tensors"]))
    text = json.dumps(index | {"tensors": index["tensors"] | {gone: None}}).encode()
    data = data[: -8 - length] + text + len(text).to_bytes(8, "little")
    (merged / name).write_bytes(data)
    manifest = json.loads((merged / "boft_export.json").read_text())
    manifest["undo"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (merged / "boft_export.json").write_text(json.dumps(manifest))
    with pytest.raises(boft_export.DamagedFileError, match=r"another .* than the base's header"):
        unmerge(merged, adapter, tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


def test_a_record_of_values_near_the_largest(tmp_path: Path) -> None:
    """What undoing makes infinite, the record has as it was."""
    weight = randn(24, 32, seed=3).clamp(-1, 1).half() * 65504
    base = write_checkpoint(tmp_path / "base", {"a.weight": weight})
    trained = boft_tensors("a", 32, 24, seed=3)
    trained[f"{PRE}a.boft_s"] = torch.full((24, 1), 0.3)
    adapter = write_adapter(tmp_path / "adapter", trained)
    boft_export.merge(base, adapter, tmp_path / "merged", reversible=True)
    assert unmerge(tmp_path / "merged", adapter, tmp_path / "out").identical


def test_weights_that_scales_have_rounded_away_are_noted(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"a.weight": (randn(24, 32) * 0.02).half()})
    for scale, noted in ((1.0, False), (1e-7, True)):
        trained = boft_tensors("a", 32, 24, seed=3)
        trained[f"{PRE}a.boft_s"] = torch.full((24, 1), scale)
        adapter = write_adapter(tmp_path / f"adapter-{scale}", trained)
        merged = tmp_path / f"merged-{scale}"
        boft_export.merge(base, adapter, merged)
        result = unmerge(merged, adapter, tmp_path / f"out-{scale}")
        assert ("lost-weights" in {n.code for n in result.plan.notices}) == noted


def test_bits_in_order() -> None:
    for dtype in DTYPES.values():
        info = torch.finfo(dtype)
        sorted_values = [float("-inf"), -1.0, -info.tiny, -0.0, 0.0, info.tiny, 1.0, 1 + info.eps, float("inf")]
        values = torch.tensor(sorted_values, dtype=dtype)
        order = to_order(values)
        assert (order.diff() > 0).all()
        assert int(order[4] - order[3]) == int(order[7] - order[6]) == 1
        assert torch.equal(as_integers(from_order(order, dtype)), as_integers(values))
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    assert torch.equal(as_integers(from_order(to_order(everything), torch.bfloat16)), as_integers(everything))
    assert len(to_order(everything).unique()) == 2**16


def test_another_machines_sums_are_put_right_too() -> None:
    """Where undoing gives values that are off as far as sums in another order are, the same base comes out."""
    base = (randn(1000) * 0.02).bfloat16()
    exact = base.double() + randn(1000, seed=1).double() * 1e-4
    # Some values lie in the middle between two numbers, but for the arithmetic's own error.
    exact[::7] = (base.double() + torch.nextafter(base, torch.ones_like(base)).double())[::7] / 2
    blocks = list(corrections(base, exact, round_once(exact, torch.bfloat16), 0))
    data = b"".join(b.data for b in blocks)
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        told = tuple((b.start, b.count, len(b.data)) for b in blocks)
        record = UndoTensor("a", "BF16", (1000,), 0, told, Path(file.name))
        for seed in range(4):
            here = exact + randn(1000, seed=seed).double() * 1e-17
            given = round_once(here, torch.bfloat16)
            assert seed == 0 or not torch.equal(given, round_once(exact, torch.bfloat16))
            for start, stop in ((0, 1000), (0, 300), (300, 1000), (999, 1000)):
                assert torch.equal(put_right(record, start, given[start:stop]), base[start:stop])


# However it is run


def test_jobs_memory_and_resuming(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.up.weight": randn(700, 512, seed=i).bfloat16() for i in range(3)}
    base = write_checkpoint(tmp_path / "base", tensors, shards=3)
    trained = {}
    for i in range(3):
        trained |= boft_tensors(f"layers.{i}.up", 512, 700, m=2, b=4, seed=i)
    adapter = write_adapter(tmp_path / "adapter", trained)
    merged = tmp_path / "merged"
    reversible = partial(boft_export.merge, reversible=True)
    for name, work, inputs in (
        ("merged", reversible, (base, adapter)),
        ("out", unmerge, (merged, adapter)),
        ("plain", unmerge, (merged, adapter)),
    ):
        if name == "plain":
            shutil.rmtree(merged / "boft_export.undo")
        for i, (jobs, memory) in enumerate(((1, None), (2, None), (2, "450MiB"))):
            work(*inputs, tmp_path / f"{name}-{i}", jobs=jobs, max_memory=memory)
        whole = digests(tmp_path / f"{name}-0")
        assert digests(tmp_path / f"{name}-1") == digests(tmp_path / f"{name}-2") == whole
        journal = tmp_path / f".{name}.boft-export" / "journal.jsonl"
        _killed_after_the_first_file(lambda **o: work(*inputs, tmp_path / name, **o), journal)  # noqa: B023  # called here
        assert not (tmp_path / name).exists()
        result = work(*inputs, tmp_path / name, resume=True)
        parts = tuple(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
        assert result.resumed
        assert result.resumed == parts[: len(result.resumed)]
        assert digests(tmp_path / name) == whole
    assert weight_files(tmp_path / "out") == weight_files(base)


def _killed_after_the_first_file(work: Callable[..., object], journal: Path) -> None:
    child = os.fork()
    if child == 0:

        def progress(*_: object) -> None:
            while journal.read_text().count('"file": "model-00001') < 1:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)

        work(jobs=1, progress=progress)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


# The command


def run(arguments: Sequence[object], command: ModuleType = cli) -> tuple[int, str, str]:
    app = typer.Typer()
    app.command(command.NAME, epilog=command.EPILOG)(command.command)
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


def test_the_command(base: Path, adapter: Path, tmp_path: Path) -> None:
    boft_export.merge(base, adapter, tmp_path / "merged")
    code, out, err = run([tmp_path / "merged", adapter, "-o", tmp_path / "out", "-n"])
    assert (code, err) == (0, "")
    assert "would undo 4 adapter layers" in out
    assert not (tmp_path / "out").exists()
    code, out, err = run([tmp_path / "merged", adapter, "-o", tmp_path / "out"])
    assert (code, err) == (0, "")
    assert "layers.*.up.weight" in out
    assert "undid 4 adapter layers into" in out
    assert "% of the rotated elements the base's" in out
    code, out, err = run([tmp_path / "merged", adapter, "-o", tmp_path / "out", "--overwrite", "--json"])
    document = json.loads(out)
    assert (code, document["merged"], document["adapters"]) == (0, "merged", ["adapter"])
    assert 0.5 < document["expected"] < 1
    assert document["tensors"]["layers.0.up.weight"]["returned"] > 0.5
    code, _, err = run([tmp_path / "merged", adapter, "-o", tmp_path / "out"])
    assert (code, "exists" in err) == (2, True)
    code, out, _ = run([tmp_path / "out", adapter, "-o", tmp_path / "again", "--json"])
    assert (code, json.loads(out)["error"]["type"]) == (3, "InputError")

    arguments = [base, adapter, "-o", tmp_path / "merged", "--overwrite", "--reversible"]
    code, out, err = run(arguments, merge)
    assert (code, err) == (0, "")
    assert "in boft_export.undo, from which unmerge gives the base's bytes" in out
    code, out, _ = run([*arguments, "--json"], merge)
    assert sorted(json.loads(out)["undo"]) == [f"boft_export.undo/model-0000{i}-of-00002.undo" for i in (1, 2)]
    code, out, err = run([tmp_path / "merged", adapter, "-o", tmp_path / "out", "--overwrite"])
    assert (code, err) == (0, "")
    assert "identical to the base (SHA-256)" in out
    boft_export.merge(base, adapter, tmp_path / "merged", reversible=True, overwrite=True, max_shard_size=2500)
    _, out, _ = run([tmp_path / "merged", adapter, "-o", tmp_path / "out", "--overwrite"])
    assert "every element as the merge's record has it, in other files than the base's" in out


def test_result_is_typed(base: Path, adapter: Path, tmp_path: Path) -> None:
    boft_export.merge(base, adapter, tmp_path / "merged")
    shutil.rmtree(base)
    result = unmerge(tmp_path / "merged", adapter, tmp_path / "out")
    assert isinstance(result, UnmergeResult)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# merged with its adapter undone" in card
    assert "base_model" not in card
