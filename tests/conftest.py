"""Fixtures that several test files share."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A local S3 server, to which this process and its children are directed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # Of another test file's server nothing must be left.
        import fsspec

        from boft_export.checkpoint import remote

        fsspec.get_filesystem_class("s3").clear_instance_cache()
        remote._file_system.cache_clear()
        try:
            for _ in range(200):
                with contextlib.suppress(OSError), urllib.request.urlopen(endpoint, timeout=1):
                    break
                time.sleep(0.1)
            yield endpoint
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def bucket(server: str, request: pytest.FixtureRequest) -> str:
    """An empty bucket."""
    import fsspec

    assert server
    name = f"b{abs(hash(request.node.name)) % 10**12}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"
