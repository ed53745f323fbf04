"""Which addresses are the guest's, and how they are reached."""

from __future__ import annotations

import ctypes
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.hypervisor.vsock.errors import BackendPeerBroke, MachineGone, QueueBroke
from services.hypervisor.vsock.memory import GuestMemory, ProcessMemory, Region
from tests.unit.hypervisor.vsock_rig import Space

TABLE = (Region(0, 100, 5000), Region(100, 50, 3000), Region(1000, 10, 9000))


def memory(*regions: Region) -> GuestMemory:
    return GuestMemory(Space(regions), regions)


def test_a_range_is_translated() -> None:
    assert memory(*TABLE).spans(10, 20) == [(5010, 20)]


def test_a_range_across_two_regions_has_two_spans() -> None:
    assert memory(*TABLE).spans(90, 60) == [(5090, 10), (3000, 50)]


@pytest.mark.parametrize(
    ("guest", "length"),
    [(150, 1), (149, 2), (999, 2), (1009, 2), (1010, 1), (1 << 63, 1), ((1 << 64) - 1, 2)],
)
def test_what_is_not_memory_is_refused(guest: int, length: int) -> None:
    with pytest.raises(QueueBroke):
        memory(*TABLE).spans(guest, length)


def test_no_memory_at_all_is_refused() -> None:
    with pytest.raises(QueueBroke):
        memory().spans(0, 1)


@given(st.integers(0, 1200), st.integers(1, 1200))
def test_spans_cover_exactly_the_range_or_nothing(guest: int, length: int) -> None:
    owned = {region.guest + at: region.user + at for region in TABLE for at in range(region.size)}
    wanted = range(guest, guest + length)
    try:
        spans = memory(*TABLE).spans(guest, length)
    except QueueBroke:
        assert any(at not in owned for at in wanted)
    else:
        assert [at for start, size in spans for at in range(start, start + size)] == [
            owned[at] for at in wanted
        ]


@pytest.mark.parametrize(
    "regions",
    [
        (Region(0, 0, 0),),
        (Region(0, 100, 0), Region(99, 10, 500)),
        (Region((1 << 64) - 10, 11, 0),),
        (Region(0, 10, (1 << 63) - 5),),
    ],
)
def test_an_impossible_table_is_refused(regions: tuple[Region, ...]) -> None:
    with pytest.raises(BackendPeerBroke):
        memory(*regions)


def test_a_ring_must_lie_in_one_region() -> None:
    guest = memory(*TABLE)
    assert guest.owns(5000, 100)
    assert not guest.owns(5000, 101)
    assert not guest.owns(4999, 1)
    assert not guest.owns(2990, 20)


def test_a_process_is_read_and_written_through_proc() -> None:
    buffer = ctypes.create_string_buffer(b"0123456789", 10)
    address = ctypes.addressof(buffer)
    fd = os.open("/proc/self/mem", os.O_RDWR)
    try:
        space = ProcessMemory(fd)
        assert space.read(address + 2, 3) == b"234"
        space.write(address, [b"ab", memoryview(b"cd")])
        target = bytearray(6)
        space.read_into(address, [memoryview(target)[:2], memoryview(target)[2:]])
        assert target == b"abcd45"
        for call in (
            lambda: space.read(0, 1),
            lambda: space.write(0, [b"x"]),
            lambda: space.read_into(0, [memoryview(bytearray(1))]),
        ):
            with pytest.raises(MachineGone):
                call()
    finally:
        os.close(fd)
