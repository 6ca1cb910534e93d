"""Turning whatever happens in a command into its exit code and one message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from boft_export.cli.output import Output, give_up_stdout
from boft_export.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, AccessError, BoftExportError, ResourceError


@contextmanager
def reported(output: Output) -> Iterator[None]:
    """Run a command's body; end it with the contract's exit code where it fails."""
    try:
        yield
    except typer.Exit:
        raise
    except BoftExportError as error:
        output.error(error)
        raise typer.Exit(error.exit_code) from None
    except MemoryError as error:
        output.error(ResourceError(f"out of memory: {error}", hint="Set --max-memory, or use fewer --jobs."))
        raise typer.Exit(ResourceError.exit_code) from None
    except KeyboardInterrupt as stop:
        output.interrupted(str(stop))
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # Whoever read our output has enough of it.
        give_up_stdout()
        raise typer.Exit(0) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        output.error(AccessError(f"the system failed: {where}{error.strerror or error}."))
        raise typer.Exit(AccessError.exit_code) from None
    except Exception as error:  # noqa: BLE001  # whatever is left is a bug of ours, and is said to be one
        if type(error).__name__ == "OutOfMemoryError":
            failed = ResourceError("the GPU is out of memory.", hint="Use --device cpu, or free the GPU.")
            output.error(failed)
            raise typer.Exit(failed.exit_code) from None
        output.bug(error)
        raise typer.Exit(EXIT_INTERNAL) from None
