"""The one place that prints: data on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from boft_export.errors import EXIT_INTERRUPTED, BoftExportError, Level, Notice

if TYPE_CHECKING:
    from rich.console import Console

_STYLE = {Level.INFO: "dim", Level.WARNING: "yellow", Level.ERROR: "bold red"}


@dataclass
class Output:
    """How a command shows its results.

    Attributes:
        as_json: Print one JSON document instead of text.
        quiet: Print errors only.
        verbose: 1 for everything noted, 2 for tracebacks too.
        no_progress: Show no progress bar.
        resumable: The command can go on with what an interrupted run has done.
        published: What is finished and stays, if the command still has more to do.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: int = 0
    no_progress: bool = False
    resumable: bool = False
    published: str | None = None

    @property
    def _err(self) -> Console:
        from rich.console import Console

        return Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)

    @property
    def _out(self) -> Console:
        from rich.console import Console

        return Console(highlight=False, soft_wrap=not sys.stdout.isatty(), markup=False, emoji=False)

    def document(self, document: Mapping[str, Any]) -> None:
        """Print a JSON document, if that is what was asked for."""
        if self.as_json:
            sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")
            # A full disk must be noticed while it can still be said.
            sys.stdout.flush()

    def line(self, text: str, style: str | None = None) -> None:
        """Print a line of the result."""
        if self._plain:
            self._out.print(text, style=style, markup=False)

    def table(self, title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; a column is its head and ``left`` or ``right``."""
        if not self._plain or not rows:
            return
        from rich import box
        from rich.table import Table

        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for head, side in columns:
            table.add_column(head, justify="right" if side == "right" else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        out = self._out
        if not out.is_terminal:
            # Nobody's window bounds a file or a pipe.
            out.width = 240
        out.print(table)

    def notices(self, notices: Sequence[Notice]) -> None:
        """Print what was noted: warnings always, the rest when asked for more."""
        shown = Level.INFO if self.verbose else Level.WARNING
        order = list(Level)
        for notice in notices:
            if order.index(notice.level) >= order.index(shown) and not (self.quiet and notice.level is not Level.ERROR):
                self._err.print(f"{notice.level.value}: {notice}", style=_STYLE[notice.level], markup=False)
                if notice.hint and self.verbose:
                    self._err.print(f"  {notice.hint}", markup=False)

    def commands(self, lines: Sequence[str]) -> None:
        """Print lines for another program, such as GitHub's workflow commands, each as it is."""
        for line in lines:
            sys.stderr.write(line + "\n")

    def error(self, error: BoftExportError) -> None:
        """Print a failure: what was expected, what was found, one next step."""
        from boft_export.report.merge_report import error_document

        self._failure(error_document(error))
        self._err.print(f"error: {error.message}", style="bold red", markup=False)
        if error.hint:
            self._err.print(f"  {error.hint}", markup=False)
        self.trace()

    def interrupted(self, told: str = "") -> None:
        """Say that the user stopped the run.

        Args:
            told: What whoever was stopped says of it himself.
        """
        message = told or f"interrupted; {self.published or 'nothing'} was published."
        hint = "Go on with --resume." if self.resumable and not self.published and not told else None
        error = {"type": "KeyboardInterrupt", "exit_code": EXIT_INTERRUPTED, "message": message, "hint": hint}
        self._failure({"schema_version": 1, "error": error, "notices": []})
        self._err.print(f"{message} {hint or ''}".rstrip(), style="yellow", markup=False)
        self.trace()

    def bug(self, error: BaseException) -> None:
        """Print a failure of ours."""
        text = f"internal error: {type(error).__name__}: {error}"
        self._failure(
            {"schema_version": 1, "error": {"type": type(error).__name__, "exit_code": 70, "message": str(error)}}
        )
        self._err.print(text, style="bold red", markup=False)
        self._err.print("  This is a bug. Please report it with the output of -vv.", markup=False)
        self.trace()

    def trace(self) -> None:
        """Print the traceback, if asked for."""
        if self.verbose > 1:
            traceback.print_exc(file=sys.stderr)

    @contextlib.contextmanager
    def progress(self, label: str, unit: str = "bytes") -> Iterator[Callable[[int, int, str], None] | None]:
        """Show a bar with bytes or ``unit`` done, on a terminal only; yield the callback that moves it.

        While nothing can be counted, the bar only moves to and fro, under the name of what is done.
        """
        if self.no_progress or self.quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        counted = (MofNCompleteColumn(), TextColumn(unit))
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            *((DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else counted),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._err, transient=True) as bar:
            task, shown = bar.add_task(label, total=None), label

            def move(done: int, total: int, name: str) -> None:
                nonlocal task, shown
                told = label if total else name or label
                if told != shown:
                    # A bar that had a total does not lose it.
                    bar.remove_task(task)
                    task, shown = bar.add_task(told, total=None), told
                bar.update(task, completed=done, total=total or None)

            yield move

    def _failure(self, document: Mapping[str, Any]) -> None:
        """Print a failure's document; that stdout is full must not hide what happened."""
        try:
            self.document(document)
            sys.stdout.flush()
        except OSError:
            give_up_stdout()

    @property
    def _plain(self) -> bool:
        return not (self.as_json or self.quiet)


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send to stderr what others print, their child processes too: stdout is for this program's data."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def give_up_stdout() -> None:
    """Send the rest of stdout to nowhere, else Python fails on it once more and exits with a code of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):
        os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
