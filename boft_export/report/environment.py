"""What there is here: versions, processors, memory, devices."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from boft_export.native import instruction_set
from boft_export.pipeline.memory import default_jobs, usable_cores
from boft_export.planning.sizes import format_size
from boft_export.version import __version__

_PACKAGES = (
    "torch", "numpy", "safetensors", "huggingface_hub", "transformers", "peft", "onnx", "onnxruntime",
    "onnxruntime-gpu", "onnxruntime-genai", "optimum-onnx",
)  # fmt: skip


def environment() -> dict[str, dict[str, Any]]:
    """Return versions, the machine, its devices, and what is wrong with them, each as names and values."""
    import torch

    from boft_export.onnx.session import runtime_conflict

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kernel = instruction_set()
    by = f"the compiled kernel ({kernel})" if kernel else f"torch ({torch.backends.cpu.get_cpu_capability()})"
    devices = {"cpu": f"{platform.machine()}, folds with {by}"}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            devices[f"cuda:{i}"] = f"{properties.name}, {format_size(properties.total_memory)}"
    return {
        "versions": {
            "boft-export": __version__,
            "python": platform.python_version(),
            **{p: v for p in _PACKAGES if (v := _version(p))},
        },
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "cores": usable_cores(),
            "memory": format_size(memory),
            "jobs": f"{default_jobs()} (default)",
        },
        "devices": devices,
        **({"problems": {"onnxruntime": told}} if (told := runtime_conflict()) is not None else {}),
        "hub": {k: os.environ[k] for k in ("HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT") if k in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
