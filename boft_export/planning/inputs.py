"""Opening what a command names: a base and its adapters, local or on the Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from boft_export.adapters import ReadOptions
from boft_export.checkpoint import Checkpoint, locate, open_checkpoint, wanted_weights
from boft_export.checkpoint.places import is_url
from boft_export.errors import UsageError
from boft_export.planning.sourced import SourcedAdapter, open_adapter

Ref = str | os.PathLike[str]


@dataclass(frozen=True)
class Sources:
    """Where inputs come from.

    Attributes:
        revision: The base's branch, tag or commit on the Hub.
        adapter_revision: The adapters'.
        subfolder: The base's folder inside its repository or root.
        offline: Use only what is local or in the Hub's cache.
        options: What the user says of adapters where files don't.
    """

    revision: str | None = None
    adapter_revision: str | None = None
    subfolder: str | None = None
    offline: bool = False
    options: ReadOptions = field(default_factory=ReadOptions)

    def adapter(self, ref: Ref) -> SourcedAdapter:
        """Open an adapter.

        Raises:
            BoftExportError: As ``locate`` and ``open_adapter`` do.
        """
        found = locate(os.fspath(ref), revision=self.adapter_revision, offline=self.offline)
        return open_adapter(found.path, self.options, repo_id=found.repo_id, revision=found.revision)

    def base(self, ref: Ref) -> Checkpoint:
        """Open a checkpoint.

        Raises:
            BoftExportError: As ``locate`` and ``open_checkpoint`` do.
        """
        found = locate(
            os.fspath(ref),
            revision=self.revision,
            subfolder=self.subfolder,
            offline=self.offline,
            wanted=wanted_weights,
        )
        return open_checkpoint(found.path, repo_id=found.repo_id, revision=found.revision)

    def pair(self, base: Ref | None, adapters: Sequence[Ref]) -> tuple[Checkpoint, list[SourcedAdapter]]:
        """Open a base and its adapters; a base of None or ``-`` is the one that the first adapter names.

        Raises:
            UsageError: If there is no adapter, or none names its base, or it names a URL.
            BoftExportError: As ``locate``, ``open_checkpoint`` and ``open_adapter`` do.
        """
        if not adapters:
            raise UsageError("no adapter was given.", hint="boft-export merge BASE ADAPTER -o OUT")
        opened = [self.adapter(ref) for ref in adapters]
        if base is not None and os.fspath(base) != "-":
            return self.base(base), opened
        first = opened[0].adapter
        if first.base_model is None:
            raise UsageError(f"{opened[0].name} does not name its base.", hint="Give the base in place of '-'.")
        if is_url(first.base_model):
            # A file that was downloaded must not decide which hosts are asked for what.
            raise UsageError(
                f"{opened[0].name} names a URL as its base, {first.base_model}, which is not opened for that.",
                hint="If that is the base, give it in place of '-'.",
            )
        own = Sources(self.revision or first.base_revision, None, self.subfolder, self.offline, self.options)
        return own.base(first.base_model), opened
