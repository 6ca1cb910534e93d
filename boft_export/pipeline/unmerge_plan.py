"""Planning to undo a merge: the adapters in reverse order, less what they replaced, checked against what was done."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from boft_export.checkpoint import DTYPE_OF_NAME, Checkpoint, TensorRef
from boft_export.errors import InputError, Level, Notice, UsageError, raise_for_errors
from boft_export.linalg.path import InterpolationPath
from boft_export.pipeline.hashing import InputHashes
from boft_export.pipeline.options import RunOptions
from boft_export.pipeline.prepare import Prepared, check_options, fit_memory, keep_off_inputs
from boft_export.pipeline.recorded import MANIFEST_NAME, Recorded, read_recorded
from boft_export.planning import FoldPlan, SourcedAdapter, make_plan
from boft_export.planning.alphas import several
from boft_export.planning.inputs import Ref, Sources
from boft_export.planning.sizes import parse_size
from boft_export.planning.strength import Course, Interpolation

_SHOWN = 10
_UNFIT = "the adapters can't be undone in this checkpoint"


@dataclass(frozen=True)
class Brought:
    """A tensor that an adapter put into the merged checkpoint.

    Attributes:
        merged: The tensor as it is there.
        adapter: What the adapter brought.
    """

    merged: TensorRef
    adapter: TensorRef


@dataclass(frozen=True)
class UnmergePlan:
    """What undoing will do.

    Attributes:
        plan: The tensors, with the adapters in reverse order.
        interpolation: How far the adapters went, in the plan's order.
        course: The same, for the plan.
        recorded: What the merged checkpoint's manifest says; None where it has none.
        brought: What must be in the merged checkpoint if it holds these adapters.
    """

    plan: FoldPlan
    interpolation: Interpolation
    course: Course
    recorded: Recorded | None
    brought: tuple[Brought, ...]


def plan_unmerge(
    merged: Ref,
    adapters: Ref | Sequence[Ref],
    *,
    base: Ref | None = None,
    keep_replaced: bool = False,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    sources: Sources | None = None,
) -> UnmergePlan:
    """Plan to undo a merge from headers and manifest alone, without reading a weight.

    Args: see ``unmerge``.

    Raises:
        UsageError: If an argument can't be understood.
        InputError: If the checkpoint does not hold these adapters, or what they replaced can't be brought back.
        DamagedFileError: If a file is unsound.
        AccessError: If an input can't be read or found.
    """
    refs = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    if os.fspath(merged) == "-":
        raise UsageError("'-' names no merged checkpoint.", hint="boft-export unmerge MERGED ADAPTER -o OUT")
    if dtype is not None and dtype not in DTYPE_OF_NAME:
        raise UsageError(f"dtype {dtype} is not one of {', '.join(DTYPE_OF_NAME)}.")
    if base is not None and keep_replaced:
        raise UsageError("a base and keep-replaced are both given.", hint="Give one of them.")
    opener = sources or Sources()
    checkpoint, opened = opener.pair(merged, refs)
    recorded = read_recorded(checkpoint)
    interpolation, notices = _how_far(recorded, checkpoint, opened)
    # What the adapters would do to the merged checkpoint tells which of its tensors they have rotated and replaced.
    again = make_plan(checkpoint, opened)
    raise_for_errors(again.notices, _UNFIT)
    if absent := [t.name for t in again.tensors if t.base is None]:
        raise InputError(
            f"{checkpoint.name} is no merge of these adapters: it lacks {_names(absent)}, which they would have added.",
            hint="Give the folder that boft-export merge wrote.",
        )
    replaced = {t.name: t for t in again.tensors if any(o.adapter is not None for o in t.origins)}
    given: dict[str, TensorRef | None] = {}
    config_text = None
    if replaced and base is not None:
        if recorded is not None and len(opened) < len(recorded.adapters):
            raise InputError(
                "the base can't give what an adapter replaced that others were applied before.",
                hint="Undo all adapters at once, or give --keep-replaced.",
            )
        original = opener.base(base)
        given = _of_base(original, checkpoint, make_plan(original, opened))
        config_text = original.config_text
        names = [n for n in given if n in replaced]
        message = f"{len(names)} tensors that an adapter replaced are taken from it: {_names(names)}"
        notices.append(Notice(Level.INFO, "from-base", original.name, message))
    elif replaced and keep_replaced:
        message = f"{len(replaced)} tensors stay as an adapter brought them: {_names(replaced)}"
        notices.append(Notice(Level.WARNING, "kept-replaced", checkpoint.name, message))
    elif replaced:
        raise InputError(
            f"{checkpoint.name} has {len(replaced)} tensors that an adapter replaced, of which nothing of the base is "
            f"left: {_names(replaced)}.",
            hint="Take them from the base with --base BASE, or leave them as they are with --keep-replaced.",
        )
    source = _restored(checkpoint, given, config_text)
    gone = {(s.adapter, s.layer.module) for t in again.tensors if t.name in given for s in t.steps}
    stripped = [_stripped(a, {m for i, m in gone if i == number}) for number, a in enumerate(opened)]
    plan = make_plan(
        source,
        stripped[::-1],
        dtype=DTYPE_OF_NAME[dtype] if dtype else None,
        max_shard_bytes=parse_size(max_shard_size) if max_shard_size is not None else None,
    )
    # It names the base it was trained on, which a merged checkpoint is not.
    notices += [n for n in plan.notices if n.code != "other-base"]
    plan = _with_config(replace(plan, notices=tuple(notices)), config_text)
    raise_for_errors(plan.notices, _UNFIT)
    rotated = [t.name for t in plan.tensors if t.steps]
    patterns = {p: a for p, a in interpolation.alpha_map.items() if any(fnmatchcase(n, p) for n in rotated)}
    interpolation = replace(interpolation, alpha_map=patterns)
    brought = tuple(
        Brought(checkpoint.tensors[t.name], t.source)
        for t in replaced.values()
        if not t.steps and _whole_way(recorded, t.name) and t.source is not t.base
    )
    return UnmergePlan(plan, interpolation, interpolation.course(plan), recorded, brought)


def prepare_unmerge(
    merged: Ref,
    adapters: Ref | Sequence[Ref],
    output: Ref,
    options: RunOptions,
    device_type: str,
    *,
    base: Ref | None = None,
    keep_replaced: bool = False,
) -> tuple[UnmergePlan, Prepared]:
    """Check all that headers, manifest and options can show.

    Args: see ``unmerge``.

    Raises:
        As ``plan_unmerge``, and
        UsageError: If ``output`` may not be written.
        ResourceError: If memory does not suffice.
    """
    check_options(output, options)
    undo = plan_unmerge(
        merged,
        adapters,
        base=base,
        keep_replaced=keep_replaced,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        sources=options.sources,
    )
    keep_off_inputs(Path(output), undo.plan, merged, adapters)
    return undo, fit_memory(undo.plan, undo.course, output, options, device_type, way_back=True)


def _how_far(
    recorded: Recorded | None, checkpoint: Checkpoint, adapters: Sequence[SourcedAdapter]
) -> tuple[Interpolation, list[Notice]]:
    """Return how far each adapter went, the last one first, and what to note; the adapters are those recorded last.

    Raises:
        InputError: If the manifest says that they are others, or that they went where there is no way back.
    """
    if recorded is None:
        message = f"has no {MANIFEST_NAME}: it can't be told whether it holds this adapter, nor how far it went"
        return Interpolation(alphas=((1.0,) * len(adapters),)), [
            Notice(Level.WARNING, "no-manifest", checkpoint.name, message, "It is taken for a whole merge.")
        ]
    if recorded.command not in {"merge", "interpolate"}:
        raise InputError(
            f"{checkpoint.name} holds no adapter: its {MANIFEST_NAME} says that it was made by {recorded.command}.",
            hint="Give the folder that boft-export merge wrote.",
        )
    told = recorded.adapters[-len(adapters) :]
    found = [InputHashes({"": a.weights.path}).digests()[""] for a in adapters]
    if len(told) < len(found) or any(f not in t.sha256.values() for t, f in zip(told, found, strict=True)):
        ours = ", then ".join(f"{a.name} (SHA-256 {f[:16]}...)" for a, f in zip(adapters, found, strict=True))
        theirs = ", then ".join(
            f"{t.name} (SHA-256 {next((d for n, d in t.sha256.items() if not n.endswith('.json')), '')[:16]}...)"
            for t in recorded.adapters
        )
        raise InputError(
            f"{checkpoint.name} was not made with these adapters: found {ours}; its {MANIFEST_NAME} says {theirs}.",
            hint="Give the adapters it was made with, in the order in which they were applied, or the last of them.",
        )
    count = len(adapters)
    last = tuple(several(recorded.alphas)[-count:][::-1])
    own = {p: several(a)[-count:][::-1] for p, a in recorded.alpha_map.items()}
    apart = {a for alphas in (last, *own.values()) for a in alphas} - {0.0, 1.0}
    if recorded.path is InterpolationPath.LINEAR and apart:
        raise InputError(
            f"{checkpoint.name} was interpolated on the path linear, where weights before and after the rotation are "
            "mixed: no rotation undoes that.",
            hint="Start from the base.",
        )
    return Interpolation(recorded.path, (last,), alpha_map=own), []


def _whole_way(recorded: Recorded | None, name: str) -> bool:
    """Tell whether each adapter went all the way in a tensor, by the first patterns that could say otherwise."""
    if recorded is None:
        return True
    alphas = [recorded.alphas, *(a for p, a in recorded.alpha_map.items() if fnmatchcase(name, p))][-1]
    return all(a == 1 for a in several(alphas))


def _of_base(base: Checkpoint, merged: Checkpoint, forward: FoldPlan) -> dict[str, TensorRef | None]:
    """Return the base's tensor for each of a merge's that is not a rotation of it: None where the base has none.

    Raises:
        InputError: If the checkpoints don't belong together.
    """
    raise_for_errors(forward.notices, f"the adapters don't fit the base {base.name}")
    shapes = {n: t.shape for n, t in merged.tensors.items()}
    expected = {t.name: t.shape for t in forward.tensors}
    if shapes != expected:
        other = next(n for n in {**expected, **shapes} if shapes.get(n) != expected.get(n))
        raise InputError(
            f"{merged.name} is no merge of {base.name}: {other} has shape {shapes.get(other)} in it, expected "
            f"{expected.get(other)}.",
            hint="Give the base it was made from.",
        )
    found: dict[str, TensorRef | None] = {}
    for tensor in forward.tensors:
        if tensor.base is None or tensor.source is not tensor.base:
            found[tensor.name] = tensor.base
        elif tensor.name != tensor.base.name:
            found[tensor.name] = replace(merged.tensors[tensor.name], name=tensor.base.name)
    return found


def _restored(merged: Checkpoint, given: Mapping[str, TensorRef | None], config_text: str | None) -> Checkpoint:
    """Return the merged checkpoint with tensors, and the config, that are the base's."""
    files = [
        replace(f, tensors=tuple(t for r in f.tensors if (t := given.get(r.name, r)) is not None)) for f in merged.files
    ]
    kept = tuple(f for f in files if f.tensors)
    return replace(merged, files=kept, config_text=config_text or merged.config_text)


def _stripped(source: SourcedAdapter, gone: set[str]) -> SourcedAdapter:
    """Return an adapter that only rotates, and not the weights of the modules in ``gone``."""
    adapter = source.adapter
    layers = tuple(x for x in adapter.layers if x.module not in gone)
    return replace(source, adapter=replace(adapter, layers=layers, replacements=()))


def _with_config(plan: FoldPlan, config_text: str | None) -> FoldPlan:
    """Return a plan that writes ``config_text`` where it would copy the merged checkpoint's config."""
    if config_text is None:
        return plan
    config = plan.base.folder / "config.json"
    side = (
        replace(f, source=None, text=config_text) if f.name == config and f.text is None else f for f in plan.side_files
    )
    return replace(plan, side_files=tuple(side))


def _names(names: Mapping[str, object] | Sequence[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
