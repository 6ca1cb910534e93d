"""Weight files that share untouched blocks with the base's on disks that can, and the same bytes on all others."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support import boft_tensors, write_adapter, write_checkpoint

import boft_export
from boft_export.checkpoint import free_bytes
from boft_export.checkpoint.cloning import clone

# How to make a file system whose files can share blocks.
MAKERS = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}
DISK_BYTES = 512 << 20
FEATURES = 512
ADAPTED = [f"layers.{i}.{m}_proj" for i in range(4) for m in "qv"]
# Of blocks in part, and of the header.
SLACK = (len(ADAPTED) + 4) * 3 * 4096
# From Linux's fiemap.h.
FIEMAP, SYNC, LAST, SHARED = 0xC020660B, 1, 1, 0x2000


class Inputs(NamedTuple):
    """A base of four files, an adapter for some of its layers, and the weight files of their merge."""

    base: Path
    adapter: Path
    merged: dict[str, bytes]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Inputs on the disk that tests lie on."""
    folder = tmp_path_factory.mktemp("inputs")
    generator = torch.Generator().manual_seed(0)
    tensors = {"embed.weight": torch.randn(4001, FEATURES, generator=generator).bfloat16()}
    for i in range(4):
        for name in "kqvo":
            tensors[f"layers.{i}.{name}_proj.weight"] = torch.randn(FEATURES, FEATURES, generator=generator).bfloat16()
        tensors[f"layers.{i}.norm.weight"] = torch.ones(FEATURES + 1).bfloat16()
    adapter = {}
    for seed, module in enumerate(ADAPTED):
        adapter |= boft_tensors(module, FEATURES, FEATURES, seed=seed)
    base = write_checkpoint(folder / "base", tensors, shards=4)
    write_adapter(folder / "adapter", adapter)
    boft_export.merge(base, folder / "adapter", folder / "out")
    return Inputs(base, folder / "adapter", weights(folder / "out"))


@pytest.fixture(scope="module", params=MAKERS)
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk whose files can share blocks; skip where none can be made or mounted."""
    programs = [shutil.which(p) for p in (MAKERS[request.param][0], "mount", "umount")]
    if None in programs:
        pytest.skip(f"there is no {MAKERS[request.param][0]}, or no mount")
    make, mount, umount = map(str, programs)
    folder = tmp_path_factory.mktemp(request.param)
    image, place = folder / "image", folder / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    for command in ([make, *MAKERS[request.param][1:], image], [mount, "-o", "loop", image, place]):
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip(f"{request.param} can't be made or mounted here")
    yield place
    subprocess.run([umount, place], check=True)


@pytest.fixture
def there(disk: Path, inputs: Inputs) -> Iterator[Path]:
    """A folder on such a disk, with the base in it; no test may change that."""
    folder = disk / "work"
    shutil.copytree(inputs.base, folder / "base")
    before = weights(folder / "base")
    yield folder
    assert weights(folder / "base") == before
    shutil.rmtree(folder)


def weights(folder: Path) -> dict[str, bytes]:
    """Return the digest of each weight file."""
    return {p.name: hashlib.sha256(p.read_bytes()).digest() for p in sorted(folder.glob("*.safetensors"))}


def private_bytes(path: Path) -> int:
    """Return how many bytes of a weight file, or of all in a folder, are in blocks of their own."""
    if path.is_dir():
        return sum(map(private_bytes, path.glob("*.safetensors")))
    count, found, start = 512, 0, 0
    with path.open("rb") as file:
        while True:
            request = bytearray(struct.pack("=QQIIII", start, 2**64 - 1 - start, SYNC, 0, count, 0) + bytes(56 * count))
            fcntl.ioctl(file, FIEMAP, request)
            mapped = struct.unpack_from("=I", request, 20)[0]
            for i in range(mapped):
                logical, _, length, _, _, flags = struct.unpack_from("=QQQQQI", request, 32 + 56 * i)
                found += 0 if flags & SHARED else length
                start = logical + length
                if flags & LAST:
                    return found
            if not mapped:
                return found


def test_only_what_changes_takes_space(there: Path, inputs: Inputs) -> None:
    boft_export.merge(there / "base", inputs.adapter, there / "out", jobs=2)
    assert weights(there / "out") == inputs.merged
    adapted = len(ADAPTED) * FEATURES * FEATURES * 2
    assert adapted <= private_bytes(there / "out") <= adapted + SLACK


def test_of_several_outputs_each_shares_what_it_leaves(there: Path, inputs: Inputs) -> None:
    """At alpha = 0 that is all but the header."""
    boft_export.interpolate(there / "base", inputs.adapter, there / "out", alphas=[0, 1])
    none, whole = sorted(p for p in (there / "out").iterdir() if p.is_dir())
    assert weights(none) == weights(there / "base")
    assert weights(whole) == inputs.merged
    assert private_bytes(none) <= SLACK
    assert private_bytes(whole) <= len(ADAPTED) * FEATURES * FEATURES * 2 + SLACK


def test_a_disk_needs_room_for_what_changes_only(there: Path, inputs: Inputs) -> None:
    whole = sum(p.stat().st_size for p in inputs.base.glob("*.safetensors"))
    with (there / "filler").open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, free_bytes(there) - whole * 3 // 4)
        except OSError:
            pytest.skip("this file system has less room than it tells")
    assert free_bytes(there) < whole
    with pytest.raises(boft_export.ResourceError, match="bytes of disk"):
        boft_export.merge(there / "base", inputs.adapter, there / "out", max_shard_size="3MB")
    boft_export.merge(there / "base", inputs.adapter, there / "out")
    assert weights(there / "out") == inputs.merged


@pytest.mark.parametrize("option", [{"max_shard_size": "3MB"}, {"dtype": "float32"}, {"dtype": "float16"}])
def test_what_lies_elsewhere_is_written(there: Path, inputs: Inputs, tmp_path: Path, option: dict[str, str]) -> None:
    boft_export.merge(there / "base", inputs.adapter, there / "out", **option)
    boft_export.merge(inputs.base, inputs.adapter, tmp_path / "out", **option)
    assert weights(there / "out") == weights(tmp_path / "out")
    size = sum(p.stat().st_size for p in (there / "out").glob("*.safetensors"))
    assert private_bytes(there / "out") >= size


def test_where_most_changes_all_is_written(there: Path, tmp_path: Path) -> None:
    """Only the file with the embedding is left as it was for the most part."""
    adapter = {}
    for module in (f"layers.{i}.{m}_proj" for i in range(4) for m in "kqv"):
        adapter |= boft_tensors(module, FEATURES, FEATURES)
    boft_export.merge(there / "base", write_adapter(tmp_path / "adapter", adapter), there / "out")
    files = sorted((there / "out").glob("*.safetensors"), key=lambda p: p.stat().st_size)
    assert [private_bytes(p) >= p.stat().st_size for p in files] == [True, True, True, False]


def test_from_one_disk_to_another(there: Path, inputs: Inputs, tmp_path: Path) -> None:
    boft_export.merge(inputs.base, inputs.adapter, there / "out")
    assert weights(there / "out") == inputs.merged
    boft_export.merge(there / "base", inputs.adapter, tmp_path / "out")
    assert weights(tmp_path / "out") == inputs.merged


def test_a_failure_leaves_nothing_and_resuming_ends_it(there: Path, inputs: Inputs) -> None:
    class StopError(Exception):
        pass

    def stop(done: int, total: int, _: str) -> None:
        if done > 0.7 * total:
            raise StopError

    with pytest.raises(StopError):
        boft_export.merge(there / "base", inputs.adapter, there / "out", jobs=1, progress=stop)
    assert not (there / "out").exists()
    assert not list(there.rglob("*.partial"))
    result = boft_export.merge(there / "base", inputs.adapter, there / "out", resume=True)
    assert result.resumed
    assert weights(there / "out") == inputs.merged
    assert private_bytes(there / "out") <= len(ADAPTED) * FEATURES * FEATURES * 2 + SLACK


def test_a_damaged_adapter_leaves_nothing(there: Path, tmp_path: Path) -> None:
    tensors = boft_tensors("layers.3.q_proj", FEATURES, FEATURES)
    tensors["base_model.model.layers.3.q_proj.boft_s"][7] = float("inf")
    adapter = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(boft_export.InputError, match="not finite"):
        boft_export.merge(there / "base", adapter, there / "out")
    assert [p.name for p in there.iterdir()] == ["base"]


def test_a_clone_ends_where_it_is_to(there: Path) -> None:
    source = there / "source"
    source.write_bytes(bytes(range(256)) * 100)
    with (there / "copy").open("wb") as file:
        assert clone(source, file.fileno(), 5000)
    assert (there / "copy").read_bytes() == source.read_bytes()[:5000]


def test_where_nothing_can_be_shared_the_file_stays_empty(tmp_path: Path) -> None:
    with (tmp_path / "copy").open("wb") as file:
        assert not clone(tmp_path / "missing", file.fileno(), 100)
    assert (tmp_path / "copy").read_bytes() == b""


# Where tensors lie, on every disk


def rewrite_header(file: Path, *, spaces: int = 0, indent: int | None = None) -> None:
    """Write a file's header anew, as another program might."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8:start]), indent=indent).encode() + b" " * spaces
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


@pytest.mark.parametrize("header", [{}, {"spaces": 4001}, {"indent": 4}])
def test_tensors_lie_where_the_base_has_them(base: Path, adapter: Path, tmp_path: Path, header: dict[str, int]) -> None:
    for file in base.glob("*.safetensors"):
        rewrite_header(file, **header)
    boft_export.merge(base, adapter, tmp_path / "out")
    for file in base.glob("*.safetensors"):
        old, new = file.read_bytes(), (tmp_path / "out" / file.name).read_bytes()
        assert new[:8] == old[:8]
        start = 8 + int.from_bytes(old[:8], "little")
        assert json.loads(new[8:start]) == json.loads(old[8:start])
        assert len(new) == len(old)


def test_in_another_dtype_tensors_are_aligned(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Nothing is gained by the base's place for tensors of another dtype."""
    for file in base.glob("*.safetensors"):
        rewrite_header(file, spaces=4001)
    boft_export.merge(base, adapter, tmp_path / "out", dtype="float16")
    for file in (tmp_path / "out").glob("*.safetensors"):
        length = int.from_bytes(file.read_bytes()[:8], "little")
        assert length < 4001
        assert length % 8 == 0
