"""Options that several commands share: the same name and meaning everywhere."""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from boft_export.adapters import ReadOptions, View
from boft_export.linalg.path import InterpolationPath

if TYPE_CHECKING:
    from boft_export.planning.inputs import Sources

_INPUTS = "Where inputs come from"
_RUN = "How it runs"
_SHOWN = "What is shown"
PATH_PANEL = "How far to go"


class OutputDtype(StrEnum):
    """The dtype of the output."""

    KEEP = "keep"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def kept(self) -> str | None:
        """The dtype, or None to keep the base's."""
        return None if self is OutputDtype.KEEP else self.value


class ComputeDtype(StrEnum):
    """The dtype of the arithmetic."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"


class EngineName(StrEnum):
    """What runs the work."""

    LOCAL = "local"
    RAY = "ray"


class ConvView(StrEnum):
    """The meaning of a PEFT BOFT Conv2d adapter."""

    AUTO = "auto"
    INPUT = "input"
    RESHAPED = "reshaped"


Base = Annotated[
    str,
    typer.Argument(
        help="Base checkpoint: a folder, a file, a URL or a Hub id; '-' for the one the adapter names.", metavar="BASE"
    ),
]
Adapter = Annotated[str, typer.Argument(help="Adapter: a folder, a file, a URL or a Hub id.", metavar="ADAPTER")]
Adapters = Annotated[
    list[str],
    typer.Argument(help="Adapters: folders, files, URLs or Hub ids; applied in the order given.", metavar="ADAPTER"),
]
Output = Annotated[
    str,
    typer.Option(
        "--output",
        "-o",
        help="Folder to write, or its URL; it appears only when it is complete.",
        metavar="PATH",
    ),
]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:N or cuda:all.", metavar="DEVICE", rich_help_panel=_RUN)
]
Compute = Annotated[ComputeDtype, typer.Option("--compute-dtype", help="Dtype to compute in.", rich_help_panel=_RUN)]
Dtype = Annotated[OutputDtype, typer.Option("--dtype", help="Dtype of the output's weights.")]
MaxShardSize = Annotated[
    str | None, typer.Option(help="Largest file, as 5GB (default: the base's own files).", metavar="SIZE")
]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="Memory the whole process may take, as 700MiB.", metavar="SIZE", rich_help_panel=_RUN),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        "-j",
        help="Threads that read, fold and write (default: one for each core, at most 8; of a base at a URL 8).",
        rich_help_panel=_RUN,
    ),
]
Curve = Annotated[
    InterpolationPath,
    typer.Option(
        "--path",
        help=f"The curve from base to tuned: {', '.join(InterpolationPath)}.",
        metavar="PATH",
        rich_help_panel=PATH_PANEL,
    ),
]
AlphaMapFile = Annotated[
    Path | None,
    typer.Option(
        "--alpha-map",
        help="YAML or JSON: glob patterns of tensor names, each with its own alpha. The last match wins.",
        metavar="FILE",
        rich_help_panel=PATH_PANEL,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was killed.", rich_help_panel=_RUN)]
EngineKind = Annotated[
    EngineName, typer.Option("--engine", help="This process, or a Ray cluster's workers.", rich_help_panel=_RUN)
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        help="auto, local, HOST:PORT or ray://HOST:PORT (default: what RAY_ADDRESS says, or local: this machine).",
        metavar="ADDRESS",
        rich_help_panel=_RUN,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output where it exists.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Plan and check only; write nothing.")]
Revision = Annotated[
    str | None, typer.Option(help="The base's branch, tag or commit on the Hub.", rich_help_panel=_INPUTS)
]
AdapterRevision = Annotated[
    str | None, typer.Option(help="The adapters' branch, tag or commit on the Hub.", rich_help_panel=_INPUTS)
]
Subfolder = Annotated[
    str | None, typer.Option(help="The base's folder inside its repository or root.", rich_help_panel=_INPUTS)
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Use only local files and the Hub's cache.", rich_help_panel=_INPUTS)
]
ConvMeaning = Annotated[
    ConvView,
    typer.Option(
        "--conv-view",
        help="Meaning of Conv2d adapters: input (PEFT 0.14 and later) or reshaped (up to 0.13).",
        rich_help_panel=_INPUTS,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=_SHOWN)]


def _log_less(quiet: bool) -> bool:  # noqa: FBT001  # as typer calls it
    """Have the package log errors only, where that is asked for."""
    logging.getLogger("boft_export").setLevel(logging.ERROR if quiet else logging.NOTSET)
    return quiet


Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", callback=_log_less, help="Print errors only.", rich_help_panel=_SHOWN)
]
Verbose = Annotated[
    int,
    typer.Option("--verbose", "-v", count=True, help="Say more; -vv with tracebacks.", rich_help_panel=_SHOWN),
]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="No progress bar.", rich_help_panel=_SHOWN)]


def sources(
    revision: str | None, adapter_revision: str | None, subfolder: str | None, *, offline: bool, conv_view: ConvView
) -> Sources:
    """Return where inputs come from, as the options say it."""
    from boft_export.planning.inputs import Sources

    view = None if conv_view is ConvView.AUTO else View(conv_view.value)
    return Sources(revision, adapter_revision, subfolder, offline, ReadOptions(conv_view=view))


def examples(*lines: str) -> str:
    """Return the end of a command's help: lines that can be pasted."""
    return "Examples:\n\n" + "\n\n".join(f"  {line}" for line in lines)
