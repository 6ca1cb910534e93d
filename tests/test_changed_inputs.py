"""Inputs that are written to while a run reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import boft_tensors, write_adapter, write_checkpoint

import boft_export
from boft_export.errors import DamagedFileError

PRE = "base_model.model."


def written_to(file: Path) -> Callable[..., None]:
    """Return a progress callback that writes to a file."""

    def write(*_: object) -> None:
        os.utime(file, ns=(1, 1))

    return write


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json", "tokenizer.json"])
def test_the_base(base: Path, adapter: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(DamagedFileError, match="changed while it was read"):
        boft_export.merge(base, adapter, tmp_path / "out", progress=written_to(base / name))
    assert not (tmp_path / "out").exists()


def test_a_record_that_undoes_a_merge(base: Path, adapter: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    boft_export.merge(base, adapter, merged, reversible=True)
    record = next((merged / "boft_export.undo").glob("*.undo"))
    with pytest.raises(DamagedFileError, match="changed while it was read"):
        boft_export.unmerge(merged, adapter, tmp_path / "out", progress=written_to(record))
    boft_export.unmerge(merged, adapter, tmp_path / "out")


def test_a_base_from_which_tensors_are_taken(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(24, 32), "head.weight": torch.zeros(2, 32)}
    base = write_checkpoint(tmp_path / "base", tensors, {"model_type": "test"})
    trained = {**boft_tensors("a", 32, 24), f"{PRE}head.weight": torch.ones(2, 32)}
    adapter = write_adapter(tmp_path / "adapter", trained, {"modules_to_save": ["head"]})
    merged = tmp_path / "merged"
    boft_export.merge(base, adapter, merged)
    with pytest.raises(DamagedFileError, match="changed while it was read"):
        boft_export.unmerge(
            merged, adapter, tmp_path / "out", base=base, progress=written_to(base / "model.safetensors")
        )
