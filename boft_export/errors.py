"""Every error a user can meet, each with the exit code a script can rely on.

BoftExportError                70   base class; raised as such only for a bug of ours
├── CheckFailedError            1   the work ran, and its result did not pass a check
├── UsageError                  2   the request itself is wrong
├── InputError                  3   the inputs don't fit together
│   └── DamagedFileError        3   a file is not what its format says
├── AccessError                 4   Hub, network or file system
└── ResourceError               5   not enough memory or disk
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar


class Level(StrEnum):
    """How much a notice matters: an ``ERROR`` stops the run before anything is written."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Notice:
    """One finding about the inputs: what it is about, what was found, and what to do."""

    level: Level
    code: str
    subject: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        """Return ``subject: message``, the form in which people read it."""
        return f"{self.subject}: {self.message}" if self.subject else self.message


class BoftExportError(Exception):
    """Base of all errors: one message, one next step, one exit code.

    Args:
        message: What was expected and what was found, naming the file or tensor.
        hint: The next step to take.
        notices: All findings behind the message, where there are several.
    """

    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, *, hint: str | None = None, notices: Sequence[Notice] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.notices = tuple(notices)


class CheckFailedError(BoftExportError):
    """The work ran, and its result did not pass a check."""

    exit_code = 1


class UsageError(BoftExportError):
    """The request itself is wrong: an option, a path, a combination."""

    exit_code = 2


class InputError(BoftExportError):
    """Base, adapter and options don't fit together."""

    exit_code = 3


class DamagedFileError(InputError):
    """A file is truncated or is not what its format says."""


class AccessError(BoftExportError):
    """The Hub, the network or the file system did not give or take something."""

    exit_code = 4


class ResourceError(BoftExportError):
    """Memory or disk does not suffice."""

    exit_code = 5


EXIT_INTERRUPTED = 130
EXIT_INTERNAL = BoftExportError.exit_code

_SHOWN = 10


def raise_for_errors(notices: Sequence[Notice], headline: str) -> None:
    """Raise one ``InputError`` that lists every notice of level ``ERROR``; do nothing if there is none."""
    errors = [n for n in notices if n.level is Level.ERROR]
    if not errors:
        return
    if len(errors) == 1:
        raise InputError(str(errors[0]), hint=errors[0].hint, notices=notices)
    lines = [f"{headline}: {len(errors)} problems"] + [f"  - {n}" for n in errors[:_SHOWN]]
    if len(errors) > _SHOWN:
        lines.append(f"  ... and {len(errors) - _SHOWN} more (all of them with --json)")
    hints = dict.fromkeys(n.hint for n in errors if n.hint)
    raise InputError("\n".join(lines), hint=next(iter(hints), None), notices=notices)


def first_line(error: Exception) -> str:
    """Return what an error that is not ours says first, without a full stop; its type where it says nothing."""
    text = str(error)
    # Python's own form; of others it may leave out the host.
    if isinstance(error, OSError) and text.startswith("[Errno") and isinstance(error.strerror, str):
        text = error.strerror
    return next(iter(text.strip().splitlines()), "").rstrip(".") or type(error).__name__
