"""A split virtqueue, device side (virtio 1.2, section 2.7), over memory that the driver controls.

Each chain is copied and checked once, before anything in it is used; what the driver writes to
those descriptors afterwards has no effect. Bounds: the chains held at one time have at most `size`
descriptors between them, however the driver links them.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import NamedTuple

from services.hypervisor.vsock.errors import BackendPeerBroke, DeviceBug, QueueBroke
from services.hypervisor.vsock.memory import GuestMemory, Span
from services.hypervisor.vsock.vhost_user import RingLayout

DESCRIPTOR = struct.Struct("<QIHH")
"""address, length, flags, next."""
U16 = struct.Struct("<H")
RING_HEAD = struct.Struct("<HH")
"""flags, index: the start of both rings."""
USED_ELEMENT = struct.Struct("<II")

DESC_NEXT = 1
DESC_WRITE = 2
DESC_INDIRECT = 4

AVAIL_NO_INTERRUPT = 1
USED_NO_NOTIFY = 1

INDEX_MASK = 0xFFFF


class Chain(NamedTuple):
    """One buffer that the driver made available, in machine addresses."""

    head: int
    spans: tuple[Span, ...]
    length: int
    descriptors: int


class Ring:
    """The consumer of one queue's buffers; all of them must go the same way.

    After any `QueueBroke` the ring must not be used again until the driver has reset it.
    """

    __slots__ = (
        "_available",
        "_descriptors",
        "_done",
        "_done_descriptors",
        "_held",
        "_held_descriptors",
        "_layout",
        "_memory",
        "_next",
        "_notify",
        "_size",
        "_space",
        "_used",
        "_used_index",
        "_writable",
        "interrupts",
        "pending",
    )

    def __init__(self, layout: RingLayout, memory: GuestMemory, *, writable: bool) -> None:
        """Continue at `layout.base`.

        Args:
            layout: Size and machine addresses.
            memory: The guest's memory; all three parts must lie in it.
            writable: True if the device fills this queue's buffers, False if it reads them.

        Raises:
            BackendPeerBroke: a part of the ring is not guest memory.
        """
        for address, length in layout.extents():
            if not memory.owns(address, length):
                raise BackendPeerBroke(f"a queue at {address:#x} is not in guest memory")
        self._layout = layout
        self._memory = memory
        self._space = memory.space
        self._size = layout.size
        self._descriptors = layout.descriptors
        self._available = layout.available
        self._used = layout.used
        self._writable = writable
        self._next = layout.base
        self._held = self._held_descriptors = 0
        self._done: list[bytes] = []
        self._done_descriptors = 0
        flags, self._used_index = self._read_used()
        self._notify = not flags & USED_NO_NOTIFY
        self.interrupts = 0
        self.pending: deque[Chain] = deque()
        """Checked buffers that have not been taken."""

    @property
    def position(self) -> int:
        """The available index to continue at; buffers taken and not completed count as not taken."""
        return (self._next - self._held) & INDEX_MASK

    @property
    def layout(self) -> RingLayout:
        """Where the ring lies, and where another one over the same memory would go on."""
        return self._layout._replace(base=self.position)

    def same_place(self, layout: RingLayout) -> bool:
        """Whether a ring started with `layout` goes on where this one stopped.

        A machine that was paused restarts its rings so; a driver that was reset begins with both
        indices at zero.
        """
        return layout == self.layout and self._read_used()[1] == self._used_index

    def fetch(self) -> bool:
        """Copy and check what the driver has made available; True if `pending` holds anything.

        Raises:
            QueueBroke: an index, a descriptor or a chain is impossible.
        """
        _flags, index = RING_HEAD.unpack(self._space.read(self._available, RING_HEAD.size))
        self._take_up_to(index)
        return bool(self.pending)

    def complete(self, chain: Chain, written: int) -> None:
        """Give `chain` back; the driver sees it after the next `publish`."""
        if written > (chain.length if self._writable else 0):
            raise DeviceBug(f"{written} bytes were written to a buffer of {chain.length}")
        self._done.append(USED_ELEMENT.pack(chain.head, written))
        self._done_descriptors += chain.descriptors

    @property
    def unpublished(self) -> int:
        """How many completed buffers the driver has not been shown."""
        return len(self._done)

    def publish(self) -> bool:
        """Show the driver what was completed; True if it wants an interrupt for it.

        What it has made available meanwhile is fetched on the way.

        Raises:
            QueueBroke: as `fetch`.
        """
        count = len(self._done)
        if not count:
            return False
        slot = self._used_index % self._size
        base = self._used + RING_HEAD.size
        first = min(count, self._size - slot)
        self._space.write(base + slot * USED_ELEMENT.size, [b"".join(self._done[:first])])
        if first < count:
            self._space.write(base, [b"".join(self._done[first:])])
        self._done.clear()
        self._held -= count
        self._held_descriptors -= self._done_descriptors
        self._done_descriptors = 0
        self._used_index = (self._used_index + count) & INDEX_MASK
        # A write of its own, so that no processor shows the index before the elements.
        self._space.write(self._used + 2, [U16.pack(self._used_index)])
        flags, index = RING_HEAD.unpack(self._space.read(self._available, RING_HEAD.size))
        self._take_up_to(index)
        wanted = not flags & AVAIL_NO_INTERRUPT
        self.interrupts += wanted
        return wanted

    def want_notifications(self, wanted: bool) -> None:
        """Ask the driver to kick, or not to bother. After asking, `fetch` once more."""
        if wanted != self._notify:
            self._space.write(self._used, [U16.pack(0 if wanted else USED_NO_NOTIFY)])
            self._notify = wanted

    def _read_used(self) -> tuple[int, int]:
        flags, index = RING_HEAD.unpack(self._space.read(self._used, RING_HEAD.size))
        return flags, index

    def _take_up_to(self, index: int) -> None:
        count = (index - self._next) & INDEX_MASK
        if not count:
            return
        size = self._size
        if self._held + count > size:
            raise QueueBroke(f"{self._held + count} buffers in a queue of {size}")
        slot = self._next % size
        first = min(count, size - slot)
        base = self._available + RING_HEAD.size
        raw = self._space.read(base + 2 * slot, 2 * first)
        if first < count:
            raw += self._space.read(base, 2 * (count - first))
        table = self._space.read(self._descriptors, DESCRIPTOR.size * size)
        for (head,) in U16.iter_unpack(raw):
            self.pending.append(self._chain(table, head))
        self._next = index
        self._held += count

    def _chain(self, table: bytes, head: int) -> Chain:
        size, want, spans_of = self._size, DESC_WRITE if self._writable else 0, self._memory.spans
        spans: list[Span] = []
        total, position = 0, head
        for count in range(1, size - self._held_descriptors + 1):
            if position >= size:
                raise QueueBroke(f"descriptor {position} in a queue of {size}")
            address, length, flags, following = DESCRIPTOR.unpack_from(table, position * DESCRIPTOR.size)
            if flags & DESC_WRITE != want:
                raise QueueBroke(f"descriptor {position} goes the wrong way")
            if flags & DESC_INDIRECT:
                raise QueueBroke(f"descriptor {position} is indirect, which was not negotiated")
            if length:
                spans += spans_of(address, length)
                total += length
            if not flags & DESC_NEXT:
                self._held_descriptors += count
                return Chain(head, tuple(spans), total, count)
            position = following
        # A loop, or a descriptor that is part of two buffers.
        raise QueueBroke(f"the buffers held have more descriptors than a queue of {size}")
