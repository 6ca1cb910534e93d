"""PyTorch's own ``.bin`` and ``.pt`` files, without ever running what a pickle says."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from boft_export.checkpoint.dtypes import DTYPE_OF_NAME
from boft_export.checkpoint.safetensors_file import WeightFile
from boft_export.checkpoint.tensors import FileBytes, HeldBytes, TensorRef
from boft_export.errors import AccessError, DamagedFileError, InputError

if TYPE_CHECKING:
    import torch

_NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "complex64": "C64", "complex128": "C128",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", **DTYPE_OF_NAME,
}  # fmt: skip


def read_pickle(path: Path, name: str | None = None) -> WeightFile:
    """Read the names, dtypes, shapes and byte offsets of a state dict that ``torch.save`` wrote.

    Only ``weights_only`` loading is used, and for today's zip form no tensor data is read: loaded under fake tensors,
    torch tells each storage's offset in the file. The form before torch 1.6 has no such offsets and is held in memory.

    Raises:
        DamagedFileError: If the file is not a state dict that ``weights_only`` loading accepts.
        InputError: If a tensor is stored in a way that byte ranges can't serve (sparse, quantised, a strided view).
        AccessError: If the file cannot be read.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    label = name or path.name
    try:
        by_ranges = zipfile.is_zipfile(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if by_ranges:
                with FakeTensorMode():
                    state = torch.load(path, map_location="cpu", weights_only=True)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise AccessError(f"cannot read {path}: {error.strerror or error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DamagedFileError(
            f"{path} cannot be read as plain weights: {str(error).splitlines()[0]}",
            hint="Only files that torch.load(..., weights_only=True) accepts are read. Save it as safetensors.",
        ) from error
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise InputError(
            f"{path} is not a flat state dict: expected names with tensors, found other values.",
            hint="Save the model's state_dict() alone, best as safetensors.",
        )
    refs = [_ref(path, label, key, tensor, by_ranges) for key, tensor in state.items()]
    return WeightFile(path, label, tuple(refs), {"format": "pt"})


def _ref(path: Path, label: str, key: str, tensor: torch.Tensor, by_ranges: bool) -> TensorRef:
    dtype = _NAMES.get(str(tensor.dtype).removeprefix("torch."))
    strided = tensor.layout.__str__() == "torch.strided" and tensor.is_contiguous()
    if dtype is None or not strided:
        raise InputError(
            f"{path}: tensor {key} is stored as {tensor.dtype} {tensor.layout}, strides {list(tensor.stride())}: only "
            "plain contiguous tensors can be read.",
            hint="Save the checkpoint as safetensors with contiguous tensors.",
        )
    shape = tuple(tensor.shape)
    if by_ranges:
        # torch leaves the position of each storage in the file here when loading under fake tensors.
        start: int = tensor.untyped_storage()._checkpoint_offset  # type: ignore[attr-defined]  # not in torch's stubs
        offset = start + int(tensor.storage_offset()) * tensor.element_size()
        return TensorRef(key, dtype, shape, FileBytes(path, offset), label)
    import torch

    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return TensorRef(key, dtype, shape, HeldBytes(memoryview(flat.numpy())), label)
