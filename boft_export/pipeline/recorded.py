"""What a checkpoint's ``boft_export.json`` says of how it was made, read as input that may be wrong in any way."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, TypeVar

from boft_export.checkpoint import Checkpoint
from boft_export.checkpoint.dtypes import DTYPE_BITS
from boft_export.checkpoint.folder import parse_json_object, read_text
from boft_export.checkpoint.places import AnyPath
from boft_export.errors import AccessError, DamagedFileError, InputError, UsageError
from boft_export.linalg.path import InterpolationPath
from boft_export.planning import Action
from boft_export.planning.strength import Interpolation

MANIFEST_NAME = "boft_export.json"
SCHEMA_VERSION = 1
# Some kilobytes for each of the tensors of the largest models.
_LARGEST = 64 << 20
_MOST_DIMENSIONS = 64
_LARGEST_NUMBER = 1 << 62
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHOWN = 80
_HINT = "The file was changed or damaged. Put back the one that was written, or remove it to go without."

T = TypeVar("T")


@dataclass(frozen=True)
class RecordedInput:
    """The base, or an adapter.

    Attributes:
        name: How it was called.
        sha256: The SHA-256 of each of its files, by name.
    """

    name: str
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class RecordedFile:
    """A file that was written."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class RecordedTensor:
    """A tensor that was written.

    Attributes:
        action: What was done.
        dtype: Its dtype.
        shape: Its shape.
        alphas: How far it went with each adapter that rotated it, by the adapter's number.
    """

    action: Action
    dtype: str
    shape: tuple[int, ...]
    alphas: Mapping[int, float]


@dataclass(frozen=True)
class Recorded:
    """How a checkpoint was made, by its own word.

    Attributes:
        command: ``merge``, ``interpolate`` or another verb.
        base: The base.
        adapters: The adapters in the order in which they were applied.
        interpolation: How far to go was asked for, and on which path; all the way for a merge.
        dtype: The dtype asked for: ``keep``, ``float32``, ...
        compute_dtype: The dtype of the arithmetic.
        files: The weight files, by name.
        tensors: The tensors, by name.
        undo: The files beside them that undo the merge, by name; see ``boft_export.pipeline.undo``.
        task: What an ONNX graph was exported for; None for anything else.
    """

    command: str
    base: RecordedInput
    adapters: tuple[RecordedInput, ...]
    interpolation: Interpolation
    dtype: str
    compute_dtype: str
    files: Mapping[str, RecordedFile]
    tensors: Mapping[str, RecordedTensor]
    undo: Mapping[str, RecordedFile] = field(default_factory=dict)
    task: str | None = None

    @property
    def path(self) -> InterpolationPath:
        """The curve from base to tuned."""
        return self.interpolation.path

    @property
    def alphas(self) -> tuple[float, ...]:
        """How far it goes with each adapter, but for what ``alpha_map`` says."""
        alpha = self.interpolation.alphas[0]
        return alpha if isinstance(alpha, tuple) else (alpha,)

    @property
    def alpha_map(self) -> Mapping[str, Any]:
        """Glob patterns over tensor names, each with its own alphas."""
        return self.interpolation.alpha_map


def read_recorded(checkpoint: Checkpoint) -> Recorded | None:
    """Read a checkpoint's ``boft_export.json``; None where it has none.

    Raises:
        DamagedFileError: If it is not what a manifest is.
        InputError: If it is of another version.
        AccessError: If it can't be read.
    """
    return read_manifest(checkpoint.root)


def read_manifest(folder: AnyPath) -> Recorded | None:
    """Read a folder's ``boft_export.json``; None where it has none.

    Raises:
        DamagedFileError: If it is not what a manifest is.
        InputError: If it is of another version.
        AccessError: If it can't be read.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        size = path.stat().st_size
    except OSError as error:
        raise AccessError(f"cannot read {path}: {error.strerror or error}") from error
    if size > _LARGEST:
        raise DamagedFileError(f"{path} has {size:,} bytes, which no manifest has: at most {_LARGEST:,}.")
    root = _Part(parse_json_object(read_text(path), path), path)
    version = root.get("schema_version", _count)
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}.",
            hint="Use the version of boft-export that wrote it, or a later one.",
        )
    settings = root.part("settings")
    adapters = tuple(_input(a) for a in root.parts("adapters"))
    return Recorded(
        command=root.get("command", _text),
        base=_input(root.part("base")),
        adapters=adapters,
        interpolation=_interpolation(settings, len(adapters)),
        dtype=settings.get("dtype", _text),
        compute_dtype=settings.get("compute_dtype", _text),
        files={n: _file(f) for n, f in root.part("files").items(_file_name)},
        tensors={n: _tensor(t, len(adapters)) for n, t in root.part("tensors").items(_text)},
        undo={n: _file(f) for n, f in root.part("undo").items(_file_name)} if "undo" in root else {},
        task=settings.get("task", _text) if "task" in settings else None,
    )


class _Part:
    """An object in a manifest that knows where it is, so that what is wrong in it can be said."""

    def __init__(self, value: object, path: AnyPath, where: str = "") -> None:
        self._path = path
        self._where = where
        if not isinstance(value, dict):
            raise self._wrong("", "an object", value)
        self._value: dict[str, Any] = value

    def __contains__(self, key: str) -> bool:
        return key in self._value

    def get(self, key: str, check: Callable[[Any], T]) -> T:
        """Return a value that passes ``check``, which raises ``ValueError`` with what it expected."""
        if key not in self._value:
            raise DamagedFileError(f"{self._path} has no {self._name(key)}.", hint=_HINT)
        value = self._value[key]
        try:
            return check(value)
        except ValueError as error:
            raise self._wrong(key, str(error), value) from None

    def part(self, key: str) -> _Part:
        return _Part(self.get(key, lambda v: v), self._path, self._name(key))

    def parts(self, key: str) -> list[_Part]:
        values = self.get(key, _list)
        return [_Part(v, self._path, f"{self._name(key)}[{i}]") for i, v in enumerate(values)]

    def items(self, check: Callable[[Any], str]) -> list[tuple[str, _Part]]:
        """Return the parts by their keys, which pass ``check``."""
        return [(self._key(k, check), self.part(k)) for k in self._value]

    def values(self, check_key: Callable[[Any], str], check: Callable[[Any], T]) -> dict[str, T]:
        """Return the values by their keys; both pass their check."""
        return {self._key(k, check_key): self.get(k, check) for k in self._value}

    def _key(self, key: str, check: Callable[[Any], str]) -> str:
        try:
            return check(key)
        except ValueError as error:
            raise self._wrong("", f"of keys that are each {error}", key) from None

    def _name(self, key: str) -> str:
        return ".".join(p for p in (self._where, key[:_SHOWN]) if p)

    def _wrong(self, key: str, expected: str, found: object) -> DamagedFileError:
        text = repr(found)
        text = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
        name = self._name(key) or "it"
        return DamagedFileError(f"{self._path}: {name} should be {expected}, found {text}.", hint=_HINT)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("text")  # noqa: TRY004  # a check says by ValueError what it expected
    # JSON can hold half characters, which no file system and no terminal takes.
    value.encode()
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("a list")  # noqa: TRY004  # as above
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _LARGEST_NUMBER:
        raise ValueError("a whole number, not negative")
    return value


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < _LARGEST_NUMBER:
        raise ValueError("a finite number")
    return float(value)


def _numbers(value: object) -> tuple[float, ...]:
    found = tuple(_number(v) for v in _list(value))
    if not found:
        raise ValueError("a list of numbers")
    return found


def _digest(value: object) -> str:
    if not _SHA256.fullmatch(_text(value)):
        raise ValueError("a SHA-256 in hexadecimal")
    return str(value)


def _file_name(value: object) -> str:
    path = PurePosixPath(text := _text(value))
    if not text or path.is_absolute() or ".." in path.parts or "\\" in text or "\0" in text:
        raise ValueError("a path within the checkpoint")
    return text


def _action(value: object) -> Action:
    if value not in list(Action):
        raise ValueError(f"one of {', '.join(Action)}")
    return Action(str(value))


def _dtype(value: object) -> str:
    if not isinstance(value, str) or value not in DTYPE_BITS:
        raise ValueError("a dtype of the safetensors format")
    return value


def check_shape(value: object) -> tuple[int, ...]:
    """Return a shape, of which JSON may hold anything.

    Raises:
        ValueError: If it is none that a tensor could have.
    """
    shape = tuple(_count(v) for v in _list(value))
    if len(shape) > _MOST_DIMENSIONS or math.prod(max(1, i) for i in shape) >= _LARGEST_NUMBER:
        raise ValueError("a shape")
    return shape


def _path(value: object) -> InterpolationPath:
    if value not in list(InterpolationPath):
        raise ValueError(f"one of {', '.join(InterpolationPath)}")
    return InterpolationPath(str(value))


def _input(part: _Part) -> RecordedInput:
    return RecordedInput(part.get("name", _text), part.part("sha256").values(_text, _digest))


def _file(part: _Part) -> RecordedFile:
    return RecordedFile(part.get("bytes", _count), part.get("sha256", _digest))


def _tensor(part: _Part, adapters: int) -> RecordedTensor:
    def adapter(value: object) -> int:
        if _count(value) >= adapters:
            raise ValueError(f"one of {adapters} adapters")
        return _count(value)

    steps = part.parts("steps") if "steps" in part else []
    alphas = {s.get("adapter", adapter): s.get("alpha", _number) for s in steps}
    return RecordedTensor(
        part.get("action", _action), part.get("dtype", _dtype), part.get("shape", check_shape), alphas
    )


def _interpolation(settings: _Part, adapters: int) -> Interpolation:
    """Return how far to go was asked for: all the way where nothing is said."""

    def alphas(value: object) -> tuple[float, ...]:
        if len(found := _numbers(value)) not in (1, adapters):
            raise ValueError(f"a number for each of {adapters} adapters")
        return found if len(found) == adapters else found * adapters

    if "alpha" not in settings:
        return Interpolation(alphas=((1.0,) * adapters,))
    path = settings.get("path", _path)
    alpha_map = settings.part("alpha_map").values(_text, alphas)

    def asked(value: object) -> Interpolation:
        try:
            return Interpolation(path, (alphas(value),), alpha_map=alpha_map)
        except UsageError as error:
            raise ValueError(f"on the path {path}") from error

    return settings.get("alpha", asked)
