"""A program in a box, from its start to its end, over streams that may break.

The program is started once, detached, under an id that its run, stage and attempt
determine. Whenever the stream breaks (the hypervisor or this service was restarted) it is
attached to again from the offsets that have been stored, so no byte is lost or doubled.
Output is acknowledged only after it was stored.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from services.common.errors import (
    AlreadyExists,
    Internal,
    NotFound,
    TimedOut,
    Unavailable,
    VoidboxError,
    from_rpc_error,
)
from services.orchestrator.blobs import reading
from services.orchestrator.convert import duration
from services.orchestrator.peers import GuestPeer, is_broken
from services.orchestrator.records import STDERR, STDOUT
from voidbox.common.v1 import common_pb2
from voidbox.guest.v1 import guest_pb2

# A quarter of the agent's ring (1 MiB by default): the program never waits for an acknowledgement.
_ACK_BYTES: Final = 256 * 1024
# The guest enforces the time limit; this is for a guest that no longer does.
_GUARD_SECONDS: Final = 30.0

KILLED_BY_TIMEOUT: Final = guest_pb2.KILL_REASON_TIMEOUT
KILLED_OUT_OF_MEMORY: Final = guest_pb2.KILL_REASON_OUT_OF_MEMORY
KILLED_CANCELLED: Final = guest_pb2.KILL_REASON_CANCELLED
KILLED_ABANDONED: Final = guest_pb2.KILL_REASON_ABANDONED

Store = Callable[[int, int, bytes], Awaitable[None]]
"""Takes (stream, offset, bytes), and returns once they are stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What is to be run; `stdin` is a host file, `timeout` in seconds."""

    exec_id: str
    program: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    stdin: Path | None = None
    timeout: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How a program ended."""

    exit_code: int
    signal: int
    kill_reason: int


class ProgramNotFound(NotFound):
    """The program does not exist in the box."""

    default_reason = "PROGRAM_NOT_FOUND"


class Execution:
    """One program's life.

    Args:
        guest: The box's agent.
        program: What is to be run.
        store: Takes the output.
        offsets: How much of standard output and error is stored already.
        begun: The program may have been started before.
    """

    def __init__(
        self, guest: GuestPeer, program: Program, store: Store, offsets: tuple[int, int], *, begun: bool
    ) -> None:
        self._guest = guest
        self._program = program
        self._store = store
        self._offsets = {STDOUT: offsets[0], STDERR: offsets[1]}
        self._acked = dict(self._offsets)
        self._join = begun
        self._seen = any(offsets)
        self._progress = False

    async def run(self) -> Exit:
        """Run the program to its end.

        Raises:
            ProgramNotFound: it does not exist in the box.
            TimedOut: the guest has not ended it long after its time limit.
            VoidboxError: the box cannot be reached any more.
        """
        limit = None if self._program.timeout is None else self._program.timeout + _GUARD_SECONDS
        try:
            async with asyncio.timeout(limit):
                return await self._run()
        except TimeoutError as error:
            raise TimedOut(
                f"the box has not ended the program {_GUARD_SECONDS:g} s after its time limit"
            ) from error

    async def _run(self) -> Exit:
        loop = asyncio.get_running_loop()
        patience_ends = loop.time() + self._guest.patience
        delay = 0.05
        while True:
            self._progress = False
            try:
                return await self._session()
            except (AlreadyExists, NotFound) as error:
                self._switch(error)
            except VoidboxError as error:
                if not is_broken(error):
                    raise
                if self._progress:
                    patience_ends, delay = loop.time() + self._guest.patience, 0.05
                if loop.time() > patience_ends:
                    message = (
                        f"the program could not be reached for {self._guest.patience:g} s: {error.message}"
                    )
                    raise Unavailable(message, reason="PEER_UNREACHABLE", peer="hypervisor") from error
                # The request may have arrived before the stream broke.
                self._join = True
                await asyncio.sleep(delay)
                delay = min(2 * delay, 1.0)

    def _switch(self, error: VoidboxError) -> None:
        """From starting to joining or back, when the guest says that it knows better."""
        if isinstance(error, AlreadyExists) and not self._join:
            self._join = True
        elif isinstance(error, NotFound) and self._join and not self._seen:
            self._join = False
        elif isinstance(error, NotFound) and not self._join:
            message = f"there is no program {self._program.program!r} in the box: {error.message}"
            raise ProgramNotFound(message) from error
        else:
            raise error

    async def _session(self) -> Exit:
        stub, metadata = self._guest.stub, self._guest.metadata
        open_stream: Any = stub.Attach if self._join else stub.Exec
        call = open_stream(metadata=metadata)
        session = _Session(call, guest_pb2.AttachRequest if self._join else guest_pb2.ExecRequest)
        senders: list[asyncio.Task[None]] = []
        try:
            await call.write(self._first())
            senders.append(asyncio.create_task(session.send_acks()))
            async for response in call:
                event = response.event
                match event.WhichOneof("event"):
                    case "started":
                        self._seen = self._progress = True
                        session.taken = event.started.stdin_offset
                        session.window = event.started.stdin_window_bytes
                        if self._program.stdin is not None and len(senders) == 1:
                            senders.append(asyncio.create_task(session.feed(self._program.stdin)))
                    case "output":
                        self._progress = True
                        await self._output(event.output, session)
                    case "stdin_offset":
                        await session.moved(event.stdin_offset)
                    case "exit":
                        end = event.exit
                        self._check_whole(end)
                        return Exit(exit_code=end.exit_code, signal=end.signal, kill_reason=end.kill_reason)
            raise Unavailable("the stream ended before the program did")
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        except asyncio.InvalidStateError as error:
            # A write met a call that has just ended; its status says why.
            status = grpc.aio.AioRpcError(
                await call.code(), grpc.aio.Metadata(), await call.trailing_metadata(), await call.details()
            )
            raise from_rpc_error(status) from error
        finally:
            call.cancel()
            for sender in senders:
                sender.cancel()
            await asyncio.gather(*senders, return_exceptions=True)

    def _first(self) -> guest_pb2.ExecRequest | guest_pb2.AttachRequest:
        program = self._program
        if self._join:
            return guest_pb2.AttachRequest(
                open=guest_pb2.AttachOpen(
                    exec_id=program.exec_id,
                    stdout_offset=self._offsets[STDOUT],
                    stderr_offset=self._offsets[STDERR],
                    stdin=program.stdin is not None,
                    acks=True,
                )
            )
        return guest_pb2.ExecRequest(
            start=guest_pb2.ExecStart(
                exec_id=program.exec_id,
                program=program.program,
                args=program.args,
                env=program.env,
                timeout=None if program.timeout is None else duration(program.timeout),
                stdin=program.stdin is not None,
                detach=True,
                acks=True,
            )
        )

    async def _output(self, chunk: guest_pb2.OutputChunk, session: _Session) -> None:
        stream = int(chunk.stream)
        if stream not in self._offsets:
            raise Internal(f"the guest sent output of stream {stream}", reason="GUEST_PROTOCOL")
        have = self._offsets[stream]
        if chunk.offset > have:
            message = f"the guest skipped from byte {have} of a stream to byte {chunk.offset}"
            raise Internal(message, reason="GUEST_PROTOCOL")
        fresh = chunk.data[have - chunk.offset :]
        if fresh:
            await self._store(stream, have, fresh)
            self._offsets[stream] = have + len(fresh)
        if self._offsets[stream] - self._acked[stream] >= _ACK_BYTES:
            self._acked[stream] = self._offsets[stream]
            session.acknowledge(stream, self._offsets[stream])

    def _check_whole(self, end: guest_pb2.ExecExit) -> None:
        said = {STDOUT: end.stdout_bytes, STDERR: end.stderr_bytes}
        for stream, length in said.items():
            if length != self._offsets[stream]:
                message = f"the program printed {length} bytes, but {self._offsets[stream]} arrived"
                raise Internal(message, reason="GUEST_PROTOCOL")


class _Session:
    """The sending side of one stream: standard input and acknowledgements."""

    def __init__(
        self, call: Any, request: type[guest_pb2.ExecRequest] | type[guest_pb2.AttachRequest]
    ) -> None:
        self._call = call
        self._request = request
        # gRPC allows one write at a time.
        self._writing = asyncio.Lock()
        self._room = asyncio.Condition()
        self._acks: dict[int, int] = {}
        self._to_ack = asyncio.Event()
        self.taken = 0
        self.window = 0

    async def _send(self, message: guest_pb2.ExecInput) -> None:
        async with self._writing:
            await self._call.write(self._request(input=message))

    def acknowledge(self, stream: int, offset: int) -> None:
        """Tell that all before `offset` is stored; does not wait, as the reader must go on reading."""
        self._acks[stream] = offset
        self._to_ack.set()

    async def send_acks(self) -> None:
        """Send acknowledgements, of each stream the latest, until cancelled."""
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            while True:
                await self._to_ack.wait()
                self._to_ack.clear()
                acks, self._acks = self._acks, {}
                for stream, offset in acks.items():
                    name = common_pb2.StdStream.ValueType(stream)
                    await self._send(guest_pb2.ExecInput(ack=guest_pb2.OutputAck(stream=name, offset=offset)))

    async def moved(self, offset: int) -> None:
        """The program has taken all its input before `offset`."""
        async with self._room:
            self.taken = max(self.taken, offset)
            self._room.notify_all()

    async def feed(self, source: Path) -> None:
        """Send the file `source` from where the program is, keeping to its window."""
        at = self.taken
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            async with reading(source, at) as chunks:
                async for data in chunks:
                    rest = data
                    while rest:
                        room = await self._wait_for_room(at)
                        await self._send_stdin(rest[:room], at)
                        at += len(rest[:room])
                        rest = rest[room:]
            await self._send_stdin(b"", at, eof=True)

    async def _wait_for_room(self, at: int) -> int:
        """How many bytes may be sent at offset `at`; waits until it is one at least."""
        window = max(self.window, 1)
        async with self._room:
            await self._room.wait_for(lambda: at < self.taken + window)
            return self.taken + window - at

    async def _send_stdin(self, data: bytes, offset: int, *, eof: bool = False) -> None:
        chunk = guest_pb2.StdinChunk(data=data, offset=offset, eof=eof)
        await self._send(guest_pb2.ExecInput(stdin=chunk))
