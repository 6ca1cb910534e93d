"""Merging: from references to a finished folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from boft_export.checkpoint.places import AnyPath
from boft_export.pipeline.engine import TensorResult
from boft_export.pipeline.options import MergeOptions, Progress
from boft_export.pipeline.run import run
from boft_export.planning import FoldPlan
from boft_export.planning.inputs import Ref, Sources
from boft_export.planning.strength import Interpolation


@dataclass(frozen=True)
class MergeResult:
    """A finished merge.

    Attributes:
        output: The folder.
        plan: What was planned, with all notices.
        tensors: What was done to each tensor, and measured.
        resumed: Weight files taken over from a killed run.
        manifest: The content of the folder's ``boft_export.json``.
    """

    output: AnyPath
    plan: FoldPlan
    tensors: tuple[TensorResult, ...]
    resumed: tuple[str, ...]
    manifest: dict[str, Any]


def merge(
    base: Ref | None,
    adapters: Ref | Sequence[Ref],
    output: Ref,
    *,
    dtype: str | None = None,
    compute_dtype: str = "float64",
    device: str = "auto",
    max_shard_size: str | int | None = None,
    max_memory: str | int | None = None,
    jobs: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    sources: Sources | None = None,
    progress: Progress | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    reversible: bool = False,
) -> MergeResult:
    """Fold adapters into a base checkpoint and write the result, all or nothing.

    Args:
        base: The base checkpoint: a local path or a Hub id; None for the one the adapter names.
        adapters: One adapter or several, in the order in which they apply.
        output: The folder to write; it appears only when it is complete.
        dtype: The output's dtype: ``float32``, ``float16``, ``bfloat16``; None keeps the base's.
        compute_dtype: ``float64``, after which each element is rounded once, or ``float32``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``cuda:all``.
        max_shard_size: The largest file of the output, as ``5GB``; None keeps the base's files.
        max_memory: Bytes that the whole process may take, as ``700MiB``.
        jobs: Threads that read, fold and write; by default one for each core.
        resume: Go on with a killed run.
        overwrite: Replace ``output`` where it exists, in one step at the end.
        sources: Where inputs come from.
        progress: Called with bytes written, bytes in all, and the tensor's name.
        engine: ``local``, or ``ray`` for the workers of a Ray cluster, a weight file each.
        ray_address: ``auto``, ``host:port`` or ``ray://host:port``; None for a cluster on this machine.
        reversible: Write beside the weights what undoing the merge would miss of the base, so that ``unmerge`` gives
            its bytes; takes more time and some 3 to 10 % more disk.

    Raises:
        CheckFailedError: If no rotated tensor differs from the base's though the adapter is trained.
        UsageError: If an argument can't be understood, or ``output`` may not be written.
        InputError: If inputs don't fit together or are damaged.
        AccessError: If the Hub or the file system fails.
        ResourceError: If memory or disk does not suffice.
    """
    options = MergeOptions(
        dtype=dtype,
        compute_dtype=compute_dtype,
        device=device,
        max_shard_size=max_shard_size,
        max_memory=max_memory,
        jobs=jobs,
        resume=resume,
        overwrite=overwrite,
        sources=sources,
        progress=progress,
        engine=engine,
        ray_address=ray_address,
        reversible=reversible,
    )
    done = run("merge", base, adapters, output, Interpolation(), options)
    return MergeResult(done.output, done.plan, done.outputs[0].tensors, done.resumed, done.manifests[0])
