"""Merging: from references to a finished folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from boft_export.checkpoint import DTYPE_OF_NAME, Staging, check_output, free_bytes
from boft_export.checkpoint.staging import file_system_errors
from boft_export.errors import CheckFailedError, Level, Notice, ResourceError, UsageError, raise_for_errors
from boft_export.pipeline.engine import Engine, Progress, RunResult, TensorResult, run_plan
from boft_export.pipeline.layers import check_values
from boft_export.pipeline.manifest import MANIFEST_NAME, dump, manifest
from boft_export.pipeline.memory import plan_memory
from boft_export.pipeline.model_card import model_card
from boft_export.pipeline.torch_io import resolve_devices
from boft_export.planning import Action, FoldPlan, make_plan
from boft_export.planning.inputs import Ref, Sources
from boft_export.planning.sizes import parse_size
from boft_export.version import __version__

COMPUTE_DTYPES = {"float64": torch.float64, "float32": torch.float32}


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

    output: Path
    plan: FoldPlan
    tensors: tuple[TensorResult, ...]
    resumed: tuple[str, ...]
    manifest: dict[str, Any]


def plan_merge(
    base: Ref | None,
    adapters: Ref | Sequence[Ref],
    *,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    sources: Sources | None = None,
) -> FoldPlan:
    """Plan a merge from headers alone, without reading a weight or writing anything.

    Args:
        base: The base checkpoint: a local path or a Hub id; None for the one the adapter names.
        adapters: One adapter or several, in the order in which they apply.
        dtype: The output's dtype: ``float32``, ``float16``, ``bfloat16``; None keeps the base's.
        max_shard_size: The largest file of the output, as ``5GB``; None keeps the base's files.
        sources: Where inputs come from.

    Returns:
        The plan. Its ``notices`` hold every problem found.

    Raises:
        UsageError: If an argument can't be understood.
        InputError: If an input is not what it should be.
        AccessError: If an input can't be read or found.
    """
    refs = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    checkpoint, opened = (sources or Sources()).pair(base, refs)
    if dtype is not None and dtype not in DTYPE_OF_NAME:
        raise UsageError(f"dtype {dtype} is not one of {', '.join(DTYPE_OF_NAME)}.")
    max_bytes = parse_size(max_shard_size) if max_shard_size is not None else None
    return make_plan(checkpoint, opened, dtype=DTYPE_OF_NAME[dtype] if dtype else None, max_shard_bytes=max_bytes)


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
        jobs: Threads that fold; by default one less than there are cores, which are for reading and writing.
        resume: Go on with a killed run.
        overwrite: Replace ``output`` where it exists, in one step at the end.
        sources: Where inputs come from.
        progress: Called with bytes written, bytes in all, and the tensor's name.

    Raises:
        CheckFailedError: If the result equals the base though the adapter is trained.
        UsageError: If an argument can't be understood, or ``output`` may not be written.
        InputError: If inputs don't fit together or are damaged.
        AccessError: If the Hub or the file system fails.
        ResourceError: If memory or disk does not suffice.
    """
    target = Path(output)
    check_output(target, overwrite=overwrite)
    if compute_dtype not in COMPUTE_DTYPES:
        raise UsageError(f"compute dtype {compute_dtype} is not one of {', '.join(COMPUTE_DTYPES)}.")
    try:
        devices = resolve_devices(device)
    except ValueError as error:
        raise UsageError(f"{error}.") from error
    workers = jobs if jobs is not None else default_jobs()
    if workers < 1:
        raise UsageError(f"{workers} jobs can't do anything.", hint="Give --jobs 1 or more.")

    plan = plan_merge(base, adapters, dtype=dtype, max_shard_size=max_shard_size, sources=sources)
    _keep_off_inputs(target, plan)
    raise_for_errors(plan.notices, "the adapter can't be merged into this base")
    limit = parse_size(max_memory) if max_memory is not None else None
    memory = plan_memory(plan, limit, workers, devices[0].type)
    values = [n for a in plan.adapters for n in check_values(a)]
    plan = replace(plan, notices=(*values, *plan.notices))
    raise_for_errors(plan.notices, "the adapter can't be merged into this base")

    settings: dict[str, Any] = {
        "dtype": dtype or "keep",
        "compute_dtype": compute_dtype,
        "device": devices[0].type,
        "max_shard_size": parse_size(max_shard_size) if max_shard_size is not None else None,
        "torch": torch.__version__,
    }
    fingerprint = plan.fingerprint({**settings, "version": __version__})
    staging = Staging(target, fingerprint, resume=resume, overwrite=overwrite)
    try:
        _check_disk(plan, staging)
        engine = Engine(devices, COMPUTE_DTYPES[compute_dtype], workers, memory)
        run = run_plan(plan, staging, engine, progress)
        _check_effect(plan, run, values)
        record = manifest(plan, run, settings)
        _write_side_files(plan, staging, dump(record))
        staging.publish()
    except (ResourceError, KeyboardInterrupt):
        # What is finished stays for --resume.
        staging.keep()
        raise
    except BaseException:
        staging.discard()
        raise
    return MergeResult(target, plan, run.tensors, run.resumed, record)


def default_jobs() -> int:
    """Return how many threads fold: all cores but one, which reads, writes and hashes."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def _keep_off_inputs(output: Path, plan: FoldPlan) -> None:
    """Refuse an output that is, holds, or lies in an input's folder: inputs are never written to."""
    target = output.resolve()
    for name, folder in (("base", plan.base.root), *(("adapter", a.root) for a in plan.adapters)):
        root = folder.resolve()
        if target == root or root.is_relative_to(target) or target.is_relative_to(root):
            raise UsageError(
                f"{output} would write into the {name}'s folder {folder}.", hint="Choose a folder apart from both."
            )


def _check_disk(plan: FoldPlan, staging: Staging) -> None:
    side = sum(f.source.stat().st_size for f in plan.side_files if f.source is not None)
    needed = side + sum(s.nbytes for s in plan.shards if s.name not in staging.done)
    free = free_bytes(staging.root)
    if needed > free:
        raise ResourceError(
            f"{staging.output} needs {needed:,} bytes of disk, {free:,} are free.", hint="Free some space, or choose another -o."
        )


def _check_effect(plan: FoldPlan, run: RunResult, values: Sequence[Notice]) -> None:
    """Fail where a trained adapter changed nothing: its whole effect was lost in rounding."""
    folded = [r for r in run.tensors if r.plan.action is Action.FOLD]
    changed = any(r.measure is not None and r.measure.changed for r in folded)
    if not folded or changed or plan.count(Action.REPLACE) or plan.count(Action.ADD):
        return
    if any(n.code == "untrained" and n.level is Level.WARNING for n in values):
        return
    raise CheckFailedError(
        f"the merge changed no element of {len(folded)} rotated tensors: the adapter's effect is below the output's precision.",
        hint="Write a wider dtype: --dtype float32.",
    )


def _write_side_files(plan: FoldPlan, staging: Staging, manifest_text: str) -> None:
    for side in plan.side_files:
        with staging.write(str(side.name)) as file:
            if side.source is not None:
                with file_system_errors(side.source), side.source.open("rb") as source:
                    shutil.copyfileobj(source, file)
            else:
                file.write((side.text or "").encode())
    for name, text in ((MANIFEST_NAME, manifest_text), ("README.md", model_card(plan))):
        with staging.write(name) as file:
            file.write(text.encode())
