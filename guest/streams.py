"""The standard streams of one program: bounded, offset-addressed, with back-pressure."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import os
import termios
from collections.abc import Callable

from guest.ring import Ring

CHUNK = 65536
SMALLEST_RING = 65536
STDIN_WINDOW = 262144
_STDIN_STEP = 65536  # stdin offsets are told at least this often


class Budget:
    """Memory that all rings of a box share.

    Over the limit every ring shrinks to `SMALLEST_RING` of undelivered bytes, so two
    hundred talkative programs slow down instead of using up the box's memory.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.waiting: set[Output] = set()

    def add(self, count: int) -> None:
        """Account for `count` more bytes, or fewer if negative."""
        over = self.used > self.limit
        self.used += count
        if over and self.used <= self.limit:
            for output in tuple(self.waiting):
                output.resume()

    def allowance(self, capacity: int) -> int:
        """How much a ring of `capacity` may hold now."""
        return capacity if self.used <= self.limit else min(capacity, SMALLEST_RING)


class Output:
    """One output stream of a program: read into a ring while there is room.

    Args:
        fd: Read end of the pipe, or the terminal's master; owned from now on.
        capacity: Bytes kept for clients that attach.
        changed: Called when there is something new to send, or the stream has ended.
    """

    __slots__ = ("_budget", "_capacity", "_changed", "_fd", "_loop", "_paused", "_remaining", "floor", "ring")

    def __init__(self, fd: int, capacity: int, budget: Budget, changed: Callable[[], None]) -> None:
        self.ring = Ring()
        self.floor = 0
        self._fd = fd
        self._capacity = capacity
        self._budget = budget
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._paused = False
        self._remaining: int | None = None
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._readable)

    @property
    def ended(self) -> bool:
        """Whether all that will ever come is in the ring."""
        return self._fd < 0

    def set_floor(self, offset: int) -> None:
        """Bytes before `offset` may be dropped when room is needed."""
        self.floor = offset
        self.resume()

    def resume(self) -> None:
        """Go on reading if there is room again."""
        if self._paused and self._fd >= 0 and self._room() > 0:
            self._paused = False
            self._budget.waiting.discard(self)
            self._loop.add_reader(self._fd, self._readable)

    def end_soon(self) -> None:
        """Take what is in the pipe now, then close it: the program itself has ended.

        Whoever still holds the other end, a daemon the program left behind, is not waited for.
        """
        if self._fd < 0:
            return
        due = array.array("i", [0])
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._fd, termios.FIONREAD, due)
        self._remaining = due[0]
        if self._remaining == 0:
            self.close()

    def close(self) -> None:
        """Stop reading; what was not read is lost."""
        if self._fd < 0:
            return
        self._loop.remove_reader(self._fd)
        self._budget.waiting.discard(self)
        os.close(self._fd)
        self._fd = -1
        self._changed()

    def forget(self) -> None:
        """Give the ring's memory back; the stream is of no use afterwards."""
        self.close()
        self._budget.add(-len(self.ring))
        self.ring = Ring()

    def _room(self) -> int:
        return self._budget.allowance(self._capacity) - (self.ring.end - self.floor)

    def _readable(self) -> None:
        room = self._room()
        if room <= 0:
            self._paused = True
            self._budget.waiting.add(self)
            self._loop.remove_reader(self._fd)
            return
        try:
            data = os.read(self._fd, min(CHUNK, room))
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EIO:  # EIO: nobody holds the terminal any more
                raise
            data = b""
        if not data:
            self.close()
            return
        self.ring.append(data)
        excess = len(self.ring) - self._budget.allowance(self._capacity)
        dropped = self.ring.drop_before(min(self.floor, self.ring.start + excess)) if excess > 0 else 0
        self._budget.add(len(data) - dropped)
        if self._remaining is not None:
            self._remaining -= len(data)
            if self._remaining <= 0:
                self.close()
                return
        self._changed()


class Input:
    """The standard input of a program.

    Args:
        fd: Write end of the pipe, or the terminal's master; owned from now on.
        terminal: Whether the end of the input is an end-of-file character.
        changed: Called when more has been taken.
    """

    __slots__ = (
        "_buffer",
        "_changed",
        "_end",
        "_fd",
        "_loop",
        "_told",
        "_writing",
        "finished",
        "received",
        "room",
        "taken",
        "terminal",
    )

    def __init__(self, fd: int, *, terminal: bool, changed: Callable[[], None]) -> None:
        self.received = 0
        self.taken = 0
        self.finished = False
        self.terminal = terminal
        self.room = asyncio.Event()
        self.room.set()
        self._fd = fd
        self._buffer = bytearray()
        self._changed = changed
        self._end = False
        self._told = 0
        self._writing = False
        self._loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)

    def feed(self, offset: int, data: bytes, *, eof: bool) -> bool:
        """Take bytes that start at `offset`; False if that leaves a gap."""
        if offset > self.received or offset < 0:
            return False
        fresh = data[self.received - offset :]
        if self._end:
            fresh = b""
        self.received += len(fresh)
        self.finished = self.finished or eof
        if self._fd < 0:
            # The program has closed its input: the rest goes nowhere, and nobody shall wait for it.
            self.taken = self.received
            self._changed()
            return True
        self._buffer += fresh
        self._end = self._end or eof
        self._write()
        return True

    def close(self) -> None:
        """Close our end; what was not written is dropped."""
        if self._fd < 0:
            return
        if self._writing:
            self._loop.remove_writer(self._fd)
            self._writing = False
        os.close(self._fd)
        self._fd = -1
        self._buffer.clear()
        self.taken = self.received
        self.room.set()
        self._changed()

    def _write(self) -> None:
        try:
            while self._buffer:
                with memoryview(self._buffer) as view:
                    count = os.write(self._fd, view[:CHUNK])
                del self._buffer[:count]
                self.taken += count
        except BlockingIOError:
            pass
        except OSError:  # EPIPE: the program has closed its input; EIO: the terminal is gone
            self.close()
            return
        if self._end and not self._buffer and self.terminal:
            self._buffer += b"\x04"
            self.taken -= 1  # the character is ours, not the client's
            self._end = False
            self._write()
            return
        if self._end and not self._buffer:
            self.close()
            return
        if bool(self._buffer) != self._writing:
            self._writing = bool(self._buffer)
            if self._writing:
                self._loop.add_writer(self._fd, self._write)
            else:
                self._loop.remove_writer(self._fd)
        if len(self._buffer) < STDIN_WINDOW:
            self.room.set()
        else:
            self.room.clear()
        if not self._buffer or self.taken - self._told >= _STDIN_STEP:
            self._told = self.taken
            self._changed()
