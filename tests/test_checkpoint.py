"""Checkpoints: headers and byte ranges in, whole folders out, and where inputs come from."""

from __future__ import annotations

import errno
import http.server
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import properties, write_checkpoint
from torch import Tensor

from boft_export.checkpoint import (
    Checkpoint,
    LocalStaging,
    TensorRef,
    check_output,
    free_bytes,
    index_json,
    keep_shards,
    locate,
    open_checkpoint,
    read_weight_file,
    split_shards,
    wanted_weights,
)
from boft_export.checkpoint.dtypes import DTYPE_BITS
from boft_export.checkpoint.safetensors_file import header_bytes
from boft_export.checkpoint.tensors import FileBytes
from boft_export.errors import AccessError, BoftExportError, DamagedFileError, InputError, ResourceError, UsageError
from boft_export.planning.sizes import format_size, parse_size

TENSORS = {
    "w": torch.arange(6, dtype=torch.float32).view(2, 3),
    "half": torch.tensor([[1.5], [-2.0]], dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "none": torch.zeros(0, 4),
    "größe": torch.tensor([True, False]),
}


def read_bytes(ref: TensorRef, start: int = 0, size: int | None = None) -> bytes:
    buffer = bytearray(ref.nbytes - start if size is None else size)
    ref.read_into(memoryview(buffer), start)
    return bytes(buffer)


def contents(file: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {t.name: (t.shape, read_bytes(t)) for t in read_weight_file(file).tensors}


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def as_contents(tensors: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {name: (tuple(t.shape), raw(t)) for name, t in tensors.items()}


# The safetensors format


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """Write a file with any header: an object becomes JSON, bytes stay as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: object = 0, end: object = 4, shape: object = (1,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_headers_are_read_as_the_safetensors_library_reads_them(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = dict(TENSORS)
    for dtype in ("float64", "float16", "uint8", "int8", "int16", "uint16", "int32", "uint32", "uint64", "complex64"):
        tensors[dtype] = torch.ones(3, 5).to(getattr(torch, dtype))
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        tensors[dtype] = torch.ones(3, 5).to(getattr(torch, dtype))
    save_file(tensors, path, metadata={"format": "pt", "ключ": "wert"})
    file = read_weight_file(path)
    with safetensors.safe_open(path, "pt") as reference:
        assert file.metadata == reference.metadata()
        assert {t.name for t in file.tensors} == set(reference.keys())
        for tensor in file.tensors:
            piece = reference.get_slice(tensor.name)
            assert tensor.dtype == piece.get_dtype()
            assert list(tensor.shape) == piece.get_shape()
    assert contents(path) == as_contents(tensors)
    ends = [t.source.offset for t in file.tensors]
    assert ends == sorted(ends), "in the order of their bytes"


def test_any_part_of_a_tensor_can_be_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    ref = next(t for t in read_weight_file(path).tensors if t.name == "w")
    assert (ref.num_elements, ref.nbytes) == (6, 24)
    assert read_bytes(ref, 5, 11) == raw(TENSORS["w"])[5:16]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DamagedFileError, match=r"x\.safetensors ends at byte"):
        read_bytes(TensorRef("w", "F32", (99,), ref.source, "x"))
    path.unlink()
    with pytest.raises(AccessError, match=r"x\.safetensors"):
        read_bytes(ref)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        pytest.param({"a": entry(), "b": entry(4, 8)}, b"1234", id="data too short"),
        pytest.param({"a": entry()}, b"12345", id="trailing bytes"),
        pytest.param({}, b"1", id="bytes of no tensor"),
        pytest.param({"a": entry(), "b": entry(2, 6)}, b"123456", id="overlap"),
        pytest.param({"a": entry(), "b": entry()}, b"1234", id="the same bytes twice"),
        pytest.param({"a": entry(), "b": entry(6, 10)}, b"1234567890", id="gap"),
        pytest.param({"a": entry(4, 8)}, b"12345678", id="gap at the start"),
        pytest.param({"a": entry(4, 0)}, b"1234", id="backwards"),
        pytest.param({"a": entry(0, 8)}, b"12345678", id="more bytes than elements"),
        pytest.param({"a": entry(0, 4, [2])}, b"1234", id="fewer bytes than elements"),
        pytest.param({"a": entry(dtype="F99")}, b"1234", id="unknown dtype"),
        pytest.param({"a": entry(dtype=["F32"])}, b"1234", id="dtype is a list"),
        pytest.param({"a": entry(dtype=None)}, b"1234", id="dtype is null"),
        pytest.param({"a": entry(0, 2, [3], "F4")}, b"12", id="half a byte"),
        pytest.param({"a": entry(shape=[True])}, b"1234", id="bool shape"),
        pytest.param({"a": entry(shape=[-1])}, b"1234", id="negative shape"),
        pytest.param({"a": entry(shape=[-1, -1])}, b"1234", id="negative shape with a positive size"),
        pytest.param({"a": entry(shape=[1.0])}, b"1234", id="float shape"),
        pytest.param({"a": entry(shape="")}, b"1234", id="string shape"),
        pytest.param({"a": entry(shape={})}, b"1234", id="object shape"),
        pytest.param({"a": entry(shape=1)}, b"1234", id="number shape"),
        pytest.param({"a": entry(0, 0, [0, 10**30])}, b"", id="empty but for an impossible size"),
        pytest.param({"a": entry(shape=[2**62] * 2000)}, b"1234", id="size of thousands of digits"),
        pytest.param({"a": entry(shape=[10**4000] * 2)}, b"1234", id="shape of thousands of digits"),
        pytest.param({"a": entry(0, 10**4000)}, b"1234", id="offset of thousands of digits"),
        pytest.param({"a": entry(0, 4.0)}, b"1234", id="float offset"),
        pytest.param({"a": entry(False, 4)}, b"1234", id="bool offset"),
        pytest.param({"a": entry(-4, 0)}, b"1234", id="negative offset"),
        pytest.param({"a": {**entry(), "data_offsets": [0, 4, 8]}}, b"1234", id="three offsets"),
        pytest.param({"a": {**entry(), "data_offsets": "04"}}, b"1234", id="string offsets"),
        pytest.param({"a": {"dtype": "F32", "shape": [1]}}, b"1234", id="no offsets"),
        pytest.param({"a": [1]}, b"1234", id="entry is a list"),
        pytest.param({"a": None}, b"1234", id="entry is null"),
        pytest.param({"a": entry(), "__metadata__": {"k": 1}}, b"1234", id="metadata of numbers"),
        pytest.param({"a": entry(), "__metadata__": []}, b"1234", id="metadata is a list"),
        pytest.param([], b"", id="header is a list"),
        pytest.param(b"1", b"", id="header is a number"),
        pytest.param(b"null", b"", id="header is null"),
        pytest.param(b"{", b"", id="not JSON"),
        pytest.param(b"", b"", id="no header"),
        pytest.param(b'{"\xff":1}', b"", id="not UTF-8"),
        pytest.param('{"a":1}'.encode("utf-16"), b"", id="UTF-16"),
        pytest.param("\ufeff{}".encode(), b"", id="byte order mark"),
        pytest.param(json.dumps({"\ud800": entry()}).encode(), b"1234", id="half a character in a name"),
        pytest.param(json.dumps({"__metadata__": {"k": "\ud800"}}).encode(), b"", id="half a character in a value"),
        pytest.param(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b"1234", id="a name twice"),
        pytest.param(b"[" * 100_000, b"", id="deep nesting"),
        pytest.param(b'{"a":' * 100_000, b"", id="deep objects"),
    ],
)  # fmt: skip
def test_a_damaged_header_is_refused(tmp_path, header, data):
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(DamagedFileError, match=r"/bad\.safetensors") as caught:
        read_weight_file(path)
    caught.value.message.encode()  # it can be printed


@pytest.mark.parametrize("length", [0, 1, 3, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
def test_a_wrong_header_length_is_refused(tmp_path, length):
    path = write_raw(tmp_path / "bad.safetensors", {"a": entry()}, b"1234", length)
    with pytest.raises(DamagedFileError, match=r"/bad\.safetensors"):
        read_weight_file(path)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    save_file(TENSORS, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedFileError, match=r"/cut\.safetensors"):
            read_weight_file(path)


@pytest.mark.parametrize("name", ["missing.safetensors", "folder.safetensors", "missing.bin", "folder.bin"])
def test_a_file_that_cannot_be_read_is_said(tmp_path, name):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(AccessError, match=name):
        read_weight_file(tmp_path / name)


# Where in the file, and the byte to put there.
MUTATIONS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.sampled_from([*b'"{}[],:0123456789FBab\\ ']), st.integers(0, 255)),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, mutations: list[tuple[float, int]], reach: int) -> bytes:
    mutated = bytearray(data)
    for place, byte in mutations:
        mutated[int(place * reach)] = byte
    return bytes(mutated)


@properties
@given(MUTATIONS, st.booleans())
def test_a_mutated_file_is_refused_or_read_as_the_library_reads_it(mutations, in_header):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file(TENSORS, path, metadata={"format": "pt"})
        data = path.read_bytes()
        reach = 8 + int.from_bytes(data[:8], "little") if in_header else len(data)
        path.write_bytes(mutate(data, mutations, reach))
        try:
            ours = contents(path)
        except DamagedFileError as error:
            assert str(path) in error.message  # noqa: PT017  # either outcome is right
            return
        assert ours == as_contents(load_file(path))


LAYOUTS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__"),
    st.tuples(st.sampled_from(["F32", "BF16", "I8", "F64"]), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
    max_size=12,
)


def laid(layout: dict[str, tuple[str, tuple[int, ...]]]) -> list[TensorRef]:
    return [TensorRef(n, d, s, FileBytes(Path("unread"), 0), "unread") for n, (d, s) in layout.items()]


@properties
@given(LAYOUTS, st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.just("value")))
def test_our_headers_are_read_by_the_safetensors_library(layout, metadata):
    header = header_bytes([(name, dtype, shape) for name, (dtype, shape) in layout.items()], metadata)
    assert len(header) % 8 == 0, "tensors begin at aligned addresses"
    data = bytes(i % 251 for i in range(sum(t.nbytes for t in laid(layout))))
    found = dict(safetensors.deserialize(header + data))
    assert {n: (v["dtype"], tuple(v["shape"])) for n, v in found.items()} == layout
    assert b"".join(bytes(found[n]["data"]) for n in layout) == data
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(header + data)
        file = read_weight_file(path)
    assert file.metadata == metadata
    assert {t.name: (t.dtype, t.shape) for t in file.tensors} == layout


# Layout


@properties
@given(LAYOUTS, st.integers(1, 400))
def test_splitting_puts_each_tensor_in_one_shard_of_the_size(layout, max_bytes):
    tensors = laid(layout)
    shards = split_shards(tensors, max_bytes, "model", {"format": "pt"})
    assert [t for s in shards for t in s.tensors] == tensors
    for number, shard in enumerate(shards, 1):
        size = sum(t.nbytes for t in shard.tensors)
        assert size <= max_bytes or sum(t.nbytes > 0 for t in shard.tensors) == 1
        assert shard.nbytes == size + len(shard.header)
        whole = len(shards) == 1
        assert shard.name == ("model.safetensors" if whole else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
    assert all(s.tensors for s in shards) or not tensors
    index = json.loads(index_json(shards, {"total_size": -1, "other": "kept"}))
    assert index["weight_map"] == {t.name: s.name for s in shards for t in s.tensors}
    assert list(index["weight_map"]) == sorted(layout)
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors), "other": "kept"}


@pytest.mark.parametrize(
    ("given_name", "kept"),
    [
        ("model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors"),
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model-00002-of-00003.bin", "model-00002-of-00003.safetensors"),
        ("0_Transformer/pytorch_model.bin", "0_Transformer/model.safetensors"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("weights.pt", "weights.safetensors"),
    ],
)
def test_keeping_shards_keeps_their_names_tensors_and_metadata(tmp_path, given_name, kept):
    tensors = laid({"b": ("U8", (3,)), "a": ("U8", (2,))})
    (shard,) = keep_shards([(given_name, tensors, {"format": "pt"}, 0)])
    assert shard.name == kept
    path = tmp_path / "x.safetensors"
    path.write_bytes(shard.header + b"12345")
    assert path.stat().st_size == shard.nbytes
    assert contents(path) == {"b": ((3,), b"123"), "a": ((2,), b"45")}
    assert read_weight_file(path).metadata == {"format": "pt"}


# PyTorch's own files


def shared() -> dict[str, Tensor]:
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    return {"whole": whole, "tied": whole, "view": whole[2:], "row": whole[1], "flat": whole.view(-1)[7:9]}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "tensors",
    [
        TENSORS,
        shared(),
        {"p": torch.nn.Parameter(torch.ones(3))},
        torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5)).state_dict(),
        {},
    ],
    ids=["plain", "shared", "parameter", "state_dict", "empty"],
)
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_a_pickle_is_read_as_torch_reads_it(tmp_path, tensors, suffix, zipped):
    path = tmp_path / f"x{suffix}"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    assert contents(path) == as_contents(torch.load(path, weights_only=True)) == as_contents(tensors)
    for ref in read_weight_file(path).tensors:
        assert ref.dtype in DTYPE_BITS
        assert isinstance(ref.source, FileBytes) is zipped, "a zip is read by ranges"
        assert read_bytes(ref, 1, ref.nbytes - 1) == raw(tensors[ref.name])[1:] if ref.nbytes else True


def repack(path: Path, edit: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Write the zip again with its records changed."""
    with zipfile.ZipFile(path) as archive:
        records = {name: edit(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return path


def test_a_compressed_pickle_is_read_too(tmp_path):
    path = tmp_path / "x.bin"
    torch.save(shared(), path)
    repack(path, lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert contents(path) == as_contents(shared())


def test_a_pickle_of_the_other_byte_order_is_read_as_torch_reads_it(tmp_path):
    path = tmp_path / "x.bin"
    torch.save(shared(), path)
    other = b"big" if sys.byteorder == "little" else b"little"
    repack(path, lambda name, data: other if name.endswith("/byteorder") else data)
    assert contents(path)["whole"][1] == shared()["whole"].numpy().byteswap().tobytes()


@pytest.mark.parametrize("cut", [4, 24], ids=["shorter", "empty"])
def test_a_record_shorter_than_its_tensor_is_refused(tmp_path, cut):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.arange(6.0), "b": torch.ones(99)}, path)
    repack(path, lambda name, data: data[:-cut] if name.endswith("/data/0") else data)
    with pytest.raises(DamagedFileError, match=r"/x\.bin: .* a "):
        read_weight_file(path)


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_the_program_in_a_pickle_is_not_run(tmp_path, form):
    mark, path = tmp_path / "mark", tmp_path / "x.bin"
    payload = Payload(f"touch {mark}")
    if form == "bare":
        path.write_bytes(pickle.dumps({"a": payload}, protocol=2))
    else:
        torch.save({"w": torch.ones(2), "a": payload}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(DamagedFileError, match=r"/x\.bin .*system") as caught:
        read_weight_file(path)
    assert "weights_only` set to `False`" not in caught.value.message, "no advice to load it all the same"
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.ones(3, 4).T},
        {"a": torch.ones(4)[::2]},
        {"a": torch.ones(1, 3).expand(2, 3)},
        {"a": torch.eye(3).to_sparse()},
        {"a": torch.ones(2, device="meta")},
        {"a": torch.ones(2, dtype=torch.complex64).conj()},
        {"a": {"b": torch.ones(2)}},
        {"a": torch.ones(2), "epoch": 3},
        {3: torch.ones(2)},
        [torch.ones(2)],
        torch.ones(2),
    ],
    ids=["transposed", "strided", "expanded", "sparse", "meta", "conjugate", "nested", "number", "key", "list", "bare"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_other_contents_of_a_pickle_are_refused(tmp_path, content, zipped):
    path = tmp_path / "x.bin"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"/x\.bin"):
        read_weight_file(path)


@properties
@given(MUTATIONS, st.sampled_from([0.0, 0.5, 0.9, 1.0, 1.0, 1.0]), st.booleans())
def test_a_mutated_pickle_is_refused_or_read(mutations, part, zipped):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.bin"
        torch.save({"a": torch.arange(6.0), "b": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped)
        data = mutate(path.read_bytes(), mutations, path.stat().st_size)
        path.write_bytes(data[: int(part * len(data))])
        try:
            file = read_weight_file(path)
            sizes = [len(read_bytes(t)) for t in file.tensors]
        except InputError as error:
            assert str(path) in error.message  # noqa: PT017  # either outcome is right
        else:
            assert sizes == [t.nbytes for t in file.tensors]


# Folders


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def one(name: str = "w") -> dict[str, Tensor]:
    return {name: torch.full((2,), float(len(name)))}


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)


def write_index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}))


def names(checkpoint: Checkpoint) -> tuple[set[str], set[str], set[str]]:
    return (
        {f.name for f in checkpoint.files},
        {str(f) for f in checkpoint.side_files},
        {str(f) for f in checkpoint.stale_files},
    )


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_opened_by_its_headers(tmp_path, shards):
    tensors = {f"layer.{i}": torch.full((i + 1, 2), float(i)) for i in range(7)}
    folder = write_checkpoint(tmp_path / "base", tensors, {"model_type": "x"}, shards)
    checkpoint = open_checkpoint(folder, repo_id="org/name", revision="abc")
    assert {n: (t.shape, read_bytes(t)) for n, t in checkpoint.tensors.items()} == as_contents(tensors)
    assert checkpoint.config == {"model_type": "x"}
    assert checkpoint.nbytes == sum(t.nbytes for t in tensors.values())
    assert (checkpoint.name, checkpoint.revision) == ("org/name", "abc")
    assert [f.name for f in checkpoint.files] == sorted(p.name for p in folder.glob("*.safetensors"))
    assert bool(checkpoint.index_metadata) is (shards > 1)
    assert checkpoint.side_files == checkpoint.stale_files == ()


def test_one_file_is_a_checkpoint_of_its_own(tmp_path):
    save(tmp_path / "some.safetensors", one())
    touch(tmp_path, "config.json", "README.md")
    checkpoint = open_checkpoint(tmp_path / "some.safetensors")
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.name == tmp_path.name
    assert checkpoint.config == {}
    assert checkpoint.side_files == ()


# Every form that loaders look for, in their order.
PREFERENCE = [
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
]


@pytest.mark.parametrize("first", range(len(PREFERENCE)), ids=PREFERENCE)
def test_loaders_order_of_preference_holds_and_other_forms_are_stale(tmp_path, first):
    present = PREFERENCE[first:]
    for name in present:
        if name.endswith(".index.json"):
            shard = name.replace(".safetensors.index.json", "-1.safetensors").replace(".bin.index.json", "-1.bin")
            save(tmp_path / shard, one(name))
            write_index(tmp_path, {name: shard}, name)
        else:
            save(tmp_path / name, one(name))
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == [present[0]]
    assert checkpoint.side_files == ()
    assert {PurePosixPath(n) for n in present[1:]} <= set(checkpoint.stale_files)


def test_side_files_are_all_that_is_no_other_form_of_the_weights(tmp_path):
    save(tmp_path / "model.safetensors", one())
    stale = {
        "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5",
        "flax_model.msgpack", "rust_model.ot", "model.fp16.safetensors", "model-q4.gguf", "model.onnx",
        "onnx/model.onnx", "onnx/config.json", "openvino/openvino_model.xml", "original/consolidated.00.pth",
        "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin",
    }  # fmt: skip
    side = {
        "tokenizer.json", "vocab.txt", "spiece.bin", "training_args.bin", "generation_config.json", "assets/logo.png",
        "chat_template.jinja", "modeling_custom.py", "LICENSE", "2_Dense/model.safetensors", "2_Dense/config.json",
    }  # fmt: skip
    touch(tmp_path, "config.json", ".git/config", ".cache/huggingface/x", "__pycache__/x.pyc", *stale, *side)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert names(checkpoint) == ({"model.safetensors"}, side, stale)
    assert {n.subject for n in checkpoint.notices()} == stale


def test_a_sentence_transformers_tree_may_keep_its_weights_in_its_first_module(tmp_path):
    modules = [{"idx": 0, "path": "0_Transformer"}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    save(tmp_path / "0_Transformer/model.safetensors", one("encoder"))
    save(tmp_path / "2_Dense/model.safetensors", one("dense"))
    side = {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "0_Transformer/tokenizer.json"}
    touch(tmp_path, *(side - {"modules.json"}), "0_Transformer/pytorch_model.bin")
    (tmp_path / "0_Transformer/config.json").write_text('{"model_type": "bert"}')
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["encoder"]
    assert checkpoint.folder == PurePosixPath("0_Transformer")
    assert checkpoint.config == {"model_type": "bert"}
    assert names(checkpoint) == (
        {"0_Transformer/model.safetensors"},
        side | {"2_Dense/model.safetensors"},
        {"0_Transformer/pytorch_model.bin"},
    )
    save(tmp_path / "model.safetensors", one("root"))
    assert list(open_checkpoint(tmp_path).tensors) == ["root"]


@pytest.mark.parametrize(
    "text", ["[]", "{}", "null", "[1]", "{", "[" * 100_000, '[{"path": "../x"}]', '[{"path": "/etc"}]', '"\ud800"']
)
def test_a_damaged_list_of_modules_is_refused(tmp_path, text):
    (tmp_path / "modules.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DamagedFileError, match=r"modules\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "outside", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..", ".", "", "..\\x.safetensors"]
)
def test_an_index_may_not_lead_out_of_its_folder(tmp_path, outside):
    save(tmp_path / "x.safetensors", one())
    save(tmp_path / "base/sub/x.safetensors", one())
    target = str(tmp_path / "x.safetensors") if outside.startswith("/") else outside
    write_index(tmp_path / "base", {"w": target})
    with pytest.raises(DamagedFileError, match=r"index\.json names a file outside of its folder"):
        open_checkpoint(tmp_path / "base")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "1.safetensors", "b": "3.safetensors"}, "3.safetensors, which is missing"),
        ({"a": "x" * 300}, "which is missing"),
        ({"a": "x\0y"}, "which is missing"),
        ({"a": "1.safetensors", "c": "1.safetensors"}, "lists 1 tensors that no file holds, the first: c"),
        ({"a": "1.safetensors", "b": "2.safetensors"}, "a is in 1.safetensors and in 2.safetensors"),
        ({"a": 1}, "weight_map"),
        (["a"], "weight_map"),
        (None, "weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path, weight_map, message):
    save(tmp_path / "1.safetensors", one("a"))
    save(tmp_path / "2.safetensors", {**one("b"), **one("a")})
    write_index(tmp_path, weight_map)
    with pytest.raises(DamagedFileError) as caught:
        open_checkpoint(tmp_path)
    assert message in caught.value.message


@pytest.mark.parametrize("text", ["[]", "{", "1", "\ud800", "[" * 100_000])
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_damaged_json_is_refused_by_name(tmp_path, text, name):
    if name == "config.json":
        save(tmp_path / "model.safetensors", one())
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DamagedFileError, match=name):
        _ = open_checkpoint(tmp_path).config


def test_a_folder_without_weights_says_what_it_is(tmp_path):
    def error(folder: Path) -> BoftExportError:
        with pytest.raises(BoftExportError) as caught:
            open_checkpoint(folder)
        return caught.value

    missing = error(tmp_path / "missing")
    assert isinstance(missing, AccessError)
    assert "missing does not exist" in missing.message

    pipeline = tmp_path / "pipeline"
    for part, name in (("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        save(pipeline / part / name, one())
    touch(pipeline, "model_index.json")
    found = error(pipeline)
    assert isinstance(found, InputError)
    assert str(pipeline) in found.message
    assert found.hint == "Choose one part with --subfolder: text_encoder, unet."

    adapter = tmp_path / "adapter"
    save(adapter / "adapter_model.safetensors", one())
    touch(adapter, "adapter_config.json")
    assert "is an adapter" in error(adapter).message

    several = tmp_path / "several"
    save(several / "a.safetensors", one())
    assert list(open_checkpoint(several).tensors) == ["w"], "one file of any name will do"
    save(several / "b.safetensors", one())
    assert "a.safetensors, b.safetensors" in error(several).message
    touch(tmp_path, "x.gguf")
    assert "x.gguf is not a weight file" in error(tmp_path / "x.gguf").message


# Staging


def finish(staging: LocalStaging, name: str, content: bytes = b"abc") -> None:
    with staging.write(name) as file:
        file.write(content)
    staging.record(name, {"sha256": content.decode()})


def read_tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_output_appears_whole(tmp_path):
    output = tmp_path / "deep/out"
    staging = LocalStaging(output, "f")
    finish(staging, "model.safetensors")
    with staging.write("sub/side.txt") as file:
        file.write(b"side")
        assert not (staging.files / "sub/side.txt").exists(), "no name before it is complete"
    assert not output.exists()
    staging.publish()
    assert read_tree(output) == {"model.safetensors": b"abc", "sub/side.txt": b"side"}
    assert list(output.parent.iterdir()) == [output], "nothing else is left"


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyError(), KeyError),
        (OSError(errno.EIO, "Input/output error"), AccessError),
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError),
    ],
)
def test_a_failed_write_leaves_no_file(tmp_path, error, raised):
    def fail(staging: LocalStaging) -> None:
        with staging.write("x") as file:
            file.write(b"half")
            raise error

    staging = LocalStaging(tmp_path / "out", "f")
    with pytest.raises(raised):
        fail(staging)
    assert list(staging.files.iterdir()) == []
    staging.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("empty", [True, False])
def test_overwriting_keeps_the_old_output_until_the_new_one_is_whole(tmp_path, empty):
    output = tmp_path / "out"
    output.mkdir()
    if not empty:
        (output / "old").write_text("old")
        with pytest.raises(UsageError, match="out exists"):
            LocalStaging(output, "f")
    staging = LocalStaging(output, "f", overwrite=True)
    finish(staging, "new")
    assert read_tree(output) == ({} if empty else {"old": b"old"})
    staging.publish()
    assert read_tree(output) == {"new": b"abc"}
    assert list(tmp_path.iterdir()) == [output]


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    for overwrite in (True, False):
        with pytest.raises(UsageError, match="is not a folder"):
            check_output(tmp_path / "out", overwrite=overwrite)
        with pytest.raises(UsageError, match="is not a folder"):
            LocalStaging(tmp_path / "out", "f", overwrite=overwrite)
    assert read_tree(tmp_path) == {"out": b"mine"}
    check_output(tmp_path / "other", overwrite=False)


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The output of a run that finished the files a and b, and was killed while it wrote c."""
    staging = LocalStaging(tmp_path / "out", "f")
    finish(staging, "a")
    finish(staging, "sub/b", b"12345")
    (staging.files / "c.partial").write_bytes(b"half")
    staging.keep()
    return tmp_path / "out"


def journal(output: Path) -> Path:
    return output.with_name(f".{output.name}.boft-export") / "journal.jsonl"


def resume(output: Path) -> dict[str, object]:
    staging = LocalStaging(output, "f", resume=True)
    staging.keep()
    return {n: r["sha256"] for n, r in staging.done.items()}


def test_resuming_takes_over_what_is_finished(killed):
    staging = LocalStaging(killed, "f", resume=True)
    assert {n: r["sha256"] for n, r in staging.done.items()} == {"a": "abc", "sub/b": "12345"}
    assert not staging.discarded
    finish(staging, "c")
    staging.publish()
    assert read_tree(killed) == {"a": b"abc", "sub/b": b"12345", "c": b"abc"}


@pytest.mark.parametrize("content", [None, b"", b"ab", b"abcd"], ids=["missing", "empty", "shorter", "longer"])
def test_a_file_that_is_not_what_the_journal_says_is_written_again(killed, content):
    file = journal(killed).parent / "files" / "a"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert resume(killed) == {"sub/b": "12345"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: [*lines[:2], lines[2][:-9]],
        lambda lines: [*lines[:2], lines[2][: len(lines[2]) // 2]],
        lambda lines: [*lines[:2], b"\0" * 50],
        lambda lines: [*lines[:2], b"\xff\n"],
        lambda lines: [*lines[:2], b"{}\n"],
        lambda lines: [*lines[:2], b"[]\n"],
    ],
    ids=["cut", "cut in half", "zeros", "not UTF-8", "no record", "no object"],
)
def test_a_line_cut_short_counts_as_not_written(killed, spoil):
    path = journal(killed)
    path.write_bytes(b"".join(spoil(path.read_bytes().splitlines(keepends=True))))
    taken = resume(killed)
    assert set(taken) <= {"a"}, "the file of that line is written again"
    staging = LocalStaging(killed, "f", resume=True)
    finish(staging, "c")
    staging.keep()
    assert resume(killed) == {**taken, "c": "abc"}, "and what is written after it counts"


@pytest.mark.parametrize("text", [b"", b"{", b"[]\n", b"1\n", b'{"a": 1}\n', b"\xff"])
def test_a_journal_without_a_beginning_is_no_journal(killed, text):
    journal(killed).write_bytes(text)
    assert resume(killed) == {}
    assert not (journal(killed).parent / "files" / "a").exists()


def test_only_the_same_inputs_and_settings_go_on(killed):
    with pytest.raises(UsageError, match="other inputs or settings"):
        LocalStaging(killed, "g", resume=True)
    assert resume(killed) == {"a": "abc", "sub/b": "12345"}, "the refusal loses nothing"
    staging = LocalStaging(killed, "f")
    assert staging.discarded, "without --resume the run starts over, and says so"
    assert not staging.done
    assert list(staging.files.iterdir()) == []
    staging.discard()


def test_two_runs_cannot_write_one_output(tmp_path):
    output = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path; from boft_export.checkpoint import LocalStaging\n"
        "staging = LocalStaging(Path(sys.argv[1]), 'f'); print('held', flush=True); sys.stdin.read(); staging.keep()"
    )
    with subprocess.Popen([sys.executable, "-c", code, output], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        for resume_it in (True, False):
            with pytest.raises(UsageError, match="another run is writing"):
                LocalStaging(output, "f", resume=resume_it)
        other.communicate()
    assert other.returncode == 0
    assert resume(output) == {}, "the lock ends with its process"


def test_free_space_is_that_of_the_folder_to_be(tmp_path):
    assert free_bytes(tmp_path / "not/yet/there") == pytest.approx(free_bytes(tmp_path), rel=0.1)


# The Hub


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with one repository: a model at its root, another in a folder."""
    repo = tmp_path / "hub/models--org--name"
    for ref, commit in (("main", COMMIT), ("v2", COMMIT[::-1])):
        touch(repo, f"refs/{ref}")
        (repo / "refs" / ref).write_text(commit)
        for folder in ("", "text_encoder/"):
            save(repo / "snapshots" / commit / folder / "model.safetensors", one(folder or ref))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return repo / "snapshots"


@pytest.mark.parametrize(
    ("ref", "options", "commit", "folder"),
    [
        ("org/name", {}, COMMIT, ""),
        ("org/name@v2", {}, COMMIT[::-1], ""),
        ("org/name", {"revision": "v2"}, COMMIT[::-1], ""),
        ("org/name@v2", {"revision": "v2"}, COMMIT[::-1], ""),
        (f"org/name@{COMMIT}", {}, COMMIT, ""),
        ("org/name/text_encoder", {}, COMMIT, "text_encoder"),
        ("org/name", {"subfolder": "text_encoder"}, COMMIT, "text_encoder"),
        ("org/name/text_encoder@v2", {}, COMMIT[::-1], "text_encoder"),
    ],
)
def test_a_repository_is_taken_from_the_cache(cache, ref, options, commit, folder):
    found = locate(ref, offline=True, wanted=wanted_weights, **options)
    assert found.path == cache / commit / folder
    assert (found.repo_id, found.revision) == ("org/name", commit)
    open_checkpoint(found.path)


@pytest.mark.usefixtures("cache")
def test_a_local_path_wins(tmp_path):
    local = tmp_path / "org/name"
    local.mkdir(parents=True)
    for ref in ("org/name", str(local), "./org/name"):
        found = locate(ref, offline=True)
        assert (found.path.resolve(), found.repo_id, found.revision) == (local, None, None)
    assert locate("org", subfolder="name").path == Path("org/name")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("ref", "options", "error", "message"),
    [
        ("org/other", {}, AccessError, "org/other is neither a local path nor in the cache"),
        ("org/name@v3", {}, AccessError, "org/name"),
        ("./org/missing", {}, AccessError, "does not exist"),
        ("missing", {}, AccessError, "missing does not exist and is not a Hub id"),
        ("~nosuchuser/name", {}, AccessError, "~nosuchuser/name"),
        ("a" * 5000, {}, AccessError, "aaa"),
        ("a\0b", {}, AccessError, "does not exist"),
        ("org/na--me", {}, AccessError, "org/na--me"),
        ("org/name@v1", {"revision": "v2"}, UsageError, "one revision and the option another"),
        ("org/name", {"subfolder": "../x"}, UsageError, "leads outside"),
        ("org/name", {"subfolder": "/x"}, UsageError, "leads outside"),
        ("org/name/../x", {}, UsageError, "leads outside"),
    ],
)
def test_what_is_nowhere_is_said(ref, options, error, message):
    with pytest.raises(error, match=message):
        locate(ref, offline=True, **options)


FULL = ["config.json", "tokenizer.json", "README.md"]


@pytest.mark.parametrize(
    ("present", "kept"),
    [
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx"], ["model.safetensors"]),
        (["pytorch_model.bin", "flax_model.msgpack"], ["pytorch_model.bin"]),
        (
            ["model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json", "original/x.pth"],
            ["model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json"],
        ),
        (
            ["pytorch_model-1-of-1.bin", "pytorch_model.bin.index.json", "model.gguf"],
            ["pytorch_model-1-of-1.bin", "pytorch_model.bin.index.json"],
        ),
        (
            ["unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"],
            ["unet/diffusion_pytorch_model.safetensors"],
        ),
        (
            ["model.safetensors", "2_Dense/pytorch_model.bin", "spiece.bin"],
            ["model.safetensors", "2_Dense/pytorch_model.bin", "spiece.bin"],
        ),
        (["0_Transformer/model.safetensors", "0_Transformer/pytorch_model.bin"], ["0_Transformer/model.safetensors"]),
    ],
)  # fmt: skip
def test_only_one_form_of_the_weights_is_downloaded(present, kept):
    assert set(wanted_weights([*FULL, *present])) == {*FULL, *kept}


# What a Hub answers of one public repository.
REPOSITORY = {
    "config.json": b"{}",
    "pytorch_model.bin": b"stale",
    "sub/model.safetensors": b"",
    "model.safetensors": b"",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's HTTP interface that a download uses."""

    files: dict[str, bytes]
    asked: list[str]

    def log_message(self, *_: object) -> None:
        """Keep standard error quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/")
        if path.startswith(f"org/name/resolve/{COMMIT}/"):
            name = path.removeprefix(f"org/name/resolve/{COMMIT}/")
            self.asked.append(name)
            self.answer(self.files[name], {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": COMMIT})
        elif path == "api/models/org/name" or path.startswith("api/models/org/name/revision/"):
            siblings = [{"rfilename": n} for n in self.files]
            self.answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith("api/models/org/name/tree/"):
            tree = [{"type": "file", "path": n, "size": len(d), "oid": n} for n, d in self.files.items()]
            self.answer(json.dumps(tree).encode())
        else:
            self.answer(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)

    def answer(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


LOCATE = """
import json, sys
from boft_export.checkpoint import locate, open_checkpoint, wanted_weights
from boft_export.errors import BoftExportError
for ref, options in json.loads(sys.argv[1]):
    try:
        found = locate(ref, wanted=wanted_weights, **options)
        tensors = list(open_checkpoint(found.path).tensors)
        print(json.dumps([str(found.path), found.revision, tensors]))
    except BoftExportError as error:
        print(json.dumps([type(error).__name__, error.message, error.hint]))
"""


def locate_elsewhere(endpoint: str, cache: Path, *asked: tuple[str, dict[str, object]]) -> list[list[object]]:
    """Locate in a fresh process: the Hub's library reads its environment when it is imported."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache), "NO_PROXY": "*"}
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | settings
    done = subprocess.run(
        [sys.executable, "-c", LOCATE, json.dumps(asked)],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A Hub on this machine with one repository; its address, and the files that were asked of it."""
    save(tmp_path / "w.safetensors", one())
    data = (tmp_path / "w.safetensors").read_bytes()
    handler = type("Handler", (Hub,), {"files": {n: d or data for n, d in REPOSITORY.items()}, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.asked
        server.shutdown()
        thread.join()


def test_what_is_wanted_is_downloaded_and_then_found_offline(hub, tmp_path):
    endpoint, asked = hub
    base = ("org/name", {})
    first, part, offline, unknown = locate_elsewhere(
        endpoint,
        tmp_path / "cache",
        base,
        ("org/name/sub@main", {}),
        ("org/name", {"offline": True}),
        ("org/unknown", {}),
    )
    snapshot = tmp_path / "cache/models--org--name/snapshots" / COMMIT
    assert first == offline == [str(snapshot), COMMIT, ["w"]]
    assert part == [str(snapshot / "sub"), COMMIT, ["w"]]
    assert set(asked) == set(REPOSITORY) - {"pytorch_model.bin"}
    assert not (snapshot / "pytorch_model.bin").exists()
    assert unknown[0] == "AccessError"
    assert "org/unknown" in unknown[1]
    # What was left out of the download is not missed.
    assert locate_elsewhere("http://127.0.0.1:9", tmp_path / "cache", ("org/name", {"offline": True})) == [first]


def test_a_hub_out_of_reach_is_said(tmp_path):
    ((kind, message, hint),) = locate_elsewhere("http://127.0.0.1:9", tmp_path, ("org/name", {}))
    assert kind == "AccessError"
    assert message.startswith("org/name is not a local path, and the Hub cannot be reached")
    assert "--offline" in hint


# Outputs and inputs with links


def staged(output: Path, **options: bool) -> LocalStaging:
    staging = LocalStaging(output, "f", **options)
    with staging.write("new") as file:
        file.write(b"new")
    return staging


def test_a_failed_exchange_loses_nothing(tmp_path, monkeypatch):
    """Without a swap in one step, the old output comes back where the new one can't take its place."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    monkeypatch.setattr("boft_export.checkpoint.staging.sys.platform", "other")
    staging = staged(tmp_path / "out", overwrite=True)
    staging.record("new", {})
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self == staging.files:
            raise OSError(errno.EIO, "broken")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(AccessError):
            staging.publish()
    staging.keep()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]
    again = LocalStaging(tmp_path / "out", "f", resume=True, overwrite=True)
    assert list(again.done) == ["new"]
    again.publish()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_that_can_not_be_flushed_is_there_all_the_same(tmp_path, monkeypatch):
    staging = staged(tmp_path / "out")
    sync = os.fsync

    def fail(fd: int) -> None:
        if os.path.sameopenfile(fd, parent):
            raise OSError(errno.EIO, "broken")
        sync(fd)

    parent = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(os, "fsync", fail)
    staging.publish()
    os.close(parent)
    assert (tmp_path / "out" / "new").read_bytes() == b"new"


@pytest.mark.parametrize("output", [".", "..", "../work", "link"])
def test_the_current_folder_is_no_output(tmp_path, monkeypatch, output):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(UsageError, match="current folder"):
        check_output(Path(output), overwrite=True)


def test_a_mount_point_is_no_output(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
    with pytest.raises(UsageError, match="mount point"):
        LocalStaging(tmp_path / "disk", "f")
    assert not any(tmp_path.iterdir())


def test_a_linked_output_is_written_where_the_link_points(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    (tmp_path / "link").symlink_to("real")
    staged(tmp_path / "link", overwrite=True).publish()
    assert [p.name for p in (tmp_path / "real").iterdir()] == ["new"]
    assert (tmp_path / "link").is_symlink()


def test_side_files_of_all_kinds(tmp_path):
    """Linked folders belong to the checkpoint, once; pipes, and the states of a training, do not."""
    root, other = tmp_path / "base", tmp_path / "other"
    save(root / "model.safetensors", one())
    other.mkdir()
    (other / "a.txt").touch()
    (other / "back").symlink_to(root)
    (root / "linked").symlink_to(other)
    (root / "up").symlink_to(tmp_path)
    (root / "checkpoint-500").mkdir()
    (root / "checkpoint-500" / "rng.txt").touch()
    os.mkfifo(root / "pipe")
    (root / "pytorch_model.bin").symlink_to("pruned")
    checkpoint = open_checkpoint(root)
    assert checkpoint.side_files == (PurePosixPath("linked/a.txt"),)
    assert checkpoint.stale_files == (PurePosixPath("pytorch_model.bin"),)
    (root / "vocab.txt").symlink_to("missing")
    with pytest.raises(AccessError, match=r"vocab\.txt is a link"):
        open_checkpoint(root)


# Sizes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5GB", 5 * 10**9), ("5 gb", 5 * 10**9), ("700MiB", 700 * 2**20), ("1.5K", 1500), ("2Ti", 2 * 2**40),
        (123, 123), ("123", 123), ("1B", 1), (" 4kb ", 4000), ("0.5GiB", 2**29),
    ],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "0", "0GB", "-1", "1e3", "5XB", "5iB", "1,5GB", "inf", "5 G B", -3])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1500, "1.5 kB"), (13_480_000_000, "13.5 GB"), (2 * 10**12, "2 TB")],
)
def test_sizes_are_written_as_people_read_them(count, text):
    assert format_size(count) == text
