"""ONNX Runtime: which one is installed, and graphs run in it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from boft_export.errors import ResourceError, UsageError

_PACKAGES = ("onnxruntime", "onnxruntime-gpu")
_BOTH = (
    "onnxruntime and onnxruntime-gpu are both installed: one overwrites the other's files, and removing either breaks "
    "both"
)


def runtime_conflict() -> str | None:
    """Return what is wrong with the installed runtimes; None if nothing is."""
    return _BOTH if len(_installed()) > 1 else None


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
        device: ``cpu`` or ``cuda``.

    Raises:
        UsageError: If ONNX Runtime is not installed.
        RuntimeError: If it can't load the graph.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UsageError(
                f"graphs can't be run without ONNX Runtime: {error}.", hint='pip install "boft-export[onnx]"'
            ) from error
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.log_severity_level = 4
        wanted = ["CPUExecutionProvider"]
        if device == "cuda":
            wanted.insert(0, "CUDAExecutionProvider")
        # Where several threads share a machine's few cores, more of them than cores only wait for each other.
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=wanted)
        except MemoryError as error:
            raise ResourceError(f"memory does not suffice to load {path.name} in ONNX Runtime.") from error
        self.inputs = {i.name: i for i in self._session.get_inputs()}
        self.outputs = [o.name for o in self._session.get_outputs()]

    @property
    def providers(self) -> list[str]:
        """The execution providers that really serve the graph: ONNX Runtime falls back without a word."""
        return list(self._session.get_providers())

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph on those of the named inputs that it has."""
        fed: dict[str, Any] = {n: t.detach().contiguous().numpy() for n, t in inputs.items() if n in self.inputs}
        found = self._session.run(self.outputs, fed)
        return {n: torch.from_numpy(np.ascontiguousarray(v)) for n, v in zip(self.outputs, found, strict=True)}
