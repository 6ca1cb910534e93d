"""Objects of a store by their exact keys: listed, read, written, removed. No name is ever taken for a pattern."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any, cast

from boft_export.checkpoint.remote import RemotePath, remote_errors
from boft_export.errors import AccessError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# One part of an upload; a store takes 10,000 of them, and some three are in memory.
PART_BYTES = 16 << 20


def sizes(folder: RemotePath) -> dict[str, int]:
    """Return the size of each object below a folder by its key, asked anew.

    A key is as the store has it: it may end in a slash, as where a console made a folder, or have two in a row.

    Raises:
        AccessError: If the folder can't be listed.
    """
    with remote_errors(folder):
        system, own = folder.file_system, folder.key.rstrip("/")
        system.invalidate_cache()
        found = {k: int(i["size"] or 0) for k, i in system.find(own, detail=True).items() if k.rstrip("/") != own}
    if elsewhere := next((k for k in found if not k.startswith(f"{own}/")), None):
        raise AccessError(f"{folder} lists {elsewhere}, which does not lie below it.")
    return found


def remove(folder: RemotePath, keys: Iterable[str]) -> None:
    """Remove objects below a folder, in order; ``rm`` would look for what matches a key, and lies below it.

    Raises:
        AccessError: If one can't be removed.
    """
    with remote_errors(folder, "write"):
        system = folder.file_system
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                system.rm_file(key)
        system.invalidate_cache()


def read_json(path: RemotePath) -> dict[str, Any] | None:
    """Return a small object's JSON, asked anew; None if there is none, or it is not whole.

    Raises:
        AccessError: If it can't be read.
    """
    try:
        path.forget()
        value = json.loads(path.read_bytes())
    except AccessError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def put_json(path: RemotePath, value: Mapping[str, Any], *, create: bool = False) -> None:
    """Write a small object.

    Args:
        path: Where.
        value: What.
        create: Fail where there is one already.

    Raises:
        AccessError: If that fails, also where the store can't create exclusively.
    """
    with remote_errors(path, "write"):
        path.file_system.pipe_file(path.key, json.dumps(value).encode(), **({"mode": "create"} if create else {}))


@contextlib.contextmanager
def upload(target: RemotePath) -> Iterator[IO[bytes]]:
    """Open an object for writing in order; it is there only when it is complete.

    Raises:
        AccessError: If it can't be written.
    """
    with remote_errors(target, "write"):
        file = target.file_system.open(target.key, "wb", block_size=PART_BYTES)
    try:
        yield cast("IO[bytes]", _Upload(file, target))
        with remote_errors(target, "write"):
            file.close()
    except BaseException:
        with contextlib.suppress(Exception):
            file.discard()
        with contextlib.suppress(AttributeError):
            # Else it would be closed, and so be there, when it is collected.
            file.closed = True
        raise


class _Upload(io.RawIOBase):
    """A file that is only written to, in order, and whose failures are ours."""

    def __init__(self, file: IO[bytes], target: RemotePath) -> None:
        super().__init__()
        self._file = file
        self._target = target

    def writable(self) -> bool:
        """Tell that it can be written."""
        return True

    def write(self, data: ReadableBuffer) -> int:
        """Write all of ``data``."""
        with remote_errors(self._target, "write"):
            self._file.write(data)
        return memoryview(data).nbytes
