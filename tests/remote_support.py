"""What the tests of remote places share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Whoever takes this skips its tests where one is missing.
fsspec = pytest.importorskip("fsspec")
pytest.importorskip("s3fs")
pytest.importorskip("moto")

MAIN = "from boft_export.cli.main import main\nmain()\n"


def put(folder: Path, url: str) -> str:
    system, _ = fsspec.core.url_to_fs(url)
    for file in folder.rglob("*"):
        if file.is_file():
            system.pipe_file(f"{url}/{file.relative_to(folder)}", file.read_bytes())
    return url


def content(place: str | Path) -> dict[str, bytes]:
    """Return every file below a folder, local or remote."""
    if isinstance(place, Path):
        return {str(f.relative_to(place)): f.read_bytes() for f in place.rglob("*") if f.is_file()}
    system, key = fsspec.core.url_to_fs(place)
    system.invalidate_cache()
    return {n[len(key) + 1 :]: system.cat_file(n) for n in system.find(key)}


def hidden(output: str) -> str:
    folder, _, name = output.rpartition("/")
    return f"{folder}/.{name}.boft-export"


def program(*arguments: object, code: str = MAIN, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def kill_at(event: str, count: int) -> str:
    """Return a program that kills itself before the ``count``-th time that ``event`` is done to the store."""
    return (
        "import os, signal, s3fs\n"
        f"real, left = s3fs.S3FileSystem._call_s3, [{count}]\n"
        "async def call(self, method, *a, **k):\n"
        f"    left[0] -= method == {event!r}\n"
        "    if left[0] <= 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return await real(self, method, *a, **k)\n"
        "s3fs.S3FileSystem._call_s3 = call\n" + MAIN
    )
