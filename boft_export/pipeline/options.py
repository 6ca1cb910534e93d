"""How a run is done: the options that all verbs which write a checkpoint share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from boft_export.planning.inputs import Sources

# Called with bytes done, bytes in all, and what they belong to.
Progress = Callable[[int, int, str], None]
# What may run a plan.
ENGINES = ("local", "ray")


@dataclass(frozen=True)
class RunOptions:
    """How a run is done.

    Attributes:
        dtype: The output's dtype: ``float32``, ``float16``, ``bfloat16``; None keeps the base's.
        compute_dtype: ``float64``, after which each element is rounded once, or ``float32``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``cuda:all``.
        max_shard_size: The largest file of the output, as ``5GB``; None keeps the base's files.
        max_memory: Bytes that the whole process may take, as ``700MiB``.
        jobs: Threads that read, fold and write; by default one for each core.
        resume: Go on with a killed run.
        overwrite: Replace the output where it exists, in one step at the end.
        sources: Where inputs come from.
        progress: Called with bytes written, bytes in all, and the tensor's name.
        engine: ``local`` for this process, or ``ray`` for the workers of a Ray cluster, a weight file each; of each
            worker ``max_memory`` and ``jobs`` hold, and ``device`` is ``cpu`` or ``cuda``.
        ray_address: ``auto``, ``host:port`` or ``ray://host:port``; None for what ``RAY_ADDRESS`` says, or a cluster on
            this machine for as long as the run takes.
    """

    dtype: str | None = None
    compute_dtype: str = "float64"
    device: str = "auto"
    max_shard_size: str | int | None = None
    max_memory: str | int | None = None
    jobs: int | None = None
    resume: bool = False
    overwrite: bool = False
    sources: Sources | None = None
    progress: Progress | None = None
    engine: str = "local"
    ray_address: str | None = None


@dataclass(frozen=True)
class MergeOptions(RunOptions):
    """How a merge is done.

    Attributes:
        reversible: Write beside the weights what undoing the merge would miss of the base.
    """

    reversible: bool = False
