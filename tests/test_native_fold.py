"""Merges by the compiled kernel beside the same by torch, and what its threads share."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import boft_tensors, expected_merge, read_folder, write_adapter, write_checkpoint
from torch import Tensor

import boft_export
from boft_export import native
from boft_export.checkpoint import LocalStaging
from boft_export.errors import AccessError, UsageError
from boft_export.linalg.spectrum import Spectrum
from boft_export.pipeline.kept import Kept
from boft_export.pipeline.memory import open_shards, shards_in_turn
from boft_export.pipeline.one_torch_thread import OneTorchThread

IN = 16
ATTENTION = "model.layers.0.self_attn"

pytestmark = pytest.mark.skipif(native.instruction_set() is None, reason="there is no compiled kernel")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def by_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, Tensor], ...]]:
    """Do something by the kernel and by torch; return the tensors of both outputs."""

    def each(do: Callable[[Path], object]) -> tuple[dict[str, Tensor], ...]:
        found = []
        for kernel in ("", "torch"):
            monkeypatch.setenv("BOFT_EXPORT_KERNEL", kernel)
            do(tmp_path / f"by-{kernel}")
            found.append(read_folder(tmp_path / f"by-{kernel}"))
        return tuple(found)

    return each


# The same as by torch


@pytest.mark.parametrize("first", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("order", [1, -1])
def test_adapters_of_a_fused_weight_and_of_a_part_of_it(by_each, tmp_path, first, order):
    """Each adapter's rows begin elsewhere."""
    rows = {"q_proj": slice(0, 8), "k_proj": slice(8, 12), "v_proj": slice(12, 16)}[first]
    weight = rand(16, IN).bfloat16()
    base = write_checkpoint(tmp_path / "base", {f"{ATTENTION}.qkv_proj.weight": weight})
    part = boft_tensors(f"{ATTENTION}.{first}", IN, rows.stop - rows.start, seed=1)
    # The other parts are adapted too: by their sizes a weight is told apart.
    rest = {n: k for n, k in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)) if n != first}
    parts = part | {k: v for n, r in rest.items() for k, v in boft_tensors(f"{ATTENTION}.{n}", IN, r, seed=r).items()}
    whole = boft_tensors(f"{ATTENTION}.qkv_proj", IN, 16, seed=2)
    adapters = [write_adapter(tmp_path / "parts", parts), write_adapter(tmp_path / "whole", whole)][::order]
    ours, theirs = by_each(lambda out: boft_export.merge(base, adapters, out))
    found = ours[f"{ATTENTION}.qkv_proj.weight"]
    assert torch.equal(found, theirs[f"{ATTENTION}.qkv_proj.weight"])
    if order == 1:
        exact = expected_merge(expected_merge(weight[rows], part), {**whole, **_rows_of(whole, rows)})
    else:
        exact = expected_merge(expected_merge(weight[rows], {**whole, **_rows_of(whole, rows)}), part)
    assert torch.equal(found[rows], exact.bfloat16())


def _rows_of(tensors: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {k: v[rows] for k, v in tensors.items() if k.endswith("boft_s")}


@pytest.mark.parametrize("shape", [(3,), (1024,), (131, 1001), (129, 1024), (131072 + 1024 + 1,)])
def test_what_is_only_converted(by_each, tmp_path, shape):
    """Whole tiles, whole rows, and what is left of both."""
    layers = {"a.weight": rand(8, IN), "b": rand(*shape, seed=3)}
    base = write_checkpoint(tmp_path / "base", layers)
    adapter = write_adapter(tmp_path / "adapter", boft_tensors("a", IN, 8))
    results = []
    for tensors in by_each(lambda out: results.append(boft_export.merge(base, adapter, out, dtype="bfloat16"))):
        assert torch.equal(tensors["b"], layers["b"].bfloat16())
    ours, theirs = (r.manifest["tensors"]["b"] for r in results)
    assert {k: v for k, v in ours.items() if not isinstance(v, float)} == {
        k: v for k, v in theirs.items() if not isinstance(v, float)
    }
    assert ours["rounding_loss"] == pytest.approx(theirs["rounding_loss"])


def test_the_manifest_tells_the_kernel_and_only_it_resumes(tmp_path, monkeypatch):
    base = write_checkpoint(tmp_path / "base", {"a.weight": rand(8, IN)})
    adapter = write_adapter(tmp_path / "adapter", boft_tensors("a", IN, 8))
    monkeypatch.setenv("BOFT_EXPORT_KERNEL", "torch")
    result = boft_export.merge(base, adapter, tmp_path / "out")
    assert result.manifest["settings"]["kernel"] == "torch"
    monkeypatch.setenv("BOFT_EXPORT_KERNEL", "nonsense")
    with pytest.raises(UsageError, match="nonsense"):
        boft_export.merge(base, adapter, tmp_path / "other")
    assert not (tmp_path / ".other.boft-export").exists()


# Programs


def test_a_sweep_prepares_each_program_once(tmp_path, monkeypatch):
    tensors = {f"l{i}.weight": rand(64, 4096, seed=i).bfloat16() for i in range(3)}
    base = write_checkpoint(tmp_path / "base", tensors)
    layers = {k: v for i in range(3) for k, v in boft_tensors(f"l{i}", 4096, 64, seed=i).items()}
    adapter = write_adapter(tmp_path / "adapter", layers)
    made = []
    program = native.Program

    def counted(stages, n):
        if stages:
            made.append(n)
        return program(stages, n)

    monkeypatch.setattr(native, "Program", counted)
    options = {"alphas": (0, 0.25, 0.5, 0.75, 1), "jobs": 2, "max_memory": "600MB"}
    boft_export.interpolate(base, adapter, tmp_path / "out", **options)
    assert len(made) == 3 * 4
    made.clear()
    boft_export.interpolate(base, adapter, tmp_path / "straight", path="linear", **options)
    assert len(made) == 3


def test_kept_values_are_made_once_and_those_used_last_stay():
    kept: Kept[str, str] = Kept(2)
    made = []

    def value(key: str) -> str:
        def make() -> str:
            time.sleep(0.01)
            made.append(key)
            return key.upper()

        return kept.get(key, 1, make)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(value, "aaaa")) == ["A"] * 4
    assert made == ["a"]
    for key in "bacab":
        assert value(key) == key.upper()
    assert made == ["a", "b", "c", "b"]


def test_what_fails_to_be_made_fails_for_all_who_ask():
    kept: Kept[str, str] = Kept(1)

    def fail() -> str:
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            kept.get("a", 1, fail)


# Threads


def test_torch_bends_paths_on_one_thread(tmp_path, monkeypatch):
    base = write_checkpoint(tmp_path / "base", {"a.weight": rand(8, IN).bfloat16()})
    adapter = write_adapter(tmp_path / "adapter", boft_tensors("a", IN, 8))
    seen = []
    power = Spectrum.power

    def watched(*arguments):
        seen.append(torch.get_num_threads())
        return power(*arguments)

    monkeypatch.setattr(Spectrum, "power", watched)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        boft_export.interpolate(base, adapter, tmp_path / "out", alphas=(0.5,))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


def test_torch_has_its_threads_again_when_all_have_left():
    one = OneTorchThread()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with one:
            with one:
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_torch_has_its_threads_again_whoever_of_several_leaves_last():
    one = OneTorchThread()
    found, before = [], torch.get_num_threads()
    steps = [threading.Event() for _ in range(4)]

    def first():
        with one:
            steps[0].set()
            steps[1].wait()
        steps[2].set()
        steps[3].wait()
        # It was not the last to leave, and now it is the first to come.
        with one:
            found.append(torch.get_num_threads())
        found.append(torch.get_num_threads())

    def second():
        steps[0].wait()
        with one:
            steps[1].set()
            steps[2].wait()
        steps[3].set()

    try:
        torch.set_num_threads(3)
        with ThreadPoolExecutor(2) as pool:
            for done in (pool.submit(first), pool.submit(second)):
                done.result()
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(torch.get_num_threads).result())
        assert found == [1, 3, 3]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def many_files(tmp_path: Path, count: int) -> tuple[Path, Path]:
    tensors = {f"l{i}.weight": rand(8, IN, seed=i) for i in range(count)}
    layers = {k: v for i in range(count) for k, v in boft_tensors(f"l{i}", IN, 8, seed=i).items()}
    return write_checkpoint(tmp_path / "base", tensors, shards=count), write_adapter(tmp_path / "adapter", layers)


@pytest.mark.parametrize("jobs", [1, 2, 8, 16])
def test_few_files_are_open_at_once_however_slow_the_disk_is(tmp_path, monkeypatch, jobs):
    base, adapter = many_files(tmp_path, 12)
    fsync, most = os.fsync, []

    def slow(descriptor):
        most.append(len(list((tmp_path / ".out.boft-export").rglob("*.safetensors.partial"))))
        time.sleep(0.01)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    boft_export.merge(base, adapter, tmp_path / "out", jobs=jobs)
    assert shards_in_turn(jobs) <= max(most) <= open_shards(jobs)


def test_a_thread_that_cannot_start_fails_the_run_and_leaves_none_behind(tmp_path, monkeypatch):
    base, adapter = many_files(tmp_path, 4)
    before = set(threading.enumerate())
    start = threading.Thread.start

    def refuse(thread):
        if thread.name == "crew-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            boft_export.merge(base, adapter, tmp_path / "out", jobs=2)
    assert set(threading.enumerate()) == before
    assert not (tmp_path / "out").exists()
    boft_export.merge(base, adapter, tmp_path / "out", jobs=2)
    assert len(load_file(tmp_path / "out" / "model-00001-of-00004.safetensors")) == 1


def test_a_file_that_fails_while_threads_are_still_starting_fails_the_run(tmp_path, monkeypatch):
    base, adapter = many_files(tmp_path, 4)
    start = threading.Thread.start

    def late(thread):
        if thread.name == "crew-1":
            time.sleep(0.3)
        start(thread)

    def refuse(*_):
        raise AccessError("cannot write the journal.")

    monkeypatch.setattr(threading.Thread, "start", late)
    monkeypatch.setattr(LocalStaging, "record", refuse)
    with pytest.raises(AccessError, match="journal"):
        boft_export.merge(base, adapter, tmp_path / "out", jobs=2)


def test_subnormals_are_kept_where_torch_was_told_to_flush_them():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't")
    try:
        source = torch.full((4, 4), 2.0**-130).bfloat16()
        out = torch.empty_like(source)
        raw, target = (t.view(torch.uint8).numpy() for t in (source, out))
        native.fold_rows(native.Program((), 4), raw, "BF16", target, "BF16", tile_rows=4)
        assert target.tobytes() == raw.tobytes()
        assert (torch.tensor(2.0**-1040, dtype=torch.float64) * 1).item() == 0
    finally:
        torch.set_flush_denormal(False)
