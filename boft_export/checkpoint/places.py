"""Places as users name them, local or remote."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from boft_export.checkpoint.remote import RemotePath
from boft_export.errors import UsageError

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<place>.*)", re.DOTALL)
# A name and a password before the host, in any part of a URL; on the web, a token alone.
_PASSWORD = re.compile(r"://[^/@]*:[^/]*@|https?://[^/@?#]+@", re.IGNORECASE)
# Other names of the same store: an output in an input's folder must be seen to be there.
_ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "local": "file"}

AnyPath = Path | RemotePath


def parse_path(ref: str | os.PathLike[str]) -> AnyPath:
    """Return the local path or the remote one that a user names.

    Raises:
        UsageError: If it is a URL that can't be used.
    """
    text = os.fspath(ref)
    match = _URL.fullmatch(text)
    if match is None:
        return Path(text)
    scheme = _ALIASES.get(match["scheme"].lower(), match["scheme"].lower())
    # It would be in messages and in the manifest. On GitHub it is an organisation, a repository and a branch.
    if _PASSWORD.search(text) and scheme != "github":
        raise UsageError(
            f"the {scheme}:// URL holds a password or a token.",
            hint="Leave it out, and put it into fsspec's configuration, or where the store looks for credentials.",
        )
    if scheme == "file":
        return Path(match["place"] or "/")
    place = PurePosixPath(match["place"].lstrip("/"))
    if "::" in text or ".." in place.parts or not place.parts:
        raise UsageError(f"{text} can't be used as a place.", hint="Write it as s3://bucket/folder.")
    return RemotePath(f"{scheme}://{place}")


def is_url(ref: str | os.PathLike[str]) -> bool:
    """Tell whether a user names a place by a URL."""
    return _URL.fullmatch(os.fspath(ref)) is not None


def local_path(path: AnyPath, purpose: str) -> Path:
    """Return a path that is local.

    Args:
        path: The path.
        purpose: What needs it to be, for the message.

    Raises:
        UsageError: If it is remote.
    """
    if isinstance(path, RemotePath):
        raise UsageError(f"{path} is remote, and {purpose} needs files on this machine.", hint="Copy the folder here.")
    return path


def lies_in(path: AnyPath, folder: AnyPath) -> bool:
    """Tell whether ``path`` is ``folder`` or lies below it."""
    if isinstance(path, RemotePath):
        if not isinstance(folder, RemotePath) or path.is_relative_to(folder):
            return isinstance(folder, RemotePath)
        # One place may have several URLs.
        return bool(path.file_system == folder.file_system) and PurePosixPath(path.key).is_relative_to(folder.key)
    return isinstance(folder, Path) and path.resolve().is_relative_to(folder.resolve())


def file_state(path: AnyPath) -> tuple[object, ...]:
    """Return what changes when a file does.

    Raises:
        AccessError: If a remote file can't be asked for.
        OSError: If a local one can't.
    """
    if isinstance(path, RemotePath):
        return path.state()
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
