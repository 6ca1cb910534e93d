"""Which of a graph's tensors hold which of a checkpoint's, told by what is in them, bit by bit."""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from boft_export.checkpoint import TensorRef
from boft_export.checkpoint.dtypes import DTYPE_BITS
from boft_export.checkpoint.tensors import FileBytes, HeldBytes
from boft_export.errors import InputError
from boft_export.onnx.external_data import Placed
from boft_export.onnx.graph_scan import StoredTensor
from boft_export.pipeline.torch_io import TORCH_DTYPES
from boft_export.planning import TensorPlan

# Elements of each tensor that are looked at first, so that only those which are probably the same are read.
_SAMPLES = 32
# Elements that are compared at once.
_BLOCK = 1 << 20
_CELLS: dict[int, np.dtype[Any]] = {8: np.dtype("u1"), 16: np.dtype("<u2"), 32: np.dtype("<u4"), 64: np.dtype("<u8")}
_SHOWN = 4

_Array = np.ndarray[Any, np.dtype[Any]]


class NotInGraphError(InputError):
    """A graph does not have what is looked for."""


@dataclass(frozen=True)
class Part:
    """The place in a graph's tensor where another tensor's values lie, or may lie.

    Attributes:
        stored: The graph's tensor.
        transposed: It is stored by columns.
        first: How many rows of other tensors come before it.
        total: The rows of all that are stored together.
    """

    stored: StoredTensor
    transposed: bool
    first: int
    total: int

    def place(self, shape: tuple[int, ...]) -> Placed:
        """Return where a tensor of ``shape`` is to be written."""
        rows, columns = as_matrix(shape)
        width = DTYPE_BITS[self.stored.dtype] // 8
        start = self.first * (1 if self.transposed else columns)
        return Placed(
            self.stored.offset + start * width,
            rows * columns * width,
            (rows, columns) if self.transposed else shape,
            self.transposed,
            stride=self.total if self.transposed else 0,
            file=str(self.stored.path),
        )


@dataclass(frozen=True)
class Matches:
    """Where a graph holds what adapters change.

    Attributes:
        parts: The places of each of the plan's tensors, by its name.
        absent: Tensors that a graph of ours does not have.
    """

    parts: Mapping[str, tuple[Part, ...]]
    absent: tuple[str, ...] = ()


class Named(NamedTuple):
    """What the names in a graph say.

    Attributes:
        tensors: The base's tensor that each name stands for.
        reliable: The graph is ours, and each of its tensors is what its name says.
    """

    tensors: Mapping[str, str]
    reliable: bool


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return a shape's rows and columns: what is no matrix has its first axis for rows."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def match_tensors(
    changed: Sequence[TensorPlan],
    base: Mapping[str, TensorRef],
    stored: Sequence[StoredTensor],
    named: Named,
    tied: Collection[tuple[str, str]],
) -> Matches:
    """Find where a graph holds the base's values of the tensors that adapters change.

    Args:
        changed: The tensors, each in the place of a tensor of the base of its shape.
        base: All of the base's tensors.
        stored: The graph's tensors.
        named: What the graph's names say; what they say is seen to be so.
        tied: Names of changed tensors that a model holds as one.

    Raises:
        NotInGraphError: If one is not there.
        InputError: If one can't be told from another that is to become something else.
    """
    with _Values() as values:
        return _Search(changed, base, stored, named, tied, values).run()


class _Values:
    """Tensors' values in mapped files."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._maps.clear()

    def stored(self, tensor: StoredTensor) -> _Array:
        """Return a graph's tensor, flat, its elements as numbers of as many bits."""
        return self._cells(tensor.path, tensor.offset, tensor.dtype, math.prod(tensor.shape))

    def base(self, ref: TensorRef) -> _Array:
        """Return a checkpoint's tensor as ``stored`` does."""
        if isinstance(ref.source, FileBytes):
            return self._cells(ref.source.path, ref.source.offset, ref.dtype, ref.num_elements)
        held = ref.source.data if isinstance(ref.source, HeldBytes) else bytearray(ref.nbytes)
        if not isinstance(ref.source, HeldBytes):
            ref.read_into(memoryview(held))
        return np.frombuffer(held, _CELLS[DTYPE_BITS[ref.dtype]], ref.num_elements)

    def _cells(self, path: Path, offset: int, dtype: str, count: int) -> _Array:
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._maps[path], _CELLS[DTYPE_BITS[dtype]], count, offset)

    def let_go(self) -> None:
        """Take what was read out of this process's memory."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)


@cache
def _positions(count: int) -> _Array:
    """Return the elements that are looked at first, all over a tensor."""
    if count <= _SAMPLES:
        return np.arange(count)
    return np.unique(np.random.default_rng(count).integers(count, size=_SAMPLES))


def _converted(cells: _Array, dtype: str, wanted: str) -> _Array:
    """Return elements in another dtype, rounded as torch does."""
    if dtype == wanted:
        return cells
    # Copied, as torch wants it aligned and writable.
    values = torch.from_numpy(cells.copy().view(f"i{cells.itemsize}")).view(TORCH_DTYPES[dtype])
    rounded = values.to(TORCH_DTYPES[wanted]).contiguous()
    width = _CELLS[DTYPE_BITS[wanted]]
    return rounded.view(torch.uint8).numpy().reshape(-1).view(width).reshape(cells.shape)


@dataclass
class _Search:
    """A search through one graph, or several that share their data."""

    changed: Sequence[TensorPlan]
    base: Mapping[str, TensorRef]
    tensors: Sequence[StoredTensor]
    named: Named
    tied: Collection[tuple[str, str]]
    values: _Values
    refs: dict[str, TensorRef] = field(init=False)
    plans: dict[str, TensorPlan] = field(init=False)
    dtypes: tuple[str, ...] = field(init=False)
    names: dict[tuple[Path, int, tuple[int, ...]], set[str]] = field(init=False)
    stored: list[StoredTensor] = field(init=False)

    def __post_init__(self) -> None:
        # What is no number of a known precision is in no graph as it is.
        self.refs = {n: r for n, r in self.base.items() if r.dtype in TORCH_DTYPES and r.num_elements}
        self.plans = {t.base.name: t for t in self.changed if t.base is not None}
        self.names = {}
        self.stored = []
        for tensor in self.tensors:
            key = tensor.path, tensor.offset, tensor.shape
            if key not in self.names:
                self.stored.append(tensor)
            self.names.setdefault(key, set()).add(tensor.name)
        self.dtypes = tuple(dict.fromkeys(t.dtype for t in self.stored))

    def run(self) -> Matches:
        counts = {t.source.num_elements for t in self.changed}
        refs = self._sampled_refs(counts)
        parts = self._sampled_parts(counts)
        found: dict[str, tuple[Part, ...]] = {}
        absent: list[str] = []
        missing: list[TensorPlan] = []
        for plan in self.changed:
            ref = self._ref(plan)
            keys = [k for dtype in self.dtypes for k in self._keys(ref, dtype)]
            holders = [p for k in keys for p in parts.get(k, ()) if self._holds(p, ref)]
            rivals = {
                rival.name: rival
                for holder in holders
                for key in self._part_keys(holder.stored)
                for rival in refs.get(key, ())
                if rival is not ref and any(self._holds(p, rival) for p in _orientations(holder.stored, rival.shape))
            }
            holders = self._settle(plan, holders, list(rivals.values()))
            self.values.let_go()
            if holders:
                found[plan.name] = tuple(holders)
            elif self.named.reliable and ref.name not in self.named.tensors.values():
                absent.append(plan.name)
            else:
                missing.append(plan)
        if missing:
            found |= self._joined(missing, {p.stored for held in found.values() for p in held})
        lost = [t.name for t in missing if t.name not in found]
        if lost or not found:
            names = lost or absent
            raise NotInGraphError(
                f"the graph is not of this base: {len(found)} of the {len(self.changed)} tensors that the adapters "
                f"change are in it, value for value; not so {_shown(names)}.",
                hint="Give the graph of the very base that the adapters were trained on, or export one without "
                "--base-onnx.",
            )
        for name, held in found.items():
            self._check_alone(name, held)
        return Matches(found, tuple(absent))

    def _ref(self, plan: TensorPlan) -> TensorRef:
        if plan.base is None:
            raise TypeError(f"{plan.name} is not in the base")
        return plan.base

    def _sampled_refs(self, counts: Collection[int]) -> dict[tuple[object, ...], list[TensorRef]]:
        found: dict[tuple[object, ...], list[TensorRef]] = {}
        for ref in self.refs.values():
            for dtype in self.dtypes if ref.num_elements in counts else ():
                for key in self._keys(ref, dtype):
                    found.setdefault(key, []).append(ref)
        return found

    def _sampled_parts(self, counts: Collection[int]) -> dict[tuple[object, ...], list[Part]]:
        found: dict[tuple[object, ...], list[Part]] = {}
        for tensor in self.stored:
            count = math.prod(tensor.shape)
            for part in _whole(tensor) if count in counts else ():
                found.setdefault(self._part_key(part), []).append(part)
        return found

    def _keys(self, ref: TensorRef, dtype: str) -> list[tuple[object, ...]]:
        """Return under which keys a tensor of the base is looked for: as it is and transposed."""
        sample = _converted(self.values.base(ref)[_positions(ref.num_elements)], ref.dtype, dtype).tobytes()
        rows, columns = as_matrix(ref.shape)
        return [(dtype, ref.num_elements, sample), *([(dtype, rows, columns, sample)] if len(ref.shape) == 2 else [])]

    def _part_keys(self, tensor: StoredTensor) -> list[tuple[object, ...]]:
        return [self._part_key(part) for part in _whole(tensor)]

    def _part_key(self, part: Part) -> tuple[object, ...]:
        tensor = part.stored
        count = math.prod(tensor.shape)
        if not part.transposed:
            return tensor.dtype, count, self.values.stored(tensor)[_positions(count)].tobytes()
        columns, rows = tensor.shape
        row, column = np.divmod(_positions(count), columns)
        return tensor.dtype, rows, columns, self.values.stored(tensor)[column * rows + row].tobytes()

    def _holds(self, part: Part, ref: TensorRef, *, quick: bool = False) -> bool:
        """Tell whether a part is a tensor of the base, element by element; ``quick`` looks at samples alone."""
        rows, columns = as_matrix(ref.shape)
        wanted, held = self.values.base(ref), self.values.stored(part.stored)
        dtype = part.stored.dtype
        if quick:
            position = _positions(ref.num_elements)
            row, column = np.divmod(position, columns)
            at = column * part.total + part.first + row if part.transposed else part.first * columns + position
            return np.array_equal(_converted(wanted[position], ref.dtype, dtype), held[at])
        step = max(1, _BLOCK // columns)
        matrix = wanted.reshape(rows, columns)
        if part.transposed:
            lying = held.reshape(columns, part.total)[:, part.first : part.first + rows].T
        else:
            lying = held[part.first * columns : (part.first + rows) * columns].reshape(rows, columns)
        return all(
            np.array_equal(_converted(matrix[i : i + step], ref.dtype, dtype), lying[i : i + step])
            for i in range(0, rows, step)
        )

    def _settle(self, plan: TensorPlan, holders: list[Part], rivals: Sequence[TensorRef]) -> list[Part]:
        """Return the places that are a tensor's own.

        Raises:
            InputError: If that can't be told.
        """
        ref = self._ref(plan)
        both = {p.stored for p in holders if p.transposed} & {p.stored for p in holders if not p.transposed}
        if both:
            raise InputError(
                f"{plan.name} equals its own transpose: how {_shown(sorted(t.name for t in both))} in the graph holds "
                "it can't be told.",
                hint="Export the tuned model without --base-onnx.",
            )
        rivals = [r for r in rivals if not self._is_tied(plan, r)]
        if not holders or not rivals:
            return holders
        owners = [self._owners(p.stored) for p in holders]
        group = {ref.name, *(r.name for r in rivals)}
        if self.named.reliable:
            told = all(len(own) == 1 for own in owners)
        else:
            told = all(len(own) == 1 for own in owners) and {n for own in owners for n in own} == group
        if not told:
            raise InputError(
                f"{plan.name} holds the same values as {_shown(sorted(r.name for r in rivals))} in the base, and the "
                f"adapters change them differently: which of them {_shown(sorted(p.stored.name for p in holders))} in "
                "the graph is can't be told.",
                hint="Export the tuned model without --base-onnx.",
            )
        return [p for p, own in zip(holders, owners, strict=True) if ref.name in own]

    def _is_tied(self, plan: TensorPlan, rival: TensorRef) -> bool:
        other = self.plans.get(rival.name)
        return other is not None and ((plan.name, other.name) in self.tied or (other.name, plan.name) in self.tied)

    def _owners(self, tensor: StoredTensor) -> set[str]:
        """Return the base's tensors that a graph's tensor is, by its names."""
        names = self.names[tensor.path, tensor.offset, tensor.shape]
        return {self.named.tensors[n] for n in names if n in self.named.tensors}

    def _joined(self, missing: Sequence[TensorPlan], taken: Collection[StoredTensor]) -> dict[str, tuple[Part, ...]]:
        """Find tensors that are stored with others in one: queries, keys and values, say."""
        widths = {as_matrix(self._ref(t).shape)[1] for t in missing}
        found: dict[str, list[Part]] = {}
        for tensor in self.stored:
            if tensor in taken:
                continue
            for part, ref in self._pieces(tensor, widths):
                if ref.name in self.plans:
                    found.setdefault(self.plans[ref.name].name, []).append(part)
            self.values.let_go()
        return {name: tuple(parts) for name, parts in found.items()}

    def _pieces(self, tensor: StoredTensor, widths: Collection[int]) -> list[tuple[Part, TensorRef]]:
        """Return which tensors of the base a graph's tensor is put together of; none if not of those alone."""
        for transposed in (True, False):
            total, columns = as_matrix(tensor.shape)
            if transposed:
                total, columns = columns, total
            if columns not in widths or (transposed and len(tensor.shape) != 2):
                continue
            pieces: list[tuple[Part, TensorRef]] = []
            first = 0
            while first < total:
                part = Part(tensor, transposed, first, total)
                fitting = [r for r in self._fitting(columns, total - first) if self._holds(part, r, quick=True)]
                fitting = [r for r in fitting if self._holds(part, r)]
                if not fitting:
                    break
                if len(fitting) > 1 and any(r.name in self.plans for r in fitting):
                    raise InputError(
                        f"{_shown(sorted(r.name for r in fitting))} hold the same values in the base: which of them is "
                        f"in {tensor.name} in the graph can't be told.",
                        hint="Export the tuned model without --base-onnx.",
                    )
                pieces.append((part, fitting[0]))
                first += as_matrix(fitting[0].shape)[0]
            else:
                return pieces
        return []

    @cached_property
    def _by_columns(self) -> dict[int, list[TensorRef]]:
        found: dict[int, list[TensorRef]] = {}
        for ref in self.refs.values():
            if len(ref.shape) <= 2:
                found.setdefault(as_matrix(ref.shape)[1], []).append(ref)
        return found

    def _fitting(self, columns: int, rows: int) -> Iterator[TensorRef]:
        return (r for r in self._by_columns.get(columns, ()) if as_matrix(r.shape)[0] <= rows)

    @cached_property
    def _shared(self) -> dict[tuple[Path, int, int], tuple[str, str]]:
        """The byte ranges of tensors that overlap others', each with the names of the two; the same range is none."""
        found: dict[tuple[Path, int, int], tuple[str, str]] = {}
        furthest: StoredTensor | None = None
        for tensor in sorted(self.stored, key=lambda t: (t.path, t.offset, t.nbytes)):
            if furthest is None or furthest.path != tensor.path or _stop(furthest) <= tensor.offset:
                furthest = tensor
                continue
            if _range(tensor) != _range(furthest):
                found[_range(tensor)] = tensor.name, furthest.name
                found[_range(furthest)] = furthest.name, tensor.name
            furthest = max(furthest, tensor, key=_stop)
        return found

    def _check_alone(self, name: str, held: Sequence[Part]) -> None:
        """See that no other tensor of the graph shares some of the bytes that are to be changed."""
        for part in held:
            if (both := self._shared.get(_range(part.stored))) is not None:
                raise InputError(f"{both[0]}, which holds {name}, shares a part of its bytes with {both[1]}.")


def _range(tensor: StoredTensor) -> tuple[Path, int, int]:
    return tensor.path, tensor.offset, tensor.nbytes


def _stop(tensor: StoredTensor) -> int:
    return tensor.offset + tensor.nbytes


def _whole(tensor: StoredTensor) -> Iterator[Part]:
    """Yield how a graph's tensor may hold one of the base's: as it is, or transposed."""
    yield Part(tensor, transposed=False, first=0, total=as_matrix(tensor.shape)[0])
    if len(tensor.shape) == 2 and min(tensor.shape) > 1:
        yield Part(tensor, transposed=True, first=0, total=tensor.shape[1])


def _orientations(tensor: StoredTensor, shape: tuple[int, ...]) -> Iterator[Part]:
    """Yield how a graph's tensor may hold one of a shape."""
    return (p for p in _whole(tensor) if not p.transposed or tensor.shape == shape[::-1])


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
