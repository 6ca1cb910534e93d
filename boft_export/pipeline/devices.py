"""Where to compute, by name: known without loading torch where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# What the drivers of Linux, of integrated boards, and of Windows' Linux put there.
_DRIVERS = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/dxg", "/dev/kfd")


@dataclass(frozen=True)
class Device:
    """A device.

    Attributes:
        type: ``cpu`` or ``cuda``.
        index: Which of its type; None for the CPU.
    """

    type: str
    index: int | None = None

    def __str__(self) -> str:
        """Return the name that torch gives it."""
        return self.type if self.index is None else f"{self.type}:{self.index}"


CPU = Device("cpu")


def resolve_devices(name: str) -> tuple[Device, ...]:
    """Return the devices that ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``cuda:all`` stands for.

    Raises:
        ValueError: If there is no such device here.
    """
    if name == "cpu":
        return (CPU,)
    count = _cuda_devices()
    if name == "auto" and not count:
        return (CPU,)
    if name in {"auto", "cuda"} and count:
        return (Device("cuda", 0),)
    if name == "cuda:all" and count:
        return tuple(Device("cuda", i) for i in range(count))
    kind, _, index = name.partition(":")
    if kind == "cuda" and index.isdigit() and int(index) < count:
        return (Device("cuda", int(index)),)
    raise ValueError(f"device {name} is not here: found cpu" + "".join(f", cuda:{i}" for i in range(count)))


def _cuda_devices() -> int:
    if not any(Path(p).exists() for p in _DRIVERS):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
