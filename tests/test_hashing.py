"""Digests of inputs whose bytes pass in any order, or stop passing."""

from __future__ import annotations

import hashlib
from pathlib import Path

from boft_export.pipeline.hashing import InputHashes

DATA = bytes(range(256)) * 100


def test_what_did_not_pass_is_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(DATA)
    hashes = InputHashes({"a": file})
    for first, last in ((0, 100), (50, 90), (300, 400), (20_000, 20_001)):
        hashes.feed(file, first, memoryview(DATA)[first:last])
    assert hashes.digests() == {"a": hashlib.sha256(DATA).hexdigest()}


def test_after_a_stop_nothing_is_read_but_what_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(DATA)
    hashes = InputHashes({"a": file})
    hashes.feed(file, 0, memoryview(DATA)[:100])
    hashes.stop()
    file.rename(tmp_path / "away")
    # What lies between would have to be read.
    hashes.feed(file, 200, memoryview(DATA)[200:300])
    (tmp_path / "away").rename(file)
    hashes.advance(file, 1000)
    assert hashes.digests() == {"a": hashlib.sha256(DATA).hexdigest()}
