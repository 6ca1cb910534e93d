"""A run from references to finished folders: one output of a merge, or one for each alpha, all or nothing."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import IO, Any

from boft_export import native
from boft_export.checkpoint import LocalStaging, Staging, free_bytes, open_staging
from boft_export.checkpoint.cloning import can_clone
from boft_export.checkpoint.places import AnyPath, file_state
from boft_export.checkpoint.tensors import BytesInFile
from boft_export.errors import (
    AccessError,
    CheckFailedError,
    DamagedFileError,
    InputError,
    Level,
    Notice,
    ResourceError,
    UsageError,
    raise_for_errors,
)
from boft_export.pipeline.devices import CPU, Device, resolve_devices
from boft_export.pipeline.engine import COMPUTE_DTYPES, Engine, OutputResult, RunResult, run_plan
from boft_export.pipeline.layers import inspect_values
from boft_export.pipeline.manifest import dump, manifest
from boft_export.pipeline.model_card import card_metadata, model_card
from boft_export.pipeline.options import RunOptions
from boft_export.pipeline.output_file import clonable
from boft_export.pipeline.prepare import Prepared, is_reversible, prepare
from boft_export.pipeline.recorded import MANIFEST_NAME, RecordedFile
from boft_export.pipeline.torch_need import native_folds
from boft_export.pipeline.undo import UndoTensor
from boft_export.planning import Action, FoldPlan, SideFile
from boft_export.planning.inputs import Ref
from boft_export.planning.sizes import parse_size
from boft_export.planning.strength import Course, Interpolation, Strength
from boft_export.version import __version__

# One in so many bytes of weights goes into corrections, at most, of trained weights.
_CORRECTIONS = 8


@dataclass(frozen=True)
class Verb:
    """What sets one kind of run apart from the others.

    Attributes:
        name: The command, for the manifest.
        inverse: The adapters are undone.
        way_back: Each fold is undone again.
        reversible: What that misses is written.
        records: What was so written, by tensor.
        record: What one output's manifest says was asked for.
        judge: Looks at an output before it is published, given the layers that are untrained, each by its adapter's
            number and its module: returns what to note, or fails.
        told: What the manifest says besides.
        card: The model card, from the plan, its metadata, and what was asked for.
        settings: What else decides the output's bytes.
    """

    name: str
    record: Callable[[Strength], dict[str, Any]]
    judge: Callable[[RunResult, OutputResult, Collection[tuple[int, str]]], list[Notice]]
    card: Callable[[FoldPlan, str, Mapping[str, Any]], str] = model_card
    told: Callable[[RunResult, OutputResult], dict[str, Any]] = lambda *_: {}
    inverse: bool = False
    way_back: bool = False
    reversible: bool = False
    records: Mapping[str, UndoTensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes:
        output: The folder, or that of the folders.
        plan: What was planned, with all notices.
        course: How far each output goes.
        outputs: What was done in each output.
        manifests: Each output's ``boft_export.json``.
        resumed: Weight files taken over from a killed run.
    """

    output: AnyPath
    plan: FoldPlan
    course: Course
    outputs: tuple[OutputResult, ...]
    manifests: tuple[dict[str, Any], ...]
    resumed: tuple[str, ...]


def run(
    command: str,
    base: Ref | None,
    adapters: Ref | Sequence[Ref],
    output: Ref,
    interpolation: Interpolation,
    options: RunOptions,
) -> Finished:
    """Write what was asked for, all or nothing.

    Args:
        command: The verb, for the manifest.
        base: The base checkpoint: a local path or a Hub id; None for the one the adapter names.
        adapters: One adapter or several, in the order in which they apply.
        output: The folder to write.
        interpolation: How far to go, and on which path.
        options: How it is done.

    Raises:
        CheckFailedError: If no rotated tensor differs from the base's though the adapter is trained and fully applied.
        UsageError: If an argument can't be understood, or ``output`` may not be written.
        InputError: If inputs don't fit together or are damaged.
        AccessError: If the Hub or the file system fails.
        ResourceError: If memory or disk does not suffice.
    """
    devices = devices_for(options)
    ready = prepare(base, adapters, output, interpolation, options, devices[0].type)
    asked = (lambda _: {}) if command == "merge" else interpolation.record
    reversible = is_reversible(options)
    settings = {"reversible": True} if reversible else {}
    verb = Verb(command, asked, check_effect, way_back=reversible, reversible=reversible, settings=settings)
    return carry_out(verb, ready, options, devices)


def devices_for(options: RunOptions) -> tuple[Device, ...]:
    """Return the devices to compute on.

    Raises:
        UsageError: If there is no such device here, or it can't be computed so.
    """
    if options.compute_dtype not in COMPUTE_DTYPES:
        raise UsageError(f"compute dtype {options.compute_dtype} is not one of {', '.join(COMPUTE_DTYPES)}.")
    if options.engine == "ray":
        return _device_of_workers(options.device)
    try:
        return resolve_devices(options.device)
    except ValueError as error:
        raise UsageError(f"{error}.") from error


def _device_of_workers(name: str) -> tuple[Device, ...]:
    """Return what one worker of a cluster computes on: of its GPUs, if any, Ray shows it one."""
    known = {"auto": CPU, "cpu": CPU, "cuda": Device("cuda", 0), "cuda:all": Device("cuda", 0)}
    if name not in known:
        raise UsageError(f"device {name} can't be had of a Ray cluster.", hint="Use --device cuda: Ray gives out GPUs.")
    return (known[name],)


# Runs a plan, writing into a folder under construction.
_RunPlan = Callable[[FoldPlan, Course, Staging, Engine], RunResult]


@contextmanager
def _engine_of(options: RunOptions, ready: Prepared, device: Device) -> Iterator[_RunPlan]:
    """Make ready what runs a plan."""
    if options.engine == "local":
        yield partial(run_plan, progress=options.progress)
        return
    from boft_export.pipeline.ray_cluster import check_cluster, connected
    from boft_export.pipeline.ray_engine import run_on_ray

    with connected(options.ray_address):
        check_cluster(ready.plan, ready.jobs, device.type, options, ready.memory.peak)
        yield partial(run_on_ray, options=options)


def carry_out(verb: Verb, ready: Prepared, options: RunOptions, devices: tuple[Device, ...]) -> Finished:
    """Do what was prepared, all or nothing.

    Args:
        verb: What kind of run it is.
        ready: What to do.
        options: How it is done.
        devices: Where to compute.

    Raises:
        CheckFailedError: If the verb's judgement is so.
        UsageError: If ``output`` may not be written.
        InputError: If inputs are damaged.
        AccessError: If the file system fails.
        ResourceError: If memory or disk does not suffice.
    """
    with _engine_of(options, ready, devices[0]) as run_it:
        return _carry_out(verb, ready, options, devices, run_it)


def _carry_out(
    verb: Verb, ready: Prepared, options: RunOptions, devices: tuple[Device, ...], run_it: _RunPlan
) -> Finished:
    plan, course, target = ready.plan, ready.course, ready.output
    values = [inspect_values(a) for a in plan.adapters]
    untrained = {(i, module) for i, (_, modules) in enumerate(values) for module in modules}
    plan = replace(plan, notices=(*(n for notices, _ in values for n in notices), *plan.notices))
    raise_for_errors(plan.notices, "the adapter can't be merged into this base")

    settings: dict[str, Any] = {
        "dtype": options.dtype or "keep",
        "compute_dtype": options.compute_dtype,
        "device": devices[0].type,
        "max_shard_size": parse_size(options.max_shard_size) if options.max_shard_size is not None else None,
        "torch": version("torch"),
        # Sums differ between them in the last bit of a float64.
        "kernel": native.arithmetic() if native_folds(devices[0].type, options.compute_dtype) else "torch",
        **verb.settings,
    }
    further = _further_files(plan, verb)
    fingerprint = _fingerprint(plan, course, settings, further)
    # A card that can't be made must not cost the work of a run.
    card = card_metadata(plan)
    staging = open_staging(target, fingerprint, resume=options.resume, overwrite=options.overwrite)
    try:
        _check_disk(plan, course, staging, reversible=verb.reversible)
        engine = Engine(
            devices,
            options.compute_dtype,
            ready.jobs,
            ready.memory,
            inverse=verb.inverse,
            way_back=verb.way_back,
            reversible=verb.reversible,
            records=verb.records,
        )
        done = run_it(plan, course, staging, engine)
        manifests = []
        lost: list[Notice] = []
        for written in done.outputs:
            strength = written.variant.strength
            lost += (found := verb.judge(done, written, untrained))
            told = replace(plan, notices=(*plan.notices, *found))
            asked = verb.record(strength)
            files = {s.name: RecordedFile(s.nbytes, written.files[s.name]) for s in plan.shards}
            made = manifest(verb.name, told, done.inputs, written, files, {**asked, **settings})
            made |= verb.told(done, written)
            manifests.append(made)
            text = verb.card(told, card, asked)
            _write_side_files(plan, staging, written, dump(manifests[-1]), text)
        _check_inputs(plan, course, fingerprint, settings, further)
        plan = replace(plan, notices=(*plan.notices, *lost))
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
        notice = Notice(Level.WARNING, "started-over", str(target), message, "Give --resume to take them over.")
        plan = replace(plan, notices=(*plan.notices, notice))
    if staging.left is not None:
        notice = Notice(Level.WARNING, "left-behind", str(target), staging.left, "Remove it: it is of no more use.")
        plan = replace(plan, notices=(*plan.notices, notice))
    return Finished(target, plan, course, done.outputs, tuple(manifests), done.resumed)


def _further_files(plan: FoldPlan, verb: Verb) -> dict[str, AnyPath]:
    """Return what is read besides the inputs that a manifest names: side files, a base, and records that undo."""
    sources = [o.ref.source for t in plan.tensors for o in t.origins]
    paths: list[AnyPath] = [s.path for s in sources if isinstance(s, BytesInFile)]
    paths += [r.path for r in verb.records.values() if r.name is not None]
    paths += [f.source for f in plan.side_files if f.source is not None]
    named = set(plan.input_files().values())
    return {str(p.resolve()): p for p in dict.fromkeys(paths) if p not in named}


def _fingerprint(plan: FoldPlan, course: Course, settings: dict[str, Any], further: Mapping[str, AnyPath]) -> str:
    outputs = [(v.folder, v.strength.alphas, dict(v.strength.own)) for v in course.variants]
    try:
        states = {n: file_state(p) for n, p in further.items()}
    except OSError as error:
        raise AccessError(f"cannot read {error.filename}: {error.strerror or error}.") from error
    told = {**settings, "version": __version__, "path": course.path.value, "outputs": outputs, "further": states}
    return plan.fingerprint(told)


def _check_inputs(
    plan: FoldPlan, course: Course, fingerprint: str, settings: dict[str, Any], further: Mapping[str, AnyPath]
) -> None:
    """Fail where an input was written to during the run: what was read of it may be of two minds."""
    if _fingerprint(plan, course, settings, further) != fingerprint:
        raise DamagedFileError("an input file changed while it was read.", hint="Run again once nothing writes to it.")


def _check_disk(plan: FoldPlan, course: Course, staging: Staging, *, reversible: bool) -> None:
    side = sum(f.source.stat().st_size for f in plan.side_files if f.source is not None)
    needed = sum(
        side + sum(s.nbytes for s in plan.shards if v.path(s.name) not in staging.done) for v in course.variants
    )
    if reversible:
        needed += needed // _CORRECTIONS + sum(t.base.nbytes for t in plan.tensors if t.base not in (None, t.source))
    free = free_bytes(staging.output)
    if free is not None and needed > free:
        needed -= _shared_bytes(plan, course, staging)
    if free is not None and needed > free:
        raise ResourceError(
            f"{staging.output} needs {needed:,} bytes of disk, {free:,} are free.",
            hint="Free some space, or choose another -o.",
        )


def _shared_bytes(plan: FoldPlan, course: Course, staging: Staging) -> int:
    """Return how many bytes of the output will be in blocks that it shares with the base."""
    if not isinstance(staging, LocalStaging):
        return 0
    todo = [(s, v) for s in plan.shards for v in course.variants if v.path(s.name) not in staging.done]
    templates = [t for s, v in todo if (t := clonable(s, v)) is not None]
    shared = {path for path in {t.path for t in templates} if can_clone(path, staging.root)}
    return sum(t.stays for t in templates if t.path in shared)


def check_effect(_: object, written: OutputResult, untrained: Collection[tuple[int, str]]) -> list[Notice]:
    """Note trained layers that changed nothing, as their effect was lost in rounding; fail where a whole merge was.

    Args:
        written: What was done.
        untrained: Layers that were to change nothing, each by its adapter's number and its module.
    """
    strength = written.variant.strength
    trained = lost = 0
    first = ""
    for result in written.tensors:
        measure = result.measure
        # Of zeros a rotation makes zeros: nothing is lost there.
        if result.plan.action is not Action.FOLD or measure is None or not measure.source:
            continue
        alphas = strength.of(result.plan.name)
        if all(not alphas[s.adapter] or (s.adapter, s.layer.module) in untrained for s in result.plan.steps):
            continue
        trained += 1
        if not measure.changed:
            lost += 1
            first = first or result.plan.name
    if not lost:
        return []
    hint = "Write a wider dtype: --dtype float32."
    replaced = any(r.plan.action in (Action.REPLACE, Action.ADD) for r in written.tensors)
    if lost == trained and not replaced and strength.is_full:
        raise CheckFailedError(
            f"the merge changed no element of {lost} rotated tensors: the adapter's effect is below the output's "
            "precision.",
            hint=hint,
        )
    message = (
        f"{lost} of {trained} tensors with trained rotations are as in the base: the effect is below the output's "
        f"precision; the first: {first}"
    )
    subject = "" if strength.label == "1" else f"alpha {strength.label}"
    return [Notice(Level.WARNING, "lost-effect", subject, message, hint)]


def _write_side_files(plan: FoldPlan, staging: Staging, written: OutputResult, manifest_text: str, card: str) -> None:
    path = written.variant.path
    for side in plan.side_files:
        with _content(side) as source, staging.write(path(str(side.name))) as file:
            shutil.copyfileobj(source, file)
    for name, text in ((MANIFEST_NAME, manifest_text), ("README.md", card)):
        with staging.write(path(name)) as file:
            file.write(text.encode())


def _content(side: SideFile) -> IO[bytes]:
    """Open what a side file is to hold."""
    if side.source is None:
        return io.BytesIO((side.text or "").encode())
    try:
        return side.source.open("rb")
    except OSError as error:
        raise AccessError(f"cannot read {side.source}: {error.strerror or error}.") from error
