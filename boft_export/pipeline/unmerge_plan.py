"""Planning to undo a merge: the adapters in reverse order, less what they replaced, checked against what was done."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from typing import NamedTuple

from boft_export.checkpoint import DTYPE_OF_NAME, Checkpoint, Shard, TensorRef
from boft_export.checkpoint.places import parse_path
from boft_export.checkpoint.tensors import tensor_bytes
from boft_export.errors import DamagedFileError, InputError, Level, Notice, UsageError, raise_for_errors
from boft_export.linalg.path import InterpolationPath
from boft_export.pipeline.hashing import InputHashes
from boft_export.pipeline.options import RunOptions
from boft_export.pipeline.prepare import Prepared, check_options, fit_memory, keep_off_inputs
from boft_export.pipeline.recorded import MANIFEST_NAME, Recorded, read_recorded
from boft_export.pipeline.undo import UndoRecord, UndoTensor, read_record
from boft_export.planning import FoldPlan, SourcedAdapter, TensorPlan, make_plan
from boft_export.planning.alphas import several
from boft_export.planning.inputs import Ref, Sources
from boft_export.planning.sizes import parse_size
from boft_export.planning.strength import Course, Interpolation

_SHOWN = 10
_NO_RECORD = "Remove its folder to go without."
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
        records: What the merge recorded of each tensor that undoing it misses something of; None without a record.
        as_base: The weight files that come out as the base's if all is right.
        base: The base, where tensors are taken from it.
    """

    plan: FoldPlan
    interpolation: Interpolation
    course: Course
    recorded: Recorded | None
    brought: tuple[Brought, ...]
    records: Mapping[str, UndoTensor] | None
    as_base: frozenset[str]
    base: Checkpoint | None


def plan_unmerge(
    merged: Ref,
    adapters: Ref | Sequence[Ref],
    *,
    base: Ref | None = None,
    keep_replaced: bool = False,
    dtype: str | None = None,
    compute_dtype: str = "float64",
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
    record = read_record(checkpoint, recorded) if recorded is not None else None
    if recorded is not None and record is not None:
        unfit = _why_unfit(recorded, len(opened), dtype, compute_dtype)
        if unfit is not None:
            notices.append(Notice(Level.WARNING, "record-unused", checkpoint.name, f"its record is not used: {unfit}"))
            record = None
    given: dict[str, TensorRef | None] = {}
    config_text = None
    original = None
    if record is not None and not keep_replaced:
        given, config_text = _of_record(record, checkpoint), record.config_text
    elif replaced and base is not None:
        _check_whole(recorded, len(opened))
        # The revision and the subfolder that were asked for are the merged checkpoint's.
        original = replace(opener, revision=None, subfolder=None).base(base)
        given, config_text = _of_base(original, checkpoint, make_plan(original, opened)), original.config_text
        message = f"{len(given)} tensors and the config are taken from it: {_names(given)}"
        notices.append(Notice(Level.INFO, "from-base", original.name, message))
    if left := [n for n in replaced if n not in given]:
        notices.append(_left(checkpoint, left, keep_replaced=keep_replaced))
    raise_for_errors(notices, _UNFIT)

    # What is not made of the merged tensor's own bytes must not be rotated.
    gone = {
        (s.adapter, s.layer.module)
        for t in again.tensors
        if t.name in given and t.base is not None and getattr(given[t.name], "source", None) is not t.base.source
        for s in t.steps
    }
    stripped = [_stripped(a, {m for i, m in gone if i == number}) for number, a in enumerate(opened)]
    plan = make_plan(
        _restored(checkpoint, given, config_text),
        stripped[::-1],
        dtype=DTYPE_OF_NAME[dtype] if dtype else None,
        max_shard_bytes=parse_size(max_shard_size) if max_shard_size is not None else None,
    )
    # It names the base it was trained on, which a merged checkpoint is not.
    notices += [n for n in plan.notices if n.code != "other-base"]
    headers = record.headers if record is not None and not left else {}
    shards = tuple(_with_header(s, headers[s.name]) if s.name in headers else s for s in plan.shards)
    if recorded is not None:
        _check_headers(headers, plan, recorded)
    plan = _with_config(replace(plan, notices=tuple(notices), shards=shards), config_text)
    raise_for_errors(plan.notices, _UNFIT)
    rotated = [t.name for t in plan.tensors if t.steps]
    patterns = {p: a for p, a in interpolation.alpha_map.items() if any(fnmatchcase(n, p) for n in rotated)}
    interpolation = replace(interpolation, alpha_map=patterns)
    return UnmergePlan(
        plan=plan,
        interpolation=interpolation,
        course=interpolation.course(plan),
        recorded=recorded,
        brought=tuple(
            Brought(checkpoint.tensors[t.name], t.source)
            for t in replaced.values()
            if not t.steps and _whole_way(recorded, t.name)
        ),
        records={r.name if (r := given.get(n)) else n: t for n, t in record.tensors.items()} if record else None,
        as_base=frozenset(s.name for s in shards if headers.get(s.name) == s.header),
        base=original,
    )


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
        compute_dtype=options.compute_dtype,
        max_shard_size=options.max_shard_size,
        sources=options.sources,
    )
    keep_off_inputs(parse_path(output), undo.plan, merged, adapters)
    if undo.base is not None:
        keep_off_inputs(parse_path(output), replace(undo.plan, base=undo.base), base, adapters)
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


def _check_whole(recorded: Recorded | None, adapters: int) -> None:
    """Refuse to take from the base what an adapter replaced that stays.

    Raises:
        InputError: If not all adapters are undone.
    """
    if recorded is not None and adapters < len(recorded.adapters):
        raise InputError(
            "the base can't give what was there before the last adapters: others were applied before them.",
            hint="Undo all adapters at once, or give --keep-replaced.",
        )


def _left(checkpoint: Checkpoint, names: Sequence[str], *, keep_replaced: bool) -> Notice:
    """Return what to note of tensors that an adapter replaced and that nothing brings back."""
    if keep_replaced:
        message = f"{len(names)} tensors stay as an adapter brought them: {_names(names)}"
        return Notice(Level.WARNING, "kept-replaced", checkpoint.name, message)
    message = (
        f"has {len(names)} tensors that an adapter replaced, of which nothing of the base is left: {_names(names)}"
    )
    hint = "Take them from the base with --base BASE, or leave them as they are with --keep-replaced."
    return Notice(Level.ERROR, "replaced", checkpoint.name, message, hint)


def _why_unfit(recorded: Recorded, adapters: int, dtype: str | None, compute_dtype: str) -> str | None:
    """Return why a merge's record can't be used; None where it can."""
    if adapters < len(recorded.adapters):
        return f"it undoes all {len(recorded.adapters)} adapters together"
    if dtype is not None:
        return "it gives the base's own dtypes, so --dtype must be left out"
    if compute_dtype not in {"float64", recorded.compute_dtype}:
        return f"the merge was computed in {recorded.compute_dtype}, more precisely than now"
    return None


def _of_record(record: UndoRecord, merged: Checkpoint) -> dict[str, TensorRef | None]:
    """Return the base's tensor, by a record, for each of a merge's that is not a rotation of it.

    Raises:
        DamagedFileError: If the record is of other tensors.
    """
    found: dict[str, TensorRef | None] = {}
    for name, told in record.tensors.items():
        here = merged.tensors.get(name)
        rotated = told.name is not None and told.whole is None
        if here is None or (rotated and (here.dtype, here.shape) != (told.dtype, told.shape)):
            raise DamagedFileError(f"the record of {merged.name} has another {name} than its weights.", hint=_NO_RECORD)
        if not rotated:
            found[name] = told.whole
        elif told.name is not None and told.name != name:
            found[name] = replace(here, name=told.name)
    return found


def _check_headers(headers: Mapping[str, bytes], plan: FoldPlan, recorded: Recorded) -> None:
    """Check that what comes out is what the base's headers say, in whichever files it will be.

    Raises:
        DamagedFileError: If a tensor is another, or is missing.
    """
    found = {t.name: (t.dtype, t.shape) for t in plan.tensors}
    told = {e.name: (e.dtype, e.shape) for name, header in headers.items() for e in _entries(name, header)}
    wrong = [n for n, entry in told.items() if found.get(n) != entry]
    if headers.keys() >= {n for n in recorded.base.sha256 if not n.endswith(".json")}:
        wrong += found.keys() - told.keys()
    if wrong:
        message = f"the record is of another {min(wrong)} than the base's header is"
        raise DamagedFileError(f"{plan.base.name}: {message}.", hint=_NO_RECORD)


class _Entry(NamedTuple):
    """A tensor in a header, by its place."""

    offsets: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]
    name: str


def _entries(file: str, header: bytes) -> list[_Entry]:
    """Return the tensors in a safetensors header, in the order of their places.

    Raises:
        DamagedFileError: If it is none.
    """
    try:
        entries = json.loads(header[8:])
        entries.pop("__metadata__", None)
        return sorted(
            _Entry(tuple(e["data_offsets"]), e["dtype"], tuple(e["shape"]), name) for name, e in entries.items()
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"the header that the record has of {file} is unsound: {error}.") from error


def _with_header(shard: Shard[TensorPlan], header: bytes) -> Shard[TensorPlan]:
    """Return a weight file with the header of the base's, where it has the same tensors at the same places."""
    ends = list(accumulate((tensor_bytes(t.dtype, t.shape) for t in shard.tensors), initial=0))
    ours = [_Entry(ab, t.dtype, t.shape, t.name) for ab, t in zip(pairwise(ends), shard.tensors, strict=True)]
    return replace(shard, header=header) if sorted(ours) == _entries(shard.name, header) else shard


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
    names = [t.name for f in kept for t in f.tensors]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise DamagedFileError(f"the record of {merged.name} gives {twice} twice.", hint=_NO_RECORD)
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
