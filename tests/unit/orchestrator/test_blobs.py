"""Content is named by its digest, appears whole or not at all, and goes when nothing needs it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from services.common.errors import Exhausted, NotFound
from services.orchestrator.blobs import Blobs, reading


def test_content_is_found_by_its_digest(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "b")
    digest = blobs.put(b"abc")
    assert digest.value == f"sha256:{hashlib.sha256(b'abc').hexdigest()}"
    assert blobs.find(digest.value).read_bytes() == b"abc"
    assert blobs.put(b"abc") == digest
    with pytest.raises(NotFound, match="is not stored; upload it"):
        blobs.find("sha256:" + "0" * 64)


def test_nothing_is_left_of_what_was_not_committed(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "b")
    with pytest.raises(Exhausted), blobs.writer(limit=3) as writer:
        writer.write(b"ab")
        writer.write(b"cd")
    with blobs.writer(limit=3) as writer:
        writer.write(b"ab")
    assert not list((tmp_path / "b").iterdir())
    (tmp_path / "b/tmp-left").write_bytes(b"x")
    Blobs(tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())


def test_a_sweep_keeps_what_is_used_or_fresh(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "b")
    used, old, fresh = blobs.put(b"used"), blobs.put(b"old"), blobs.put(b"fresh")
    for digest in (used, old):
        os.utime(blobs.find(digest.value), (1, 1))
    blobs.sweep({used.value})
    assert blobs.find(used.value).exists()
    assert blobs.find(fresh.value).exists()
    with pytest.raises(NotFound):
        blobs.find(old.value)


def test_a_copy_of_a_file_is_cut_at_the_limit(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 200_000)
    blobs = Blobs(tmp_path / "b")
    assert blobs.put_file(tmp_path / "f", 100_001).size == 100_001
    assert blobs.put_file(tmp_path / "f", 1 << 20).size == 200_000


async def test_reading_starts_at_an_offset(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789" * 20_000)
    async with reading(tmp_path / "f", 199_995) as chunks:
        assert [chunk async for chunk in chunks] == [b"56789"]
