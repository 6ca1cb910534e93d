"""A weight file of the output while it is written: each piece at its place, and what must go in order in order.

Where the disk can share blocks between files, a file of which most stays begins as a clone of the base's.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple

from boft_export.checkpoint import Shard
from boft_export.checkpoint.cloning import clone
from boft_export.checkpoint.staging import file_system_errors
from boft_export.checkpoint.tensors import FileBytes, tensor_bytes
from boft_export.errors import InputError
from boft_export.pipeline.chunks import Chunk
from boft_export.pipeline.measure import Measure
from boft_export.pipeline.workbench import Piece
from boft_export.planning import Action, TensorPlan
from boft_export.planning.strength import Variant

# Writing over what is shared costs as much again as it saves to leave a byte (docs/decisions.md).
_CLONED_SHARE = 0.5
# From Linux's fs.h.
_SYNC_FILE_RANGE_WRITE = 2
# By layer: its adapter's number, its module, and its alpha.
Residuals = Mapping[tuple[int, str, float], float]


class OutputFile:
    """One output's file of a shard, with its digest and what was measured of its tensors.

    Args:
        shard: What is in it.
        variant: The output.
        file: Where it is written; a file on disk is written by several threads at once, any other in order.
    """

    def __init__(self, shard: Shard[TensorPlan], variant: Variant, file: IO[bytes]) -> None:
        self.shard = shard
        self.variant = variant
        self._digest = hashlib.sha256(shard.header)
        self._file = file
        self._descriptor = _descriptor(file)
        self._path = Path(getattr(file, "name", shard.name)).with_suffix("")
        self._measures: dict[str, Measure] = {}
        self._is_clone = False
        if self._descriptor is None:
            file.write(shard.header)
        else:
            template = clonable(shard, variant)
            with file_system_errors(self._path):
                self._is_clone = template is not None and clone(template.path, self._descriptor, shard.nbytes)
            self._write_at(self._descriptor, 0, memoryview(shard.header))

    def place(self, chunk: Chunk, piece: Piece) -> None:
        """Write a piece where it belongs, where that can be done in any order and it isn't there yet.

        Raises:
            ResourceError: If the disk is full.
            AccessError: If the file can't be written.
        """
        if self._descriptor is not None and not (self._is_clone and piece.untouched):
            self._write_at(self._descriptor, chunk.offset, piece.data.data)

    def follow(self, chunk: Chunk, piece: Piece) -> None:
        """Do with the next piece what goes in order.

        Raises:
            InputError: If a result is not finite.
        """
        if self._descriptor is None:
            self._file.write(piece.data.data)
        self._digest.update(piece.data.data)
        name = chunk.tensor.name
        for measure in piece.measures:
            self._measures[name] = self._measures.get(name, Measure()) + measure
            check_finite(chunk.tensor, measure)

    def journal_entry(self, residuals: Residuals) -> dict[str, Any]:
        """Return what a later run, and the manifest, will need to know of the finished file."""
        tensors = {}
        for tensor in self.shard.tensors:
            measure = self._measures.get(tensor.name)
            alphas = self.variant.strength.of(tensor.name)
            found = [residuals[s.adapter, s.layer.module, alphas[s.adapter]] for s in tensor.steps if alphas[s.adapter]]
            tensors[tensor.name] = {
                "measure": asdict(measure) if measure is not None else None,
                "residual": max(found) if found else None,
            }
        return {"sha256": self._digest.hexdigest(), "tensors": tensors}

    def _write_at(self, descriptor: int, offset: int, data: memoryview) -> None:
        with file_system_errors(self._path):
            written = 0
            while written < len(data):
                written += os.pwrite(descriptor, data[written:], offset + written)
        _start_writeback(descriptor, offset, len(data))


class Template(NamedTuple):
    """The base's file that an output's may begin as a clone of, and how many of its bytes stay."""

    path: Path
    stays: int


def clonable(shard: Shard[TensorPlan], variant: Variant) -> Template | None:
    """Return what an output's file begins as a clone of where the disk can do that; None if it is written whole."""
    sizes = [(t, tensor_bytes(t.dtype, t.shape)) for t in shard.tensors]
    stays = sum(size for t, size in sizes if t.action is Action.COPY or not any(variant.strength.of(t.name)))
    if stays < _CLONED_SHARE * sum(size for _, size in sizes):
        return None
    base = base_in_place(shard)
    return None if base is None else Template(base, stays)


def base_in_place(shard: Shard[TensorPlan]) -> Path | None:
    """Return the file on disk that has the base's tensors where the shard has them; None where there is none."""
    paths = set()
    offset = len(shard.header)
    for tensor in shard.tensors:
        base = tensor.base
        if base is None or not isinstance(base.source, FileBytes):
            return None
        if (base.source.offset, base.dtype, base.shape) != (offset, tensor.dtype, tensor.shape):
            return None
        paths.add(base.source.path)
        offset += base.nbytes
    return paths.pop() if len(paths) == 1 else None


def check_finite(tensor: TensorPlan, measure: Measure) -> None:
    """See that what was made of a tensor is finite.

    Raises:
        InputError: If it is not.
    """
    if measure.damaged:
        raise InputError(
            f"{tensor.name}: {measure.damaged} values are not finite as {tensor.dtype}, though the base's are.",
            hint="Write a wider dtype (--dtype float32), or look for very large scales in the adapter.",
        )
    if measure.unsound:
        raise InputError(
            f"{tensor.name}: {measure.unsound} values in the adapter's {tensor.source.name} are not finite.",
            hint="The training diverged, or the file is damaged. Use an earlier adapter.",
        )


def _descriptor(file: IO[bytes]) -> int | None:
    """Return the descriptor of a file on disk; None where there is no such thing."""
    try:
        return file.fileno()
    except (OSError, AttributeError):
        return None


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _start_writeback(descriptor: int, offset: int, size: int) -> None:
    """Have the disk begin with what was written: waiting for it at the end of the file takes less time then."""
    if _LIBC is not None and hasattr(_LIBC, "sync_file_range"):
        _LIBC.sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)
