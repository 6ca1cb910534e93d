"""The program: its commands and their common behaviour."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Annotated, NoReturn

import typer

from boft_export.cli import diff, env, inspect, interpolate, merge, onnx, rotation, unmerge, validate
from boft_export.version import __version__

app = typer.Typer(
    name="boft-export",
    help="Fold orthogonal adapters (BOFT, OFT) into checkpoints, and prove it.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"boft-export {__version__}")
        raise typer.Exit


@app.callback(epilog="Examples:\n\n  boft-export merge BASE ADAPTER -o OUT\n\n  boft-export inspect ADAPTER")
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for _command in (merge, interpolate, onnx, unmerge, validate, diff, inspect, rotation, env):
    app.command(_command.NAME, epilog=_command.EPILOG)(_command.command)


def _stop(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Run the program; being asked to end is the same as being interrupted."""
    signal.signal(signal.SIGTERM, _stop)
    app()


if __name__ == "__main__":
    main()
