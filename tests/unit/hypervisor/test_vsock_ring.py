"""A split virtqueue whose driver is a test, honest or not."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.hypervisor.vsock.errors import BackendPeerBroke, DeviceBug, QueueBroke
from services.hypervisor.vsock.memory import GuestMemory
from services.hypervisor.vsock.ring import DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Ring
from services.hypervisor.vsock.vhost_user import RingLayout
from tests.unit.hypervisor.vsock_rig import REGIONS, DriverQueue, Space, user

SIZE = 8


class Pair:
    """A driver's queue and the device's ring over it."""

    def __init__(self, *, writable: bool = False, size: int = SIZE, base: int = 0) -> None:
        self.space = Space()
        self.queue = DriverQueue(self.space, 0x1000, size)
        self.memory = GuestMemory(self.space, REGIONS)
        self.queue.index = self.queue.seen = base
        for at in (self.queue.available, self.queue.used):
            self.queue.poke(at + 2, struct.pack("<H", base))
        self.layout = RingLayout(
            size, user(self.queue.descriptors), user(self.queue.available), user(self.queue.used), base
        )
        self.ring = Ring(self.layout, self.memory, writable=writable)


def test_buffers_are_taken_in_order_and_given_back() -> None:
    pair = Pair()
    first = pair.queue.add([(0x5000, 10)], write=False)
    second = pair.queue.add([(0x6000, 20), (0xFFFF0, 32)], write=False)
    assert pair.ring.fetch()
    one, two = pair.ring.pending
    assert (one.head, one.spans, one.length) == (first, ((user(0x5000), 10),), 10)
    assert two.spans == ((user(0x6000), 20), (user(0xFFFF0), 16), (user(0x100000), 16))
    pair.ring.pending.clear()
    pair.ring.complete(one, 0)
    pair.ring.complete(two, 0)
    assert pair.queue.collect() == []
    assert pair.ring.publish()
    assert pair.queue.collect() == [(first, 0), (second, 0)]
    assert not pair.ring.publish()


@pytest.mark.parametrize("base", [0, 3, 65533])
def test_indices_wrap(base: int) -> None:
    pair = Pair(base=base)
    for _ in range(3 * SIZE):
        head = pair.queue.add([(0x5000, 1)], write=False)
        assert pair.ring.fetch()
        pair.ring.complete(pair.ring.pending.popleft(), 0)
        pair.ring.publish()
        assert pair.queue.collect() == [(head, 0)]
    assert pair.ring.position == (base + 3 * SIZE) & 0xFFFF


def test_many_at_once_wrap_in_both_rings() -> None:
    pair = Pair(base=5)
    for _ in range(4):
        heads = [pair.queue.add([(0x5000, 1)], write=False) for _ in range(SIZE)]
        assert pair.ring.fetch()
        while pair.ring.pending:
            pair.ring.complete(pair.ring.pending.popleft(), 0)
        pair.ring.publish()
        assert pair.queue.collect() == [(head, 0) for head in heads]


def test_a_driver_that_wants_no_interrupt_gets_none() -> None:
    pair = Pair()
    pair.queue.poke(pair.queue.available, b"\1\0")
    pair.queue.add([(0x5000, 1)], write=False)
    pair.ring.fetch()
    pair.ring.complete(pair.ring.pending.popleft(), 0)
    assert not pair.ring.publish()


def test_notifications_are_switched_in_the_used_ring() -> None:
    pair = Pair()
    pair.ring.want_notifications(False)
    assert pair.queue.peek(pair.queue.used, 2) == b"\1\0"
    assert Ring(pair.layout, pair.memory, writable=False)._notify is False
    pair.ring.want_notifications(True)
    assert pair.queue.peek(pair.queue.used, 2) == b"\0\0"


def test_what_is_published_meanwhile_is_fetched_on_the_way() -> None:
    pair = Pair()
    pair.queue.add([(0x5000, 1)], write=False)
    pair.ring.fetch()
    pair.queue.add([(0x5000, 2)], write=False)
    pair.ring.complete(pair.ring.pending.popleft(), 0)
    pair.ring.publish()
    assert [chain.length for chain in pair.ring.pending] == [2]


def test_a_copy_is_used_whatever_the_driver_writes_later() -> None:
    pair = Pair()
    head = pair.queue.add([(0x5000, 1)], write=False)
    pair.ring.fetch()
    pair.queue.describe(head, 1 << 60, 1 << 31)
    assert pair.ring.pending[0].spans == ((user(0x5000), 1),)


def test_a_paused_ring_goes_on_and_a_reset_one_does_not() -> None:
    pair = Pair()
    pair.queue.add([(0x5000, 1)], write=False)
    pair.queue.add([(0x5000, 1)], write=False)
    pair.ring.fetch()
    pair.ring.complete(pair.ring.pending.popleft(), 0)
    pair.ring.publish()
    assert pair.ring.position == 1, "what is held and not used will be fetched again"
    again = pair.layout._replace(base=1)
    assert pair.ring.same_place(again)
    assert not pair.ring.same_place(pair.layout)
    assert not pair.ring.same_place(again._replace(used=again.used + 4))
    pair.queue.poke(pair.queue.used + 2, b"\0\0")
    assert not pair.ring.same_place(again)


def test_a_ring_outside_guest_memory_is_refused() -> None:
    pair = Pair()
    for field in ("descriptors", "available", "used"):
        with pytest.raises(BackendPeerBroke):
            Ring(pair.layout._replace(**{field: 0x1000}), pair.memory, writable=False)
        # Its end is what does not fit.
        end = REGIONS[0].user + REGIONS[0].size - 16
        with pytest.raises(BackendPeerBroke):
            Ring(pair.layout._replace(**{field: end}), pair.memory, writable=False)


def broken(pair: Pair) -> None:
    with pytest.raises(QueueBroke):
        pair.ring.fetch()


def test_more_buffers_than_the_queue_holds_break_it() -> None:
    pair = Pair()
    pair.queue.offer(0, index=SIZE + 1)
    broken(pair)


def test_an_index_that_runs_backwards_breaks_it() -> None:
    pair = Pair(base=5)
    pair.queue.offer(0, index=4)
    broken(pair)


@pytest.mark.parametrize("head", [SIZE, 0xFFFF])
def test_a_head_outside_the_table_breaks_it(head: int) -> None:
    pair = Pair()
    pair.queue.offer(head)
    broken(pair)


@pytest.mark.parametrize("loop", [(0, 0), (0, 1), (2, 1)])
def test_a_loop_of_descriptors_breaks_it(loop: tuple[int, int]) -> None:
    start, back = loop
    pair = Pair()
    for slot in range(SIZE):
        pair.queue.describe(slot, 0x5000, 1, DESC_NEXT, slot + 1 if slot < 3 else back)
    pair.queue.offer(start)
    broken(pair)


def test_descriptors_shared_between_buffers_break_it() -> None:
    """Otherwise a queue of n could make the device hold n * n of them."""
    pair = Pair()
    for slot in range(SIZE):
        pair.queue.describe(slot, 0x5000, 1, DESC_NEXT if slot < SIZE - 1 else 0, slot + 1)
    for slot in range(SIZE):
        pair.queue.offer(slot)
    broken(pair)


@pytest.mark.parametrize(
    ("flags", "following"), [(DESC_NEXT, SIZE), (DESC_INDIRECT, 0), (DESC_WRITE, 0), (DESC_NEXT, 0xFFFF)]
)
def test_impossible_descriptors_break_it(flags: int, following: int) -> None:
    pair = Pair()
    pair.queue.describe(0, 0x5000, 16, flags, following)
    pair.queue.offer(0)
    broken(pair)


def test_a_read_only_buffer_in_a_receive_queue_breaks_it() -> None:
    pair = Pair(writable=True)
    pair.queue.describe(0, 0x5000, 16, 0)
    pair.queue.offer(0)
    broken(pair)


@pytest.mark.parametrize(
    ("address", "length"), [(0x200000, 1), (0x1FFFFF, 2), ((1 << 64) - 1, 2), (0, 0xFFFFFFFF), (1 << 40, 1)]
)
def test_a_buffer_outside_guest_memory_breaks_it(address: int, length: int) -> None:
    pair = Pair()
    pair.queue.describe(0, address, length)
    pair.queue.offer(0)
    broken(pair)


def test_empty_descriptors_are_nothing() -> None:
    pair = Pair()
    pair.queue.describe(0, 1 << 60, 0)
    pair.queue.offer(0)
    pair.ring.fetch()
    assert pair.ring.pending[0].spans == ()


def test_writing_more_than_a_buffer_holds_is_our_defect() -> None:
    pair = Pair(writable=True)
    pair.queue.add([(0x5000, 4)], write=True)
    pair.ring.fetch()
    with pytest.raises(DeviceBug):
        pair.ring.complete(pair.ring.pending[0], 5)


@settings(max_examples=300)
@given(st.binary(min_size=16 * SIZE, max_size=16 * SIZE), st.binary(max_size=4 + 2 * SIZE), st.booleans())
def test_any_bytes_as_a_queue_are_taken_or_refused(table: bytes, available: bytes, writable: bool) -> None:
    pair = Pair(writable=writable)
    pair.queue.poke(pair.queue.descriptors, table)
    pair.queue.poke(pair.queue.available, available)
    with contextlib.suppress(QueueBroke):
        pair.ring.fetch()
    assert len(pair.ring.pending) <= SIZE
    assert sum(chain.descriptors for chain in pair.ring.pending) <= SIZE
