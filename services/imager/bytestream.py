"""A byte source that is read exactly, by chunk, or skipped: what the tar parser stands on."""

from __future__ import annotations

from collections.abc import Iterator

from services.common.errors import Corrupt


class Truncated(Corrupt):
    """The source ended before what its own headers announced."""

    default_reason = "TRUNCATED"


class ByteStream:
    """Pull-based view on an iterator of byte chunks; `position` counts what was consumed."""

    __slots__ = ("_at", "_chunk", "_source", "position")

    def __init__(self, source: Iterator[bytes]) -> None:
        self._source = source
        self._chunk = b""
        self._at = 0
        self.position = 0

    def _more(self) -> bool:
        while self._at >= len(self._chunk):
            following = next(self._source, None)
            if following is None:
                self._chunk, self._at = b"", 0
                return False
            self._chunk, self._at = following, 0
        return True

    def read(self, length: int) -> bytes:
        """`length` bytes, fewer only at the end of the source."""
        at = self._at
        piece = self._chunk[at : at + length]
        if len(piece) == length:
            self._at = at + length
            self.position += length
            return piece
        self._at = len(self._chunk)
        self.position += len(piece)
        parts = [piece]
        missing = length - len(piece)
        while missing and self._more():
            piece = self._chunk[self._at : self._at + missing]
            self._at += len(piece)
            self.position += len(piece)
            missing -= len(piece)
            parts.append(piece)
        return b"".join(parts)

    def exactly(self, length: int) -> bytes:
        """`length` bytes.

        Raises:
            Truncated: the source has fewer.
        """
        data = self.read(length)
        if len(data) != length:
            raise Truncated(f"the stream ends {length - len(data)} bytes too early, at byte {self.position}")
        return data

    def piece(self, length: int) -> memoryview | None:
        """The next `length` bytes, if they came in one piece; else None, and nothing is read.

        They are not copied: who keeps them keeps a whole chunk.
        """
        at = self._at
        end = at + length
        if end > len(self._chunk):
            return None
        self._at = end
        self.position += length
        return memoryview(self._chunk)[at:end]

    def chunks(self, length: int) -> Iterator[bytes | memoryview]:
        """The next `length` bytes in pieces of whatever size they arrive in.

        Raises:
            Truncated: the source has fewer.
        """
        while length:
            if not self._more():
                raise Truncated(f"the stream ends {length} bytes too early, at byte {self.position}")
            end = min(len(self._chunk), self._at + length)
            whole = self._at == 0 and end == len(self._chunk)
            piece = self._chunk if whole else memoryview(self._chunk)[self._at : end]
            size = end - self._at
            self._at = end
            self.position += size
            length -= size
            yield piece

    def skip(self, length: int) -> None:
        """Drop `length` bytes.

        Raises:
            Truncated: the source has fewer.
        """
        if len(self._chunk) - self._at >= length:
            self._at += length
            self.position += length
            return
        for _ in self.chunks(length):
            pass

    def drain(self) -> None:
        """Read the source to its end."""
        while self._more():
            self.position += len(self._chunk) - self._at
            self._at = len(self._chunk)
