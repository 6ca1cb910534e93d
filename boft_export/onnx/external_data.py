"""The data file beside a graph: its layout, planned ahead, and tensors written into it piece by piece."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from boft_export.checkpoint.staging import file_system_errors
from boft_export.checkpoint.tensors import tensor_bytes

# Readers map tensors into memory, which needs page boundaries.
_ALIGNMENT = 4096
_UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies.

    Attributes:
        offset: Its first byte in the file.
        nbytes: Its size.
        shape: The shape it has before any transposition.
        transposed: It is a matrix and stored by columns.
        stride: Elements from one of its columns to the next, where others lie between them; 0 where none do.
        file: Which file, where there are several.
    """

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    transposed: bool
    stride: int = 0
    file: str = ""


class Layout:
    """Offsets for tensors, in the order in which they are added."""

    def __init__(self) -> None:
        self.nbytes = 0

    def add(self, dtype: str, shape: tuple[int, ...], *, transposed: bool = False) -> Placed:
        """Return a tensor's place; dtypes are named as in safetensors."""
        offset = -(-self.nbytes // _ALIGNMENT) * _ALIGNMENT
        placed = Placed(offset, tensor_bytes(dtype, shape), shape, transposed)
        self.nbytes = offset + placed.nbytes
        return placed


class DataFile:
    """A file of a known size that tensors are written into, as a context.

    All of its space is taken from the disk at once, so that a full disk shows before any work. It is mapped, so that
    what was written is the system's to flush, and not held in this process.

    Args:
        path: The file, to be made anew.
        nbytes: Its size.

    Raises:
        ResourceError: If the disk is full.
        AccessError: If the file can't be written.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self._path = path
        with file_system_errors(path), path.open("w+b") as file:
            if nbytes:
                os.posix_fallocate(file.fileno(), 0, nbytes)
            # Nothing can be mapped of an empty file.
            self._map = mmap.mmap(file.fileno(), nbytes) if nbytes else None

    def write(self, places: Iterable[Placed], start: int, data: memoryview) -> None:
        """Write a run of a tensor's bytes, from its byte ``start`` on in row-major order, to each of its places."""
        for place in places:
            if self._map is None:
                continue
            if place.transposed:
                _write_columns(self._map, place, start, data)
            else:
                target = np.frombuffer(self._map, np.uint8, place.nbytes, place.offset)
                target[start : start + len(data)] = np.frombuffer(data, np.uint8)

    def __enter__(self) -> Self:
        """Return the file."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Flush it to disk, unless something failed, and let go of it."""
        if self._map is not None:
            with file_system_errors(self._path):
                if kind is None:
                    self._map.flush()
            # While an error is on its way, its traceback holds on to pieces of the map.
            with contextlib.suppress(BufferError):
                self._map.close()


def _write_columns(target: mmap.mmap, place: Placed, start: int, data: memoryview) -> None:
    """Write a run of a matrix's elements, which may begin and end within a row, into its transpose."""
    rows, columns = place.shape
    width = place.nbytes // (rows * columns)
    pitch = (place.stride or rows) * width
    matrix = np.ndarray((columns, rows), _UINT[width], target, place.offset, (pitch, width))
    run = np.frombuffer(data, _UINT[width])
    row, column = divmod(start // width, columns)
    if column:
        head, run = run[: columns - column], run[columns - column :]
        matrix[column : column + len(head), row] = head
        row += 1
    whole = len(run) // columns
    matrix[:, row : row + whole] = run[: whole * columns].reshape(whole, columns).T
    if tail := len(run) - whole * columns:
        matrix[:tail, row + whole] = run[whole * columns :]
