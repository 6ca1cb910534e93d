"""A checkpoint on disk: which files hold weights, which belong beside them, and which are stale copies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from boft_export.checkpoint.pickle_file import read_pickle
from boft_export.checkpoint.places import AnyPath, lies_in
from boft_export.checkpoint.remote import RemotePath
from boft_export.checkpoint.safetensors_file import WeightFile, read_safetensors
from boft_export.checkpoint.tensors import TensorRef
from boft_export.errors import AccessError, DamagedFileError, InputError, Level, Notice

# Where loaders look for weights, in their order of preference.
_WEIGHT_NAMES = tuple(
    f"{stem}{suffix}"
    for suffix in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    for stem in ("model", "diffusion_pytorch_model", "pytorch_model")
)
# Other forms of the same weights, which a merge would leave stale: beside the weights, by name; anywhere, by folder.
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".gguf", ".tflite",
    ".safetensors.index.json", ".bin.index.json",
)  # fmt: skip
_WEIGHT_FOLDERS = {"onnx", "openvino", "original", "metal", "coreml", "gguf"}
_ADAPTER_FILES = re.compile(r"adapter_(config\.json|model\..*)$")
_IGNORED_FOLDERS = {".git", ".cache", "__pycache__"}
# Earlier states of the same training, each a checkpoint of its own.
_TRAINER_FOLDERS = re.compile(r"checkpoint-\d+$")
# Small side files that end like weights but are not.
_NOT_WEIGHTS = {"training_args.bin", "spiece.bin"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, known by its headers alone.

    Attributes:
        root: The folder, or the folder of the file.
        folder: Where in ``root`` the weights and their config are; ``.`` almost always.
        files: The weight files in order.
        index_metadata: The ``metadata`` of the index file; empty where there is none.
        config_text: ``config.json`` as it stands, or None.
        side_files: Everything else that belongs to the checkpoint, relative to ``root``.
        stale_files: Files that hold these weights in another form and so are not taken along.
        revision: The commit of the Hub repository it comes from, where it does.
        repo_id: That repository.
    """

    root: AnyPath
    folder: PurePosixPath
    files: tuple[WeightFile, ...]
    index_metadata: Mapping[str, Any]
    config_text: str | None
    side_files: tuple[PurePosixPath, ...]
    stale_files: tuple[PurePosixPath, ...]
    repo_id: str | None = None
    revision: str | None = None

    @cached_property
    def tensors(self) -> dict[str, TensorRef]:
        """All tensors by name."""
        return {t.name: t for f in self.files for t in f.tensors}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed ``config.json``; empty where there is none."""
        if self.config_text is None:
            return {}
        return parse_json_object(self.config_text, self.root / self.folder / "config.json")

    @property
    def nbytes(self) -> int:
        """The size of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def name(self) -> str:
        """How people call it: the repository's id or the folder's name."""
        return self.repo_id or self.root.name or self.root.resolve().name

    def notices(self) -> list[Notice]:
        """Return what a user should know about the folder itself."""
        notices = [
            Notice(Level.INFO, "stale-file", str(f), "holds the base's weights in another form and is not copied")
            for f in self.stale_files
        ]
        if self.config_text is None and not self.side_files:
            message = "it has no config beside its weights: the output will have none, and no tokenizer"
            notices.append(Notice(Level.WARNING, "no-config", self.name, message, "Give the whole folder as the base."))
        return notices


def parse_json_object(text: str, path: AnyPath) -> dict[str, Any]:
    """Return the JSON object in ``text``; ``path`` is for the message.

    Raises:
        DamagedFileError: If it is not JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path} should hold a JSON object, found {type(value).__name__}.")
    return value


def read_text(path: AnyPath) -> str:
    """Return a text file's content.

    Raises:
        AccessError: If it cannot be read.
        DamagedFileError: If it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise AccessError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{path} is not UTF-8 text.") from error


def below(path: AnyPath, folder: AnyPath) -> PurePosixPath:
    """Return where ``path`` is in ``folder``.

    Raises:
        ValueError: If it is not in it.
    """
    if isinstance(path, RemotePath) and isinstance(folder, RemotePath):
        return path.relative_to(folder)
    return PurePosixPath(Path(path).relative_to(folder).as_posix())


def open_checkpoint(path: AnyPath, *, repo_id: str | None = None, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint by its headers: a folder, or one weight file.

    Raises:
        InputError: If there are no weights, or it is unclear which ones count.
        DamagedFileError: If a header or the index is unsound.
        AccessError: If a file cannot be read.
    """
    if path.is_file():
        single = _read_weights(path, path.parent)
        return Checkpoint(path.parent, PurePosixPath(), single[0], single[1], None, (), (), repo_id, revision)
    if not path.is_dir():
        raise AccessError(f"{path} does not exist.", hint="Give a folder, a weight file, or a Hub id (org/name).")
    folder = _weights_folder(path)
    weights = _find_weights(path / folder)
    files, index_metadata = _read_weights(weights, path)
    config = path / folder / "config.json"
    own = {PurePosixPath(f.name) for f in files} | {below(weights, path)}
    side: list[PurePosixPath] = []
    stale: list[PurePosixPath] = []
    for file in _walk(path):
        if file in own or file == folder / "config.json":
            continue
        if is_stale_weight(file, folder):
            stale.append(file)
        elif (path / file).exists():
            side.append(file)
        else:
            raise AccessError(f"{path / file} is a link to a file that is missing.", hint="Complete or remove it.")
    return Checkpoint(
        root=path,
        folder=folder,
        files=files,
        index_metadata=index_metadata,
        config_text=read_text(config) if config.is_file() else None,
        side_files=tuple(side),
        stale_files=tuple(stale),
        repo_id=repo_id,
        revision=revision,
    )


def read_weight_file(path: AnyPath, name: str | None = None) -> WeightFile:
    """Read the header of one weight file, by its suffix.

    Raises:
        InputError: If the suffix is none that holds weights.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path, name)
    if path.suffix in {".bin", ".pt", ".pth"}:
        return read_pickle(path, name)
    raise InputError(f"{path} is not a weight file: expected .safetensors, .bin or .pt.")


def _weights_folder(root: AnyPath) -> PurePosixPath:
    """Return where in ``root`` the weights lie: a sentence-transformers tree may keep them in its first module."""
    modules = root / "modules.json"
    if any((root / n).is_file() for n in _WEIGHT_NAMES) or not modules.is_file():
        return PurePosixPath()
    try:
        first = json.loads(read_text(modules))[0]["path"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedFileError(f"{modules} is not a list of modules: {error}.") from error
    folder = PurePosixPath(str(first))
    if folder.is_absolute() or ".." in folder.parts:
        raise DamagedFileError(f"{modules} names a folder outside of its own: {first}.")
    return folder


def _find_weights(folder: AnyPath) -> AnyPath:
    """Return the weight file, or the index, that loaders would take."""
    for name in _WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(
        p for p in folder.glob("*.safetensors") if p.is_file() and not _ADAPTER_FILES.match(p.name)
    ) or sorted(folder.glob("*.safetensors.index.json"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(p.name for p in found[:4])
        raise InputError(f"{folder} holds several weight files and no index: {names}.", hint="Name one of them.")
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder} is an adapter, not a checkpoint.", hint="Give the base first, then the adapter.")
    parts = sorted(p.parent.name for p in folder.glob("*/*") if p.name in _WEIGHT_NAMES)
    hint = f"Choose one part with --subfolder: {', '.join(parts)}." if parts else None
    raise InputError(
        f"{folder} holds no weights: expected model.safetensors, its index, or pytorch_model.bin.", hint=hint
    )


def _read_weights(weights: AnyPath, root: AnyPath) -> tuple[tuple[WeightFile, ...], Mapping[str, Any]]:
    """Read one weight file, or all that an index names."""

    def relative(path: AnyPath) -> str:
        return below(path, root).as_posix()

    if weights.suffix != ".json":
        return (read_weight_file(weights, relative(weights)),), {}
    index = parse_json_object(read_text(weights), weights)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise DamagedFileError(f"{weights} has no weight_map of names to files.")
    files = []
    beside = {p.name for p in weights.parent.iterdir() if p.is_file()}
    for name in dict.fromkeys(weight_map.values()):
        # An index may come from anywhere; what it names must lie beside it.
        if PurePosixPath(name).name != name or name in {"", ".", ".."} or "\\" in name:
            raise DamagedFileError(f"{weights} names a file outside of its folder: {name}.")
        if name not in beside:
            raise DamagedFileError(f"{weights} names {name}, which is missing.", hint="Complete the download.")
        files.append(read_weight_file(weights.parent / name, relative(weights.parent / name)))
    files.sort(key=lambda f: f.name)
    seen: dict[str, str] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name in seen:
                raise DamagedFileError(f"{tensor.name} is in {seen[tensor.name]} and in {file.name}.")
            seen[tensor.name] = file.name
    missing = [n for n in weight_map if n not in seen]
    if missing:
        raise DamagedFileError(
            f"{weights} lists {len(missing)} tensors that no file holds, the first: {missing[0]}.",
            hint="Complete the download.",
        )
    metadata = index.get("metadata")
    return tuple(files), metadata if isinstance(metadata, dict) else {}


def _walk(root: AnyPath) -> Iterator[PurePosixPath]:
    """Yield all files below ``root`` in a fixed order, also in linked folders, and links to files that are missing.

    What is neither, such as a pipe, belongs to no checkpoint.
    """

    def walk(folder: AnyPath, above: tuple[AnyPath, ...]) -> Iterator[PurePosixPath]:
        folders = []
        for path in _listed(folder):
            if path.is_dir():
                folders.append(path)
            elif path.is_file() or (path.is_symlink() and not path.exists()):
                yield below(path, root)
        for path in folders:
            if path.name in _IGNORED_FOLDERS or _TRAINER_FOLDERS.match(path.name):
                continue
            real = path.resolve()
            # A link to where we come from would lead here again and again.
            if not any(lies_in(a, real) for a in above):
                yield from walk(path, (*above, real))

    try:
        yield from walk(root, (root.resolve(),))
    except OSError as error:
        raise AccessError(f"cannot read {error.filename}: {error.strerror or error}") from error


def _listed(folder: AnyPath) -> Sequence[AnyPath]:
    """Return what lies in a folder, in the order of names."""
    return list(folder.iterdir()) if isinstance(folder, RemotePath) else sorted(folder.iterdir())


def is_stale_weight(file: PurePosixPath, folder: PurePosixPath) -> bool:
    """Tell whether a file is another form of the weights that lie in ``folder``, which a merge would leave stale."""
    if _ADAPTER_FILES.match(file.name) or _WEIGHT_FOLDERS.intersection(file.parts[:-1]):
        return True
    # Weights in other folders belong to other parts, such as the dense head of a sentence-transformers model.
    return file.parent == folder and file.name.endswith(_WEIGHT_SUFFIXES) and file.name not in _NOT_WEIGHTS
