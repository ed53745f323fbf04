"""One program in a box, followed over any number of connections.

Nothing is lost and nothing comes twice: output carries offsets and is acknowledged once
the caller has taken it, input is kept until the guest has it. When the connection breaks
the client joins the program again at its offsets.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import grpc

from services.common.errors import AlreadyExists, Cancelled, Corrupt, NotFound, Unavailable, from_rpc_error
from voidbox.common.v1 import common_pb2
from voidbox.guest.v1 import guest_pb2
from voidbox.outage import RECONNECT_SECONDS, Outage

if TYPE_CHECKING:
    from voidbox.guest.v1.guest_pb2_grpc import GuestServiceAsyncStub

# The guest keeps 1 MiB per stream by default (ExecStart.ring_bytes); it never waits for us at a quarter.
ACK_BYTES = 256 * 1024
CHUNK_BYTES = 64 * 1024
# Until the guest tells its own window.
FIRST_WINDOW_BYTES = 64 * 1024
# How long a program outlives a lost connection, and we try to get it back.
DETACH_GRACE_SECONDS = 30

STDOUT = common_pb2.STD_STREAM_STDOUT
STDERR = common_pb2.STD_STREAM_STDERR


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A piece of output."""

    stderr: bool
    data: bytes


class StdinBuffer:
    """Input that the guest has not taken yet: at most a window of it is kept."""

    def __init__(self, window: int = FIRST_WINDOW_BYTES) -> None:
        self._window = window
        self._start = 0
        self._data = bytearray()
        self._ended = False
        self._change = asyncio.Condition()

    async def put(self, data: bytes) -> None:
        """Append `data` (not longer than a chunk) once there is room."""
        async with self._change:
            # Never more than a window under way, and a window that is too small for a chunk still moves.
            await self._change.wait_for(lambda: not self._data or len(self._data) + len(data) <= self._window)
            self._data += data
            self._change.notify_all()

    async def finish(self) -> None:
        """No more input will come."""
        async with self._change:
            self._ended = True
            self._change.notify_all()

    async def taken(self, offset: int, window: int = 0) -> None:
        """The guest has everything before `offset`; `window` is its size if it told one.

        Raises:
            Corrupt: it claims to have what it was never sent.
        """
        async with self._change:
            count = offset - self._start
            if count > len(self._data):
                raise Corrupt(
                    f"the guest acknowledges input up to {offset}, "
                    f"but only {self._start + len(self._data)} bytes were sent"
                )
            if count > 0:
                del self._data[:count]
                self._start = offset
            self._window = window or self._window
            self._change.notify_all()

    async def get(self, position: int) -> tuple[bytes, bool]:
        """The next piece at or after `position`, and whether it is the last one."""
        async with self._change:
            await self._change.wait_for(lambda: self._ended or position < self._start + len(self._data))
            at = max(0, position - self._start)
            piece = bytes(self._data[at : at + CHUNK_BYTES])
            return piece, self._ended and at + len(piece) >= len(self._data)


class Execution:
    """A program in a box.

        async with client.execute(box_id, ExecStart(program="cat"), stdin) as program:
            async for output in program.output():
                ...
        program.exit.exit_code

    Leaving the block early ends the connection, and with it the program unless it detaches.

    Args:
        guest: Stub of the guest service, reached through a forwarder.
        metadata: Names the box.
        start: How to start the program; an empty exec id is chosen here.
        stdin: Standard input; None for none.
    """

    def __init__(
        self,
        guest: GuestServiceAsyncStub,
        metadata: tuple[tuple[str, str], ...],
        start: guest_pb2.ExecStart,
        stdin: AsyncIterator[bytes] | None,
    ) -> None:
        self._guest = guest
        self._metadata = metadata
        self._start = guest_pb2.ExecStart()
        self._start.CopyFrom(start)
        self._start.exec_id = start.exec_id or f"x-{secrets.token_hex(8)}"
        self._start.acks = True
        self._start.stdin = stdin is not None
        if not self._start.HasField("detach_grace"):
            self._start.detach_grace.seconds = DETACH_GRACE_SECONDS
        self._source = stdin
        self._input = StdinBuffer()
        self._offsets = {STDOUT: 0, STDERR: 0}
        self._acked = {STDOUT: 0, STDERR: 0}
        self._call: grpc.aio.StreamStreamCall[Any, Any] | None = None
        # Whether to join instead of start; whether the call under way does; what has been seen so far.
        self._attach = self._attaching = self._started = self._broken = False
        self._writing = asyncio.Lock()
        self._outbox: asyncio.Queue[guest_pb2.ExecInput] = asyncio.Queue()
        self._reader: asyncio.Task[None] | None = None
        self._exit: guest_pb2.ExecExit | None = None

    @property
    def exec_id(self) -> str:
        """The program's id in the box."""
        return self._start.exec_id

    @property
    def exit(self) -> guest_pb2.ExecExit:
        """How it ended; only after `output` has ended."""
        if self._exit is None:
            raise RuntimeError("the program has not ended")
        return self._exit

    async def __aenter__(self) -> Execution:
        if self._source is not None:
            self._reader = asyncio.create_task(self._read(self._source), name="stdin")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._call is not None:
            self._call.cancel()
        await _end(self._reader)

    def signal(self, number: int) -> None:
        """Send a signal to the program's process group; kept until it runs."""
        self._outbox.put_nowait(guest_pb2.ExecInput(signal=number))

    def resize(self, columns: int, rows: int) -> None:
        """Tell the terminal's new size."""
        self._outbox.put_nowait(guest_pb2.ExecInput(resize=guest_pb2.Terminal(columns=columns, rows=rows)))

    async def output(self) -> AsyncIterator[Output]:
        """The program's output as it comes, until its end.

        Raises:
            VoidboxError: it could not be started, or the connection stayed broken.
        """
        outage = Outage(RECONNECT_SECONDS)
        while self._exit is None:
            call = self._call = await self._open()
            senders: list[asyncio.Task[None]] = []
            try:
                while (response := await call.read()) is not grpc.aio.EOF:
                    event = cast("guest_pb2.ExecResponse | guest_pb2.AttachResponse", response).event
                    kind = event.WhichOneof("event")
                    if kind == "started":
                        outage.over()
                        senders += await self._joined(call, event.started)
                    elif kind == "output":
                        if data := self._fresh(event.output):
                            yield Output(stderr=event.output.stream == STDERR, data=data)
                        self._took(event.output)
                    elif kind == "stdin_offset":
                        await self._input.taken(event.stdin_offset)
                    elif kind == "exit":
                        self._exit = event.exit
                        return
                raise Unavailable("the stream ended before the program did")
            except grpc.RpcError as error:
                await self._recover(from_rpc_error(error), outage)
            except Unavailable as error:
                await self._recover(error, outage)
            finally:
                call.cancel()
                for task in senders:
                    await _end(task)

    async def _open(self) -> grpc.aio.StreamStreamCall[Any, Any]:
        """Start the program, or join it at our offsets."""
        first: guest_pb2.AttachRequest | guest_pb2.ExecRequest
        call: grpc.aio.StreamStreamCall[Any, Any]
        if self._attach:
            opening = guest_pb2.AttachOpen(
                exec_id=self.exec_id,
                stdout_offset=self._offsets[STDOUT],
                stderr_offset=self._offsets[STDERR],
                stdin=self._source is not None,
                acks=True,
            )
            call, first = self._guest.Attach(metadata=self._metadata), guest_pb2.AttachRequest(open=opening)
        else:
            call = self._guest.Exec(metadata=self._metadata)
            first = guest_pb2.ExecRequest(start=self._start)
        self._attaching = self._attach
        await _write(call, first)
        return call

    async def _joined(
        self, call: grpc.aio.StreamStreamCall[Any, Any], started: guest_pb2.ExecStarted
    ) -> list[asyncio.Task[None]]:
        """The program runs: send what waits for that, and its input from where it has it."""
        self._started = self._attach = True
        await self._input.taken(started.stdin_offset, started.stdin_window_bytes)
        tasks = [asyncio.create_task(self._post(call), name="post")]
        if self._source is not None:
            tasks.append(asyncio.create_task(self._feed(call, started.stdin_offset), name="feed stdin"))
        return tasks

    async def _recover(self, error: Exception, outage: Outage) -> None:
        """Decide how to go on after a failed attempt, or raise its error."""
        if isinstance(error, (Unavailable, Cancelled)):  # CANCELLED: a server on the way is shutting down
            # The program may have started although nobody told us.
            self._broken = self._attach = True
            await outage.wait(error)
        elif isinstance(error, AlreadyExists) and self._broken and not self._attaching:
            self._attach = True
            await outage.wait(error)
        elif isinstance(error, NotFound) and self._attaching and not self._started:
            self._attach = False
            await outage.wait(error)
        else:
            raise error

    def _fresh(self, chunk: guest_pb2.OutputChunk) -> bytes:
        """The part of a chunk that was not received before."""
        expected = self._offsets.get(chunk.stream, -1)
        if not 0 <= chunk.offset <= expected:
            raise Corrupt(
                f"the guest sent output from offset {chunk.offset}, but {expected} comes next",
                reason="OUTPUT_GAP",
            )
        return chunk.data[expected - chunk.offset :]

    def _took(self, chunk: guest_pb2.OutputChunk) -> None:
        """The caller has taken a chunk: remember it, and let the guest forget it now and then."""
        end = max(self._offsets[chunk.stream], chunk.offset + len(chunk.data))
        self._offsets[chunk.stream] = end
        if end - self._acked[chunk.stream] >= ACK_BYTES:
            self._acked[chunk.stream] = end
            ack = guest_pb2.OutputAck(stream=chunk.stream, offset=end)
            self._outbox.put_nowait(guest_pb2.ExecInput(ack=ack))

    async def _post(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        """Send acknowledgements, signals and sizes over one connection, as they come.

        In a task of its own: a write can wait for the peer, which waits for us to read.
        """
        while True:
            item = await self._outbox.get()
            if not await self._input_to(call, item):
                self._outbox.put_nowait(item)  # for the next connection
                return

    async def _input_to(self, call: grpc.aio.StreamStreamCall[Any, Any], item: guest_pb2.ExecInput) -> bool:
        make = guest_pb2.AttachRequest if self._attaching else guest_pb2.ExecRequest
        async with self._writing:
            return await _write(call, make(input=item))

    async def _feed(self, call: grpc.aio.StreamStreamCall[Any, Any], position: int) -> None:
        """Send the input from `position` on over one connection."""
        last = False
        while not last:
            data, last = await self._input.get(position)
            chunk = guest_pb2.StdinChunk(data=data, offset=position, eof=last)
            await self._input_to(call, guest_pb2.ExecInput(stdin=chunk))
            position += len(data)

    async def _read(self, source: AsyncIterator[bytes]) -> None:
        """Take the input from its source, at the pace of the guest."""
        try:
            async for data in source:
                for start in range(0, len(data), CHUNK_BYTES):
                    await self._input.put(data[start : start + CHUNK_BYTES])
        finally:
            await self._input.finish()


async def _write(call: grpc.aio.StreamStreamCall[Any, Any], message: object) -> bool:
    """Write; False if the call has ended and takes no more: the reading side learns why."""
    with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
        await call.write(message)
        return True
    return False


async def _end(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
