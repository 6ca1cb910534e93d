"""Undoing merges: how near to the base it comes, what it refuses, and that it is the same however it is run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from support import boft_tensors, butterfly_matrix, read_folder, write_adapter, write_checkpoint
from torch import Tensor
from typer.testing import CliRunner

import boft_export
from boft_export.adapters import View
from boft_export.cli import unmerge as cli
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
    with pytest.raises(boft_export.UsageError, match="both given"):
        unmerge(merged, adapter, tmp_path / "x", base=base, keep_replaced=True)
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


# However it is run


def test_jobs_memory_and_resuming(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.up.weight": randn(700, 512, seed=i).bfloat16() for i in range(3)}
    base = write_checkpoint(tmp_path / "base", tensors, shards=3)
    trained = {}
    for i in range(3):
        trained |= boft_tensors(f"layers.{i}.up", 512, 700, m=2, b=4, seed=i)
    adapter = write_adapter(tmp_path / "adapter", trained)
    merged = tmp_path / "merged"
    boft_export.merge(base, adapter, merged)
    for jobs, memory in ((1, None), (2, None), (2, "420MiB")):
        unmerge(merged, adapter, tmp_path / f"out-{jobs}-{memory}", jobs=jobs, max_memory=memory)
    whole = digests(tmp_path / "out-1-None")
    assert digests(tmp_path / "out-2-None") == digests(tmp_path / "out-2-420MiB") == whole

    _killed_in_the_second_file(merged, adapter, tmp_path / "out", tensors["layers.0.up.weight"].nbytes)
    result = unmerge(merged, adapter, tmp_path / "out", resume=True)
    assert result.resumed == ("model-00001-of-00003.safetensors",)
    assert digests(tmp_path / "out") == whole


def _killed_in_the_second_file(merged: Path, adapter: Path, output: Path, size: int) -> None:
    child = os.fork()
    if child == 0:

        def progress(done: int, *_: object) -> None:
            if done > size * 1.5:
                os.kill(os.getpid(), signal.SIGKILL)

        unmerge(merged, adapter, output, jobs=1, progress=progress)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not output.exists()


# The command


def run(arguments: Sequence[object]) -> tuple[int, str, str]:
    app = typer.Typer()
    app.command(cli.NAME, epilog=cli.EPILOG)(cli.command)
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


def test_result_is_typed(base: Path, adapter: Path, tmp_path: Path) -> None:
    boft_export.merge(base, adapter, tmp_path / "merged")
    shutil.rmtree(base)
    result = unmerge(tmp_path / "merged", adapter, tmp_path / "out")
    assert isinstance(result, UnmergeResult)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# merged with its adapter undone" in card
    assert "base_model" not in card
