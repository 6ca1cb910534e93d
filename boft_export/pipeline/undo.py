"""The files beside a merged checkpoint that say what undoing the merge misses of the base: their form on disk.

A file belongs to a weight file. It holds blocks of corrections (``boft_export.pipeline.corrections``) and tensors of
which a merge leaves nothing, one after the other; then an index as JSON, and the index's length in 8 bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path, PurePosixPath
from typing import IO, Any

from boft_export.checkpoint import FLOAT_DTYPES, Checkpoint, TensorRef
from boft_export.checkpoint.dtypes import DTYPE_BITS
from boft_export.checkpoint.folder import read_text
from boft_export.checkpoint.places import AnyPath
from boft_export.checkpoint.tensors import bytes_at, tensor_bytes
from boft_export.errors import AccessError, DamagedFileError
from boft_export.pipeline.recorded import Recorded, RecordedFile, check_shape
from boft_export.planning import TensorPlan
from boft_export.planning.output import UNDO_FOLDER

CONFIG_NAME = f"{UNDO_FOLDER}/base_config.json"
_SUFFIX = ".undo"
_VERSION = 1
_LENGTH = 8
_PIECE = 4 << 20
_LARGEST_INDEX = 256 << 20
_LARGEST_CONFIG = 16 << 20


def undo_name(weight_file: str) -> str:
    """Return the name of the file that belongs to a weight file; no loader takes it for weights."""
    return f"{UNDO_FOLDER}/{PurePosixPath(weight_file).with_suffix(_SUFFIX)}"


@dataclass(frozen=True)
class Block:
    """Corrections for the elements of a tensor from ``start`` on, ``count`` of them."""

    start: int
    count: int
    data: bytes


@dataclass(frozen=True)
class UndoTensor:
    """What a file says of a tensor that is not as in the base.

    Attributes:
        name: The tensor's name in the base; None where the base has none.
        dtype: Its dtype in the base.
        shape: Its shape in the base.
        offset: Where its blocks, or its bytes, begin in the file.
        blocks: First element, number of elements and size of each block of corrections; None where the tensor is whole.
        path: The file.
    """

    name: str | None
    dtype: str = ""
    shape: tuple[int, ...] = ()
    offset: int = 0
    blocks: tuple[tuple[int, int, int], ...] | None = None
    path: AnyPath = Path()

    @property
    def whole(self) -> TensorRef | None:
        """The base's tensor, where the file holds it whole."""
        if self.name is None or self.blocks is not None:
            return None
        return TensorRef(self.name, self.dtype, self.shape, bytes_at(self.path, self.offset), self.path.name)

    def read(self, start: int, stop: int) -> list[tuple[int, int, bytes]]:
        """Return the blocks for elements ``start`` to ``stop``: first element, number of elements, and bytes of each.

        Raises:
            DamagedFileError: If the file ends early.
            AccessError: If it can't be read.
        """
        found = []
        blocks = self.blocks or ()
        offsets = accumulate((size for *_, size in blocks), initial=self.offset)
        for (first, count, size), offset in zip(blocks, offsets, strict=False):
            if first < stop and start < first + count:
                data = bytearray(size)
                bytes_at(self.path, offset).read_into(memoryview(data), 0)
                found.append((first, count, bytes(data)))
        return found


@dataclass(frozen=True)
class UndoRecord:
    """All that a merged checkpoint's files say.

    Attributes:
        tensors: Each tensor that is not as in the base, by its name in the merged checkpoint.
        headers: The headers of the base's weight files, by name.
        config_text: The base's ``config.json``, where the merged checkpoint has another.
    """

    tensors: Mapping[str, UndoTensor]
    headers: Mapping[str, bytes]
    config_text: str | None


class UndoWriter:
    """Writes one file.

    Args:
        file: Where to.
        tensors: The weight file's tensors, in order.
        base: The base's weight file of the same name; None where it has none.
    """

    def __init__(self, file: IO[bytes], tensors: Sequence[TensorPlan], base: AnyPath | None) -> None:
        self._file = file
        self._next = iter(tensors)
        self._current = ""
        self._digest = hashlib.sha256()
        self._position = 0
        self._index: dict[str, Any] = {
            "version": _VERSION,
            "header": _header(base) if base is not None else None,
            "tensors": {},
        }

    def _begin(self, tensor: TensorPlan) -> None:
        """Note a tensor: its corrections come next, or it is written whole where the merge leaves nothing of it."""
        self._current = tensor.name
        base = tensor.base
        if base is None:
            self._index["tensors"][tensor.name] = None
        elif tensor.steps or base is not tensor.source or base.name != tensor.name:
            entry = {"name": base.name, "dtype": base.dtype, "shape": list(base.shape), "offset": self._position}
            entry["blocks"] = [] if base is tensor.source else None
            self._index["tensors"][tensor.name] = entry
            if base is not tensor.source:
                buffer = memoryview(bytearray(min(_PIECE, base.nbytes)))
                for start in range(0, base.nbytes, _PIECE):
                    piece = buffer[: base.nbytes - start]
                    base.read_into(piece, start)
                    self._write(piece)

    def add(self, tensor: TensorPlan, blocks: Sequence[Block]) -> None:
        """Write the next corrections of a tensor."""
        while self._current != tensor.name:
            self._begin(next(self._next))
        for block in blocks:
            self._index["tensors"][tensor.name]["blocks"].append([block.start, block.count, len(block.data)])
            self._write(block.data)

    def finish(self) -> dict[str, Any]:
        """Write the index; return what the journal notes of the file."""
        for tensor in self._next:
            self._begin(tensor)
        index = json.dumps(self._index, ensure_ascii=False).encode()
        self._write(index)
        self._write(len(index).to_bytes(_LENGTH, "little"))
        return {"sha256": self._digest.hexdigest()}

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._position += len(data)


def read_record(checkpoint: Checkpoint, recorded: Recorded) -> UndoRecord | None:
    """Read what a checkpoint's manifest names; None where that is nothing, or its folder was removed.

    Raises:
        DamagedFileError: If a file is missing, or is not what the manifest or the format says.
        AccessError: If a file can't be read.
    """
    if not recorded.undo or not (checkpoint.root / UNDO_FOLDER).is_dir():
        return None
    tensors: dict[str, UndoTensor] = {}
    headers: dict[str, bytes] = {}
    config = None
    for name, told in recorded.undo.items():
        path = checkpoint.root / name
        _check_digest(path, told)
        if name == CONFIG_NAME and told.nbytes <= _LARGEST_CONFIG:
            config = read_text(path)
        elif name.startswith(f"{UNDO_FOLDER}/") and name.endswith(_SUFFIX):
            header, found = _read_index(path, told.nbytes)
            tensors |= found
            if header is not None:
                weights = PurePosixPath(name).relative_to(UNDO_FOLDER).with_suffix(".safetensors")
                headers[str(weights)] = header
        else:
            raise DamagedFileError(f"{path} is no file that undoes a merge.")
    return UndoRecord(tensors, headers, config)


def _header(file: AnyPath) -> str:
    """Return the header of a safetensors file."""
    length = bytearray(_LENGTH)
    bytes_at(file, 0).read_into(memoryview(length), 0)
    text = bytearray(int.from_bytes(length, "little"))
    bytes_at(file, _LENGTH).read_into(memoryview(text), 0)
    return text.decode()


def _check_digest(path: AnyPath, told: RecordedFile) -> None:
    hint = "Copy the whole folder again, or remove the folder to go without."
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            while size == told.nbytes and (piece := file.read(_PIECE)):
                digest.update(piece)
    except FileNotFoundError as error:
        raise DamagedFileError(f"{path} is missing, though boft_export.json names it.", hint=hint) from error
    except OSError as error:
        raise AccessError(f"cannot read {path}: {error.strerror or error}") from error
    if size != told.nbytes:
        raise DamagedFileError(f"{path} has {size:,} bytes, boft_export.json says {told.nbytes:,}.", hint=hint)
    if digest.hexdigest() != told.sha256:
        raise DamagedFileError(
            f"{path} has SHA-256 {digest.hexdigest()}, boft_export.json says {told.sha256}.", hint=hint
        )


def _read_index(path: AnyPath, nbytes: int) -> tuple[bytes | None, dict[str, UndoTensor]]:
    def read(start: int, stop: int) -> bytes:
        data = bytearray(stop - start)
        bytes_at(path, start).read_into(memoryview(data), 0)
        return bytes(data)

    try:
        end = max(0, nbytes - _LENGTH)
        start = end - int.from_bytes(read(end, nbytes), "little")
        if nbytes < _LENGTH or not 0 <= start <= end or end - start > _LARGEST_INDEX:
            raise ValueError("its index has no sound length")
        index = json.loads(read(start, end))
        if index["version"] != _VERSION:
            raise ValueError(f"version {index['version']} is not known")
        text = index["header"]
        header = None if text is None else len(text.encode()).to_bytes(_LENGTH, "little") + text.encode()
        return header, {n: _tensor(e, path, start) for n, e in index["tensors"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"{path} is not a sound file that undoes a merge: {error}.") from error


def _tensor(entry: Any, path: AnyPath, end: int) -> UndoTensor:  # noqa: ANN401  # it is checked here
    if entry is None:
        return UndoTensor(None)
    name, dtype, offset = entry["name"], entry["dtype"], entry["offset"]
    shape = check_shape(entry["shape"])
    blocks = tuple((a, b, c) for a, b, c in entry["blocks"]) if entry["blocks"] is not None else None
    numbers = (offset, *(i for b in blocks or () for i in b))
    if not isinstance(name, str) or dtype not in DTYPE_BITS or any(type(i) is not int or i < 0 for i in numbers):
        raise ValueError("an entry of its index is not what it should be")
    name.encode()
    if DTYPE_BITS[dtype] * math.prod(shape) % 8:
        raise ValueError(f"{name} ends within a byte")
    if any(a + b > c for (a, b, _), (c, _, _) in pairwise(blocks or ())) or not all(b for _, b, _ in blocks or ()):
        raise ValueError(f"the blocks of {name} are empty or out of order")
    size = tensor_bytes(dtype, shape) if blocks is None else sum(size for *_, size in blocks)
    if blocks and (dtype not in FLOAT_DTYPES or max(first + count for first, count, _ in blocks) > math.prod(shape)):
        raise ValueError(f"the blocks of {name} are for other elements than it has")
    if offset + size > end:
        raise ValueError(f"{name} lies beyond its end")
    return UndoTensor(name, dtype, shape, offset, blocks, path)
