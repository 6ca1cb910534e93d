"""Copies of files that share their blocks on the disk until one of the two is written to (reflinks)."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

# From Linux's fs.h.
_FICLONE = 0x40049409


def clone(source: Path, descriptor: int, size: int) -> bool:
    """Make an empty file a copy of ``source`` that takes no space of its own.

    Args:
        source: The file to copy.
        descriptor: The file to make, open for writing.
        size: Where the copy is to end.

    Returns:
        Whether that was possible: XFS and btrfs can, within one file system. If not, the file is empty still.
    """
    try:
        with source.open("rb") as file:
            fcntl.ioctl(descriptor, _FICLONE, file.fileno())
        os.ftruncate(descriptor, size)
    except OSError:
        os.ftruncate(descriptor, 0)
        return False
    return True


def can_clone(source: Path, folder: Path) -> bool:
    """Tell whether a file in ``folder`` can be a clone of ``source``."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return clone(source, file.fileno(), 0)
    except OSError:
        return False
