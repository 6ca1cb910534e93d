"""ONNX Runtime: which one is installed, and graphs run in it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from boft_export.errors import Level, Notice, ResourceError, UsageError

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_FLOATS = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16}
# onnx's number for bfloat16, which numpy doesn't have.
_BFLOAT16 = 16
_PACKAGES = ("onnxruntime", "onnxruntime-gpu")
_BOTH = (
    "onnxruntime and onnxruntime-gpu are both installed: one overwrites the other's files, and removing either breaks "
    "both"
)


def runtime_conflict() -> str | None:
    """Return what is wrong with the installed runtimes; None if nothing is."""
    return _BOTH if len(_installed()) > 1 else None


def runtime_notices() -> list[Notice]:
    """Warn of what is wrong with the installed runtimes."""
    told = runtime_conflict()
    return [Notice(Level.WARNING, "two-runtimes", "", told, "Remove both, and install one.")] if told else []


def check_installed() -> None:
    """See that graphs can be run.

    Raises:
        UsageError: If ONNX Runtime is not installed.
    """
    _runtime()


def has_cuda() -> bool:
    """Tell whether the installed runtime knows CUDA; that it can be used here shows when a graph is loaded."""
    return _CUDA in _runtime().get_available_providers()


def check_runs(kind: str) -> None:
    """See that graphs of a kind can be run here at all.

    Raises:
        UsageError: If not.
    """
    if kind == "bfloat16" and not has_cuda():
        raise UsageError(
            "ONNX Runtime computes in bfloat16 with CUDA only, so this graph could not be proven here.",
            hint="Export with --dtype float32, or where onnxruntime-gpu and a GPU are.",
        )


def _runtime() -> Any:  # noqa: ANN401  # onnxruntime is untyped here
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(
            f"graphs can't be run without ONNX Runtime: {error}.", hint='pip install "boft-export[onnx]"'
        ) from error
    return onnxruntime


def _installed() -> list[str]:
    found = []
    for package in _PACKAGES:
        try:
            version(package)
        except PackageNotFoundError:
            continue
        found.append(package)
    return found


class Session:
    """A graph in ONNX Runtime.

    Weights stay where they are on disk: they are mapped, and not copied into a layout of the runtime's own.

    Args:
        path: The graph.
        device: ``cpu`` or ``cuda``; where CUDA can't be had, the runtime falls back to the CPU.
        fold_constants: Let the runtime compute what is constant while it loads the graph, as it does by default. What
            it so makes of weights, such as the transpose of a tied embedding, is in memory.

    Raises:
        UsageError: If ONNX Runtime is not installed.
        ResourceError: If memory does not suffice.
        RuntimeError: If it can't load the graph.
    """

    def __init__(self, path: Path, device: str = "cpu", *, fold_constants: bool = True) -> None:
        runtime = _runtime()
        options = runtime.SessionOptions()
        options.add_session_config_entry("session.disable_prepacking", "1")
        # What activations took goes back to the system after each run.
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 4
        # Where several threads share a machine's few cores, more of them than cores only wait for each other.
        options.intra_op_num_threads = torch.get_num_threads()
        wanted: list[Any] = [_CPU]
        if device == "cuda" and has_cuda():
            # TF32 has the bits of a float16.
            wanted.insert(0, (_CUDA, {"use_tf32": "0"}))
        left_out = [] if fold_constants else ["ConstantFolding"]
        try:
            self._session = runtime.InferenceSession(path, options, providers=wanted, disabled_optimizers=left_out)
        except MemoryError as error:
            raise ResourceError(f"memory does not suffice to load {path.name} in ONNX Runtime.") from error
        self.inputs = {i.name: i for i in self._session.get_inputs()}
        self.outputs = [o.name for o in self._session.get_outputs()]

    @property
    def providers(self) -> list[str]:
        """The execution providers that really serve the graph: ONNX Runtime falls back without a word."""
        return list(self._session.get_providers())

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph on those of the named inputs that it has, floating-point ones in the dtype that it takes."""
        known = {n: t for n, t in inputs.items() if n in self.inputs}
        fed = {n: _to_runtime(t.detach().to(_FLOATS.get(self.inputs[n].type, t.dtype))) for n, t in known.items()}
        found = self._session.run_with_ort_values(self.outputs, fed)
        return dict(zip(self.outputs, map(_from_runtime, found), strict=True))


def _to_runtime(tensor: Tensor) -> Any:  # noqa: ANN401  # onnxruntime is untyped here
    value = _runtime().OrtValue
    flat = tensor.contiguous()
    if tensor.dtype is torch.bfloat16:
        return value.ortvalue_from_numpy_with_onnx_type(flat.view(torch.int16).numpy(), _BFLOAT16)
    return value.ortvalue_from_numpy(flat.numpy())


def _from_runtime(value: Any) -> Tensor:  # noqa: ANN401  # as above
    if value.data_type() == "tensor(bfloat16)":
        bits: Tensor = torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())  # noqa: SLF001  # numpy has no bfloat16
        return bits.cpu()
    return torch.from_numpy(np.ascontiguousarray(value.numpy()))
