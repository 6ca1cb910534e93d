"""Folding into graphs that exist: a base's ONNX files become the tuned model's, with no model and no tracing.

What is written is the files as they are, nodes and all, byte for byte, but for the weights that adapters change and
what the graph says of its origin.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

import onnx

from boft_export.checkpoint import Shard
from boft_export.checkpoint.staging import file_system_errors
from boft_export.errors import AccessError, DamagedFileError, InputError, Level, Notice
from boft_export.onnx.external_data import DataFile, Placed
from boft_export.onnx.graph_file import graph_metadata
from boft_export.onnx.graph_match import Matches, Named, NotInGraphError, match_tensors
from boft_export.onnx.graph_scan import OWN_PREFIX, GraphFile, StoredTensor, scan_graph
from boft_export.onnx.tasks import Task
from boft_export.onnx.weights import write_weights
from boft_export.pipeline.engine import Engine, OutputResult
from boft_export.pipeline.hashing import file_digest
from boft_export.pipeline.options import Progress
from boft_export.planning import Action, FoldPlan, TensorPlan
from boft_export.planning.inputs import Ref
from boft_export.planning.names import matched_names
from boft_export.planning.renames import names_in_memory
from boft_export.planning.strength import Course

_ALONE = "model.onnx"
# What onnxruntime-genai needs to run a graph.
_BESIDE = ("genai_config.json",)
_TASK = f"{OWN_PREFIX}task"
_FRESH = "Export the tuned model without --base-onnx."
# The record of ModelProto that holds a piece of metadata, with its length to follow.
_METADATA_TAG = b"\x72"
_DIGEST = "0" * 64
_COPIED = 8 << 20


@dataclass(frozen=True)
class BaseGraphs:
    """The graphs of a base.

    Attributes:
        folder: Where they are.
        files: Each graph by the name that it gets in the output.
    """

    folder: Path
    files: Mapping[str, GraphFile]

    @property
    def tensors(self) -> list[StoredTensor]:
        """The tensors of all graphs."""
        return [t for f in self.files.values() for t in f.tensors]

    @property
    def are_ours(self) -> bool:
        """Whether each was exported here, so that its tensors are what their names say."""
        return all(f.own_metadata for f in self.files.values())

    @property
    def task(self) -> str | None:
        """What they were exported for, where they say it."""
        return next((f.metadata[_TASK] for f in self.files.values() if _TASK in f.metadata), None)

    @property
    def opset(self) -> int:
        """The version of ONNX's operators."""
        return max((f.opset or 0 for f in self.files.values()), default=0)

    @property
    def dtype(self) -> str:
        """The dtype of most weights, as safetensors names it."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return max(sizes, key=lambda d: sizes[d], default="F32")

    @cached_property
    def outputs(self) -> dict[Path, str]:
        """The name in the output of each file: graphs, data, and what runs them."""
        data = {path: str(PurePosixPath(n)) for f in self.files.values() for n, path in f.locations.items()}
        beside = {path: path.name for name in _BESIDE if (path := self.folder / name).is_file()}
        return {f.path: name for name, f in self.files.items()} | data | beside

    def state(self) -> dict[Path, tuple[int, int]]:
        """Return what shows whether a file changes meanwhile."""
        return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in self.outputs}

    def digests(self) -> dict[str, str]:
        """Return SHA-256 of the graphs, without data files: those hold the base's values, as is seen of each used."""
        return {name: file_digest(f.path) for name, f in self.files.items()}


def open_graphs(ref: Ref) -> BaseGraphs:
    """Find a base's graphs: one file, or all of a folder.

    Raises:
        AccessError: If there is none.
        DamagedFileError: If one is no ONNX file.
    """
    path = Path(ref)
    if path.is_dir():
        files = {f.name: scan_graph(f) for f in sorted(path.glob("*.onnx"))}
        if not files:
            raise AccessError(f"{path} has no ONNX file in it.", hint="Name the file, or its folder.")
        return _checked(BaseGraphs(path, files))
    if not path.is_file():
        raise AccessError(f"{path} is not there.", hint="Name the base's ONNX file, or the folder of its files.")
    return _checked(BaseGraphs(path.parent, {_ALONE: scan_graph(path)}))


def _checked(graphs: BaseGraphs) -> BaseGraphs:
    names = list(graphs.outputs.values())
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise InputError(f"two files of {graphs.folder} would both be {twice} in the output.")
    return graphs


def find_places(graphs: BaseGraphs, plan: FoldPlan) -> Matches:
    """Find where graphs hold what adapters change.

    Raises:
        InputError: If a tensor's place is not known for sure, or it has none.
    """
    changed = [t for t in plan.tensors if t.action not in (Action.COPY, Action.CONVERT)]
    for tensor in changed:
        if tensor.base is None or tensor.base.shape != tensor.shape:
            found = "the base has no such tensor" if tensor.base is None else f"the base's is {tensor.base.shape}"
            raise InputError(f"{tensor.name} is {tensor.shape} with the adapters, and {found}.", hint=_FRESH)
    stored = graphs.tensors
    try:
        return match_tensors(changed, plan.base.tensors, stored, _named(graphs, plan), plan.tied)
    except NotInGraphError as error:
        quantised = next((f.quantised for f in graphs.files.values() if f.quantised), None)
        if quantised is None:
            raise
        raise InputError(
            f"the graph is quantised ({quantised}): its weights are no longer the base's, and can't be changed. "
            f"{error.message}",
            hint="Patch the graph that it was made from, and quantise that again.",
        ) from error


def _named(graphs: BaseGraphs, plan: FoldPlan) -> Named:
    """Return what the names in graphs say."""
    names = dict.fromkeys(t.name for t in graphs.tensors)
    known = {n: n for n in plan.base.tensors}
    known |= {new: old for new, old in names_in_memory(plan.base.config, plan.base.tensors).items() if new not in known}
    found, _ = matched_names(list(names), known)
    return Named({n: found[n] for n in names if n in found}, graphs.are_ours)


def absent_notices(matches: Matches) -> list[Notice]:
    """Return notices of what adapters change and the graphs don't have."""
    if not matches.absent:
        return []
    message = f"{len(matches.absent)} tensors that the adapters change are not in the graph"
    return [Notice(Level.WARNING, "not-in-graph", matches.absent[0], message)]


def patched_plan(plan: FoldPlan, matches: Matches) -> FoldPlan:
    """Return the part of a plan that is written, in the graphs' dtypes.

    Raises:
        InputError: If a tensor is held in several dtypes.
    """

    def written(tensor: TensorPlan) -> TensorPlan:
        dtypes = sorted({p.stored.dtype for p in matches.parts[tensor.name]})
        if len(dtypes) > 1:
            raise InputError(f"the graph holds {tensor.name} both as {' and '.join(dtypes)}.", hint=_FRESH)
        return replace(tensor, dtype=dtypes[0])

    kept = ((s.name, tuple(written(t) for t in s.tensors if t.name in matches.parts)) for s in plan.shards)
    return replace(plan, shards=tuple(Shard(name, tensors, b"") for name, tensors in kept if tensors))


@dataclass(frozen=True)
class _Rewrite:
    """A file as it is written again.

    Attributes:
        source: The file.
        size: Its size.
        cuts: What is left out of it.
        at: Where something is put in.
        added: How many bytes that is.
    """

    source: Path
    size: int
    cuts: tuple[tuple[int, int], ...] = ()
    at: int = 0
    added: int = 0

    @property
    def nbytes(self) -> int:
        """The size of what is written."""
        return self.size - sum(stop - start for start, stop in self.cuts) + self.added

    def moved(self, position: int) -> int:
        """Return where a byte comes to lie."""
        left_out = sum(stop - start for start, stop in self.cuts if stop <= position)
        return position - left_out + (self.added if position >= self.at else 0)


class Rewriting:
    """The rewriting of graphs, known in all its sizes before it begins.

    Args:
        graphs: What is rewritten.
        matches: The places of what changes.
        plan: What the graphs are to say of their origin.
        task: What they are for.
    """

    def __init__(self, graphs: BaseGraphs, matches: Matches, plan: FoldPlan, task: Task) -> None:
        self._graphs = graphs
        self._plan = plan
        self._task = task
        self._before = graphs.state()
        added = len(self._metadata(dict.fromkeys(plan.input_files(), _DIGEST)))
        own = {f.path: f.own_metadata for f in graphs.files.values()}
        self._rewrites = {
            str(path): _Rewrite(path, size, own[path], own[path][0][0] if own[path] else size, added)
            if path in own
            else _Rewrite(path, size)
            for path, (size, _) in self._before.items()
        }
        shapes = {t.name: t.shape for t in plan.tensors}
        self._places = {
            name: [self._moved(p) for p in dict.fromkeys(part.place(shapes[name]) for part in parts)]
            for name, parts in matches.parts.items()
        }

    @property
    def nbytes(self) -> int:
        """The size of all files."""
        return sum(r.nbytes for r in self._rewrites.values())

    def _moved(self, place: Placed) -> Placed:
        return replace(place, offset=self._rewrites[place.file].moved(place.offset))

    def _metadata(self, inputs: Mapping[str, str]) -> bytes:
        """Return the records that say of a graph's origin."""
        records = b""
        for key, value in sorted(graph_metadata(self._plan, inputs, self._task.name).items()):
            content = onnx.StringStringEntryProto(key=key, value=value).SerializeToString()
            records += _METADATA_TAG + _varint(len(content)) + content
        return records

    def write(
        self, folder: Path, plan: FoldPlan, course: Course, engine: Engine, progress: Progress | None = None
    ) -> tuple[OutputResult, dict[str, str]]:
        """Fold a plan's tensors into copies of the files; return what was done, and SHA-256 of the inputs.

        Raises:
            InputError: If a result is not finite.
            DamagedFileError: If a file changes meanwhile.
            AccessError: If one can't be read or written.
            ResourceError: If the disk is full.
        """
        with _Files(folder, self._graphs.outputs, self._rewrites, self._places) as files:
            written, inputs = write_weights(files, self._places, plan, course, engine, progress)
            records = self._metadata(inputs)
            for graph in self._graphs.files.values():
                rewrite = self._rewrites[str(graph.path)]
                end = rewrite.moved(rewrite.at)
                files.write([Placed(end - len(records), len(records), (), transposed=False, file=str(graph.path))], 0,
                            memoryview(records))  # fmt: skip
        if self._graphs.state() != self._before:
            raise DamagedFileError(
                f"the graph in {self._graphs.folder} changed while it was read.",
                hint="Run again once nothing writes to it.",
            )
        return written, inputs


class _Files:
    """Copies of files without what changes in them, as a context: weights are written into the gaps."""

    def __init__(
        self,
        folder: Path,
        names: Mapping[Path, str],
        rewrites: Mapping[str, _Rewrite],
        places: Mapping[str, Sequence[Placed]],
    ) -> None:
        # What lies between other tensors' values is copied with them and then written over.
        gaps = [p for own in places.values() for p in own if not p.stride or p.stride == p.shape[0]]
        self._open: dict[str, DataFile] = {}
        with contextlib.ExitStack() as opened:
            for key, rewrite in rewrites.items():
                target = folder / names[rewrite.source]
                with file_system_errors(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                self._open[key] = opened.enter_context(DataFile(target, rewrite.nbytes))
                skipped = sorted((p.offset, p.offset + p.nbytes) for p in gaps if p.file == key)
                with file_system_errors(target):
                    _copy(rewrite, target, skipped)
            self._stack = opened.pop_all()

    def write(self, places: Iterable[Placed], start: int, data: memoryview) -> None:
        """Write a run of a tensor's bytes to its places."""
        for place in places:
            self._open[place.file].write([place], start, data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def _copy(rewrite: _Rewrite, target: Path, skipped: Sequence[tuple[int, int]]) -> None:
    """Copy a file but for what is cut out of it, and what is written later."""
    source = os.open(rewrite.source, os.O_RDONLY)
    try:
        sink = os.open(target, os.O_WRONLY)
        try:
            for start, stop in _kept(rewrite):
                for first, last in _without(rewrite.moved(start), stop - start, skipped):
                    _copy_range(source, start + first - rewrite.moved(start), sink, first, last - first)
        finally:
            os.close(sink)
    finally:
        os.close(source)


def _kept(rewrite: _Rewrite) -> Iterator[tuple[int, int]]:
    """Yield the runs of a file that stay together."""
    edges = sorted({0, rewrite.at, rewrite.size, *(e for cut in rewrite.cuts for e in cut)})
    yield from ((a, b) for a, b in pairwise(edges) if (a, b) not in rewrite.cuts)


def _without(start: int, size: int, skipped: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield what is left of a run without those parts, which are in order."""
    stop = start + size
    for first, last in skipped:
        if start < min(first, stop):
            yield start, min(first, stop)
        start = max(start, last)
    if start < stop:
        yield start, stop


def _copy_range(source: int, start: int, sink: int, at: int, size: int) -> None:
    """Copy a run of bytes, in the kernel where it can."""
    done = 0
    with contextlib.suppress(OSError, AttributeError):
        while done < size and (count := os.copy_file_range(source, sink, size - done, start + done, at + done)):
            done += count
    while done < size:
        data = os.pread(source, min(_COPIED, size - done), start + done)
        if not data:
            raise OSError("a file ended while it was copied")
        done += os.pwrite(sink, data, at + done)


def _varint(number: int) -> bytes:
    """Return a number as ONNX files have it."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])
