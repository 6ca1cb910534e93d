"""Quantising finished graphs, by ONNX Runtime's own tools, which load the model."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import onnx
import onnx_ir as ir

from boft_export.errors import InputError
from boft_export.models.loading import model_errors
from boft_export.onnx.graph_file import save_whole
from boft_export.onnx.limits import graph_kind
from boft_export.onnx.variant import Quantize

# Elements that share a scale: with fewer the error is less, and the file is hardly larger.
_BLOCK = 32
# Products are taken in 8-bit integers, which is faster, and changes results by less than the weights' own error.
_IN_INT8 = 4


def quantize_graphs(folder: Path, kind: Quantize, scratch: Path) -> dict[str, int]:
    """Put quantised graphs in the place of a folder's float32 ones; return their files, each with its nodes.

    Only what weights are multiplied with is quantised: embeddings, and heads tied to them, stay as they are.

    Raises:
        InputError: If nothing in them can be quantised, or the library fails.
        ResourceError: If memory does not suffice.
    """
    made = scratch / "quantized"
    made.mkdir()
    nodes = {}
    for path in sorted(folder.glob("*.onnx")):
        with model_errors(InputError, f"{path.name} can't be quantised to {kind}"), _quiet():
            metadata = dict(ir.load(path).metadata_props)
            model = ir.from_proto(_QUANTIZERS[kind](path, made))
        nodes[path.name] = save_whole(model, made / path.name, metadata)
        if graph_kind(made / path.name) != kind:
            raise InputError(f"nothing in {path.name} can be quantised to {kind}: it multiplies by no weights.")
    for path in folder.glob("*.onnx*"):
        path.unlink()
    for path in made.iterdir():
        path.rename(folder / path.name)
    made.rmdir()
    return nodes


def _to_int8(path: Path, scratch: Path) -> onnx.ModelProto:
    from onnxruntime.quantization import quantize_dynamic

    part = scratch / "int8"
    part.mkdir()
    # Not the Attention of opset 23: it is taken for ONNX Runtime's own operator of that name.
    quantize_dynamic(
        path, part / path.name, op_types_to_quantize=["MatMul"], per_channel=True, use_external_data_format=True
    )
    model = onnx.load(part / path.name)
    shutil.rmtree(part)
    return model


def _to_int4(path: Path, _: Path) -> onnx.ModelProto:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(path), bits=4, block_size=_BLOCK, accuracy_level=_IN_INT8)
    quantizer.process()
    model: onnx.ModelProto = quantizer.model.model
    return model


_QUANTIZERS: Mapping[Quantize, Callable[[Path, Path], onnx.ModelProto]] = MappingProxyType(
    {Quantize.INT8: _to_int8, Quantize.INT4: _to_int4}
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Let the library's log, which is for its makers, go nowhere."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
