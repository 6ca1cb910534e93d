"""A validation for GitHub Actions: annotations at the run, and a page of Markdown, the step's summary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from boft_export.plots.module_names import printable
from boft_export.plots.validation_data import alike, bound, figure, figures, how, words
from boft_export.report.validation_report import validation_document
from boft_export.validation.model import Validation

# GitHub shows as many annotations of a level for each step.
_MOST_ANNOTATIONS = 10
_LEVELS = {"fails": "error", "warning": "warning", "inconclusive": "notice"}
_MOST_TITLE = 255
_MOST_MESSAGE = 4000
# GitHub refuses a summary of 1 MiB.
_MOST_BYTES = 1_000_000
# Longer texts are cut in a summary.
_MOST_TEXT = 500
_MOST_ROWS = 200
_SIGNS = {"pass": "✅", "fail": "❌", "inconclusive": "⚠️"}
# Characters that mean something in Markdown, and what stands for them everywhere, in tables and in code too.
_ESCAPES = str.maketrans({c: f"&#{ord(c)};" for c in "&<>|`*_~[]\\#@$"})
_SECTIONS = {"fails": "Failures", "warning": "Warnings", "inconclusive": "Not to be told"}


# Annotations


def validation_annotations(validation: Validation) -> list[str]:
    """Return the workflow commands that annotate a run, at most ten of a level; the tenth tells how many more.

    Errors fail the whole; warnings don't; what could not be told is a notice where it does not fail the whole.
    """
    levels: dict[str, list[Mapping[str, Any]]] = {level: [] for level in _LEVELS.values()}
    for check in validation_document(validation, 0.0)["checks"]:
        if (ending := how(check)) is not None:
            levels[_LEVELS[ending]].append(check)
    return [line for level, checks in levels.items() for line in _of_level(level, checks)]


def error_annotations(error: BaseException) -> list[str]:
    """Return the workflow command that tells why a validation ended before it had a result."""
    hint = getattr(error, "hint", None)
    message = "\n".join([_message(error), *([hint] if hint else [])])
    return [_command("error", f"boft-export validate: {type(error).__name__}", message)]


def _of_level(level: str, checks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    shown = len(checks) if len(checks) <= _MOST_ANNOTATIONS else _MOST_ANNOTATIONS - 1
    for check in checks[:shown]:
        title = ": ".join(p for p in (check["finding"] or check["check"], check["subject"]) if p)
        message = "\n".join(p for p in (check["message"], check["hint"]) if p)
        yield _command(level, title, message)
    if more := len(checks) - shown:
        yield _command(level, "boft-export validate", f"... and {more} more checks, in the step's summary or --json")


def _command(level: str, title: str, message: str) -> str:
    """Return a workflow command, escaped as GitHub's own toolkit does it."""
    told = _data(_cut(_lines(message), _MOST_MESSAGE))
    name = _data(_cut(printable(title), _MOST_TITLE)).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={name}::{told}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


# The step's summary


def step_summary(validation: Validation, seconds: float) -> str:
    """Return a validation as Markdown: outcome, findings with their figures, and a table of the checks by name.

    Below GitHub's limit of 1 MiB, however many checks there are.
    """
    document = validation_document(validation, seconds)
    blocks = [*_head(document), *_by_name(document["summary"])]
    for ending, title in _SECTIONS.items():
        checks = [c for c in document["checks"] if how(c) == ending]
        if checks:
            blocks.append(f"\n### {title} ({len(checks)})\n")
            blocks += _findings(checks)
    return _within(blocks, _MOST_BYTES)


def error_summary(error: BaseException, seconds: float) -> str:
    """Return as Markdown why a validation ended before it had a result."""
    hint = getattr(error, "hint", None)
    notices = [f"- {_inline(str(n))}\n" for n in getattr(error, "notices", ())]
    blocks = [
        "## ❌ boft-export validate: no result\n",
        f"\n**{_inline(type(error).__name__)}**: {_inline(_message(error), 4 * _MOST_TEXT)}\n",
        *([f"\n{_inline(hint)}\n"] if hint else []),
        f"\nAfter {seconds:.1f} s.\n",
        *(["\n", *notices] if notices else []),
    ]
    return _within(blocks, _MOST_BYTES)


def _head(document: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {_SIGNS[document['outcome']]} boft-export validate: {document['headline']}\n"
    what = [(name, value) for name in ("merged", "onnx", "base") if (value := document[name]) is not None]
    what += [("adapter", name) for name in document["adapters"][:_MOST_ROWS]]
    told = " · ".join(f"{name} {_code(value)}" for name, value in what)
    yield f"\n{told}{' · ' if told else ''}{document['seconds']:.1f} s\n"


def _by_name(summary: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not summary:
        return
    yield "\n| check | passed | failed | warnings | inconclusive | worst figure | limit | of |\n"
    yield "|---|--:|--:|--:|--:|--:|--:|---|\n"
    for entry in summary[:_MOST_ROWS]:
        worst = entry["worst"]
        told = ["", "", ""]
        if worst is not None:
            value = f"{_inline(words(worst['figure']))} {figure(worst['measured'])}"
            told = [value, bound(worst), _code(worst["subject"])]
        counts = [str(entry[key] or "") for key in ("pass", "fail", "warning", "inconclusive")]
        yield f"| {' | '.join([_code(entry['check']), *counts, *told])} |\n"
    if (more := len(summary) - _MOST_ROWS) > 0:
        yield f"\n... and {more} more\n"


def _findings(checks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield checks that ended alike together: their finding and hint, and a row for each."""
    for finding in alike(checks):
        yield f"\n**{_code(finding.name)}** ({_code(finding.checks[0]['check'])}, {len(finding.checks)})"
        yield f": {_inline(finding.hint)}\n" if finding.hint else "\n"
        yield "\n| subject | message | measured |\n|---|---|---|\n"
        for check in finding.checks[:_MOST_ROWS]:
            cells = (_code(check["subject"]), _inline(check["message"]), _inline(", ".join(figures(check))))
            yield f"| {' | '.join(cells)} |\n"
        if (more := len(finding.checks) - _MOST_ROWS) > 0:
            yield f"\n... and {more} more\n"


def _within(blocks: Iterable[str], most: int) -> str:
    """Return blocks joined, up to the first one with which they would be too many bytes."""
    end = "\n... and more than a summary has room for; `--json` has all.\n"
    room = most - len(end.encode())
    kept: list[str] = []
    for block in blocks:
        room -= len(block.encode())
        if room < 0:
            return "".join([*kept, end])
        kept.append(block)
    return "".join(kept)


# Texts


def _message(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _code(text: str) -> str:
    """Return a name as code, empty where it is."""
    return f"<code>{_inline(text)}</code>" if text else ""


def _inline(text: str, most: int = _MOST_TEXT) -> str:
    """Return a text in which nothing is Markdown, fit for a table's cell."""
    return "<br>".join(_cut(_lines(text), most).translate(_ESCAPES).split("\n"))


def _lines(text: str) -> str:
    """Return a text with what can be shown, its lines kept."""
    return "\n".join(map(printable, text.splitlines()))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
