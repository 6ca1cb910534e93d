"""``boft-export validate``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from boft_export.cli import options as opt
from boft_export.cli.output import Output
from boft_export.cli.run import reported
from boft_export.errors import BoftExportError, CheckFailedError, UsageError

if TYPE_CHECKING:
    from boft_export.models.inputs import FunctionalInputs

NAME = "validate"
EPILOG = opt.examples(
    "boft-export validate ./my-adapter --base ./base",
    "boft-export validate ./my-adapter --base ./base --merged ./merged --junit-xml report.xml --report report.html",
    "boft-export validate --base ./base --merged ./somebody-elses-merge",
    "boft-export validate ./my-adapter --base ./base --onnx ./onnx",
)
_ASKED = "What is asked"
_REPORTS = "Reports"
_FUNCTIONAL = "The model's outputs"


class FailOn(StrEnum):
    """What ends with exit code 1."""

    ERROR = "error"
    WARNING = "warning"
    INCONCLUSIVE = "inconclusive"


def command(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            help="Adapters in the order in which they were merged; none to judge a merge by its base alone.",
            metavar="ADAPTER",
            show_default=False,
        ),
    ] = None,
    *,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base: a folder, a file, a URL or a Hub id (default: what the adapter names).", metavar="BASE"
        ),
    ] = None,
    merged: Annotated[
        str | None,
        typer.Option(help="A merged checkpoint: every tensor is merged again and compared.", metavar="MERGED"),
    ] = None,
    onnx: Annotated[
        Path | None,
        typer.Option(help="A folder with ONNX graphs: they are run beside base and adapter.", metavar="DIR"),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            help="YAML: thresholds, required_layers, allowed_warnings, allowed_changes, fail_on.",
            metavar="FILE",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            help="Another threshold, as max_angle=0.5. Several times.", metavar="NAME=VALUE", rich_help_panel=_ASKED
        ),
    ] = None,
    fail_on: Annotated[
        list[FailOn] | None,
        typer.Option(
            help="What ends with exit code 1 beside errors: warning, inconclusive. Several times.",
            metavar="LEVEL",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    functional: Annotated[
        bool,
        typer.Option("--functional", help="Run the merged model beside base and adapter.", rich_help_panel=_FUNCTIONAL),
    ] = False,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Run them on this text. Several times.", metavar="TEXT", rich_help_panel=_FUNCTIONAL),
    ] = None,
    text_file: Annotated[
        Path | None,
        typer.Option(help="Run them on the lines of this file.", metavar="FILE", rich_help_panel=_FUNCTIONAL),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Run them on this image. Several times.", metavar="FILE", rich_help_panel=_FUNCTIONAL),
    ] = None,
    junit_xml: Annotated[
        Path | None, typer.Option(help="Write a JUnit report.", metavar="FILE", rich_help_panel=_REPORTS)
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write an HTML page.", metavar="FILE", rich_help_panel=_REPORTS)
    ] = None,
    device: opt.Device = "auto",
    max_memory: opt.MaxMemory = None,
    jobs: opt.Jobs = None,
    revision: opt.Revision = None,
    adapter_revision: opt.AdapterRevision = None,
    subfolder: opt.Subfolder = None,
    offline: opt.Offline = False,
    conv_view: opt.ConvMeaning = opt.ConvView.AUTO,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
    no_progress: opt.NoProgress = False,
) -> None:
    """Measure an adapter, and a merge of it, and fail where something is wrong with them.

    In GitHub Actions it also annotates the run and adds to the step's summary.
    """
    out = Output(as_json, quiet, verbose, no_progress)
    with reported(out):
        from boft_export.cli.validation_result import show_validation
        from boft_export.report.github import error_annotations, validation_annotations
        from boft_export.report.validation_files import ValidationFiles, on_github
        from boft_export.report.validation_report import validation_document

        refs = list(adapters or ())
        given = (*refs, base, merged, onnx, policy, text_file, *(image or ()))
        files = ValidationFiles.of(junit_xml, report, [r for r in given if r is not None])
        sources = opt.sources(revision, adapter_revision, subfolder, offline=offline, conv_view=conv_view)
        if refs and (base == "-" or (base is None and (merged or onnx) is not None)):
            # The base that will be read is one that the adapter names; what is wrong with the adapter is told below.
            named = None
            with contextlib.suppress(BoftExportError):
                named = sources.adapter(refs[0]).adapter.base_model
            files.keep_off([named] if named is not None else [])
        started = time.monotonic()
        try:
            from boft_export.validation.policy import Policy, parse_fail_on, parse_thresholds, read_policy
            from boft_export.validation.validate import validate

            asked = read_policy(policy) if policy is not None else Policy()
            asked = replace(
                asked,
                thresholds=asked.thresholds.changed(parse_thresholds(threshold or ())),
                fail_on=asked.fail_on | parse_fail_on([f.value for f in fail_on or ()]),
            )
            inputs = _inputs(text or (), text_file, image or (), wanted=functional)
            with out.progress("validating") as progress:
                result = validate(
                    refs,
                    base=base,
                    merged=merged,
                    onnx=onnx,
                    functional=inputs,
                    policy=asked,
                    device=device,
                    max_memory=max_memory,
                    jobs=jobs,
                    sources=sources,
                    progress=progress,
                )
        except BaseException as error:
            # What the run ended with matters more than what its reports end with.
            with contextlib.suppress(BoftExportError):
                files.write_error(error, time.monotonic() - started)
            if on_github():
                out.commands(error_annotations(error))
            raise
        seconds = time.monotonic() - started
        files.write(result, seconds)
        if on_github():
            out.commands(validation_annotations(result))
        show_validation(out, validation_document(result, seconds))
        if result.failures:
            raise typer.Exit(CheckFailedError.exit_code)


def _inputs(
    texts: Sequence[str], text_file: Path | None, images: Sequence[Path], *, wanted: bool
) -> FunctionalInputs | None:
    """Return what to run models on; None where they are not to be run."""
    from boft_export.models.inputs import FunctionalInputs

    if text_file is not None:
        if texts or images:
            raise UsageError("--text-file is given beside other inputs.", hint="Give one kind of input.")
        return FunctionalInputs.from_text_file(text_file)
    if texts or images:
        return FunctionalInputs(texts=tuple(texts), images=tuple(images))
    return FunctionalInputs() if wanted else None
