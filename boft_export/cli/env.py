"""``boft-export env``."""

from __future__ import annotations

from boft_export.cli import options as opt
from boft_export.cli.output import Output
from boft_export.cli.run import reported

NAME = "env"
EPILOG = opt.examples("boft-export env", "boft-export env --json")


def command(*, as_json: opt.Json = False, verbose: opt.Verbose = 0) -> None:
    """Tell what this machine has that a merge could use."""
    out = Output(as_json, verbose=verbose)
    with reported(out):
        from boft_export.report.environment import environment

        found = environment()
        out.document({"schema_version": 1, **found})
        for section, values in found.items():
            out.line(section, "bold")
            for key, value in values.items():
                out.line(f"  {key}: {value}")
