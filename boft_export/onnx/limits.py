"""What a graph computes in, and how far its outputs may be from the model's."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir

from boft_export.errors import DamagedFileError


@dataclass(frozen=True)
class Limits:
    """How far outputs may differ.

    Attributes:
        largest: The largest difference of any element, as a share of the model's largest magnitude.
        cosine: The least cosine of any row.
        mean_cosine: The least mean of the rows' cosines.
        top1: The least share of rows with the same largest element.
        roundings: A larger difference passes up to so many times what the model itself is off where each of its
            operators' results is rounded to what the graph computes in.
    """

    largest: float = math.inf
    cosine: float = -1.0
    mean_cosine: float = -1.0
    top1: float = 0.0
    roundings: float = 0.0


# In float32 the difference is the rounding of arithmetic alone: 2e-7 of the largest magnitude was measured for tiny
# models, 1.5e-6 for one of 1.2 GB. In float16 weights and activations have 11 bits, and what that does to outputs is
# the model's own: right graphs of tiny models are off by 9e-4 to 9e-3, which is 0.5 to 1.5 times what rounding each
# operator's result does to the model in PyTorch. Hence four times that, or two steps if that is more; bfloat16 has 8
# bits. Quantised weights are off by their step in each element, so that single elements say little; a row's direction
# stays.
LIMITS = MappingProxyType(
    {
        "float32": Limits(largest=1e-5),
        "float16": Limits(largest=1e-3, roundings=4),
        "bfloat16": Limits(largest=8e-3, roundings=4),
        "int8": Limits(mean_cosine=0.95),
        "int4": Limits(mean_cosine=0.85),
    }
)
_FLOATS = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
_QUANTISED = {
    "MatMulNBits": "int4",
    "DynamicQuantizeLinear": "int8",
    "MatMulInteger": "int8",
    "QLinearMatMul": "int8",
    "DynamicQuantizeMatMul": "int8",
    "DequantizeLinear": "int8",
}


def graph_kind(path: Path) -> str:
    """Return what a graph computes in, one of ``LIMITS``: how it is quantised, or the dtype of most of its weights.

    Raises:
        DamagedFileError: If the file is no graph.
    """
    try:
        graph = ir.load(path).graph
    except Exception as error:
        raise DamagedFileError(f"{path} can't be read as an ONNX graph: {error}") from error
    found = {_QUANTISED[node.op_type] for node in graph if node.op_type in _QUANTISED}
    for value in graph.initializers.values():
        if value.dtype in (ir.DataType.INT4, ir.DataType.UINT4):
            found.add("int4")
    if found:
        return min(found)
    sizes: Counter[str] = Counter()
    for value in graph.initializers.values():
        if value.dtype in _FLOATS and value.shape is not None:
            sizes[_FLOATS[value.dtype]] += math.prod(d for d in value.shape if isinstance(d, int))
    return sizes.most_common(1)[0][0] if sizes else "float32"
