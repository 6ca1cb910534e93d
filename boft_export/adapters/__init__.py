"""Adapter formats: a registry of readers, each one a small file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from boft_export.adapters.adapter import (
    Adapter,
    AdapterLayer,
    Pairing,
    Parametrization,
    Reader,
    ReadOptions,
    Replacement,
    ReplacementKind,
    Storage,
    TensorInfo,
    View,
)
from boft_export.adapters.peft_boft import PeftBoft
from boft_export.adapters.peft_oft import PeftOft
from boft_export.errors import InputError

READERS: tuple[Reader, ...] = (PeftBoft(), PeftOft())


def read_adapter(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], options: ReadOptions, name: str
) -> Adapter:
    """Read an adapter with the reader that recognises it.

    Args:
        config: The adapter's parsed config; empty where it has none.
        tensors: Its tensors' headers by key.
        options: What the user said where files don't.
        name: How to call the adapter in messages.

    Raises:
        InputError: If no reader recognises it.
    """
    for reader in READERS:
        if reader.recognises(config, list(tensors)):
            return reader.read(config, tensors, options)
    kind = config.get("peft_type")
    found = f"peft_type {kind}" if kind else f"keys like {next(iter(tensors), 'none')}"
    raise InputError(
        f"{name} is not an adapter that can be merged: found {found}, "
        f"supported are {', '.join(r.name for r in READERS)}.",
        hint="LoRA and other additive adapters: use PEFT's merge_and_unload." if kind else None,
    )


__all__ = [
    "READERS",
    "Adapter",
    "AdapterLayer",
    "Pairing",
    "Parametrization",
    "ReadOptions",
    "Reader",
    "Replacement",
    "ReplacementKind",
    "Storage",
    "TensorInfo",
    "View",
    "read_adapter",
]
