"""Writing a plan's weight files into a staging folder, by a crew of threads."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from boft_export.checkpoint import Shard
from boft_export.checkpoint.staging import Journalled
from boft_export.errors import BoftExportError
from boft_export.pipeline.crew import Crew, Line
from boft_export.pipeline.memory import Budget, open_shards, shards_in_turn
from boft_export.pipeline.output_file import OutputFile
from boft_export.pipeline.undo import UndoWriter, undo_name
from boft_export.pipeline.works import Admitted, Works
from boft_export.planning import FoldPlan, TensorPlan

if TYPE_CHECKING:
    from boft_export.pipeline.chunks import Chunk
    from boft_export.pipeline.workbench import Piece

# Bytes written, and the tensor they belong to; None for those of no tensor.
News = tuple[int, str | None]


@dataclass
class _OpenShard:
    """A shard that is being written.

    Attributes:
        files: Its file in each output.
        undo: The file that undoes it.
        opened: What closes them.
        line: What must go in order.
        left: Chunks not yet written, and one more as long as more may come.
    """

    files: Sequence[OutputFile]
    undo: UndoWriter | None
    opened: contextlib.ExitStack
    line: Line = field(default_factory=Line)
    left: int = 1


class _IncompleteError(Exception):
    """A file was left while it was written."""


_Task = tuple[_OpenShard, Admitted, int]


class Writing:
    """Shards on their way into a staging folder; gone with the context, but for those that are finished.

    Args:
        works: Makes the pieces.
        plan: The plan.
        staging: Where to write, and where to note what is finished.
        shards: Which of the plan's shards.
    """

    def __init__(self, works: Works, plan: FoldPlan, staging: Journalled, shards: Sequence[Shard[TensorPlan]]) -> None:
        self._works = works
        self._plan = plan
        self._staging = staging
        self._shards = shards
        self._open: list[_OpenShard] = []
        self._places = Budget(open_shards(works.engine.jobs))
        self._lock = threading.Lock()
        self._news: queue.SimpleQueue[News | None] = queue.SimpleQueue()

    def __enter__(self) -> Iterator[News]:
        """Begin, and return what happens, as it happens, until nothing more does."""
        # Flushing a file is waiting for the disk.
        self._closer = ThreadPoolExecutor(1, "flush")
        self._crew = Crew(self._works.engine.jobs, self._tasks(), self._do, lambda: self._news.put(None), self._stop)
        try:
            self._crew.start()
        except BaseException:
            self._crew.close()
            self._leave()
            raise
        return iter(self._news.get, None)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until all is written, or as soon as something failed until all threads have stopped.

        Raises:
            BaseException: What failed first.
        """
        try:
            if kind is None:
                self._crew.join()
                self._closer.shutdown(wait=self._crew.failure is None)
        finally:
            self._crew.close()
            left = self._leave()
        if kind is None:
            self._crew.check()
            if left is not None:
                raise left

    def _leave(self) -> BoftExportError | None:
        """Let go of the files that are not complete, so that they vanish; return what failed in that, if anything."""
        self._closer.shutdown(wait=True, cancel_futures=True)
        failure = None
        for shard in self._open:
            try:
                shard.opened.__exit__(_IncompleteError, _IncompleteError(), None)
            except _IncompleteError:
                pass
            except BoftExportError as error:
                # The others are let go all the same.
                failure = error
        return failure

    def _stop(self) -> None:
        self._places.close()
        self._works.stop()

    def _tasks(self) -> Iterator[_Task]:
        """Yield the chunks of a few shards in turn; where one ends, the next takes its place."""
        waiting = iter(self._shards)
        running = deque(map(self._chunks, islice(waiting, shards_in_turn(self._works.engine.jobs))))
        while running:
            chunks = running.popleft()
            if (task := next(chunks, None)) is not None:
                running.append(chunks)
                yield task
            else:
                running.extend(map(self._chunks, islice(waiting, 1)))

    def _chunks(self, shard: Shard[TensorPlan]) -> Iterator[_Task]:
        if not self._places.acquire(1):
            return
        opened = self._begin(shard)
        for chunk in self._works.chunks(shard):
            if (admitted := self._works.admit(chunk)) is None:
                return
            with self._lock:
                opened.left += 1
            yield opened, admitted, opened.line.ticket()
        self._count_down(opened)

    def _begin(self, shard: Shard[TensorPlan]) -> _OpenShard:
        variants, engine = self._works.variants, self._works.engine
        with contextlib.ExitStack() as stack:
            paths = [(v, v.path(shard.name)) for v in variants]
            files = [OutputFile(shard, v, stack.enter_context(self._staging.write(path))) for v, path in paths]
            undo = None
            if engine.reversible:
                base = next((f.path for f in self._plan.base.files if f.name == shard.name), None)
                file = stack.enter_context(self._staging.write(undo_name(shard.name)))
                undo = UndoWriter(file, shard.tensors, base)
            opened = _OpenShard(files, undo, stack.pop_all())
        with self._lock:
            self._open.append(opened)
        self._news.put((len(shard.header) * len(files), None))
        return opened

    def _do(self, task: _Task) -> None:
        shard, admitted, ticket = task
        chunk = admitted.chunk

        def use(pieces: list[Piece], done: Callable[[], None]) -> None:
            for file, piece in zip(shard.files, pieces, strict=True):
                file.place(chunk, piece)
            shard.line.put(ticket, partial(self._follow, shard, chunk, pieces, done))

        self._works.make(admitted, use)

    def _follow(self, shard: _OpenShard, chunk: Chunk, pieces: Sequence[Piece], done: Callable[[], None]) -> None:
        """Do with the next chunk's pieces what goes in order."""
        for file, piece in zip(shard.files, pieces, strict=True):
            file.follow(chunk, piece)
            if shard.undo is not None:
                shard.undo.add(chunk.tensor, piece.corrections)
        done()
        self._news.put((chunk.nbytes * len(pieces), chunk.tensor.name))
        self._count_down(shard)

    def _count_down(self, shard: _OpenShard) -> None:
        with self._lock:
            shard.left -= 1
            last = not shard.left
        if last:
            self._closer.submit(self._finish, shard)

    def _finish(self, shard: _OpenShard) -> None:
        try:
            finished = shard.undo.finish() if shard.undo is not None else None
            with self._lock:
                self._open.remove(shard)
            shard.opened.close()
            name = shard.files[0].shard.name
            if finished is not None:
                self._staging.record(undo_name(name), finished)
            for file in shard.files:
                self._staging.record(file.variant.path(name), file.journal_entry(self._works.layers.residuals))
            self._places.release(1)
        except BaseException as error:  # noqa: BLE001  # it is raised where the crew is waited for
            self._crew.fail(error)
