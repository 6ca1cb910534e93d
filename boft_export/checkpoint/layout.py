"""How the output's tensors are laid out in files: planned from headers before a byte is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Generic, Protocol, TypeVar

from boft_export.checkpoint.safetensors_file import header_bytes
from boft_export.checkpoint.tensors import tensor_bytes


class Laid(Protocol):
    """What the layout needs to know of a tensor."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def dtype(self) -> str:
        """Its dtype, by the format's name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


T = TypeVar("T", bound=Laid)


@dataclass(frozen=True)
class Shard(Generic[T]):
    """One file of the output: its tensors in the order of their bytes, and its header."""

    name: str
    tensors: tuple[T, ...]
    header: bytes

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return len(self.header) + sum(tensor_bytes(t.dtype, t.shape) for t in self.tensors)


def safetensors_name(file: str) -> str:
    """Return the name a weight file has as safetensors: ``pytorch_model.bin`` becomes ``model.safetensors``."""
    path = PurePosixPath(file)
    if path.suffix == ".safetensors":
        return file
    stem = path.stem.replace("pytorch_model", "model") if path.stem.startswith("pytorch_model") else path.stem
    return str(path.with_name(f"{stem}.safetensors"))


def keep_shards(files: Sequence[tuple[str, Sequence[T], Mapping[str, str], int]]) -> list[Shard[T]]:
    """Lay tensors out in the files given: (name, tensors, metadata, size of the header where it fits in that) each."""
    return [
        Shard(safetensors_name(name), tuple(tensors), _header(tensors, metadata, size))
        for name, tensors, metadata, size in files
    ]


def split_shards(tensors: Iterable[T], max_bytes: int, stem: str, metadata: Mapping[str, str]) -> list[Shard[T]]:
    """Lay ``tensors`` out in order in files of at most ``max_bytes`` of data; a larger tensor has its own file."""
    groups: list[list[T]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = tensor_bytes(tensor.dtype, tensor.shape)
        if groups[-1] and size + nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += nbytes
    total = len(groups)
    return [
        Shard(
            f"{stem}.safetensors" if total == 1 else f"{stem}-{i:05d}-of-{total:05d}.safetensors",
            tuple(group),
            _header(group, metadata),
        )
        for i, group in enumerate(groups, 1)
    ]


def index_json(shards: Sequence[Shard[Any]], metadata: Mapping[str, Any]) -> str:
    """Return the index of ``shards``: which file holds which tensor, and their total size."""
    tensors = [(t, s) for s in shards for t in s.tensors]
    total = sum(tensor_bytes(t.dtype, t.shape) for t, _ in tensors)
    weight_map = {t.name: PurePosixPath(s.name).name for t, s in tensors}
    counts = {"total_parameters": sum(math.prod(t.shape) for t, _ in tensors)} if "total_parameters" in metadata else {}
    content = {"metadata": {**metadata, "total_size": total, **counts}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _header(tensors: Sequence[Laid], metadata: Mapping[str, str], size: int = 0) -> bytes:
    return header_bytes([(t.name, t.dtype, t.shape) for t in tensors], metadata, size)
