"""Just enough of ELF64, little endian, to ask what a file needs and offers.

Every offset and count is checked against the file before use: kernels may come from a
user. Format: System V ABI, chapters 4 and 5 ("ELF-64 Object File Format").
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from services.common.errors import Corrupt

EM_X86_64 = 62
ET_EXEC = 2
PT_LOAD = 1
PT_DYNAMIC = 2
PT_NOTE = 4
_DT_NEEDED = 1
_DT_STRTAB = 5
# xen/include/public/elfnote.h: the 32-bit entry point of the PVH boot protocol.
XEN_ELFNOTE_PHYS32_ENTRY = 18

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_DYN = struct.Struct("<qQ")
_NOTE = struct.Struct("<III")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One program header."""

    kind: int
    offset: int
    address: int
    physical: int
    file_size: int
    memory_size: int


class Elf:
    """A view of one file's bytes.

    Raises:
        Corrupt: the bytes are no ELF64 file for x86-64, or a header lies outside them.
    """

    def __init__(self, data: bytes | memoryview, name: str) -> None:
        self.data = memoryview(data)
        self.name = name
        header = _EHDR.unpack(self._bytes(0, _EHDR.size))
        if header[0][:6] != b"\x7fELF\x02\x01":
            raise Corrupt(f"{name} is not a 64-bit little-endian ELF file", reason="NOT_ELF", file=name)
        if header[2] != EM_X86_64:
            raise Corrupt(
                f"{name} is not for x86-64 (machine {header[2]})", reason="WRONG_MACHINE", file=name
            )
        self.type = header[1]
        self.entry = header[4]
        phoff, shoff, phentsize, phnum = header[5], header[6], header[9], header[10]
        shentsize, shnum, shstrndx = header[11], header[12], header[13]
        if phnum and phentsize != _PHDR.size:
            raise self._corrupt("has program headers of an unknown size")
        if shnum and shentsize != _SHDR.size:
            raise self._corrupt("has section headers of an unknown size")
        self.segments = tuple(
            Segment(kind=p[0], offset=p[2], address=p[3], physical=p[4], file_size=p[5], memory_size=p[6])
            for p in _PHDR.iter_unpack(self._bytes(phoff, phnum * _PHDR.size))
        )
        self._sections = tuple(_SHDR.iter_unpack(self._bytes(shoff, shnum * _SHDR.size)))
        self._shstrndx = shstrndx

    def _corrupt(self, what: str) -> Corrupt:
        return Corrupt(f"{self.name} {what}", reason="BAD_ELF", file=self.name)

    def _bytes(self, offset: int, size: int) -> memoryview:
        if offset < 0 or size < 0 or offset + size > len(self.data):
            raise self._corrupt(f"is cut off: bytes {offset} to {offset + size} of {len(self.data)}")
        return self.data[offset : offset + size]

    def _string(self, table: memoryview, offset: int) -> str:
        raw = bytes(table[offset : offset + 4096])
        end = raw.find(b"\0")
        if offset < 0 or end < 0:
            raise self._corrupt("has a string that does not end")
        return raw[:end].decode("utf-8", "replace")

    def section(self, name: str) -> memoryview | None:
        """The content of the first section called `name`, or None."""
        if not self._sections:
            return None
        if self._shstrndx >= len(self._sections):
            raise self._corrupt("names no section name table")
        names = self._sections[self._shstrndx]
        table = self._bytes(names[4], names[5])
        for section in self._sections:
            if self._string(table, section[0]) == name:
                return self._bytes(section[4], section[5])
        return None

    def needed(self) -> tuple[str, ...]:
        """The shared libraries that the dynamic section asks for."""
        wanted: list[int] = []
        strtab: int | None = None
        for segment in self.segments:
            if segment.kind != PT_DYNAMIC:
                continue
            usable = segment.file_size - segment.file_size % _DYN.size
            for tag, value in _DYN.iter_unpack(self._bytes(segment.offset, usable)):
                if tag == 0:
                    break
                if tag == _DT_NEEDED:
                    wanted.append(value)
                elif tag == _DT_STRTAB:
                    strtab = value
        if not wanted:
            return ()
        if strtab is None:
            raise self._corrupt("needs libraries but has no string table")
        table = self._at_address(strtab)
        return tuple(self._string(table, offset) for offset in wanted)

    def _at_address(self, address: int) -> memoryview:
        for segment in self.segments:
            if segment.kind == PT_LOAD and segment.address <= address < segment.address + segment.file_size:
                skip = address - segment.address
                return self._bytes(segment.offset + skip, segment.file_size - skip)
        raise self._corrupt(f"has nothing at address {address:#x}")

    def notes(self) -> Iterator[tuple[str, int, bytes]]:
        """Every note as (owner, type, description)."""
        for segment in self.segments:
            if segment.kind != PT_NOTE:
                continue
            data, at = self._bytes(segment.offset, segment.file_size), 0
            while at + _NOTE.size <= len(data):
                name_size, desc_size, kind = _NOTE.unpack(data[at : at + _NOTE.size])
                name_at = at + _NOTE.size
                desc_at = name_at + -(-name_size // 4) * 4
                at = desc_at + -(-desc_size // 4) * 4
                if desc_at + desc_size > len(data):
                    raise self._corrupt("has a note that leaves its segment")
                owner = bytes(data[name_at : name_at + name_size]).rstrip(b"\0").decode("utf-8", "replace")
                yield owner, kind, bytes(data[desc_at : desc_at + desc_size])

    def pvh_entry(self) -> int | None:
        """The physical address where PVH boot enters this kernel; None if it has none."""
        for owner, kind, description in self.notes():
            if owner == "Xen" and kind == XEN_ELFNOTE_PHYS32_ENTRY and len(description) in (4, 8):
                return int.from_bytes(description, "little")
        return None

    def end(self) -> int:
        """The offset after the last byte that a header accounts for."""
        shoff, shnum = _EHDR.unpack(self._bytes(0, _EHDR.size))[6], len(self._sections)
        ends: list[int] = [shoff + shnum * _SHDR.size]
        ends += [segment.offset + segment.file_size for segment in self.segments]
        ends += [section[4] + section[5] for section in self._sections if section[1] != 8]  # SHT_NOBITS
        return min(max(*ends, 0), len(self.data))
