"""A tensor on disk, known by its header and read by byte ranges."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from boft_export.checkpoint.dtypes import DTYPE_BITS
from boft_export.checkpoint.places import AnyPath
from boft_export.checkpoint.remote import RemoteBytes, RemotePath
from boft_export.errors import AccessError, DamagedFileError


class Bytes(Protocol):
    """Where a tensor's bytes come from."""

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill ``buffer`` with the bytes from ``start`` on."""


@dataclass(frozen=True)
class FileBytes:
    """A byte range of a file, read with ``pread`` into the caller's buffer: nothing is mapped or cached here."""

    path: Path
    offset: int

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill ``buffer`` with the file's bytes from ``offset + start`` on.

        Raises:
            DamagedFileError: If the file ends before the buffer is full.
            AccessError: If the file cannot be read.
        """
        position = self.offset + start
        try:
            fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            try:
                while len(buffer):
                    count = os.preadv(fd, [buffer], position)
                    if count == 0:
                        raise DamagedFileError(f"{self.path} ends at byte {position}: it is truncated or was changed.")
                    buffer, position = buffer[count:], position + count
            finally:
                os.close(fd)
        except OSError as error:
            raise AccessError(f"cannot read {self.path}: {error.strerror or error}") from error


# Bytes that are a range of a file, with its ``path`` and the range's ``offset``.
BytesInFile = FileBytes | RemoteBytes


def bytes_at(path: AnyPath, offset: int) -> BytesInFile:
    """Return the bytes of a file, local or remote, from ``offset`` on."""
    return RemoteBytes(path, offset) if isinstance(path, RemotePath) else FileBytes(path, offset)


@dataclass(frozen=True)
class HeldBytes:
    """Bytes in memory, for formats that cannot be read by ranges."""

    data: memoryview

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill ``buffer`` with the bytes from ``start`` on."""
        buffer[:] = self.data[start : start + len(buffer)]


@dataclass(frozen=True)
class TensorRef:
    """A tensor known by its header alone.

    Attributes:
        name: Its name in the checkpoint.
        dtype: Its dtype, by the safetensors format's name (``BF16``).
        shape: Its shape.
        source: Where its bytes are, row-major and contiguous.
        file: The file's path relative to the checkpoint's folder, for messages and the manifest.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Bytes
    file: str

    @property
    def num_elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return tensor_bytes(self.dtype, self.shape)

    def read_into(self, buffer: memoryview, start: int = 0) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``start`` on."""
        self.source.read_into(buffer, start)


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size in bytes of a tensor of ``dtype`` and ``shape``."""
    return (DTYPE_BITS[dtype] * math.prod(shape) + 7) // 8
