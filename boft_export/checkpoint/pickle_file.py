"""PyTorch's own ``.bin`` and ``.pt`` files, without ever running what a pickle says."""

from __future__ import annotations

import bisect
import contextlib
import sys
import warnings
import zipfile
from typing import TYPE_CHECKING

from boft_export.checkpoint.dtypes import DTYPE_OF_NAME
from boft_export.checkpoint.places import AnyPath
from boft_export.checkpoint.safetensors_file import WeightFile
from boft_export.checkpoint.tensors import HeldBytes, TensorRef, bytes_at
from boft_export.errors import AccessError, BoftExportError, DamagedFileError, InputError

if TYPE_CHECKING:
    import torch

_NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "complex64": "C64", "complex128": "C128",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", **DTYPE_OF_NAME,
}  # fmt: skip
_ZIP_MAGIC = b"PK\x03\x04"
# What torch puts before the unpickler's own message: advice to load the file unsafely.
_ADVICE = ("Weights only load failed", "WeightsUnpickler error: ")


def read_pickle(path: AnyPath, name: str | None = None) -> WeightFile:
    """Read the names, dtypes, shapes and byte offsets of a state dict that ``torch.save`` wrote.

    Only ``weights_only`` loading is used, and for today's zip form no tensor data is read: loaded under fake tensors,
    torch tells each storage's offset in the file. The form before torch 1.6 has no such offsets and is held in memory,
    as is a zip whose records are compressed or of the other byte order.

    Raises:
        DamagedFileError: If the file is not a state dict that ``weights_only`` loading accepts.
        InputError: If a tensor is stored in a way that byte ranges can't serve (sparse, quantised, a strided view).
        AccessError: If the file cannot be read.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    label = name or path.name
    try:
        with path.open("rb") as file:
            zipped = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    except OSError as error:
        raise AccessError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        bounds = _record_bounds(path) if zipped else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with path.open("rb") as file, FakeTensorMode() if bounds is not None else contextlib.nullcontext():
                state = torch.load(file, map_location="cpu", weights_only=True)
    except (MemoryError, BoftExportError):
        raise
    except Exception as error:  # A damaged pickle fails in as many ways as there are instructions in it.
        raise DamagedFileError(
            f"{path} cannot be read as plain weights: {_reason(error)}",
            hint="Only files that torch.load(..., weights_only=True) accepts are read. Save it as safetensors.",
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(t, torch.Tensor) for k, t in state.items()
    ):
        raise InputError(
            f"{path} is not a flat state dict: expected names with tensors, found other values.",
            hint="Save the model's state_dict() alone, best as safetensors.",
        )
    refs = [_ref(path, label, key, tensor, bounds) for key, tensor in state.items()]
    return WeightFile(path, label, tuple(refs), {"format": "pt"})


def _reason(error: Exception) -> str:
    """Return the first line of what the unpickler says."""
    start, end = _ADVICE
    lines = (line.strip() for line in str(error).rpartition(end)[2].splitlines())
    return next((line for line in lines if line and not line.startswith(start)), type(error).__name__)


def _record_bounds(path: AnyPath) -> list[int] | None:
    """Return where the records of a zip begin, and where the last ends; None if their bytes aren't the tensors' own."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        order = next((archive.read(r) for r in records if r.filename.endswith("/byteorder")), sys.byteorder.encode())
        if order != sys.byteorder.encode() or any(r.compress_type != zipfile.ZIP_STORED for r in records):
            return None
        return sorted([*(r.header_offset for r in records), archive.start_dir])


def _ref(path: AnyPath, label: str, key: str, tensor: torch.Tensor, bounds: list[int] | None) -> TensorRef:
    dtype = _NAMES.get(str(tensor.dtype).removeprefix("torch."))
    strided = str(tensor.layout) == "torch.strided" and tensor.is_contiguous()
    if dtype is None or not strided or tensor.is_meta or tensor.is_conj() or tensor.is_neg():
        raise InputError(
            f"{path}: tensor {key} is stored as {tensor.dtype} {tensor.layout}, strides {list(tensor.stride())}: only "
            "plain contiguous tensors can be read.",
            hint="Save the checkpoint as safetensors with contiguous tensors.",
        )
    shape = tuple(tensor.shape)
    if bounds is not None:
        # torch leaves the position of each storage in the file here when loading under fake tensors.
        start: int = getattr(tensor.untyped_storage(), "_checkpoint_offset")  # noqa: B009  # private, not in all stubs
        offset = start + int(tensor.storage_offset()) * tensor.element_size()
        end = start + tensor.untyped_storage().nbytes()
        if bisect.bisect_left(bounds, start) != bisect.bisect_left(bounds, end):
            raise DamagedFileError(f"{path}: the record of tensor {key} is shorter than the tensor.")
        return TensorRef(key, dtype, shape, bytes_at(path, offset), label)
    import torch

    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return TensorRef(key, dtype, shape, HeldBytes(flat.numpy().data), label)
