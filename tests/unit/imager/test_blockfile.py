"""Blocks written past the page cache, or through it, are the same bytes in the same place."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from services.imager.blockfile import BlockFile

BLOCK = 4096
MIB = 1 << 20


@pytest.fixture(params=["direct", "through the page cache"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Direct where the file system can; else what every system can."""
    chosen: str = request.param
    if chosen != "direct":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    return chosen


def pattern(length: int, seed: int) -> bytes:
    """Bytes that differ from place to place."""
    return bytes((seed + at * 7) % 251 for at in range(251)) * (length // 251 + 1)


@pytest.mark.usefixtures("way")
def test_pieces_of_all_lengths_lie_in_blocks_of_their_own(tmp_path: Path) -> None:
    lengths = [1, 4095, 4096, 4097, 0, 100_000, 4 * MIB - 4096, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 9 * MIB, 3]
    wanted = b""
    with (tmp_path / "image").open("w+b") as file, BlockFile(file.fileno(), 3) as blocks:
        for seed, length in enumerate(lengths):
            data = pattern(length, seed)[:length]
            blocks.put(data)
            wanted += data + bytes(-length % BLOCK)
        blocks.flush()
        assert os.fstat(file.fileno()).st_size == 3 * BLOCK + len(wanted)
        blocks.put(b"after a flush")
        blocks.flush()
    found = (tmp_path / "image").read_bytes()
    assert found[: 3 * BLOCK] == bytes(3 * BLOCK)
    assert found[3 * BLOCK : -BLOCK] == wanted
    assert found[-BLOCK:] == b"after a flush".ljust(BLOCK, b"\0")


@pytest.mark.usefixtures("way")
def test_parts_of_a_piece_are_joined_without_gaps(tmp_path: Path) -> None:
    data = pattern(10 * MIB + 77, 5)[: 10 * MIB + 77]
    with (tmp_path / "image").open("w+b") as file, BlockFile(file.fileno(), 0) as blocks:
        at = 0
        for length in (5, 4091, 1, 6 * MIB, 3 * MIB, len(data)):
            blocks.write(memoryview(data)[at : at + length])
            at += length
        blocks.pad()
        blocks.flush()
    assert (tmp_path / "image").read_bytes() == data + bytes(-len(data) % BLOCK)


def test_a_failed_write_is_an_error_for_who_goes_on_or_flushes() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with BlockFile(full, 0) as blocks:
            blocks.put(b"x")
            with pytest.raises(OSError, match="No space left") as caught:
                blocks.flush()
            assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match="No space left"), BlockFile(full, 0) as blocks:
            for _ in range(100):  # far more than waits
                blocks.put(bytes(4 * MIB))
    finally:
        os.close(full)


def test_what_was_not_flushed_holds_nothing_open(tmp_path: Path) -> None:
    image = tmp_path / "image"

    def holders() -> list[str]:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return [link for link in links if os.path.lexists(link) and os.readlink(link) == str(image)]

    with pytest.raises(KeyboardInterrupt), image.open("w+b") as file:
        with BlockFile(file.fileno(), 0) as blocks:
            blocks.put(bytes(5 * MIB))
            assert len(holders()) > 1
            raise KeyboardInterrupt
    assert not holders()
