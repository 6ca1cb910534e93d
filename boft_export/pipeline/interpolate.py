"""Interpolating: from references to finished folders, some of the way from base to tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from boft_export.checkpoint.places import AnyPath
from boft_export.linalg.path import InterpolationPath
from boft_export.pipeline.engine import TensorResult
from boft_export.pipeline.options import Progress, RunOptions
from boft_export.pipeline.run import run
from boft_export.planning import FoldPlan
from boft_export.planning.alphas import Alpha, AlphaMap
from boft_export.planning.inputs import Ref, Sources
from boft_export.planning.strength import Course, Strength, interpolation


@dataclass(frozen=True)
class InterpolatedOutput:
    """One finished checkpoint.

    Attributes:
        folder: Where it is.
        strength: How far it goes.
        tensors: What was done to each tensor, and measured.
        manifest: The content of the folder's ``boft_export.json``.
    """

    folder: AnyPath
    strength: Strength
    tensors: tuple[TensorResult, ...]
    manifest: dict[str, Any]


@dataclass(frozen=True)
class InterpolationResult:
    """A finished interpolation.

    Attributes:
        output: The folder, or that of the folders of a sweep.
        plan: What was planned, with all notices.
        course: The path, and how far each output goes.
        outputs: The checkpoints, in the order of their alphas.
        resumed: Weight files taken over from a killed run.
    """

    output: AnyPath
    plan: FoldPlan
    course: Course
    outputs: tuple[InterpolatedOutput, ...]
    resumed: tuple[str, ...]


def interpolate(
    base: Ref | None,
    adapters: Ref | Sequence[Ref],
    output: Ref,
    alpha: Alpha | None = None,
    *,
    alphas: Sequence[Alpha] | None = None,
    path: InterpolationPath | str = "geodesic",
    alpha_map: AlphaMap | None = None,
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
) -> InterpolationResult:
    """Write a checkpoint that goes ``alpha`` of the way from base (0) to tuned (1), or one for each of ``alphas``.

    At 0 the tensors are the base's bytes, at 1 those of ``merge``, on every path. Scales go as s^alpha, or as
    1 + alpha (s - 1) where s <= 0 and on the path ``linear``; replaced tensors and biases go linearly. Beyond [0, 1]
    the path is extrapolated. A sweep reads the base once.

    Args:
        base: The base checkpoint: a local path or a Hub id; None for the one the adapter names.
        adapters: One adapter or several, in the order in which they apply.
        output: The folder to write; it appears only when it is complete.
        alpha: How far to go, one number for all adapters or one for each; written to ``output`` itself.
        alphas: A sweep in place of ``alpha``: each is written to a folder of its own, ``output/alpha-0.25``.
        path: ``geodesic``, ``factorwise``, ``cayley``, ``truncate`` or ``linear``, see ``interpolate_rotation``.
        alpha_map: Glob patterns over the output's tensor names, each with its own alpha; the last match wins. What none
            matches goes as far as ``alpha``, or all the way without one.
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

    Raises:
        CheckFailedError: If an output at 1 does not differ from the base though the adapter is trained.
        UsageError: If an argument can't be understood, or ``output`` may not be written.
        InputError: If inputs don't fit together or are damaged, or a pattern of ``alpha_map`` matches nothing.
        AccessError: If the Hub or the file system fails.
        ResourceError: If memory or disk does not suffice.
    """
    request = interpolation(alpha, alphas, path, alpha_map)
    options = RunOptions(
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
    )
    done = run("interpolate", base, adapters, output, request, options)
    outputs = tuple(
        InterpolatedOutput(done.output / o.variant.folder, o.variant.strength, o.tensors, record)
        for o, record in zip(done.outputs, done.manifests, strict=True)
    )
    return InterpolationResult(done.output, done.plan, done.course, outputs, done.resumed)
