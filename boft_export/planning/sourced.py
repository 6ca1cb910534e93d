"""An adapter on disk: its config, its tensors and what its reader makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from boft_export.adapters import Adapter, ReadOptions, read_adapter
from boft_export.checkpoint import TensorRef, WeightFile, read_weight_file
from boft_export.checkpoint.folder import parse_json_object, read_text
from boft_export.checkpoint.places import AnyPath
from boft_export.errors import AccessError, DamagedFileError, InputError, Level, Notice
from boft_export.planning.tables import TOKENIZER_FILES, VOCABULARY_FILES

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class SourcedAdapter:
    """An adapter and where it comes from.

    Attributes:
        adapter: What its reader made of it.
        weights: Its weight file.
        config_file: Its config, where it has one.
        repo_id: Its repository on the Hub, where it comes from there.
        revision: That repository's commit.
    """

    adapter: Adapter
    weights: WeightFile
    config_file: AnyPath | None
    repo_id: str | None = None
    revision: str | None = None

    @property
    def root(self) -> AnyPath:
        """The folder it is in."""
        return self.weights.path.parent

    @property
    def name(self) -> str:
        """How people call it."""
        return self.repo_id or self.root.name or self.root.resolve().name

    @property
    def refs(self) -> Mapping[str, TensorRef]:
        """Its tensors by key."""
        return {t.name: t for t in self.weights.tensors}

    def has_tokenizer(self) -> bool:
        """Tell whether a vocabulary lies beside it, and not only settings of a tokenizer."""
        return bool(VOCABULARY_FILES.intersection(self.tokenizer_files()))

    def tokenizer_files(self) -> list[str]:
        """Return the tokenizer's files that lie beside it."""
        return sorted(n for n in TOKENIZER_FILES if (self.root / n).is_file())


def open_adapter(
    path: AnyPath, options: ReadOptions | None = None, *, repo_id: str | None = None, revision: str | None = None
) -> SourcedAdapter:
    """Open an adapter by its headers: a folder, or its weight file.

    Raises:
        InputError: If there is no adapter, several to choose from, or one of a kind that can't be merged.
        DamagedFileError: If a file is unsound.
        AccessError: If a file cannot be read.
    """
    if not path.exists():
        raise AccessError(f"{path} does not exist.", hint="Give a folder, a weight file, or a Hub id (org/name).")
    notices: list[Notice] = []
    weights = path if path.is_file() else _find(path, notices)
    config_file = weights.parent / _CONFIG
    config = parse_json_object(read_text(config_file), config_file) if config_file.is_file() else {}
    file = read_weight_file(weights)
    if len({t.name for t in file.tensors}) != len(file.tensors):
        raise DamagedFileError(f"{weights} holds a tensor twice.")
    headers = {t.name: t for t in file.tensors}
    adapter = read_adapter(config, headers, options or ReadOptions(), str(path))
    adapter = replace(adapter, notices=(*notices, *adapter.notices))
    return SourcedAdapter(adapter, file, config_file if config_file.is_file() else None, repo_id, revision)


def _find(folder: AnyPath, notices: list[Notice]) -> AnyPath:
    """Return a folder's adapter weights; PEFT keeps other than the default adapter in folders of their own."""
    others = sorted(p.parent.name for p in folder.glob(f"*/{_CONFIG}"))
    here = [folder / n for n in _WEIGHTS if (folder / n).is_file()]
    if here:
        if others:
            message = f"the default adapter is taken; others beside it: {', '.join(others)}"
            notices.append(Notice(Level.INFO, "other-adapters", folder.name, message))
        return here[0]
    if len(others) == 1:
        notices.append(Notice(Level.INFO, "nested-adapter", folder.name, f"its only adapter is taken: {others[0]}"))
        return _find(folder / others[0], notices)
    if others:
        raise InputError(
            f"{folder} holds several adapters: {', '.join(others)}.", hint=f"Name one: {folder / others[0]}"
        )
    if any(folder.glob("*.safetensors")) and not (folder / _CONFIG).is_file():
        raise InputError(f"{folder} is not an adapter: it has no adapter_model file.", hint="Is it a full checkpoint?")
    raise InputError(f"{folder} holds no adapter: expected {' or '.join(_WEIGHTS)}.")
