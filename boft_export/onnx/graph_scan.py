"""ONNX files read as bytes: where each tensor's values lie, in the file itself or in data files beside it.

A graph's records are walked and no tensor is read, so that files of any size take no memory, and whoever writes one
again can leave every byte of its nodes as it is.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from boft_export.checkpoint import FLOAT_DTYPES
from boft_export.checkpoint.tensors import tensor_bytes
from boft_export.errors import AccessError, DamagedFileError

# TensorProto.DataType of what is matched; all others are known by their number.
_DTYPES = {1: "F32", 10: "F16", 11: "F64", 16: "BF16"}
# int8, uint8, the 8-bit floats, and the 4-bit and 2-bit types.
_LOW_PRECISION = frozenset({2, 3, *range(17, 27)})
_FEW = 64
_QUANTISED_OPS = frozenset(
    {
        "DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul",
        "QLinearConv", "MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "QMoE", "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat", "QAttention", "QGemm",
    }
)  # fmt: skip
# Messages that may hold tensors: the fields of each that do, and what is in them.
_NESTED = {
    "model": {7: "main", 25: "function"},
    "main": {1: "node", 5: "tensor"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}
_METADATA, _OPSETS = 14, 8
_NODE, _INPUT, _OUTPUT = 1, 11, 12
# Fields of TensorProto with values that lie one after the other as they do in memory, by dtype.
_PACKED = {"F32": 4, "F64": 10}
_RAW = 9
OWN_PREFIX = "boft_export."


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a graph and where its values lie.

    Attributes:
        name: Its name in the graph; of a constant, that of the node's output.
        dtype: As safetensors names it.
        shape: Its shape.
        path: The file.
        offset: Its first byte there.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class GraphFile:
    """An ONNX file.

    Attributes:
        path: The file.
        tensors: Its floating-point tensors whose values can be read and written in place.
        locations: The data files it refers to, by the names it has for them.
        metadata: What it says of itself.
        own_metadata: The byte ranges of the records there that we wrote.
        quantised: How it is quantised, if it is: the operators, or the tensors, that say so.
        inputs: Its inputs' names.
        outputs: Its outputs' names.
        nodes: How many nodes it has.
        opset: The version of ONNX's own operators; None if it uses none.
    """

    path: Path
    tensors: tuple[StoredTensor, ...]
    locations: Mapping[str, Path]
    metadata: Mapping[str, str]
    own_metadata: tuple[tuple[int, int], ...]
    quantised: str | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: int
    opset: int | None


class _Field(NamedTuple):
    """A record of a message: its number, where it begins, its payload, and its value if it is a number."""

    number: int
    begin: int
    start: int
    stop: int
    value: int | None


@dataclass
class _Found:
    """What a walk has found so far."""

    tensors: list[StoredTensor] = field(default_factory=list)
    locations: dict[str, Path] = field(default_factory=dict)
    operators: set[str] = field(default_factory=set)
    low_precision: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    own_metadata: list[tuple[int, int]] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    constants: set[str] = field(default_factory=set)
    graphs: int = 0
    nodes: int = 0
    opset: int | None = None


def scan_graph(path: Path) -> GraphFile:
    """Find a graph's tensors.

    Raises:
        DamagedFileError: If it is no ONNX file, or refers to data that is not there, or lies outside of its folder.
        AccessError: If it can't be read.
    """
    found = _Found()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(path, data, found).message("model", 0, len(data))
    except OSError as error:
        raise AccessError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, IndexError, RecursionError) as error:
        raise _damaged(path, str(error) or type(error).__name__) from error
    if not found.graphs:
        raise _damaged(path, "there is no graph in it")
    operators = sorted(found.operators & _QUANTISED_OPS)
    quantised = operators or found.low_precision
    return GraphFile(
        path,
        tuple(found.tensors),
        found.locations,
        found.metadata,
        tuple(found.own_metadata),
        ", ".join(quantised[:3]) if quantised else None,
        # Old graphs list their weights among their inputs.
        tuple(n for n in found.inputs if n not in found.constants),
        tuple(found.outputs),
        found.nodes,
        found.opset,
    )


def _damaged(path: Path, reason: str) -> DamagedFileError:
    return DamagedFileError(f"{path} is no sound ONNX file: {reason}.", hint="Export or download it again.")


def _varint(data: mmap.mmap, position: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while position < stop and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(f"a number at byte {position:,} does not end")


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[_Field]:
    """Yield a message's records."""
    position = start
    while position < stop:
        begin = position
        key, position = _varint(data, position, stop)
        number, wire = key >> 3, key & 7
        value: int | None = None
        payload = position
        if wire == 0:
            value, position = _varint(data, position, stop)
        elif wire == 1:
            position += 8
        elif wire == 5:
            position += 4
        elif wire == 2:
            size, payload = _varint(data, position, stop)
            position = payload + size
        else:
            raise ValueError(f"byte {begin:,} begins no record")
        if position > stop or not number:
            raise ValueError(f"the record at byte {begin:,} goes on past the end")
        yield _Field(number, begin, payload, position, value)


class _Walk:
    """A walk through one file's records."""

    def __init__(self, path: Path, data: mmap.mmap, found: _Found) -> None:
        self.path = path
        self.data = data
        self.found = found

    def message(self, kind: str, start: int, stop: int, label: str = "") -> None:
        """Go through a message; ``label`` is what to call tensors in it that have no name."""
        nested = _NESTED[kind]
        self.found.graphs += kind == "main"
        for record in _fields(self.data, start, stop):
            inner = nested.get(record.number)
            if record.value is not None:
                continue
            if kind == "node":
                label = self._node(record, label)
            if kind == "model":
                self._of_model(record)
            elif kind == "main":
                self._of_graph(record)
            if inner is None:
                continue
            if inner == "tensor":
                self._tensor(record.start, record.stop, label)
            else:
                self.message(inner, record.start, record.stop, label)

    def _text(self, record: _Field) -> str:
        return self.data[record.start : record.stop].decode()

    def _of_model(self, record: _Field) -> None:
        if record.number == _METADATA:
            self._metadata(record)
        elif record.number == _OPSETS:
            parts = {f.number: f for f in _fields(self.data, record.start, record.stop)}
            if 1 not in parts or not self._text(parts[1]):
                self.found.opset = parts[2].value if 2 in parts else None

    def _of_graph(self, record: _Field) -> None:
        """Take note of what the main graph has."""
        self.found.nodes += record.number == _NODE
        names = {_INPUT: self.found.inputs, _OUTPUT: self.found.outputs}.get(record.number)
        if names is not None:
            names += [self._text(f) for f in _fields(self.data, record.start, record.stop) if f.number == 1]

    def _node(self, record: _Field, label: str) -> str:
        if record.number == 4:
            self.found.operators.add(self._text(record))
        return self._text(record) if record.number == 2 else label

    def _pair(self, record: _Field) -> tuple[str, str]:
        parts = {f.number: self._text(f) for f in _fields(self.data, record.start, record.stop)}
        return parts.get(1, ""), parts.get(2, "")

    def _metadata(self, record: _Field) -> None:
        key, value = self._pair(record)
        self.found.metadata[key] = value
        if key.startswith(OWN_PREFIX):
            self.found.own_metadata.append((record.begin, record.stop))

    def _tensor(self, start: int, stop: int, label: str) -> None:
        name, number, external = label, 0, False
        shape: list[int] = []
        place: dict[str, str] = {}
        runs: dict[int, list[_Field]] = {}
        for record in _fields(self.data, start, stop):
            match record.number:
                case 1:
                    shape += self._packed(record) if record.value is None else [record.value]
                case 2:
                    number = record.value or 0
                case 8:
                    name = self._text(record) or label
                case 13:
                    place |= [self._pair(record)]
                case 14:
                    external = record.value == 1
                case _:
                    runs.setdefault(record.number, []).append(record)
        self.found.constants.add(name)
        count = math.prod(shape)
        if number in _LOW_PRECISION and count > _FEW:
            self.found.low_precision.append(name)
        dtype = _DTYPES.get(number)
        if external:
            self._external(name, dtype, tuple(shape), place)
        elif dtype is not None and count:
            nbytes = tensor_bytes(dtype, tuple(shape))
            run = runs.get(_RAW) or runs.get(_PACKED.get(dtype, _RAW)) or []
            # Half floats may be spelt as integers of changing length, which can't be changed in place.
            if len(run) == 1 and run[0].stop - run[0].start == nbytes:
                self.found.tensors.append(StoredTensor(name, dtype, tuple(shape), self.path, run[0].start))
            elif _RAW in runs:
                raise ValueError(f"tensor {name} takes {nbytes:,} bytes, and has others")

    def _packed(self, record: _Field) -> list[int]:
        values, position = [], record.start
        while position < record.stop:
            value, position = _varint(self.data, position, record.stop)
            values.append(value)
        return values

    def _external(self, name: str, dtype: str | None, shape: tuple[int, ...], place: Mapping[str, str]) -> None:
        path = self._locate(place.get("location", ""), name)
        offset = int(place.get("offset", 0))
        nbytes = tensor_bytes(dtype, shape) if dtype in FLOAT_DTYPES else int(place.get("length", 0))
        length = int(place.get("length", nbytes))
        size = path.stat().st_size
        if offset < 0 or length != nbytes:
            raise ValueError(f"tensor {name} takes {nbytes:,} bytes, and {length:,} are recorded")
        if offset + nbytes > size:
            raise DamagedFileError(
                f"{path} is truncated: {name} ends at byte {offset + nbytes:,}, the file at {size:,}.",
                hint="Export or download it again.",
            )
        if dtype is not None and nbytes:
            self.found.tensors.append(StoredTensor(name, dtype, shape, path, offset))

    def _locate(self, location: str, tensor: str) -> Path:
        """Return the data file of a name: in the graph's folder, or in that of what a link stands for."""
        known = self.found.locations.get(location)
        if known is not None:
            return known
        name = PurePosixPath(location)
        path = self.path.parent / name
        inside = location and not name.is_absolute() and ".." not in name.parts and "\0" not in location
        roots = [self.path.parent.resolve(), self.path.resolve().parent]
        if not inside or not any(path.resolve().is_relative_to(r) for r in roots):
            raise DamagedFileError(
                f"{self.path} refers to {location!r} for the values of {tensor}, which is outside of its folder; it is "
                "not followed there.",
                hint="Keep a graph's data files beside it.",
            )
        if not path.is_file():
            raise DamagedFileError(
                f"{self.path} keeps its weights in {location}, which is not there.",
                hint="Put the data file beside the graph.",
            )
        self.found.locations[location] = path
        return path
