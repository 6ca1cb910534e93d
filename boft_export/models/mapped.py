"""Weights that stay on disk: tensors mapped from the files they lie in, which take no memory of the process's own."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from boft_export.checkpoint import TensorRef
from boft_export.checkpoint.staging import file_system_errors
from boft_export.checkpoint.tensors import FileBytes
from boft_export.errors import AccessError, DamagedFileError
from boft_export.models.loading import read_run, read_whole

_CHUNK = 1 << 20


class MappedWeights:
    """Reads tensors in float32, as ``read_whole`` does, without holding them; a context.

    What is float32 in its file is mapped there. Anything else is written once into a scratch file without a name, and
    mapped from it. The inputs are never written to: whoever changes such a tensor gets pages of the process's own.

    Args:
        folder: Where the scratch file takes its space.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, mmap.mmap] = {}
        with file_system_errors(folder):
            self._scratch = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed at the context's end

    def read(self, ref: TensorRef) -> Tensor:
        """Return a tensor, in float32 where it holds floating-point numbers.

        Raises:
            CannotTellError: If its dtype is none that models are run in.
            ResourceError: If the disk is full.
        """
        if ref.dtype == "F32" and ref.num_elements and isinstance(ref.source, FileBytes) and not ref.source.offset % 4:
            whole = self._map(ref.source.path)
            if ref.source.offset + ref.nbytes > len(whole):
                raise DamagedFileError(f"{ref.source.path} is truncated or was changed.")
            return torch.frombuffer(whole, dtype=torch.float32, count=ref.num_elements, offset=ref.source.offset).view(
                ref.shape
            )
        if not read_run(ref, 0, 0).is_floating_point() or not ref.num_elements:
            return read_whole(ref)
        target = self.room(ref.shape)
        flat = target.view(-1)
        for start in range(0, ref.num_elements, _CHUNK):
            stop = min(start + _CHUNK, ref.num_elements)
            flat[start:stop] = read_run(ref, start, stop)
        return target

    def room(self, shape: tuple[int, ...]) -> Tensor:
        """Return a float32 tensor in the scratch file, to be filled.

        Raises:
            ResourceError: If the disk is full.
        """
        start = os.fstat(self._scratch.fileno()).st_size
        nbytes = torch.Size(shape).numel() * torch.float32.itemsize
        if not nbytes:
            return torch.empty(shape)
        # Maps begin at page boundaries.
        size = -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        with file_system_errors(self._folder):
            os.posix_fallocate(self._scratch.fileno(), start, size)
            part = mmap.mmap(self._scratch.fileno(), size, offset=start)
        return torch.frombuffer(part, dtype=torch.float32, count=nbytes // 4).view(shape)

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._files:
            try:
                with path.open("rb") as file:
                    self._files[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError as error:
                raise AccessError(f"cannot read {path}: {error.strerror or error}") from error
        return self._files[path]

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the files; a map stays as long as a tensor in it."""
        self._files.clear()
        self._scratch.close()
