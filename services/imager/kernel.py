"""Kernels for direct boot: `vmlinux` out of a bzImage, and the modules a guest needs.

The uncompressed ELF file boots by PVH and skips decompression in the guest, which is the
slowest part of a boot under emulation. QEMU enters it at the address in its Xen note.
PVH boot has no boot stub that could move the kernel, so KASLR of the text does not
apply, whatever the command line says.
"""

from __future__ import annotations

import io
import lzma
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import zstandard

from services.common.errors import Corrupt, InvalidInput, NotFound
from services.imager.elf import ET_EXEC, PT_LOAD, Elf

# Debian's is 66 MB; nothing sane is larger than this.
MAX_VMLINUX = 512 << 20
MAX_BZIMAGE = 128 << 20
MAX_MODULE = 64 << 20

# Documentation/x86/boot.rst
_SETUP_SECTS = 0x1F1
_BOOT_FLAG = 0x1FE
_HEADER_MAGIC = 0x202
_VERSION = 0x206
_PAYLOAD = 0x248
_PAYLOAD_SINCE = 0x0208  # protocol version that has payload_offset and payload_length

_MAGICS: tuple[tuple[bytes, str], ...] = (
    (b"\xfd7zXZ\0", "xz"),
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x89LZO", "lzo"),
    (b"BZh", "bzip2"),
    (b"\x5d\0\0", "lzma"),
)


def extract_vmlinux(image: bytes, name: str = "kernel") -> bytes:
    """The uncompressed, PVH-bootable ELF kernel inside `image`.

    Args:
        image: A bzImage (`vmlinuz`), or a `vmlinux`, which is checked and returned.
        name: What messages call it.

    Raises:
        InvalidInput: it is no kernel, or is compressed in a way that is not supported.
        Corrupt: it is cut off, or what it says of itself is wrong.
    """
    if image[:4] == b"\x7fELF":
        return _checked_vmlinux(image, name)
    header = image[: _PAYLOAD + 8]
    if len(header) < _PAYLOAD + 8 or header[_HEADER_MAGIC : _HEADER_MAGIC + 4] != b"HdrS":
        raise InvalidInput(
            f"{name} is neither a bzImage nor an ELF vmlinux for x86-64", reason="NOT_A_KERNEL", file=name
        )
    (version,) = struct.unpack_from("<H", header, _VERSION)
    if version < _PAYLOAD_SINCE or header[_BOOT_FLAG : _BOOT_FLAG + 2] != b"\x55\xaa":
        raise InvalidInput(
            f"{name} has boot protocol {version:#06x}; 2.08 is needed", reason="OLD_KERNEL", file=name
        )
    offset, length = struct.unpack_from("<II", header, _PAYLOAD)
    start = ((header[_SETUP_SECTS] or 4) + 1) * 512 + offset
    if length < 8 or start + length > len(image) or len(image) > MAX_BZIMAGE:
        raise Corrupt(
            f"{name} is cut off: its payload is bytes {start} to {start + length} of {len(image)}",
            reason="BAD_KERNEL",
            file=name,
        )
    # The build appends the uncompressed size to the payload (scripts/Makefile.lib, size_append).
    payload, (size,) = image[start : start + length - 4], struct.unpack_from("<I", image, start + length - 4)
    if not 0 < size <= MAX_VMLINUX:
        raise Corrupt(f"{name} says it unpacks to {size} bytes", reason="BAD_KERNEL", file=name)
    # gzip carries that size itself (ISIZE), so there it was not appended.
    vmlinux = decompress(image[start : start + length] if payload[:2] == b"\x1f\x8b" else payload, size, name)
    if len(vmlinux) != size:
        raise Corrupt(
            f"{name} unpacks to {len(vmlinux)} bytes, not to {size}", reason="BAD_KERNEL", file=name
        )
    return _checked_vmlinux(vmlinux, name)


def _checked_vmlinux(vmlinux: bytes, name: str) -> bytes:
    elf = Elf(vmlinux, name)
    loads = [segment for segment in elf.segments if segment.kind == PT_LOAD]
    if elf.type != ET_EXEC or not loads:
        raise InvalidInput(f"{name} is an ELF file but not a kernel", reason="NOT_A_KERNEL", file=name)
    for load in loads:
        if load.offset + load.file_size > len(vmlinux) or load.file_size > load.memory_size:
            raise Corrupt(f"{name} has a segment that leaves the file", reason="BAD_KERNEL", file=name)
    if elf.pvh_entry() is None:
        raise InvalidInput(
            f"{name} has no PVH entry; use a kernel built with CONFIG_PVH=y", reason="NO_PVH", file=name
        )
    # A relocatable kernel's relocation table follows the ELF file; only the boot stub reads it.
    return vmlinux[: elf.end()]


def decompress(data: bytes, limit: int, name: str) -> bytes:
    """The content of one xz, gzip or zstd stream, refused if it is longer than `limit` bytes."""
    kind = next((kind for magic, kind in _MAGICS if data.startswith(magic)), "")
    try:
        if kind == "xz":
            out = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=256 << 20).decompress(data, limit + 1)
        elif kind == "gzip":
            out = zlib.decompressobj(wbits=31).decompress(data, limit + 1)
        elif kind == "zstd":
            reader = zstandard.ZstdDecompressor(max_window_size=128 << 20).stream_reader(io.BytesIO(data))
            out = reader.read(limit + 1)
        else:
            raise InvalidInput(
                f"{name} is compressed with {kind or 'something unknown'}; xz, gzip and zstd are supported",
                reason="UNSUPPORTED_COMPRESSION",
                file=name,
            )
    except (lzma.LZMAError, zlib.error, zstandard.ZstdError, EOFError) as error:
        raise Corrupt(
            f"{name} cannot be decompressed: {error}", reason="BAD_COMPRESSION", file=name
        ) from error
    if len(out) > limit:
        raise Corrupt(f"{name} unpacks to more than {limit} bytes", reason="TOO_LARGE", file=name)
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One kernel module, uncompressed.

    Attributes:
        name: As the kernel calls it, with underscores.
        path: Below the root of the guest, e.g. "lib/modules/6.1.0/kernel/fs/9p/9p.ko".
        content: The .ko file.
    """

    name: str
    path: PurePosixPath
    content: bytes


class ModuleTree:
    """The modules of one kernel release, read from an unpacked package.

    Dependencies come from each module's own `.modinfo`: the package has no `modules.dep`,
    since depmod makes that when it is installed.
    """

    def __init__(self, root: Path, release: str) -> None:
        self._base = root / "lib/modules" / release
        self._release = release
        self._files = {
            _module_name(path.name): path
            for path in sorted(self._base.glob("kernel/**/*.ko*"))
            if path.is_file()
        }
        built_in = self._base / "modules.builtin"
        if not built_in.is_file():
            raise NotFound(f"{self._base} holds no modules", reason="NO_MODULES", path=self._base)
        self._built_in = {_module_name(PurePosixPath(line).name) for line in built_in.read_text().split()}

    def closure(self, names: Iterable[str]) -> list[Module]:
        """`names` and all they depend on, in load order, without what is built in.

        Raises:
            NotFound: a module is neither there nor built in.
            Corrupt: modules depend on each other in a circle.
        """
        order: dict[str, Module] = {}
        for name in names:
            self._visit(name.replace("-", "_"), order, ())
        return list(order.values())

    def _visit(self, name: str, order: dict[str, Module], path: tuple[str, ...]) -> None:
        if name in order or name in self._built_in:
            return
        if name in path:
            raise Corrupt(f"modules depend on each other: {' > '.join((*path, name))}", reason="MODULE_CYCLE")
        source = self._files.get(name)
        if source is None:
            raise NotFound(
                f"kernel {self._release} has no module {name} (wanted by {' > '.join(path) or 'the guest'})",
                reason="NO_MODULE",
                module=name,
            )
        content = source.read_bytes()
        if source.suffix != ".ko":
            content = decompress(content, MAX_MODULE, source.name)
        for dependency in module_dependencies(content, name):
            self._visit(dependency, order, (*path, name))
        relative = source.relative_to(self._base)
        plain = relative.with_suffix("") if source.suffix != ".ko" else relative
        order[name] = Module(
            name=name, path=PurePosixPath("lib/modules", self._release, plain), content=content
        )


def _module_name(file_name: str) -> str:
    return re.sub(r"\.ko(\.\w+)?$", "", file_name).replace("-", "_")


def module_dependencies(content: bytes, name: str) -> Sequence[str]:
    """The modules that `content` says must be loaded before it."""
    section = Elf(content, name).section(".modinfo")
    if section is None:
        raise Corrupt(f"module {name} has no .modinfo", reason="BAD_MODULE", module=name)
    for item in bytes(section).split(b"\0"):
        if item.startswith(b"depends="):
            depends = item.removeprefix(b"depends=").decode("ascii", "replace")
            return [word.replace("-", "_") for word in depends.split(",") if word]
    return ()


def kernel_release(vmlinux: bytes, name: str = "kernel") -> str:
    """The release a kernel reports as `uname -r`, from its banner."""
    found = re.search(rb"Linux version (\S{1,64}) ", vmlinux)
    if found is None:
        raise InvalidInput(f"{name} does not say its version", reason="NOT_A_KERNEL", file=name)
    return found[1].decode("ascii", "replace")
