"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# As many tests run at once as there are cores: more threads would wait for each other. Read when torch is loaded, here
# and in every program that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from support import boft_tensors, write_adapter, write_checkpoint

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background jobs ignore Ctrl-C, and so would every program that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

MODULES = {"layers.0.up": (24, 32), "layers.0.down": (32, 24), "layers.1.up": (24, 32), "layers.1.down": (32, 24)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A small bfloat16 checkpoint in two files, with a side file."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{m}.weight": torch.randn(shape, generator=generator).bfloat16() for m, shape in MODULES.items()}
    tensors |= {f"layers.{i}.norm.weight": torch.ones(32, dtype=torch.bfloat16) for i in range(2)}
    folder = write_checkpoint(tmp_path / "base", tensors, {"model_type": "test"}, shards=2)
    (folder / "tokenizer.json").write_bytes(b'{"a": 1}\r\n')
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter for all linear layers of ``base``."""
    tensors = {}
    for seed, (module, (out, n)) in enumerate(MODULES.items()):
        tensors |= boft_tensors(module, n, out, m=2, b=4, seed=seed)
    return write_adapter(tmp_path / "adapter", tensors)
