"""The program calls of `GuestService`: Exec, Attach and their kin."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from guest.errors import AgentError, Code, invalid, wrong_state
from guest.execs import STDIN_WINDOW, Client, Exec, Exit, Size, Start, ring_size
from guest.guest_state import Guest
from guest.rpc import CHUNK_LIMIT, Gate, call
from voidbox.guest.v1 import guest_pb2 as pb

DETACH_GRACE = 10.0  # guest.proto: ExecStart.detach_grace
_LINGER = 1.0  # seconds
_MAX_PAGE, _DEFAULT_PAGE = 1000, 100
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class ExecCalls:
    """Translates between protobuf and `Execs`."""

    gate: Gate
    guest: Guest

    @call()
    async def Exec(self, requests: AsyncIterator[pb.ExecRequest], context: Any) -> None:
        """Run a program and stay attached to it."""
        first = await anext(aiter(requests), None)
        if first is None or not first.HasField("start"):
            raise invalid("the first message of Exec is `start`", reason="NO_START")
        start = _to_start(first.start, self.guest)
        # A caller that goes away now must not leave a program that nobody knows.
        starting = asyncio.ensure_future(self.guest.execs.start(start))
        try:
            program = await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(_abandoned)
            raise
        client = program.attach(acks=first.start.acks, stdin=start.stdin, offsets=[0, 0])
        await _converse(program, client, requests, context, _exec_response)

    @call()
    async def Attach(self, requests: AsyncIterator[pb.AttachRequest], context: Any) -> None:
        """Join a program from given offsets on."""
        first = await anext(aiter(requests), None)
        if first is None or not first.HasField("open"):
            raise invalid("the first message of Attach is `open`", reason="NO_OPEN")
        wanted = first.open
        program = self.guest.execs.get(wanted.exec_id)
        if program.adopted:
            raise AgentError(
                Code.DATA_LOSS,
                "OUTPUT_LOST",
                f"the agent that started exec {program.id!r} has died, and its streams with it",
                exec_id=program.id,
            )
        if not program.outputs:
            raise AgentError(
                Code.UNAVAILABLE, "STARTING", f"exec {wanted.exec_id!r} is being started; try again"
            )
        if wanted.stdin and program.input is None:
            raise wrong_state(f"exec {program.id!r} was started without standard input", reason="NO_STDIN")
        offsets = [wanted.stdout_offset, wanted.stderr_offset]
        client = program.attach(acks=wanted.acks, stdin=wanted.stdin, offsets=offsets)
        await _converse(program, client, requests, context, _attach_response)

    @call()
    async def ListExecs(self, request: pb.ListExecsRequest, _context: Any) -> pb.ListExecsResponse:
        """List programs in order of their start."""
        if not request.page_size >= 0:
            raise invalid(f"page_size is {request.page_size}")
        if request.page_token and not request.page_token.isdigit():
            raise invalid("page_token is not one that ListExecs gave", reason="BAD_PAGE_TOKEN")
        limit = min(request.page_size or _DEFAULT_PAGE, _MAX_PAGE)
        found, more = self.guest.execs.after(int(request.page_token or 0), limit)
        return pb.ListExecsResponse(
            execs=[_to_info(one) for one in found], next_page_token=str(found[-1].sequence) if more else ""
        )

    @call()
    async def SignalExec(self, request: pb.SignalExecRequest, _context: Any) -> pb.SignalExecResponse:
        """Signal a program, or end its tree."""
        program = self.guest.execs.get(request.exec_id)
        if request.signal == 0:
            program.terminate()
        else:
            program.signal(request.signal)
        return pb.SignalExecResponse()

    @call()
    async def DeleteExec(self, request: pb.DeleteExecRequest, _context: Any) -> pb.DeleteExecResponse:
        """Forget a program that has ended."""
        self.guest.execs.delete(request.exec_id)
        return pb.DeleteExecResponse()


async def _converse(
    program: Exec,
    client: Client,
    requests: AsyncIterator[Any],
    context: Any,
    wrap: Callable[..., Any],
) -> None:
    """Serve one attached client until the program has ended and all was sent."""
    reader = asyncio.ensure_future(_read(program, client, requests))
    writer = asyncio.ensure_future(_write(program, client, context, wrap))
    try:
        await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
        if not writer.done():
            await reader  # it has failed, or the client sends nothing more
        await writer
        await _linger(program, client, reader)
    finally:
        program.detach(client)
        for task in (reader, writer):
            task.cancel()
        await asyncio.gather(reader, writer, return_exceptions=True)


async def _linger(program: Exec, client: Client, reader: asyncio.Future[None]) -> None:
    """After the exit was sent, let a client that is still sending acks or input come to its end.

    A message that meets the end of its call half-way makes some clients (grpc.aio) drop the
    answers that they have not read yet, the exit among them.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER):
            while not reader.done() and not _settled(program, client):
                client.changed.clear()
                more = asyncio.ensure_future(client.changed.wait())
                await asyncio.wait((reader, more), return_when=asyncio.FIRST_COMPLETED)
                more.cancel()


def _settled(program: Exec, client: Client) -> bool:
    if client.stdin and program.input is not None and not program.input.finished:
        return False
    ends = [output.ring.end for output in program.outputs]
    return not client.acks or all(taken >= end for taken, end in zip(client.taken, ends, strict=True))


async def _write(program: Exec, client: Client, context: Any, wrap: Callable[..., Any]) -> None:
    taken = program.input.taken if program.input else 0
    started = pb.ExecStarted(
        exec_id=program.id, pid=program.pid, stdin_window_bytes=STDIN_WINDOW, stdin_offset=taken
    )
    await context.write(wrap(started=started))
    while True:
        client.changed.clear()
        finished = program.ended  # before the look at the rings: nothing is added to them afterwards
        sent = False
        for stream, output in enumerate(program.outputs):
            data = output.ring.read(client.sent[stream], CHUNK_LIMIT)
            if not data:
                continue
            sent = True
            chunk = pb.OutputChunk(stream=stream + 1, offset=client.sent[stream], data=data)  # type: ignore[arg-type]
            await context.write(wrap(output=chunk))
            client.sent[stream] += len(data)
            if not client.acks:
                program.delivered(client, stream, client.sent[stream])
        if client.stdin and program.input is not None and program.input.taken != client.stdin_told:
            client.stdin_told = program.input.taken
            await context.write(wrap(stdin_offset=client.stdin_told))
        if sent:
            continue
        if finished:
            await context.write(wrap(exit=_to_exit(program)))
            return
        await client.changed.wait()


async def _read(program: Exec, client: Client, requests: AsyncIterator[Any]) -> None:
    async for request in requests:
        if not request.HasField("input"):
            raise invalid("all messages after the first are `input`", reason="NO_INPUT")
        kind = request.input.WhichOneof("input")
        if kind == "stdin":
            await _feed(program, client, request.input.stdin)
        elif kind == "ack":
            _acknowledge(program, client, request.input.ack)
        elif kind == "signal":
            program.signal(request.input.signal)
        elif kind == "resize":
            program.resize(_to_size(request.input.resize))


async def _feed(program: Exec, client: Client, chunk: pb.StdinChunk) -> None:
    if not client.stdin or program.input is None:
        raise wrong_state(
            "the client said that it sends no standard input", reason="NO_STDIN", exec_id=program.id
        )
    if len(chunk.data) > CHUNK_LIMIT:
        raise invalid(
            f"a chunk of {len(chunk.data)} bytes; the limit is {CHUNK_LIMIT}", reason="CHUNK_TOO_LARGE"
        )
    if not program.input.feed(chunk.offset, chunk.data, eof=chunk.eof):
        raise AgentError(
            Code.OUT_OF_RANGE, "STDIN_GAP",
            f"stdin chunk at {chunk.offset}, but only {program.input.received} bytes have come",
            exec_id=program.id, received=program.input.received,
        )  # fmt: skip
    # A client that keeps to the window never waits here, so its acks are never stuck.
    await program.input.room.wait()


def _acknowledge(program: Exec, client: Client, ack: Any) -> None:
    stream = ack.stream - 1
    if not client.acks:
        raise wrong_state("the client said that it sends no acks", reason="NO_ACKS", exec_id=program.id)
    if not 0 <= stream < len(program.outputs):
        raise invalid(f"ack of stream {ack.stream}", reason="BAD_ACK", exec_id=program.id)
    # Not `client.sent`: the write of the last chunk may not have returned yet.
    if not 0 <= ack.offset <= program.outputs[stream].ring.end:
        raise invalid(f"ack of {ack.offset}, which was not sent", reason="BAD_ACK", exec_id=program.id)
    program.delivered(client, stream, ack.offset)


def _abandoned(starting: asyncio.Future[Exec]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().abandon()


def _exec_response(**event: Any) -> pb.ExecResponse:
    return pb.ExecResponse(event=pb.ExecEvent(**event))


def _attach_response(**event: Any) -> pb.AttachResponse:
    return pb.AttachResponse(event=pb.ExecEvent(**event))


def _to_start(message: pb.ExecStart, guest: Guest) -> Start:
    if not message.program:
        raise invalid("program is empty")
    account = guest.account(message.user)
    terminal = _to_size(message.terminal) if message.HasField("terminal") else None
    env = {
        "PATH": _PATH,
        "HOME": account.home,
        "USER": account.name,
        "LOGNAME": account.name,
        "SHELL": account.shell or "/bin/sh",
        "LANG": "C.UTF-8",
        "TERM": (message.terminal.term or "xterm-256color") if terminal else "dumb",
    }
    env.update(guest.env)
    env.update(message.env)
    for key, value in env.items():
        if not key or "=" in key or "\0" in key or "\0" in value:
            raise invalid(f"environment variable {key!r} cannot be set: its name or value is malformed")
    for word in (message.program, *message.args, message.working_directory):
        if "\0" in word:
            raise invalid("program, arguments and working directory cannot hold NUL")
    if message.working_directory and not message.working_directory.startswith("/"):
        raise invalid(f"working_directory {message.working_directory!r} is not an absolute path")
    timeout = message.timeout.seconds + message.timeout.nanos / 1e9
    grace = message.detach_grace.seconds + message.detach_grace.nanos / 1e9
    if timeout < 0 or grace < 0:
        raise invalid("timeout and detach_grace cannot be negative")
    return Start(
        exec_id=message.exec_id,
        program=message.program,
        args=list(message.args),
        env=env,
        directory=message.working_directory or "/workspace",
        default_directory=not message.working_directory,
        make_directory=message.create_working_directory and bool(message.working_directory),
        account=account,
        terminal=terminal,
        timeout=timeout,
        stdin=message.stdin,
        detach=message.detach,
        detach_grace=grace if message.HasField("detach_grace") else DETACH_GRACE,
        ring=ring_size(message.ring_bytes),
    )


def _to_size(terminal: pb.Terminal) -> Size:
    if terminal.columns > 65535 or terminal.rows > 65535:
        raise invalid(f"a terminal of {terminal.columns} x {terminal.rows}; the limit is 65535")
    return Size(terminal.columns or 80, terminal.rows or 24)


def _to_exit(program: Exec) -> pb.ExecExit:
    ended: Exit | None = program.exit
    assert ended is not None
    message = pb.ExecExit(
        exit_code=ended.code,
        signal=ended.signal,
        kill_reason=ended.reason,  # type: ignore[arg-type]
        stdout_bytes=program.outputs[0].ring.end if program.outputs else 0,
        stderr_bytes=program.outputs[1].ring.end if len(program.outputs) > 1 else 0,
    )
    message.duration.FromNanoseconds(int(ended.seconds * 1e9))
    return message


def _to_info(program: Exec) -> pb.ExecInfo:
    info = pb.ExecInfo(
        exec_id=program.id,
        program=program.program,
        args=program.args,
        pid=program.pid,
        clients=len(program.clients),
    )
    if program.start_time:
        info.start_time.FromNanoseconds(int(program.start_time * 1e9))
    if program.exit is not None:
        info.exit.CopyFrom(_to_exit(program))
    return info
