"""Merging: from references to a finished folder."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from boft_export.checkpoint import Staging, free_bytes
from boft_export.checkpoint.staging import file_system_errors
from boft_export.errors import (
    CheckFailedError,
    DamagedFileError,
    InputError,
    Level,
    Notice,
    ResourceError,
    UsageError,
    raise_for_errors,
)
from boft_export.pipeline.engine import Engine, Progress, RunResult, TensorResult, run_plan
from boft_export.pipeline.layers import inspect_values
from boft_export.pipeline.manifest import MANIFEST_NAME, dump, manifest
from boft_export.pipeline.model_card import card_metadata, model_card
from boft_export.pipeline.prepare import prepare
from boft_export.pipeline.torch_io import resolve_devices
from boft_export.planning import Action, FoldPlan
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
        CheckFailedError: If no rotated tensor differs from the base's though the adapter is trained.
        UsageError: If an argument can't be understood, or ``output`` may not be written.
        InputError: If inputs don't fit together or are damaged.
        AccessError: If the Hub or the file system fails.
        ResourceError: If memory or disk does not suffice.
    """
    if compute_dtype not in COMPUTE_DTYPES:
        raise UsageError(f"compute dtype {compute_dtype} is not one of {', '.join(COMPUTE_DTYPES)}.")
    try:
        devices = resolve_devices(device)
    except ValueError as error:
        raise UsageError(f"{error}.") from error
    ready = prepare(
        base,
        adapters,
        output,
        dtype=dtype,
        max_shard_size=max_shard_size,
        max_memory=max_memory,
        jobs=jobs,
        overwrite=overwrite,
        device_type=devices[0].type,
        sources=sources,
    )
    plan, target = ready.plan, ready.output
    values = [inspect_values(a) for a in plan.adapters]
    untrained = {(i, module) for i, (_, modules) in enumerate(values) for module in modules}
    plan = replace(plan, notices=(*(n for notices, _ in values for n in notices), *plan.notices))
    raise_for_errors(plan.notices, "the adapter can't be merged into this base")

    settings: dict[str, Any] = {
        "dtype": dtype or "keep",
        "compute_dtype": compute_dtype,
        "device": devices[0].type,
        "max_shard_size": parse_size(max_shard_size) if max_shard_size is not None else None,
        "torch": torch.__version__,
    }
    fingerprint = _fingerprint(plan, settings)
    # A card that can't be made must not cost the work of a run.
    card = card_metadata(plan)
    staging = Staging(target, fingerprint, resume=resume, overwrite=overwrite)
    try:
        _check_disk(plan, staging)
        engine = Engine(devices, COMPUTE_DTYPES[compute_dtype], ready.jobs, ready.memory)
        run = run_plan(plan, staging, engine, progress)
        _check_inputs(plan, fingerprint, settings)
        plan = replace(plan, notices=(*plan.notices, *_check_effect(plan, run, untrained)))
        record = manifest(plan, run, settings)
        _write_side_files(plan, staging, dump(record), model_card(plan, card))
        staging.publish()
    except (InputError, CheckFailedError):
        # Another run over the same inputs would end the same.
        staging.discard()
        raise
    except BaseException:
        # What is finished stays for --resume.
        staging.keep()
        raise
    if staging.discarded:
        # Only said here: the output's bytes must not depend on what was before.
        message = "the finished files of an earlier run were discarded"
        notice = Notice(Level.WARNING, "started-over", str(output), message, "Give --resume to take them over.")
        plan = replace(plan, notices=(*plan.notices, notice))
    return MergeResult(target, plan, run.tensors, run.resumed, record)


def _fingerprint(plan: FoldPlan, settings: dict[str, Any]) -> str:
    return plan.fingerprint({**settings, "version": __version__})


def _check_inputs(plan: FoldPlan, fingerprint: str, settings: dict[str, Any]) -> None:
    """Fail where an input was written to during the run: what was read of it may be of two minds."""
    if _fingerprint(plan, settings) != fingerprint:
        raise DamagedFileError("an input file changed while it was read.", hint="Run again once nothing writes to it.")


def _check_disk(plan: FoldPlan, staging: Staging) -> None:
    side = sum(f.source.stat().st_size for f in plan.side_files if f.source is not None)
    needed = side + sum(s.nbytes for s in plan.shards if s.name not in staging.done)
    free = free_bytes(staging.root)
    if needed > free:
        raise ResourceError(
            f"{staging.output} needs {needed:,} bytes of disk, {free:,} are free.",
            hint="Free some space, or choose another -o.",
        )


def _check_effect(plan: FoldPlan, run: RunResult, untrained: Collection[tuple[int, str]]) -> list[Notice]:
    """Note trained layers that changed nothing, as their effect was lost in rounding; fail where all were.

    Args:
        plan: What was to be done.
        run: What was done.
        untrained: Layers that were to change nothing, each by its adapter's number and its module.
    """
    trained = lost = 0
    first = ""
    for result in run.tensors:
        measure = result.measure
        # Of zeros a rotation makes zeros: nothing is lost there.
        if result.plan.action is not Action.FOLD or measure is None or not measure.source:
            continue
        if all((s.adapter, s.layer.module) in untrained for s in result.plan.steps):
            continue
        trained += 1
        if not measure.changed:
            lost += 1
            first = first or result.plan.name
    if not lost:
        return []
    hint = "Write a wider dtype: --dtype float32."
    if lost == trained and not (plan.count(Action.REPLACE) or plan.count(Action.ADD)):
        raise CheckFailedError(
            f"the merge changed no element of {lost} rotated tensors: the adapter's effect is below the output's "
            "precision.",
            hint=hint,
        )
    message = (
        f"{lost} of {trained} tensors with trained rotations are as in the base: the effect is below the output's "
        f"precision; the first: {first}"
    )
    return [Notice(Level.WARNING, "lost-effect", "", message, hint)]


def _write_side_files(plan: FoldPlan, staging: Staging, manifest_text: str, card: str) -> None:
    for side in plan.side_files:
        with staging.write(str(side.name)) as file:
            if side.source is not None:
                with file_system_errors(side.source), side.source.open("rb") as source:
                    shutil.copyfileobj(source, file)
            else:
                file.write((side.text or "").encode())
    for name, text in ((MANIFEST_NAME, manifest_text), ("README.md", card)):
        with staging.write(name) as file:
            file.write(text.encode())
