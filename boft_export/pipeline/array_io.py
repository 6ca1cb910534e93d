"""Tensors on disk as numpy arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from boft_export.checkpoint import TensorRef

_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_array(ref: TensorRef) -> NDArray[np.float64]:
    """Return a whole float tensor in float64.

    Raises:
        DamagedFileError: If its file ends early.
        AccessError: If its file can't be read.
    """
    data = np.empty(ref.nbytes, np.uint8)
    ref.read_into(data.data)
    values = data.view(_TYPES[ref.dtype])
    if ref.dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.reshape(ref.shape).astype(np.float64, copy=False)
