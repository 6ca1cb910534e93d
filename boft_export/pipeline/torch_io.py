"""Byte ranges on disk as torch tensors and back."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from boft_export.checkpoint import FLOAT_DTYPES, TensorRef
from boft_export.pipeline.devices import Device

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, torch_name) for name, torch_name in FLOAT_DTYPES.items()}
# By the names that options have.
DTYPE_NAMED: dict[str, torch.dtype] = {FLOAT_DTYPES[name]: dtype for name, dtype in TORCH_DTYPES.items()}


def read_bytes(ref: TensorRef, start: int, stop: int, *, pinned: bool = False) -> Tensor:
    """Return bytes ``start`` to ``stop`` of a tensor, uint8; in page-locked memory where a GPU is to fetch them."""
    buffer = torch.empty(stop - start, dtype=torch.uint8, pin_memory=pinned)
    ref.read_into(as_bytes(buffer), start)
    return buffer


def read_tensor(ref: TensorRef) -> Tensor:
    """Return a whole float tensor in float64."""
    return read_bytes(ref, 0, ref.nbytes).view(TORCH_DTYPES[ref.dtype]).view(ref.shape).to(torch.float64)


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def as_tensor(data: NDArray[np.uint8], dtype: str) -> Tensor:
    """Return bytes as a flat tensor of ``dtype``, without a copy."""
    return torch.from_numpy(data).view(TORCH_DTYPES[dtype])


def torch_device(device: Device) -> torch.device:
    """Return torch's own device."""
    return torch.device(str(device))
