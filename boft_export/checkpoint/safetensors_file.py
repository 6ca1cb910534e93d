"""The safetensors format: a length, a JSON header, and the tensors' bytes one after the other."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from boft_export.checkpoint.dtypes import DTYPE_BITS
from boft_export.checkpoint.places import AnyPath
from boft_export.checkpoint.tensors import TensorRef, bytes_at, tensor_bytes
from boft_export.errors import AccessError, DamagedFileError

# The limit of the format's reference reader.
_MAX_HEADER = 100_000_000
_ALIGNMENT = 8
_MAX_NUMBER = 2**63 - 1


@dataclass(frozen=True)
class WeightFile:
    """One file of weights: its tensors in the order of their bytes, and its metadata.

    Attributes:
        header_size: Where in a safetensors file the first tensor's bytes begin; 0 for other formats.
    """

    path: AnyPath
    name: str
    tensors: tuple[TensorRef, ...]
    metadata: Mapping[str, str]
    header_size: int = 0


def read_safetensors(path: AnyPath, name: str | None = None) -> WeightFile:
    """Read the header of a safetensors file and check it against the file.

    Args:
        path: The file.
        name: How to call the file in messages and in the result; its own name by default.

    Raises:
        DamagedFileError: If the header is malformed, or its tensors don't fill the file without gap or overlap.
        AccessError: If the file cannot be read.
    """
    label = name or path.name

    def damaged(reason: str) -> DamagedFileError:
        return DamagedFileError(
            f"{path} is not a sound safetensors file: {reason}.", hint="Download or save the file again."
        )

    try:
        size = path.stat().st_size
        length = int.from_bytes(_read(path, 0, min(8, size)), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise damaged(f"its header claims {length:,} bytes, the file has {size:,}")
        raw = _read(path, 8, length)
    except OSError as error:
        raise AccessError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise TypeError("not an object")
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise TypeError("metadata must map strings to strings")
        # Escapes can spell halves of characters, which no file or terminal takes.
        "".join([*header, *metadata, *metadata.values()]).encode()
        entries = sorted((_entry(k, v) for k, v in header.items()), key=lambda e: (e[3], e[4]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(f"its header cannot be read ({error})") from error

    position, start_of_data = 0, 8 + length
    tensors = []
    for tensor, dtype, shape, begin, end in entries:
        if begin != position:
            raise damaged(f"tensor {tensor} should begin at byte {position:,}, the header says {begin:,}")
        tensors.append(TensorRef(tensor, dtype, shape, bytes_at(path, start_of_data + begin), label))
        position = end
    if start_of_data + position != size:
        kind = "truncated" if start_of_data + position > size else "longer than its header says"
        raise damaged(f"it is {kind}: {start_of_data + position:,} bytes expected, {size:,} found")
    return WeightFile(path, label, tuple(tensors), metadata, start_of_data)


def _read(path: AnyPath, start: int, size: int) -> bytes:
    data = bytearray(size)
    bytes_at(path, start).read_into(memoryview(data), 0)
    return bytes(data)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _entry(name: str, value: Mapping[str, Any]) -> tuple[str, str, tuple[int, ...], int, int]:
    dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in DTYPE_BITS:
        raise ValueError(f"tensor {name} has the unknown dtype {dtype}")
    if type(shape) is not list or any(type(i) is not int or not 0 <= i <= _MAX_NUMBER for i in (*shape, begin, end)):
        raise ValueError(f"tensor {name} has a shape or an offset that is not a natural number")
    if DTYPE_BITS[dtype] * math.prod(shape) != 8 * (end - begin):
        raise ValueError(f"tensor {name} ({dtype}, shape {shape}) does not take the {end - begin:,} bytes it is given")
    return name, dtype, tuple(shape), begin, end


def header_bytes(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str], size: int = 0
) -> bytes:
    """Return the length and header of a safetensors file that holds ``tensors`` (name, dtype, shape) in this order.

    Args:
        tensors: What is in the file.
        metadata: What else its header says.
        size: As many bytes it is to be, where it fits in them; else it ends where tensors are aligned.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    room = size - 8 - len(text)
    text += b" " * (room if room >= 0 else -len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
