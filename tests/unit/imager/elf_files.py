"""Small ELF files, kernels and modules for tests."""

from __future__ import annotations

import struct


def note(owner: bytes, kind: int, description: bytes) -> bytes:
    """One ELF note."""
    name = owner + b"\0"
    return (
        struct.pack("<III", len(name), len(description), kind)
        + name.ljust(-(-len(name) // 4) * 4, b"\0")
        + description.ljust(-(-len(description) // 4) * 4, b"\0")
    )


def vmlinux(*, pvh: bool = True, machine: int = 62, kind: int = 2, payload: bytes = b"\x90" * 64) -> bytes:
    """A kernel with one loadable segment and, if asked, a PVH note."""
    notes = note(b"Linux", 1, b"x") + (note(b"Xen", 18, struct.pack("<Q", 0x1000000)) if pvh else b"")
    payload = b"Linux version 6.1.0-test (a@b) " + payload
    start = 64 + 2 * 56
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        kind,
        machine,
        1,
        0x1000000,
        64,
        0,
        0,
        64,
        56,
        2,
        64,
        0,
        0,
    )
    load = struct.pack("<IIQQQQQQ", 1, 5, start, 0, 0x1000000, len(payload), len(payload) + 16, 0x1000)
    where = start + len(payload)
    noted = struct.pack("<IIQQQQQQ", 4, 4, where, 0, 0, len(notes), len(notes), 4)
    return header + load + noted + payload + notes


def bzimage(payload: bytes, *, version: int = 0x020F, length: int | None = None, offset: int = 0) -> bytes:
    """A bzImage around a compressed payload (which ends with its uncompressed size)."""
    setup = bytearray(5 * 512)
    setup[0x1F1] = 4
    setup[0x1FE:0x200] = b"\x55\xaa"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    struct.pack_into("<II", setup, 0x248, offset, len(payload) if length is None else length)
    return bytes(setup) + payload


def module(depends: str) -> bytes:
    """A kernel module that says what it depends on."""
    modinfo = f"license=GPL\0depends={depends}\0".encode()
    names = b"\0.modinfo\0.shstrtab\0"
    at = 64
    sections = struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    sections += struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, at, len(modinfo), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, at + len(modinfo), len(names), 0, 0, 1, 0)
    shoff = at + len(modinfo) + len(names)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 1, 62, 1, 0, 0, shoff, 0, 64, 0, 0, 64, 3, 2
    )
    return header + modinfo + names + sections
