"""Compresses a stream for archives and kernels; the same input gives the same bytes.

Linux unpacks an initramfs of any of these kinds (usr/Kconfig). Its lz4 reader knows only the
legacy frame (lz4_Frame_format.md, "Legacy frame"), which `lz4 -d` reads as well.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, Final, Literal, Protocol, cast, get_args

import lz4.block
import zstandard

from services.common.errors import InvalidInput

Compression = Literal["none", "gzip", "zstd", "lz4"]
COMPRESSIONS: Final[tuple[Compression, ...]] = get_args(Compression)

_LZ4_MAGIC: Final = struct.pack("<I", 0x184C2102)
_LZ4_BLOCK: Final = 8 << 20  # fixed by the legacy frame
_LZ4_LEVEL: Final = 4  # of high compression; above it time grows faster than the gain
_GZIP_LEVEL: Final = 6
_ZSTD_LEVEL: Final = 9  # its window of 8 MiB is far below the 128 MiB that Linux allows


class _Compressor(Protocol):
    def compress(self, data: bytes | memoryview, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _Plain:
    """No compression."""

    def compress(self, data: bytes | memoryview, /) -> bytes:
        return bytes(data)

    def flush(self) -> bytes:
        return b""


class _Lz4Legacy:
    """Magic number, then each block of 8 MiB compressed by itself after its length."""

    def __init__(self) -> None:
        self._waiting = bytearray()
        self._head = _LZ4_MAGIC

    def compress(self, data: bytes | memoryview, /) -> bytes:
        self._waiting += data
        done = []
        while len(self._waiting) >= _LZ4_BLOCK:
            done.append(self._block(bytes(self._waiting[:_LZ4_BLOCK])))
            del self._waiting[:_LZ4_BLOCK]
        return b"".join(done)

    def flush(self) -> bytes:
        return self._block(bytes(self._waiting)) if self._waiting else self._take_head()

    def _take_head(self) -> bytes:
        head, self._head = self._head, b""
        return head

    def _block(self, data: bytes) -> bytes:
        packed: bytes = lz4.block.compress(
            data, mode="high_compression", compression=_LZ4_LEVEL, store_size=False
        )
        return self._take_head() + struct.pack("<I", len(packed)) + packed


_COMPRESSORS: Final[dict[str, Callable[[], _Compressor]]] = {
    "none": _Plain,
    # No name and no time in the header: zlib leaves both out.
    "gzip": lambda: cast("_Compressor", zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, 31)),
    "zstd": lambda: cast("_Compressor", zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj()),
    "lz4": _Lz4Legacy,
}


def compression_from(text: str) -> Compression:
    """The compression called `text`; "" means none.

    Raises:
        InvalidInput: there is none of that name.
    """
    for kind in COMPRESSIONS:
        if kind == (text or "none"):
            return kind
    raise InvalidInput(
        f"{text!r} is no compression; use one of {', '.join(COMPRESSIONS)}", reason="BAD_COMPRESSION"
    )


class _Writer:
    """The writing end of a file that compresses; it cannot seek."""

    def __init__(self, out: BinaryIO, compressor: _Compressor) -> None:
        self._out, self._compressor = out, compressor

    def write(self, data: bytes | memoryview) -> int:
        """Take `data`; return its length, as a file does."""
        self._out.write(self._compressor.compress(data))
        return len(data)


@contextmanager
def compressing(out: BinaryIO, kind: Compression) -> Iterator[BinaryIO]:
    """A file whose `write` compresses into `out`, which is complete when the block ends; not closed."""
    compressor = _COMPRESSORS[kind]()
    yield cast("BinaryIO", _Writer(out, compressor))
    out.write(compressor.flush())
