"""SHA-256 of the input files, taken from the bytes as they pass."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from boft_export.checkpoint.places import AnyPath
from boft_export.checkpoint.tensors import bytes_at
from boft_export.errors import AccessError

_PIECE = 4 << 20


class InputHashes:
    """Digests of files that are read in ranges, mostly in order.

    Bytes that come in their order are digested as they pass; what was left out is read when it is needed.

    Args:
        files: Name in the manifest and path of each file.
    """

    def __init__(self, files: Mapping[str, AnyPath]) -> None:
        self._files = dict(files)
        self._state = {path: (hashlib.sha256(), 0) for path in files.values()}
        self._stopped = False

    def stop(self) -> None:
        """Read no more while bytes pass; what was left out is still read where a digest is asked for."""
        self._stopped = True

    def feed(self, path: AnyPath, offset: int, data: memoryview) -> None:
        """Take note of ``data``, the bytes of ``path`` from ``offset`` on."""
        state = self._state.get(path)
        if state is None or offset < state[1]:
            return
        self._advance(path, offset, passing=True)
        digest, position = self._state[path]
        if position == offset:
            digest.update(data)
            self._state[path] = (digest, position + len(data))

    def advance(self, path: AnyPath, stop: int) -> None:
        """Read what has not passed yet of the first ``stop`` bytes of ``path``.

        Raises:
            DamagedFileError: If the file ends early.
            AccessError: If it can't be read.
        """
        self._advance(path, stop)

    def _advance(self, path: AnyPath, stop: int, *, passing: bool = False) -> None:
        digest, position = self._state[path]
        while position < stop and not (passing and self._stopped):
            buffer = memoryview(bytearray(min(_PIECE, stop - position)))
            bytes_at(path, position).read_into(buffer, 0)
            digest.update(buffer)
            position += len(buffer)
        self._state[path] = (digest, position)

    def digests(self, names: Collection[str] | None = None) -> dict[str, str]:
        """Return the SHA-256 of each file by its name, reading what has not passed yet.

        Args:
            names: Of these files; None for all.

        Raises:
            DamagedFileError: If a file ends early.
            AccessError: If a file cannot be read.
        """
        wanted = {n: p for n, p in self._files.items() if names is None or n in names}
        for path in dict.fromkeys(wanted.values()):
            try:
                size = path.stat().st_size
            except OSError as error:
                raise AccessError(f"cannot read {path}: {error.strerror or error}") from error
            self._advance(path, size)
        return {name: self._state[path][0].hexdigest() for name, path in wanted.items()}


def file_digest(path: AnyPath) -> str:
    """Return a file's SHA-256.

    Raises:
        AccessError: If it cannot be read.
    """
    return InputHashes({"": path}).digests()[""]
