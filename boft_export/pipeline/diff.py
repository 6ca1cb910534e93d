"""Two checkpoints compared, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from boft_export.checkpoint import Checkpoint, TensorRef
from boft_export.errors import ResourceError, UsageError
from boft_export.pipeline.allocator import keep_tiles_free_chunks
from boft_export.pipeline.memory import RUNTIME_BYTES
from boft_export.pipeline.options import Progress
from boft_export.pipeline.tensor_change import ChangeKind, TensorChange
from boft_export.pipeline.tensor_comparison import comparing_bytes, measure_change
from boft_export.pipeline.workers import default_workers, workers
from boft_export.planning.inputs import Ref, Sources
from boft_export.planning.sizes import parse_size


@dataclass(frozen=True)
class TensorDiff:
    """A tensor that both checkpoints have, in one shape.

    Attributes:
        name: Its name.
        dtype: Its dtype in A, by the safetensors format's name.
        new_dtype: Its dtype in B.
        shape: Its shape.
        change: What was done to it.
    """

    name: str
    dtype: str
    new_dtype: str
    shape: tuple[int, ...]
    change: TensorChange


@dataclass(frozen=True)
class Reshaped:
    """A tensor that has another shape in B.

    Attributes:
        name: Its name.
        dtype: Its dtype in A.
        new_dtype: Its dtype in B.
        shape: Its shape in A.
        new_shape: Its shape in B.
    """

    name: str
    dtype: str
    new_dtype: str
    shape: tuple[int, ...]
    new_shape: tuple[int, ...]


@dataclass(frozen=True)
class Lone:
    """A tensor that only one of them has: its name, dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ConfigDiff:
    """A setting of ``config.json`` that differs.

    Attributes:
        key: Its name, with a dot between those of nested ones.
        old: Its value in A as JSON; None where it is not set.
        new: The same of B.
    """

    key: str
    old: str | None
    new: str | None


@dataclass(frozen=True)
class Diff:
    """How checkpoint B differs from A.

    Attributes:
        a: A's name.
        b: B's name.
        tensors: What both have, in one shape, in A's order: identical ones too.
        reshaped: What both have, in different shapes.
        only_a: What only A has.
        only_b: What only B has.
        config: Settings that differ.
    """

    a: str
    b: str
    tensors: tuple[TensorDiff, ...]
    reshaped: tuple[Reshaped, ...]
    only_a: tuple[Lone, ...]
    only_b: tuple[Lone, ...]
    config: tuple[ConfigDiff, ...]

    @property
    def changed(self) -> tuple[TensorDiff, ...]:
        """The tensors that are not identical, those that changed most first; what has no measure comes before them."""
        changed = [t for t in self.tensors if t.change.kind is not ChangeKind.IDENTICAL]
        return tuple(sorted(changed, key=lambda t: _rank(t.change), reverse=True))

    @property
    def same(self) -> bool:
        """Whether all tensors and settings are the same."""
        return not (self.changed or self.reshaped or self.only_a or self.only_b or self.config)


def diff(
    a: Ref,
    b: Ref,
    *,
    sources: Sources | None = None,
    new_sources: Sources | None = None,
    max_memory: str | int | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Diff:
    """Compare two checkpoints, in bounded memory, whatever their size.

    Tensors are matched by name. The result is the same for any number of jobs.

    Args:
        a: The checkpoint before: a local path or a Hub id.
        b: The checkpoint after.
        sources: Where A comes from.
        new_sources: Where B comes from; by default as A, but at no certain revision.
        max_memory: Bytes that the whole process may take, as ``700MiB``.
        jobs: Threads that compare; by default as many as there are cores and memory for.
        progress: Called with bytes of B compared, bytes in all, and the tensor's name.

    Raises:
        UsageError: If an argument can't be understood.
        InputError: If one is no checkpoint.
        DamagedFileError: If a file is not what its format says.
        AccessError: If one can't be read or found.
        ResourceError: If memory does not suffice.
    """
    where = sources or Sources()
    old, new = where.base(a), (new_sources or replace(where, revision=None)).base(b)
    common = [(t, new.tensors[name]) for name, t in old.tensors.items() if name in new.tensors]
    pairs = [(x, y) for x, y in common if x.shape == y.shape]
    tensors = tuple(compare_pairs(pairs, max_memory=max_memory, jobs=jobs, progress=progress))
    return Diff(
        old.name,
        new.name,
        tensors,
        tuple(Reshaped(x.name, x.dtype, y.dtype, x.shape, y.shape) for x, y in common if x.shape != y.shape),
        _lone(old, new),
        _lone(new, old),
        tuple(_config_changes(old.config, new.config)),
    )


def _rank(change: TensorChange) -> float:
    return float("inf") if change.relative_change is None else change.relative_change


def _jobs(pairs: Sequence[tuple[TensorRef, TensorRef]], max_memory: str | int | None, jobs: int | None) -> int:
    """Return how many threads compare.

    Raises:
        UsageError: If ``jobs`` or ``max_memory`` says nothing.
        ResourceError: If memory is too small for one, or for as many as were asked for.
    """
    if jobs is not None and jobs < 1:
        raise UsageError(f"{jobs} jobs can't do anything.", hint="Give --jobs 1 or more.")
    wanted = jobs or default_workers()
    limit = parse_size(max_memory) if max_memory is not None else None
    if limit is None:
        return wanted
    for count in [wanted] if jobs else range(wanted, 0, -1):
        needed = RUNTIME_BYTES + max((comparing_bytes(x, y, count) for x, y in pairs), default=0)
        if needed <= limit:
            return count
    raise ResourceError(
        f"{limit:,} bytes of memory are too few: this comparison needs {needed:,}.",
        hint=f"Raise --max-memory to at least {-(-needed // (1 << 20))}MiB, or use fewer --jobs.",
    )


def compare_pairs(
    pairs: Sequence[tuple[TensorRef, TensorRef]],
    *,
    max_memory: str | int | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Iterator[TensorDiff]:
    """Yield what was done to each tensor of pairs of one shape each, by the name of the first.

    Arguments and errors are those of ``diff``.
    """
    keep_tiles_free_chunks()
    total, done = sum(y.nbytes for _, y in pairs), 0
    with workers(_jobs(pairs, max_memory, jobs)) as pool:
        for x, y in pairs:
            start = done

            def report(part: int, _whole: int, name: str, start: int = start) -> None:
                if progress is not None:
                    progress(start + part, total, name)

            yield TensorDiff(x.name, x.dtype, y.dtype, y.shape, measure_change(x, y, pool=pool, progress=report))
            done += y.nbytes


def _lone(one: Checkpoint, other: Checkpoint) -> tuple[Lone, ...]:
    return tuple(Lone(t.name, t.dtype, t.shape) for name, t in one.tensors.items() if name not in other.tensors)


def _config_changes(old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> Iterator[ConfigDiff]:
    for key in dict.fromkeys((*old, *new)):
        x, y = old.get(key), new.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            yield from _config_changes(x, y, f"{above}{key}.")
        elif key not in old or key not in new or _json(x) != _json(y):
            yield ConfigDiff(above + key, _json(x) if key in old else None, _json(y) if key in new else None)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
