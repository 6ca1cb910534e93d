"""Paths on object stores and other remote file systems, through fsspec: read by ranges, never as a whole."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import PurePath, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from boft_export.errors import AccessError, BoftExportError, DamagedFileError, UsageError, first_line

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from fsspec import AbstractFileSystem

# What one request asks for, and how many are under way at once for one reader.
RANGE_BYTES = 4 << 20
RANGES = 4
# What tells one state of a file from another, by the names that the stores give it.
_STATE = (
    "ETag", "etag", "md5Hash", "md5", "content_md5", "generation", "LastModified", "last_modified", "mtime", "modified",
    "updated", "created",
)  # fmt: skip
_DENIED = "Check the credentials: the store's usual environment variables and files hold."
_UNREACHED = "Check the network, the endpoint and the credentials, then run again."


class RemoteStat(NamedTuple):
    """What ``stat`` tells of a remote file."""

    st_size: int


@dataclass(frozen=True, order=True)
class RemotePath:
    """A place on a remote file system: as much of ``pathlib.Path`` as a checkpoint needs.

    A folder's listing may be that of a moment ago, until ``refresh``. It can be pickled and shared by threads.

    Attributes:
        url: Where it is, without a slash at its end.
    """

    url: str

    def __str__(self) -> str:
        """Return the URL."""
        return self.url

    def __fspath__(self) -> str:
        """Return the URL, by which this may be named wherever an input may."""
        return self.url

    def __truediv__(self, other: str | PurePath) -> RemotePath:
        """Return what lies below.

        Raises:
            DamagedFileError: If that would lead elsewhere.
        """
        below = PurePosixPath(other)
        if below.is_absolute() or ".." in below.parts or "://" in str(other):
            raise DamagedFileError(f"{other} is no place in {self}.")
        return RemotePath("/".join((self.url, *below.parts)))

    @property
    def _scheme(self) -> str:
        return self.url.partition("://")[0]

    @property
    def _place(self) -> PurePosixPath:
        """The bucket or host, and the path in it."""
        return PurePosixPath(self.url.partition("://")[2])

    @property
    def parts(self) -> tuple[str, ...]:
        """The bucket or host, and each folder down to here."""
        return self._place.parts

    @property
    def name(self) -> str:
        """The last part."""
        return self._place.name

    @property
    def suffix(self) -> str:
        """The suffix of the last part."""
        return self._place.suffix

    @property
    def parent(self) -> RemotePath:
        """The folder it is in; of a bucket itself the bucket."""
        return RemotePath(self.url.rpartition("/")[0]) if len(self.parts) > 1 else self

    def with_name(self, name: str) -> RemotePath:
        """Return what lies beside it."""
        return self.parent / name

    def resolve(self) -> RemotePath:
        """Return it as it is: there are no links to follow."""
        return self

    def relative_to(self, folder: RemotePath) -> PurePosixPath:
        """Return the path from a folder above it.

        Raises:
            ValueError: If it does not lie below.
        """
        if self._scheme != folder._scheme:  # its own class
            raise ValueError(f"{self} is not below {folder}")
        return self._place.relative_to(folder._place)

    def is_relative_to(self, folder: RemotePath) -> bool:
        """Tell whether it is ``folder`` or lies below it."""
        return self._scheme == folder._scheme and self._place.is_relative_to(folder._place)

    @property
    def file_system(self) -> AbstractFileSystem:
        """The file system it is on.

        Raises:
            UsageError: If its scheme is not known, or the package for it is not installed.
        """
        thread = 0 if _is_async(self._scheme) else threading.get_ident()
        return _file_system(self._scheme, self.parts[0] if self.parts else "", os.getpid(), thread)

    @property
    def key(self) -> str:
        """Its name on that file system."""
        return str(self.file_system._strip_protocol(self.url))  # noqa: SLF001  # strip_protocol would look up the class again

    def refresh(self) -> None:
        """Forget what is known of folders."""
        with remote_errors(self):
            self.file_system.invalidate_cache()

    def forget(self) -> None:
        """Forget what its folder's listing says of it."""
        with remote_errors(self):
            self.file_system.invalidate_cache(self.parent.key)

    def info(self) -> dict[str, Any] | None:
        """Return what the file system tells of it; None if there is nothing.

        Raises:
            AccessError: If it can't be asked.
        """
        try:
            with remote_errors(self):
                return cast("dict[str, Any]", self.file_system.info(self.key))
        except AccessError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return None
            raise

    def exists(self) -> bool:
        """Tell whether there is a file or a folder."""
        return self.info() is not None

    def is_file(self) -> bool:
        """Tell whether there is a file."""
        return (self.info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        """Tell whether there is a folder: a store has one where there are files below it."""
        return any(True for _ in self.iterdir()) or (self.info() or {}).get("type") == "directory"

    def is_symlink(self) -> bool:
        """Tell that it is no link."""
        return False

    def stat(self) -> RemoteStat:
        """Return the file's size.

        Raises:
            AccessError: If there is no such file, or it can't be asked for.
        """
        return RemoteStat(int(self._known()["size"]))

    def state(self) -> tuple[object, ...]:
        """Return what changes when the file does, asked anew: its size, and its ETag, time or the like.

        Raises:
            AccessError: If there is no such file, or it can't be asked for.
        """
        self.forget()
        known = self._known()
        return known["size"], *(f"{k} {known[k]}" for k in _STATE if known.get(k))

    def _known(self) -> dict[str, Any]:
        known = self.info()
        if known is None:
            raise AccessError(f"{self} does not exist.", hint="Check the bucket and the path.")
        return known

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield what lies in the folder, in the order of names; nothing where there is no folder.

        Raises:
            AccessError: If it can't be listed.
        """
        own = self.key.rstrip("/")
        try:
            with remote_errors(self):
                entries = self.file_system.ls(self.key, detail=True)
        except AccessError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return
            raise
        names = {e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["name"].rstrip("/") != own}
        # A store lets a key have any name; no folder of files can have these.
        yield from (self / n for n in sorted(names - {"", ".", ".."}) if "\\" not in n)

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield what lies below and matches ``pattern``, each part of which stands for one name."""
        first, _, rest = pattern.partition("/")
        for path in self.iterdir():
            if fnmatchcase(path.name, first):
                yield from path.glob(rest) if rest else (path,)

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Open the file for reading.

        Raises:
            AccessError: If it can't be read, then or later.
        """
        with remote_errors(self):
            file = self.file_system.open(self.key, mode, block_size=RANGE_BYTES)
        return io.BufferedReader(_Reader(file, self))

    def read_bytes(self) -> bytes:
        """Return the content of a small file.

        Raises:
            AccessError: If it can't be read.
        """
        with remote_errors(self):
            return bytes(self.file_system.cat_file(self.key))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the content of a small file.

        Raises:
            AccessError: If it can't be read.
            UnicodeDecodeError: If it is no such text.
        """
        return self.read_bytes().decode(encoding)


class _Reader(io.RawIOBase):
    """A file that is only read, and whose failures are ours; not those of whoever reads it."""

    def __init__(self, file: IO[bytes], path: RemotePath) -> None:
        super().__init__()
        self._file = file
        self._path = path

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be read anywhere."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill ``buffer`` as far as the file goes on."""
        place = memoryview(buffer).cast("B")
        with remote_errors(self._path):
            data = self._file.read(len(place))
        place[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go elsewhere."""
        with remote_errors(self._path):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return where it is."""
        return self._file.tell()

    def close(self) -> None:
        """Close it."""
        if not self.closed:
            self._file.close()
        super().close()


@dataclass(frozen=True)
class RemoteBytes:
    """A byte range of a remote file, read by requests for just what is wanted."""

    path: RemotePath
    offset: int

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill ``buffer`` with the file's bytes from ``offset + start`` on.

        Raises:
            DamagedFileError: If the file ends before the buffer is full.
            AccessError: If the file cannot be read.
        """
        position, end = self.offset + start, self.offset + start + len(buffer)
        begins = list(range(position, end, RANGE_BYTES))
        for i in range(0, len(begins), RANGES):
            batch = begins[i : i + RANGES]
            for begin, data in zip(batch, self._read(batch, end), strict=True):
                place = buffer[begin - position : begin - position + RANGE_BYTES]
                if len(data) != len(place):
                    raise self._truncated()
                place[:] = data

    def _read(self, begins: list[int], end: int) -> list[bytes]:
        ends = [min(b + RANGE_BYTES, end) for b in begins]
        try:
            with remote_errors(self.path):
                system, key = self.path.file_system, self.path.key
                if len(begins) == 1:
                    return [system.cat_file(key, start=begins[0], end=ends[0])]
                found: list[bytes] = system.cat_ranges([key] * len(begins), begins, ends, on_error="raise")
                return found
        except AccessError as error:
            # Of a range beyond the end each store has its own way to say that there is none.
            if isinstance(error.__cause__, FileNotFoundError | PermissionError | TimeoutError):
                raise
            if cast("int", self.path.state()[0]) < ends[-1]:
                raise self._truncated() from error
            raise

    def _truncated(self) -> DamagedFileError:
        return DamagedFileError(f"{self.path} has fewer bytes than it should: it is truncated or was changed.")


@contextmanager
def remote_errors(path: RemotePath, doing: str = "read") -> Iterator[None]:
    """Turn whatever a remote file system raises on ``path`` into an ``AccessError``."""
    try:
        yield
    except (BoftExportError, MemoryError):
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = "Check the bucket and the path."
        raise AccessError(f"cannot {doing} {path}: it, or its bucket, does not exist.", hint=hint) from error
    except PermissionError as error:
        raise AccessError(f"cannot {doing} {path}: access was denied ({first_line(error)}).", hint=_DENIED) from error
    except Exception as error:  # each file system has errors of its own, with no base that they share
        hint = _DENIED if "redential" in type(error).__name__ else _UNREACHED
        raise AccessError(f"cannot {doing} {path}: {first_line(error)}.", hint=hint) from error


@lru_cache
def _is_async(scheme: str) -> bool:
    """Tell whether threads may share a file system: its requests are made by one thread of its own."""
    try:
        from fsspec import get_filesystem_class

        return bool(get_filesystem_class(scheme).async_impl)
    except (ImportError, ValueError):
        # That it can't be had is told when it is asked for.
        return True


@lru_cache(maxsize=256)
def _file_system(scheme: str, place: str, _process: int, _thread: int) -> AbstractFileSystem:
    """Return the file system that all threads of a process share, or one for a thread where they can't."""
    url = f"{scheme}://{place}"
    try:
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations
    except ImportError as error:
        raise UsageError(
            f"{url} is remote, for which fsspec is needed.", hint='pip install "boft-export[remote]"'
        ) from error
    try:
        return url_to_fs(url)[0]
    except ImportError as error:
        known = known_implementations.get(scheme, {})
        package = str(known.get("class", "")).partition(".")[0]
        extra = '"boft-export[remote]"' if package == "s3fs" else package
        hint = str(known.get("err", error)) if package in {"", "fsspec"} else f"pip install {extra}"
        raise UsageError(f"{url} needs a package that is not installed: {first_line(error)}.", hint=hint) from error
    except ValueError as error:
        raise UsageError(
            f"{url} can't be opened: {first_line(error)}.", hint="s3://, gs://, az:// and fsspec's other schemes work."
        ) from error
    except Exception as error:  # such as a server that can't be reached
        raise AccessError(f"cannot open {url}: {first_line(error)}.", hint=_UNREACHED) from error
