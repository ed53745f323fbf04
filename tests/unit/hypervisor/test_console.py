"""The console's ring file: offsets are the stream's, the newest bytes stay, readers never see others."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.hypervisor import console, console_ring

LENGTH = console_ring.CHUNK_BYTES + 1000


@pytest.fixture
def ring() -> Iterator[int]:
    fd = os.memfd_create("ring")
    console_ring.create(fd, LENGTH)
    yield fd
    os.close(fd)


def everything(fd: int, offset: int = 0) -> tuple[int, bytes]:
    start, data = console_ring.read(fd, offset)
    position = start + len(data)
    while True:
        _, more = console_ring.read(fd, position)
        if not more:
            return start, data
        data += more
        position += len(more)


@given(st.lists(st.binary(min_size=1, max_size=40_000), max_size=12), st.integers(-5, 300_000))
def test_what_is_read_is_what_was_written_at_that_offset(pieces: list[bytes], offset: int) -> None:
    fd = os.memfd_create("ring")
    try:
        console_ring.create(fd, LENGTH)
        writer = console_ring.Writer(fd)
        for piece in pieces:
            writer.append(piece)
        written = b"".join(pieces)
        assert console_ring.end(fd) == len(written)
        start, data = everything(fd, offset)
        assert data == written[start:]
        assert start >= min(offset, len(written))
        assert start == min(max(offset, 0, len(written) - 1000), len(written))
    finally:
        os.close(fd)


def test_a_writer_goes_on_where_another_stopped(ring: int) -> None:
    console_ring.Writer(ring).append(b"one ")
    console_ring.Writer(ring).append(b"two")
    assert everything(ring) == (0, b"one two")


def test_the_file_never_grows(ring: int) -> None:
    before = os.fstat(ring).st_size
    writer = console_ring.Writer(ring)
    for _ in range(20):
        writer.append(b"x" * console_ring.CHUNK_BYTES)
    assert os.fstat(ring).st_size == before


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 100, b"VBCONS1\n" + bytes(8), bytes(100_000)])
def test_another_file_is_no_log(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "console.log"
    path.write_bytes(content)
    with path.open("rb") as file, pytest.raises(console_ring.DamagedRing):
        console_ring.end(file.fileno())
    assert console.tail(path) == ""


def test_the_tail_is_printable(tmp_path: Path) -> None:
    fd = console.create(tmp_path / "console.log")
    console_ring.Writer(fd).append(b"\x1b[2J\x1b[0mKernel \x00\x07panic\r\nlast \xff line\n")
    os.close(fd)
    assert console.tail(tmp_path / "console.log") == "Kernel panic\nlast \ufffd line"
    assert console.tail(tmp_path / "none") == ""


async def test_a_follower_sees_each_piece_and_the_end(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    fd = console.create(path)
    writer = console_ring.Writer(fd)
    writer.append(b"start ")
    ended = asyncio.Event()
    pieces = aiter(console.read(path, 0, follow=True, ended=ended))
    assert await anext(pieces) == (0, b"start ")
    waiting = asyncio.ensure_future(anext(pieces))
    await asyncio.sleep(0)
    writer.append(b"middle ")
    assert await waiting == (6, b"middle ")
    writer.append(b"end")
    ended.set()
    assert [piece async for piece in pieces] == [(13, b"end")]
    os.close(fd)
