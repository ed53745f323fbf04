"""A bounded window of a byte stream, addressed by offsets in the whole stream."""

from __future__ import annotations


class Ring:
    """The last bytes of a stream: those from `start` up to `end`."""

    __slots__ = ("_data", "start")

    def __init__(self) -> None:
        self._data = bytearray()
        self.start = 0

    @property
    def end(self) -> int:
        """Offset after the last byte."""
        return self.start + len(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def append(self, data: bytes) -> None:
        """Add bytes at the end."""
        self._data += data

    def drop_before(self, offset: int) -> int:
        """Forget the bytes before `offset`; how many that were."""
        count = min(max(offset - self.start, 0), len(self._data))
        if count:
            del self._data[:count]
            self.start += count
        return count

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on; empty at the end.

        Raises:
            IndexError: the offset is no longer, or not yet, in the window.
        """
        if not self.start <= offset <= self.end:
            raise IndexError(offset)
        at = offset - self.start
        with memoryview(self._data) as view:
            return bytes(view[at : at + size])
