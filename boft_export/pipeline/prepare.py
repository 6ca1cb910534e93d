"""All that is checked before a weight is read: what a dry run does, and what a merge begins with."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from boft_export.checkpoint import DTYPE_OF_NAME, check_output
from boft_export.checkpoint.places import AnyPath, lies_in, parse_path
from boft_export.errors import AccessError, ResourceError, UsageError, raise_for_errors
from boft_export.pipeline.memory import MemoryPlan, default_jobs, is_remote, plan_memory, remote_bytes
from boft_export.pipeline.options import ENGINES, MergeOptions, RunOptions
from boft_export.pipeline.torch_need import needs_torch
from boft_export.pipeline.undo import CONFIG_NAME
from boft_export.planning import FoldPlan, make_plan
from boft_export.planning.inputs import Ref, Sources
from boft_export.planning.model import SideFile
from boft_export.planning.sizes import parse_size
from boft_export.planning.strength import Course, Interpolation


@dataclass(frozen=True)
class Prepared:
    """A run that can begin.

    Attributes:
        plan: What will be done.
        course: How far each output goes.
        output: Where.
        memory: How memory is divided.
        jobs: Threads that read, fold and write.
    """

    plan: FoldPlan
    course: Course
    output: AnyPath
    memory: MemoryPlan
    jobs: int


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
    checkpoint, opened = (sources or Sources()).pair(base, _refs(None, adapters))
    if dtype is not None and dtype not in DTYPE_OF_NAME:
        raise UsageError(f"dtype {dtype} is not one of {', '.join(DTYPE_OF_NAME)}.")
    max_bytes = parse_size(max_shard_size) if max_shard_size is not None else None
    return make_plan(checkpoint, opened, dtype=DTYPE_OF_NAME[dtype] if dtype else None, max_shard_bytes=max_bytes)


def prepare(
    base: Ref | None,
    adapters: Ref | Sequence[Ref],
    output: Ref,
    interpolation: Interpolation,
    options: RunOptions,
    device_type: str,
    *,
    torch: bool = False,
) -> Prepared:
    """Check all that headers and options can show.

    Args:
        base: The base checkpoint; None for the one the adapter names.
        adapters: One adapter or several, in the order in which they apply.
        output: The folder to write.
        interpolation: How far to go.
        options: How it is done.
        device_type: ``cpu`` or ``cuda``.
        torch: It is loaded whatever there is to do.

    Raises:
        UsageError: If an argument can't be understood, or ``output`` may not be written.
        InputError: If inputs don't fit together or are damaged.
        AccessError: If the Hub or the file system fails.
        ResourceError: If memory does not suffice.
    """
    check_options(output, options)
    plan = plan_merge(
        base, adapters, dtype=options.dtype, max_shard_size=options.max_shard_size, sources=options.sources
    )
    keep_off_inputs(parse_path(output), plan, base, adapters)
    raise_for_errors(plan.notices, "the adapter can't be merged into this base")
    course = interpolation.course(plan)
    plan = replace(plan, notices=(*interpolation.notices(plan), *plan.notices))
    reversible = is_reversible(options)
    if reversible and plan.edits and plan.base.config_text is not None:
        kept = SideFile(PurePosixPath(CONFIG_NAME), text=plan.base.config_text)
        plan = replace(plan, side_files=(*plan.side_files, kept))
    # A worker of Ray's is as large without torch as this process with it.
    torch = torch or reversible or options.engine == "ray"
    torch = torch or needs_torch(plan, course, device_type, options.compute_dtype)
    return fit_memory(plan, course, output, options, device_type, way_back=reversible, torch=torch)


def is_reversible(options: RunOptions) -> bool:
    """Tell whether what undoes the run is written too."""
    return isinstance(options, MergeOptions) and options.reversible


def check_options(output: Ref, options: RunOptions) -> None:
    """Check what can be checked without the inputs.

    Raises:
        UsageError: If an option can't be understood, or ``output`` may not be written.
    """
    check_output(parse_path(output), overwrite=options.overwrite)
    _check_engine(options)
    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"{options.jobs} jobs can't do anything.", hint="Give --jobs 1 or more.")
    if options.max_memory is not None:
        parse_size(options.max_memory)
    if is_reversible(options) and options.dtype is not None:
        raise UsageError(
            "a merge into another dtype is not reversible: most of the base's bits are lost in it.",
            hint="Leave --dtype out, or merge without --reversible.",
        )


def _check_engine(options: RunOptions) -> None:
    if options.engine not in ENGINES:
        raise UsageError(f"engine {options.engine} is not one of {', '.join(ENGINES)}.")
    if options.engine == "ray" and find_spec("ray") is None:
        raise UsageError("the engine ray needs a package that is not installed.", hint='pip install "boft-export[ray]"')
    if options.ray_address is not None and options.engine != "ray":
        raise UsageError("there is a Ray address, but the engine is local.", hint="Add --engine ray.")


def fit_memory(
    plan: FoldPlan,
    course: Course,
    output: Ref,
    options: RunOptions,
    device_type: str,
    *,
    way_back: bool = False,
    torch: bool = True,
    beside: int = 0,
) -> Prepared:
    """Return a run that can begin, on as many threads as memory has room for.

    Args:
        plan: What will be done.
        course: How far each output goes.
        output: The folder to write.
        options: How it is done.
        device_type: ``cpu`` or ``cuda``.
        way_back: Each fold is undone too.
        torch: It is loaded.
        beside: Bytes that whoever takes the results needs.

    Raises:
        ResourceError: If memory does not suffice.
    """
    jobs = options.jobs if options.jobs is not None else default_jobs(remote=is_remote(plan))
    limit = parse_size(options.max_memory) if options.max_memory is not None else None
    place = parse_path(output)
    divide = partial(plan_memory, plan, course, limit, device=device_type, way_back=way_back, torch=torch)
    while True:
        try:
            remote = remote_bytes(plan, course, place, jobs, reversible=is_reversible(options))
            memory = divide(jobs=jobs, beside=beside + remote)
            return Prepared(plan, course, place, memory, jobs)
        except ResourceError:
            # Fewer threads take less memory; how many was not asked for.
            if options.jobs is not None or jobs == 1:
                raise
            jobs -= 1


def check_further_file(
    file: Path, ready: Prepared, base: Ref | None, adapters: Sequence[Ref], others: Iterable[Path] = ()
) -> None:
    """Refuse a file, to be written after a run, that is or lies in an input or the output, or can't be made.

    Args:
        file: The file.
        ready: The run.
        base: Its base.
        adapters: Its adapters.
        others: Further files that are read.

    Raises:
        UsageError: If it may not be written.
        AccessError: If its folder can't be made or written to.
    """
    keep_off_inputs(file, ready.plan, base, adapters)
    place = file.resolve()
    if place in {p.resolve() for p in (*ready.plan.input_files().values(), *others)}:
        raise UsageError(f"{file} is an input, and inputs are never written to.", hint="Choose another file.")
    if lies_in(place, ready.output):
        raise UsageError(f"{file} lies in the output {ready.output}.", hint="Choose a place beside it.")
    folder = next(p for p in place.parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise AccessError(f"{file} can't be written: {folder} is no folder that this user may write to.")


def _refs(base: Ref | None, adapters: Ref | Sequence[Ref]) -> list[Ref]:
    """Return all references in one list."""
    several = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    return several if base is None else [base, *several]


def keep_off_inputs(output: AnyPath, plan: FoldPlan, base: Ref | None, adapters: Ref | Sequence[Ref]) -> None:
    """Refuse an output that is, holds, or lies in an input's folder: inputs are never written to.

    Of an input that was given as one file only the file is the input, so beside it is free.

    Raises:
        UsageError: If it is.
    """
    named = [parse_path(r) for r in _refs(base, adapters)]
    shared = {p.parent.resolve() for p in named if p.is_file()}
    target = output.resolve()
    for name, folder in (("base", plan.base.root), *(("adapter", a.root) for a in plan.adapters)):
        root = folder.resolve()
        if lies_in(root, target) or (lies_in(target, root) and root not in shared):
            raise UsageError(
                f"{output} would write into the {name}'s folder {folder}.", hint="Choose a folder apart from both."
            )
