"""A user's own figures of finished checkpoints, from a Python file with ``evaluate(model_dir) -> dict[str, float]``."""

from __future__ import annotations

import ast
import contextlib
import math
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from boft_export.checkpoint.folder import read_text
from boft_export.errors import InputError

# Figures by name; None for one that is no finite number.
Figures = dict[str, float | None]

_FUNCTION = "evaluate"
_HINT = "It should have: def evaluate(model_dir): return {'accuracy': 0.9}"


def check_script(script: Path) -> None:
    """Look for the function without running the file, so that hours of work don't end in a slip of the pen.

    Raises:
        AccessError: If the file can't be read.
        InputError: If it is not Python, or nothing in it is called ``evaluate``.
    """
    try:
        tree = ast.parse(read_text(script), str(script))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise InputError(f"{script} is not valid Python: {error}.", hint=_HINT) from error
    names = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    names |= {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    names |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    if _FUNCTION not in names:
        raise InputError(f"{script} defines no function {_FUNCTION}.", hint=_HINT)


def evaluate(
    script: Path, folders: Sequence[Path], progress: Callable[[int, int, str], None] | None = None
) -> list[Figures]:
    """Run a script's ``evaluate`` on each folder and return its figures.

    Args:
        script: The file; it is run once, as ``python SCRIPT`` would but for its name, and may import its neighbours.
        folders: Finished checkpoints.
        progress: Called with folders done, folders in all, and the next one's name.

    Raises:
        InputError: If the script fails, or returns something else than numbers by name.
    """
    # The script may change the current folder.
    beside, folders = str(script.resolve().parent), [f.resolve() for f in folders]
    sys.path.insert(0, beside)
    try:
        function = _guard(script, None, lambda: runpy.run_path(str(script), run_name="boft_export_evaluation"))
        if not callable(call := function.get(_FUNCTION)):
            raise InputError(f"{script} defines no function {_FUNCTION}.", hint=_HINT)
        found = []
        for i, folder in enumerate(folders):
            if progress is not None:
                progress(i, len(folders), folder.name)
            found.append(_figures(script, folder, _guard(script, folder, partial(call, str(folder)))))
        return found
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(beside)


def _guard(script: Path, folder: Path | None, work: Callable[[], Any]) -> Any:  # noqa: ANN401  # a user's own value
    """Return what ``work`` returns; a failure there is the script's, and says where its subject is."""
    try:
        return work()
    except (Exception, SystemExit) as error:
        where = f" on {folder}" if folder is not None else ""
        raise InputError(
            f"{script} failed{where}: {type(error).__name__}: {error}",
            hint="The checkpoints themselves are complete. See -vv for the traceback.",
        ) from error


def _figures(script: Path, folder: Path, value: object) -> Figures:
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise InputError(f"{script} returned {value!r} for {folder}: expected figures by name.", hint=_HINT)
    try:
        numbers = {k: float(v) for k, v in value.items()}
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{script} returned {value!r} for {folder}: {error}.", hint=_HINT) from error
    return {k: v if math.isfinite(v) else None for k, v in numbers.items()}
