"""What a validation leaves behind for others to read: JUnit, an HTML page, GitHub's annotations and summary."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from boft_export.checkpoint.staging import file_system_errors, write_whole
from boft_export.errors import AccessError, UsageError
from boft_export.planning.inputs import Ref

if TYPE_CHECKING:
    # At run time this would load torch, which checking the files' names does without.
    from boft_export.validation.model import Validation


# How reports begin: an earlier one may be replaced, and nothing else.
_JUNIT, _PAGE = b"<?xml version='1.0' encoding='utf-8'?>\n<testsuites", b"<!doctype html>"


@dataclass(frozen=True)
class ValidationFiles:
    """Files to write when a validation has ended, whichever way.

    Attributes:
        junit: For JUnit's XML.
        page: For an HTML page.
        summary: GitHub's file for the step's summary, which is added to; None outside of GitHub Actions.
    """

    junit: Path | None = None
    page: Path | None = None
    summary: Path | None = None

    @classmethod
    def of(cls, junit: Path | None, page: Path | None, inputs: Sequence[Ref]) -> ValidationFiles:
        """Return the files, checked: what could not be written in the end is refused before any work.

        Args:
            junit: For JUnit's XML.
            page: For an HTML page.
            inputs: What is validated; inputs are never written to.

        Raises:
            UsageError: If one is a folder, lies in an input, or is no page, or what draws it is missing.
            AccessError: If its folder can't be written to.
        """
        if page is not None and page.suffix not in (".html", ".htm"):
            raise UsageError(f"{page} is no HTML page: its name should end in .html.")
        if page is not None and find_spec("matplotlib") is None:
            hint = "pip install 'boft-export[plots]', or do with --json or --junit-xml."
            raise UsageError(f"{page} takes matplotlib, which is not installed.", hint=hint)
        if junit is not None and page is not None and junit.resolve() == page.resolve():
            raise UsageError(f"{junit} is named for two reports.")
        for file, start in ((junit, _JUNIT), (page, _PAGE)):
            if file is not None:
                _check_place(file, start)
        files = cls(_absolute(junit), _absolute(page))
        files.keep_off(inputs)
        summary = os.environ.get("GITHUB_STEP_SUMMARY") if on_github() else None
        return replace(files, summary=Path(summary) if summary else None)

    def keep_off(self, inputs: Sequence[Ref]) -> None:
        """Refuse files that are, or lie in, an input: inputs are never written to.

        Raises:
            UsageError: If one does.
        """
        for file in (self.junit, self.page):
            for given in map(Path, inputs):
                if file is not None and given.exists() and file.resolve().is_relative_to(given.resolve()):
                    hint = "Choose another place."
                    raise UsageError(f"{file} lies in {given}, and inputs are never written to.", hint=hint)

    def write(self, validation: Validation, seconds: float) -> None:
        """Write all of them.

        Raises:
            AccessError: If one can't be written.
        """
        from boft_export.report.github import step_summary
        from boft_export.report.junit import junit_xml

        if self.junit is not None:
            _write(self.junit, junit_xml(validation, seconds))
        if self.page is not None:
            from boft_export.plots.validation_page import page
            from boft_export.report.validation_report import validation_document

            _write(self.page, page(validation_document(validation, seconds)).encode())
        self._summarise(step_summary(validation, seconds))

    def write_error(self, error: BaseException, seconds: float) -> None:
        """Write why there is no result; a page has nothing to show then."""
        from boft_export.report.github import error_summary
        from boft_export.report.junit import junit_error

        if self.junit is not None:
            _write(self.junit, junit_error(error, seconds))
        self._summarise(error_summary(error, seconds))

    def _summarise(self, text: str) -> None:
        if self.summary is not None:
            with file_system_errors(self.summary), self.summary.open("a", encoding="utf-8") as file:
                file.write(text)


def on_github() -> bool:
    """Tell whether this runs in GitHub Actions."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def _check_place(file: Path, start: bytes) -> None:
    place = file.resolve()
    if place.is_dir():
        raise UsageError(f"{file} is a folder.", hint="Name a file in it.")
    if place.is_file():
        with file_system_errors(file), file.open("rb") as opened:
            content = opened.read(len(start))
        if content and content != start:
            raise UsageError(f"{file} exists and is no such report.", hint="Choose another name, or remove it.")
    folder = next(p for p in place.parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise AccessError(f"{file} can't be written: {folder} is no folder that this user may write to.")


def _absolute(file: Path | None) -> Path | None:
    return None if file is None else file.absolute()


def _write(file: Path, content: bytes) -> None:
    if file.exists() and not file.is_file():
        # A pipe or a device, such as /dev/stdout, is written to and not replaced.
        with file_system_errors(file):
            file.write_bytes(content)
        return
    with file_system_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(file) as opened:
        opened.write(content)
