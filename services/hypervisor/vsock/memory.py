"""The guest's memory, reached through the machine process's own address space.

A usual vhost-user backend maps the RAM's file; that shows it the file's pages and so forces
`share=on`. Reading and writing `/proc/<pid>/mem` sees what the machine sees, private pages too,
and leaves the template's file alone. The kernel takes the target's mmap lock in each such call
(acquire on entry, release on exit), so consecutive calls are fully ordered against each other;
the rings need no other barrier (Documentation/memory-barriers.txt, "RELEASE ... ACQUIRE").
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from services.hypervisor.vsock.errors import BackendPeerBroke, MachineGone, QueueBroke

ADDRESS_LIMIT = 1 << 63
"""`pread`'s offset is signed; user addresses are below 2**57 on every supported processor."""


class Region(NamedTuple):
    """One piece of guest RAM: guest-physical start, size, and where the machine process has it."""

    guest: int
    size: int
    user: int


Span = tuple[int, int]
"""(address in the machine process, length in bytes)."""


class AddressSpace(Protocol):
    """Bytes at addresses of the machine process."""

    def read(self, address: int, length: int) -> bytes:
        """Exactly `length` bytes.

        Raises:
            MachineGone: they cannot be read.
        """

    def read_into(self, address: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers` from one contiguous run."""

    def write(self, address: int, buffers: Sequence[bytes | memoryview]) -> None:
        """Write `buffers` as one contiguous run."""


class ProcessMemory:
    """`AddressSpace` over an open `/proc/<pid>/mem`; the descriptor belongs to the caller."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, address: int, length: int) -> bytes:
        """See `AddressSpace.read`."""
        try:
            data = os.pread(self._fd, length, address)
        except OSError as error:
            raise MachineGone(f"cannot read {length} bytes at {address:#x}: {error.strerror}") from error
        if len(data) != length:
            raise MachineGone(f"read {len(data)} of {length} bytes at {address:#x}")
        return data

    def read_into(self, address: int, buffers: Sequence[memoryview]) -> None:
        """See `AddressSpace.read_into`."""
        try:
            done = os.preadv(self._fd, buffers, address)
        except OSError as error:
            raise MachineGone(f"cannot read at {address:#x}: {error.strerror}") from error
        if done != sum(map(len, buffers)):
            raise MachineGone(f"short read at {address:#x}")

    def write(self, address: int, buffers: Sequence[bytes | memoryview]) -> None:
        """See `AddressSpace.write`."""
        try:
            done = os.pwritev(self._fd, buffers, address)
        except OSError as error:
            raise MachineGone(f"cannot write at {address:#x}: {error.strerror}") from error
        if done != sum(map(len, buffers)):
            raise MachineGone(f"short write at {address:#x}")


class GuestMemory:
    """Which addresses are the guest's: the only way from a guest's number to a machine address."""

    __slots__ = ("_last", "_regions", "_starts", "space")

    def __init__(self, space: AddressSpace, regions: Sequence[Region] = ()) -> None:
        """Take the table of `SET_MEM_TABLE`.

        Raises:
            BackendPeerBroke: a region is empty, wraps around, or overlaps another.
        """
        self.space = space
        self._regions = sorted(regions)
        end = 0
        for region in self._regions:
            if region.size <= 0 or region.guest < end:
                raise BackendPeerBroke(f"memory region at {region.guest:#x} is empty or overlaps another")
            end = region.guest + region.size
            if end > 1 << 64 or region.user < 0 or region.user + region.size > ADDRESS_LIMIT:
                raise BackendPeerBroke(f"memory region at {region.guest:#x} wraps around")
        self._starts = [region.guest for region in self._regions]
        self._last = self._regions[0] if self._regions else Region(0, 0, 0)

    def spans(self, guest: int, length: int) -> list[Span]:
        """Where `length` bytes at guest-physical `guest` are; more than one span across regions.

        Raises:
            QueueBroke: a byte of the range is not guest memory.
        """
        start, size, user = self._last
        offset = guest - start
        if offset >= 0 and offset + length <= size:
            return [(user + offset, length)]
        found: list[Span] = []
        while True:
            index = bisect.bisect_right(self._starts, guest) - 1
            region = self._regions[index] if index >= 0 else None
            if region is None or guest >= region.guest + region.size:
                raise QueueBroke(f"guest address {guest:#x} is not memory")
            offset = guest - region.guest
            step = min(length, region.size - offset)
            found.append((region.user + offset, step))
            self._last = region
            length -= step
            guest += step
            if not length:
                return found

    def owns(self, user: int, length: int) -> bool:
        """Whether a machine-process range lies inside one region, as a ring must."""
        return any(
            region.user <= user and user + length <= region.user + region.size for region in self._regions
        )
