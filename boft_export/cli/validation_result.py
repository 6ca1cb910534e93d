"""Showing what a validation found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from boft_export.cli.output import Output
from boft_export.plots.module_names import printable
from boft_export.plots.validation_data import bound, figure, how, words

_MOST_FINDINGS = 20
_ENDINGS = {"fails": ("failed", "red"), "warning": ("warning", "yellow"), "inconclusive": ("inconclusive", "yellow")}
_STYLES = {"pass": "bold green", "fail": "bold red", "inconclusive": "bold yellow"}
# Not every terminal's encoding has them.
_PLAIN = str.maketrans({"≤": "<=", "≥": ">="})
_HEADS = {"pass": "passed", "fail": "failed", "warning": "warnings", "inconclusive": "unclear"}


def show_validation(out: Output, document: Mapping[str, Any]) -> None:
    """Print a validation: a row for each kind of check, what was found, and a line that sums it up."""
    out.document(document)
    _show_checks(out, document)
    found = [(ending, c) for ending in _ENDINGS for c in document["checks"] if how(c) == ending]
    hint = None
    for ending, check in found[:_MOST_FINDINGS]:
        if hint and hint != check["hint"]:
            out.line(f"  {_text(hint)}")
        word, style = _ENDINGS[ending]
        finding = f" ({printable(check['finding'])})" if check["finding"] else ""
        subject = f" {printable(check['subject'])}" if check["subject"] else ""
        out.line(f"{word}: {printable(check['check'])}{subject}: {_text(check['message'])}{finding}", style)
        # What the next one says too is said once.
        hint = check["hint"]
    if hint:
        out.line(f"  {_text(hint)}")
    if (more := len(found) - _MOST_FINDINGS) > 0:
        out.line(f"... and {more} more (all of them with --json)")
    out.line(document["headline"], _STYLES[document["outcome"]])


def _show_checks(out: Output, document: Mapping[str, Any]) -> None:
    heads = {key: head for key, head in _HEADS.items() if key == "pass" or document["counts"][key]}
    columns = [("check", "left"), *((head, "right") for head in heads.values()), ("worst", "left"), ("limit", "left")]
    rows = []
    for entry in document["summary"]:
        worst = entry["worst"]
        told = ["", ""]
        if worst is not None:
            told = [printable(f"{words(worst['figure'])} {figure(worst['measured'])}"), bound(worst).translate(_PLAIN)]
        rows.append([printable(entry["check"]), *(str(entry[key] or "") for key in heads), *told])
    filled = [i for i in range(len(columns)) if i < 2 or any(row[i] for row in rows)]
    out.table("", [columns[i] for i in filled], [[row[i] for i in filled] for row in rows])


def _text(text: str) -> str:
    # On a line of its own, GitHub would take ::this:: for a command.
    return " ".join(printable(line).strip() for line in text.splitlines())
