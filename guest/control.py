"""The agent's end of its channel to PID 1."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from guest import log, wire
from guest.wire import Message


class SpawnFailed(Exception):
    """PID 1 could not start the program: stage, errno and path."""

    def __init__(self, stage: str, number: int, path: str) -> None:
        super().__init__(f"{stage}: {os.strerror(number)}: {path}")
        self.stage = stage
        self.number = number
        self.path = path


class Control:
    """Sends requests to PID 1 and hands on what it tells.

    Args:
        channel: The agent's end of the socketpair.
        on_exit: Called with the message for each program that has ended.
        on_lost: Called when PID 1 has closed the channel.
    """

    def __init__(
        self, channel: socket.socket, on_exit: Callable[[Message], None], on_lost: Callable[[], None]
    ) -> None:
        self._channel = channel
        self._on_exit = on_exit
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._sequence = 0
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._outbox: deque[tuple[Message, list[int]]] = deque()
        self.hello: asyncio.Future[Message] = self._loop.create_future()
        self.listener: asyncio.Future[socket.socket] = self._loop.create_future()
        channel.setblocking(False)
        self._loop.add_reader(channel, self._readable)

    async def request(self, message: Message, fds: tuple[int, ...] = ()) -> Message:
        """Send a request and return PID 1's answer.

        Raises:
            SpawnFailed: it could not be done.
        """
        self._sequence += 1
        message["seq"] = self._sequence
        future: asyncio.Future[Message] = self._loop.create_future()
        self._waiting[self._sequence] = future
        # Duplicates, so that the caller may close its own at once.
        self.tell(message, fds)
        answer = await future
        if "error" in answer:
            raise SpawnFailed(*answer["error"])
        return answer

    def tell(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send something that has no answer."""
        self._outbox.append((message, [os.dup(fd) for fd in fds]))
        self._flush()

    def _flush(self) -> None:
        while self._outbox:
            message, fds = self._outbox[0]
            try:
                wire.send(self._channel, message, tuple(fds))
            except BlockingIOError:
                self._loop.add_writer(self._channel, self._flush)
                return
            except OSError:
                self._lost()
                return
            self._outbox.popleft()
            for fd in fds:
                os.close(fd)
        self._loop.remove_writer(self._channel)

    def _readable(self) -> None:
        for _ in range(64):
            try:
                got = wire.receive(self._channel)
            except BlockingIOError:
                return
            except OSError:
                got = None
            if got is None:
                self._lost()
                return
            message, fds = got
            self._dispatch(message, fds)

    def _dispatch(self, message: Message, fds: list[int]) -> None:
        operation: Any = message["op"]
        if operation == "reply":
            future = self._waiting.pop(message["seq"], None)
            if future is not None and not future.done():
                future.set_result(message)
        elif operation == "exit":
            # Not at once: the task that asked for this program may not have seen its start yet.
            self._loop.call_soon(self._on_exit, message)
        elif operation == "hello":
            self.hello.set_result(message)
        elif operation == "listener":
            self.listener.set_result(
                socket.socket(message["family"], socket.SOCK_STREAM, 0, fileno=fds.pop())
            )
        else:
            log.error(f"unknown message {operation!r} of PID 1")
        for fd in fds:
            os.close(fd)

    def _lost(self) -> None:
        self._loop.remove_reader(self._channel)
        self._loop.remove_writer(self._channel)
        self._on_lost()
