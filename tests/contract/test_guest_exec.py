"""Programs: what they print arrives whole, what feeds them arrives once, and none is left behind.

A real agent and its PID 1 run as ordinary processes; see `guest_process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from tests.contract.guest_process import (
    CHUNK,
    METADATA,
    AgentProcess,
    Client,
    Result,
    alive,
    duration,
    events,
    reason,
    stdin,
    wait_gone,
)
from voidbox.guest.v1 import guest_pb2 as pb

MIB = 1 << 20


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    """One agent for all tests of this file; exec ids are the tests' own."""
    with AgentProcess() as process:
        yield process


async def attach(client: Client, exec_id: str, out: int = 0, err: int = 0, **fields: Any) -> Any:
    """An open Attach call."""
    call = client.stub.Attach(metadata=METADATA)
    opening = pb.AttachOpen(exec_id=exec_id, stdout_offset=out, stderr_offset=err, **fields)
    await call.write(pb.AttachRequest(open=opening))
    return call


async def info(client: Client, exec_id: str) -> pb.ExecInfo:
    """What ListExecs says about one program."""
    answer = await client.stub.ListExecs(pb.ListExecsRequest(page_size=1000), metadata=METADATA)
    found: pb.ExecInfo
    [found] = [one for one in answer.execs if one.exec_id == exec_id]
    return found


async def until_ended(client: Client, exec_id: str) -> pb.ExecExit:
    """Attach to the end of a program and return how it ended."""
    call = await attach(client, exec_id)
    result = Result()
    async for event in events(call):
        if not event.HasField("output"):
            result.take(event)
    assert result.exit is not None
    return result.exit


# Starting


async def test_exit_codes_signals_and_both_streams(agent: AgentProcess) -> None:
    async with agent.client() as client:
        result = await client.sh("printf out; printf err >&2; exit 42")
        assert (bytes(result.stdout), bytes(result.stderr), result.code) == (b"out", b"err", 42)
        assert result.exit is not None
        assert (result.exit.stdout_bytes, result.exit.stderr_bytes) == (3, 3)
        assert result.exit.kill_reason == pb.KILL_REASON_UNSPECIFIED
        killed = await client.sh("kill -11 $$")
        assert killed.exit is not None
        assert (killed.exit.signal, killed.exit.exit_code) == (11, 0)


async def test_bytes_arrive_unchanged(agent: AgentProcess) -> None:
    data = bytes(range(256)) * 300 + "żółć 世界 🚀\0".encode() * 5000 + b"\xff\xfe\x00"
    (agent.directory / "bytes").write_bytes(data)
    async with agent.client() as client:
        # One byte at a time for a while: characters are cut at every place.
        path = agent.directory / "bytes"
        script = f"dd if={path} bs=1 count=3000 2>/dev/null; tail -c +3001 {path}"
        assert (await client.sh(script)).stdout == data


async def test_environment_is_the_boxs_then_the_callers(agent: AgentProcess) -> None:
    async with agent.client() as client:
        await client.claim(env={"BOX": "box", "BOTH": "box", "LANG": "xx"})
        result = await client.run("env", env={"BOTH": "caller", "SPACE": "a b\nc"})
        lines = result.stdout.decode().splitlines()
        assert {"BOX=box", "BOTH=caller", "LANG=xx", "SPACE=a b", "TERM=dumb"} <= set(lines)
        names = {line.partition("=")[0] for line in lines}
        assert {"PATH", "HOME", "USER", "LOGNAME", "SHELL"} <= names
        assert not {"GRPC_ENABLE_FORK_SUPPORT", "VIRTUAL_ENV", "PYTHONPATH"} & names
        await client.claim()


async def test_working_directory_user_and_limits(agent: AgentProcess) -> None:
    async with agent.client() as client:
        where = str(agent.directory.resolve())
        assert (await client.run("pwd", working_directory=where)).stdout.decode().strip() == where
        script = "ulimit -n; ulimit -c; umask; grep -E 'NoNewPrivs|CapEff' /proc/self/status"
        result = await client.sh(script)
        files, core, umask, *status = result.stdout.decode().split("\n")
        assert int(files) >= 1024
        assert (core, umask) == ("0", "0022")
        assert "NoNewPrivs:\t1" in status
        if os.geteuid() == 0:
            assert "CapEff:\t0000000000000000" in status
            result = await client.run("id", user="12345:54321")
            assert result.stdout.startswith(b"uid=12345 gid=54321 groups=54321")


async def test_no_descriptor_of_the_agent_is_inherited(agent: AgentProcess) -> None:
    async with agent.client() as client:
        result = await client.run("ls", "-l", "/proc/self/fd")
        lines = result.stdout.decode().splitlines()
        targets = [line.rpartition("-> ")[2] for line in lines if "->" in line]
        assert len(targets) == 4  # 0, 1, 2 and the directory itself
        assert not any("socket" in target for target in targets)


@pytest.mark.parametrize(
    ("start", "code", "why"),
    [
        ({"program": "no-such-program-xyz"}, grpc.StatusCode.NOT_FOUND, "PROGRAM_NOT_FOUND"),
        ({"program": "/no/such/program"}, grpc.StatusCode.NOT_FOUND, "PROGRAM_NOT_FOUND"),
        ({"program": "/etc/passwd"}, grpc.StatusCode.PERMISSION_DENIED, "NOT_EXECUTABLE"),
        ({"program": "DIR/no-interpreter"}, grpc.StatusCode.NOT_FOUND, "INTERPRETER_NOT_FOUND"),
        ({"program": "DIR/no-format"}, grpc.StatusCode.INVALID_ARGUMENT, "EXEC_FORMAT"),
        ({"program": "true", "working_directory": "/no/such"}, grpc.StatusCode.NOT_FOUND, "BAD_DIRECTORY"),
        ({"program": "true", "working_directory": "a"}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"),
        ({"program": ""}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"),
        ({"program": "a\0b"}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"),
        ({"program": "true", "exec_id": "a/b"}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"),
        ({"program": "true", "exec_id": ".."}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"),
        ({"program": "true", "exec_id": "x" * 65}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"),
        ({"program": "true", "env": {"A=B": "c"}}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"),
        ({"program": "true", "user": "nobody-here"}, grpc.StatusCode.NOT_FOUND, "USER_NOT_FOUND"),
        ({"program": "true", "user": "99999999999"}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"),
        ({"program": "true", "ring_bytes": 1000}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"),
        ({"program": "true", "ring_bytes": -1}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"),
        ({"program": "true", "args": ["x" * 200_000]}, grpc.StatusCode.INVALID_ARGUMENT, "ARGUMENTS_TOO_LONG"),  # noqa: E501
    ],
)  # fmt: skip
async def test_what_cannot_start_says_why_and_leaves_nothing(
    agent: AgentProcess, start: dict[str, Any], code: grpc.StatusCode, why: str
) -> None:
    (agent.directory / "no-interpreter").write_text("#!/no/such/interpreter\n")
    (agent.directory / "no-format").write_text("just text\n")
    for name in ("no-interpreter", "no-format"):
        (agent.directory / name).chmod(0o755)
    agent.directory.chmod(0o755)
    fields = dict(start)
    fields["program"] = fields["program"].replace("DIR", str(agent.directory))
    async with agent.client() as client:
        await client.sh("true")
        before = agent.open_files()
        for _ in range(8):  # the id is free again
            with pytest.raises(aio.AioRpcError) as caught:
                await client.run(**({"exec_id": "fails"} | fields))
            assert caught.value.code() is code, caught.value.details()
            found = reason(caught.value)
            assert found.reason == why
            if why == "PROGRAM_NOT_FOUND":
                assert fields["program"] in str(caught.value.details())
                assert "/usr/bin" in found.metadata["PATH"]
        # Connections of the test before may have been open then, and what has just ended may still be.
        async with asyncio.timeout(60):
            while agent.open_files() > before:
                await client.sh("true")
        answer = await client.stub.ListExecs(pb.ListExecsRequest(page_size=1000), metadata=METADATA)
        assert "fails" not in {one.exec_id for one in answer.execs}


async def test_long_arguments_and_environment_pass(agent: AgentProcess) -> None:
    args = [f"{number}-" + "x" * 100_000 for number in range(8)]
    async with agent.client() as client:
        result = await client.run("sh", "-c", 'printf %s "$*" | sha256sum', "sh", *args)
        assert result.stdout.split()[0].decode() == hashlib.sha256(" ".join(args).encode()).hexdigest()


async def test_an_exec_id_can_be_used_once(agent: AgentProcess) -> None:
    async with agent.client() as client:
        await client.run("true", exec_id="once")
        with pytest.raises(aio.AioRpcError) as caught:
            await client.run("true", exec_id="once")
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
        await client.stub.DeleteExec(pb.DeleteExecRequest(exec_id="once"), metadata=METADATA)
        await client.run("true", exec_id="once")


# Volume


async def test_100_mib_of_output_in_bounded_memory(agent: AgentProcess) -> None:
    async with agent.client() as client:
        await client.sh("true")
        before = agent.agent_rss()
        call, _ = await client.exec("sh", "-c", "head -c 104857600 /dev/zero | tr '\\0' 'x'")
        digest, size, highest = hashlib.sha256(), 0, 0
        async for event in events(call):
            if event.HasField("output"):
                assert event.output.offset == size
                digest.update(event.output.data)
                size += len(event.output.data)
                if size % (8 * MIB) < CHUNK:
                    highest = max(highest, agent.agent_rss())
        assert size == 100 * MIB
        assert digest.digest() == hashlib.sha256(b"x" * (100 * MIB)).digest()
        assert highest - before < 24 * MIB


async def tell(call: Any, request: Any) -> None:
    """Send something that comes too late once the program has ended and its call is over."""
    with contextlib.suppress(aio.AioRpcError, asyncio.InvalidStateError):
        await call.write(request)


class Sender:
    """Sends input within the window, and acks, by one call that may only write one thing at a time."""

    def __init__(self, call: Any, window: int) -> None:
        self.call = call
        self.window = window
        self.taken = 0
        self.more = asyncio.Event()
        self.lock = asyncio.Lock()

    async def feed(self, data: bytes) -> None:
        """Send all of `data`."""
        for start in range(0, len(data), CHUNK):
            while start + CHUNK - self.taken > self.window:
                await self.more.wait()
                self.more.clear()
            await self.write(stdin(data[start : start + CHUNK], start, eof=start + CHUNK >= len(data)))

    async def write(self, request: pb.ExecRequest) -> None:
        """Send one request."""
        async with self.lock:
            await tell(self.call, request)

    def took(self, offset: int) -> None:
        """The agent has taken all before `offset`."""
        assert offset >= self.taken
        self.taken = offset
        self.more.set()


async def test_10_mib_through_cat_in_bounded_memory(agent: AgentProcess) -> None:
    data = random.Random(1).randbytes(10 * MIB)
    async with agent.client() as client:
        before = agent.agent_rss()
        call, started = await client.exec("cat", stdin=True, acks=True)
        sender = Sender(call, started.stdin_window_bytes)
        feeding = asyncio.ensure_future(sender.feed(data))
        result = Result()
        async for event in events(call):
            result.take(event)
            if event.HasField("stdin_offset"):
                sender.took(event.stdin_offset)
            elif event.HasField("output"):
                await sender.write(ack(1, len(result.stdout)))
        await feeding
        assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()
        assert result.code == 0
        assert agent.agent_rss() - before < 24 * MIB


async def test_a_client_without_acks_or_window_is_slowed_down_not_broken(agent: AgentProcess) -> None:
    data = random.Random(2).randbytes(6 * MIB)
    async with agent.client() as client:
        call, _ = await client.exec("cat", stdin=True)

        async def send() -> None:
            for start in range(0, len(data), CHUNK):
                await call.write(stdin(data[start : start + CHUNK], start))
            await call.write(stdin(b"", len(data), eof=True))

        sender = asyncio.ensure_future(send())
        result = Result()
        async for event in events(call):
            result.take(event)
        await sender
        assert result.stdout == data


async def test_input_and_output_larger_than_any_pipe_do_not_deadlock(agent: AgentProcess) -> None:
    """The program writes a lot before it reads; the client sends a lot before it reads."""
    async with agent.client() as client:
        call, _ = await client.exec("sh", "-c", "head -c 400000 /dev/zero; wc -c", stdin=True)
        for start in range(0, 3 * CHUNK, CHUNK):
            await call.write(stdin(bytes(CHUNK), start))
        await call.write(stdin(b"", 3 * CHUNK, eof=True))
        result = Result()
        async for event in events(call):
            result.take(event)
        assert result.stdout == bytes(400000) + b"%d\n" % (3 * CHUNK)


async def test_200_concurrent_programs(agent: AgentProcess) -> None:
    async with agent.client() as client:
        before = agent.agent_rss()

        async def talk(number: int) -> None:
            script = f"read line; echo {number} $line; echo $line >&2; exit {number}"
            call, _ = await client.exec("sh", "-c", script, stdin=True)
            running.append(number)
            if len(running) == 200:
                everybody.set()
            await everybody.wait()  # all 200 run at the same time
            await call.write(stdin(f"line {number}\n".encode()))
            result = Result()
            async for event in events(call):
                result.take(event)
            assert result.stdout == f"{number} line {number}\n".encode()
            assert result.stderr == f"line {number}\n".encode()
            assert result.code == number

        running: list[int] = []
        everybody = asyncio.Event()
        await asyncio.gather(*(talk(number) for number in range(200)))
        assert agent.agent_rss() - before < 64 * MIB


# Attaching


def ack(stream: int, offset: int) -> pb.ExecRequest:
    """A request that acknowledges output."""
    message = pb.ExecRequest()
    message.input.ack.stream = stream  # type: ignore[assignment]
    message.input.ack.offset = offset
    return message


async def test_a_client_killed_at_200_random_offsets_gets_every_byte_once(agent: AgentProcess) -> None:
    size = 20 * MIB
    chance = random.Random(3)
    data = chance.randbytes(size)
    (agent.directory / "stream").write_bytes(data)
    cuts = sorted(chance.sample(range(1, size), 200))
    received = bytearray()
    async with agent.client() as client:
        start = pb.ExecStart(program="cat", args=[str(agent.directory / "stream")], exec_id="cut", acks=True)
        call: Any = client.stub.Exec(metadata=METADATA)
        await call.write(pb.ExecRequest(start=start))
        kind: Any = pb.ExecRequest
        ended = None
        for cut in [*cuts, size + 1]:
            while ended is None and len(received) < cut:
                response = await call.read()
                assert response is not aio.EOF, (await call.code(), await call.details())
                event = response.event
                if event.HasField("output"):
                    assert event.output.offset == len(received)
                    # The client dies in the middle of a message: it keeps a part of it.
                    received += event.output.data[: max(cut - len(received), 1)]
                    await tell(call, kind(input=ack(1, len(received)).input))
                elif event.HasField("exit"):
                    ended = event.exit
            if ended is not None:
                break
            call.cancel()
            call = await attach(client, "cut", len(received), acks=True)
            kind = pb.AttachRequest
        assert ended is not None
        assert ended.stdout_bytes == size
        assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()


async def test_the_program_waits_for_acks_and_nothing_is_dropped_before(agent: AgentProcess) -> None:
    marker = agent.directory / "passed"
    script = f"head -c 300000 /dev/zero; touch {marker}; echo end"
    async with agent.client() as client:
        call, _ = await client.exec("sh", "-c", script, exec_id="acks", acks=True, ring_bytes=CHUNK)
        got = 0
        while got < CHUNK:
            event = (await call.read()).event
            got += len(event.output.data)
        assert got == CHUNK  # the ring is full and nothing was acknowledged
        other = await attach(client, "acks", acks=True)
        await other.read()
        again = (await other.read()).event.output
        assert again.offset == 0
        other.cancel()
        assert not marker.exists()
        assert (await info(client, "acks")).pid
        await call.write(ack(1, got))
        result = Result(stdout=bytearray(got))
        async for event in events(call):
            result.take(event)
            if event.HasField("output"):
                await tell(call, ack(1, len(result.stdout)))
        assert result.stdout[-4:] == b"end\n"
        assert marker.exists()


async def test_without_a_client_the_program_waits_when_the_ring_is_full(agent: AgentProcess) -> None:
    marker = agent.directory / "went-on"
    script = f"sleep 0.3; head -c 1000000 /dev/zero; touch {marker}; echo end"
    async with agent.client() as client:
        call, _ = await client.exec("sh", "-c", script, exec_id="alone", detach=True, ring_bytes=CHUNK)
        call.cancel()
        await asyncio.sleep(1.0)  # long enough for the program to fill pipe and ring
        assert not marker.exists()
        joined = await attach(client, "alone")
        result = Result()
        async for event in events(joined):
            result.take(event)
        assert len(result.stdout) == 1000004
        assert result.stdout.endswith(b"end\n")


async def test_attach_after_the_end_and_lost_offsets(agent: AgentProcess) -> None:
    script = "head -c 200000 /dev/zero | tr '\\0' a; printf zz; echo e >&2"
    async with agent.client() as client:
        await client.sh(script, exec_id="past", ring_bytes=CHUNK)
        tail = Result(stdout=bytearray(200002 - 10))
        async for event in events(await attach(client, "past", 200002 - 10, 2)):
            tail.take(event)
        assert tail.stdout[-10:] == b"aaaaaaaazz"
        assert tail.exit is not None
        assert tail.exit.stdout_bytes == 200002
        for offset in (0, 200003, -1):
            with pytest.raises(aio.AioRpcError) as caught:
                _ = [event async for event in events(await attach(client, "past", offset))]
            assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
            found = reason(caught.value)
            assert found.reason == "OFFSET_LOST"
            assert int(found.metadata["first_offset"]) == 200002 - CHUNK
        with pytest.raises(aio.AioRpcError) as caught:
            _ = [event async for event in events(await attach(client, "never-was"))]
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_several_clients_see_the_same_stream(agent: AgentProcess) -> None:
    async with agent.client() as client:
        call, _ = await client.exec("sh", "-c", "read x; seq 1 20000", exec_id="many", stdin=True)
        others = [await attach(client, "many") for _ in range(3)]
        for other in others:
            assert (await other.read()).event.HasField("started")
        assert (await info(client, "many")).clients == 4

        async def collect(one: Any) -> bytes:
            result = Result()
            async for event in events(one):
                result.take(event)
            return bytes(result.stdout)

        collecting = [asyncio.ensure_future(collect(one)) for one in (call, *others)]
        await call.write(stdin(b"go\n"))
        outputs = await asyncio.gather(*collecting)
        assert set(outputs) == {"".join(f"{number}\n" for number in range(1, 20001)).encode()}


async def test_input_goes_on_with_another_client_and_repeats_are_dropped(agent: AgentProcess) -> None:
    async with agent.client() as client:
        call, _ = await client.exec("cat", exec_id="input", stdin=True)
        await call.write(stdin(b"hello ", 0))
        result = Result()
        while not result.stdout:
            result.take((await call.read()).event)
        call.cancel()
        joined = await attach(client, "input", len(result.stdout), stdin=True)
        started = (await joined.read()).event.started
        assert started.stdin_offset == 6
        for data, offset, eof in ((b"lo wor", 3, False), (b"hello wor", 0, False), (b"ld", 9, True)):
            await joined.write(pb.AttachRequest(input=stdin(data, offset, eof=eof).input))
        async for event in events(joined):
            result.take(event)
        assert result.stdout == b"hello world"


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (stdin(b"x", 1), grpc.StatusCode.OUT_OF_RANGE),
        (stdin(b"x" * (CHUNK + 1), 0), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.ExecRequest(start=pb.ExecStart(program="true")), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.ExecRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.ExecRequest(input=pb.ExecInput(signal=99)), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.ExecRequest(input=pb.ExecInput(resize=pb.Terminal())), grpc.StatusCode.FAILED_PRECONDITION),
        (ack(1, 1), grpc.StatusCode.FAILED_PRECONDITION),
    ],
)  # fmt: skip
async def test_wrong_input_ends_the_call_and_says_why(
    agent: AgentProcess, message: pb.ExecRequest, code: grpc.StatusCode
) -> None:
    async with agent.client() as client:
        call, _ = await client.exec("cat", stdin=True, detach_grace=duration(0))
        await call.write(message)
        with pytest.raises(aio.AioRpcError) as caught:
            _ = [event async for event in events(call)]
        assert caught.value.code() is code
        assert reason(caught.value).reason


async def test_a_program_that_closes_its_input_does_not_block_the_sender(agent: AgentProcess) -> None:
    async with agent.client() as client:
        call, _ = await client.exec("sh", "-c", "exec <&-; echo closed; sleep 0.2; echo done", stdin=True)

        async def send() -> None:
            for start in range(0, 2 * MIB, CHUNK):
                await call.write(stdin(bytes(CHUNK), start))

        sender = asyncio.ensure_future(send())
        result = Result()
        async for event in events(call):
            result.take(event)
        assert result.stdout == b"closed\ndone\n"
        await asyncio.gather(sender, return_exceptions=True)


# Ending

DAEMON = "(setsid sh -c 'echo $$ > {file}; exec sleep 600' >/dev/null 2>&1 </dev/null &) ; sleep 0.2; "


def daemon(agent: AgentProcess, name: str) -> tuple[str, Path]:
    """A script that leaves a daemon in a session of its own, and the file with its pid."""
    file = agent.directory / name
    return DAEMON.format(file=file), file


def daemon_is_gone(agent: AgentProcess, file: Path) -> None:
    """Without cgroups a daemon whose parents have ended is out of reach; that is documented."""
    pid = int(file.read_text())
    if agent.cgroup:
        wait_gone(pid)
    else:
        os.kill(pid, 9)


async def test_a_timeout_kills_the_whole_tree(agent: AgentProcess) -> None:
    script, file = daemon(agent, "timeout-daemon")
    async with agent.client() as client:
        started = time.monotonic()
        result = await client.sh(script + "trap '' TERM; sleep 600 & echo $!; wait", timeout=1.0)
        assert time.monotonic() - started < 4
        assert result.exit is not None
        assert (result.exit.signal, result.exit.kill_reason) == (9, pb.KILL_REASON_TIMEOUT)
        assert result.exit.duration.seconds >= 1
        wait_gone(int(result.stdout))
        daemon_is_gone(agent, file)


async def test_cancelling_terminates_then_kills_the_tree(agent: AgentProcess) -> None:
    script, file = daemon(agent, "cancel-daemon")
    async with agent.client() as client:
        call, _ = await client.exec(
            "sh",
            "-c",
            script + "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.1; done",
            exec_id="cancel",
        )
        assert (await call.read()).event.output.data == b"up\n"
        await client.stub.SignalExec(pb.SignalExecRequest(exec_id="cancel"), metadata=METADATA)
        result = Result(stdout=bytearray(b"up\n"))
        async for event in events(call):
            result.take(event)
        assert result.stdout == b"up\nbye\n"
        assert result.exit is not None
        assert (result.exit.exit_code, result.exit.kill_reason) == (7, pb.KILL_REASON_CANCELLED)
        daemon_is_gone(agent, file)
        # Stubborn ones get KILL.
        call, _ = await client.exec(
            "sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done", exec_id="stubborn"
        )
        await call.read()
        await client.stub.SignalExec(pb.SignalExecRequest(exec_id="stubborn"), metadata=METADATA)
        seen = [event async for event in events(call)]
        assert (seen[-1].exit.signal, seen[-1].exit.kill_reason) == (9, pb.KILL_REASON_CANCELLED)
        # Once more, after the end, is fine.
        await client.stub.SignalExec(pb.SignalExecRequest(exec_id="stubborn"), metadata=METADATA)


async def test_a_program_outlives_its_last_client_by_the_grace_only(agent: AgentProcess) -> None:
    async with agent.client() as client:
        call, started = await client.exec("sleep", "600", exec_id="left", detach_grace=duration(0.3))
        call.cancel()
        ended_by_hand = await attach(client, "left")  # in time: the program goes on
        assert (await ended_by_hand.read()).event.started.pid == started.pid
        ended_by_hand.cancel()
        wait_gone(started.pid)
        ended = await until_ended(client, "left")
        assert ended.kill_reason == pb.KILL_REASON_ABANDONED


async def test_a_detached_program_goes_on_without_clients(agent: AgentProcess) -> None:
    async with agent.client() as client:
        fields = {"detach": True, "detach_grace": duration(0), "exec_id": "detached", "stdin": True}
        call, started = await client.exec("sh", "-c", "read line; echo got $line", **fields)
        call.cancel()
        await asyncio.sleep(0.5)  # with a grace of 0 it would be gone long since
        assert (await info(client, "detached")).clients == 0
        assert alive(started.pid)
        joined = await attach(client, "detached", stdin=True)
        await joined.write(pb.AttachRequest(input=stdin(b"it\n").input))
        result = Result()
        async for event in events(joined):
            result.take(event)
        assert result.stdout == b"got it\n"


async def test_a_daemon_that_holds_the_pipe_does_not_hold_the_exit(agent: AgentProcess) -> None:
    async with agent.client() as client:
        started = time.monotonic()
        result = await client.sh("sleep 30 & echo $!; echo last words >&2", exec_id="holder")
        took = time.monotonic() - started
        assert 1.5 < took < 8
        assert result.stderr == b"last words\n"
        assert result.code == 0
        assert result.exit is not None
        assert result.exit.duration.seconds < 1.5  # of the program, not of the wait
        pid = int(result.stdout)
        assert alive(pid)  # a program may leave daemons; ending the exec ends them
        await client.stub.SignalExec(pb.SignalExecRequest(exec_id="holder"), metadata=METADATA)
        if agent.cgroup:
            wait_gone(pid)
        else:
            os.kill(pid, 9)


async def test_output_written_just_before_the_end_is_all_sent_before_exit(agent: AgentProcess) -> None:
    async with agent.client() as client:
        for size in (1, 65535, 65536, 65537, 300000):
            result = await client.sh(f"head -c {size} /dev/zero")
            assert len(result.stdout) == size


async def test_signals_reach_the_process_group(agent: AgentProcess) -> None:
    async with agent.client() as client:
        # The shell tells on its standard error of a `sleep` that the signal to the group has killed.
        script = "exec 2>/dev/null; trap 'echo usr1' USR1; echo up; while :; do sleep 0.05; done"
        call, _ = await client.exec("sh", "-c", script, exec_id="signals")
        assert (await call.read()).event.output.data == b"up\n"
        await call.write(pb.ExecRequest(input=pb.ExecInput(signal=10)))
        assert (await call.read()).event.output.data == b"usr1\n"
        await client.stub.SignalExec(pb.SignalExecRequest(exec_id="signals", signal=15), metadata=METADATA)
        seen = [event async for event in events(call)]
        assert (seen[-1].exit.signal, seen[-1].exit.kill_reason) == (15, 0)


async def test_delete_only_what_has_ended(agent: AgentProcess) -> None:
    async with agent.client() as client:
        call, _ = await client.exec("sleep", "600", exec_id="delete")
        with pytest.raises(aio.AioRpcError) as caught:
            await client.stub.DeleteExec(pb.DeleteExecRequest(exec_id="delete"), metadata=METADATA)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        await call.write(pb.ExecRequest(input=pb.ExecInput(signal=9)))
        _ = [event async for event in events(call)]
        await client.stub.DeleteExec(pb.DeleteExecRequest(exec_id="delete"), metadata=METADATA)
        with pytest.raises(aio.AioRpcError) as caught:
            await client.stub.DeleteExec(pb.DeleteExecRequest(exec_id="delete"), metadata=METADATA)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_listing_pages_in_order_of_start_and_ended_programs_are_bounded() -> None:
    with AgentProcess() as fresh:
        async with fresh.client() as client:
            for number in range(270):
                await client.run("true", exec_id=f"n{number}")
            names, token = [], ""
            while True:
                request = pb.ListExecsRequest(page_size=50, page_token=token)
                page = await client.stub.ListExecs(request, metadata=METADATA)
                assert len(page.execs) <= 50
                names += [one.exec_id for one in page.execs]
                token = page.next_page_token
                if not token:
                    break
            assert names == [f"n{number}" for number in range(270 - len(names), 270)]
            assert 250 <= len(names) <= 257
            with pytest.raises(aio.AioRpcError):
                await client.stub.ListExecs(pb.ListExecsRequest(page_token="x"), metadata=METADATA)


# Terminals


async def test_a_terminal_has_a_size_and_learns_a_new_one(agent: AgentProcess) -> None:
    script = "trap 'stty size; exit 0' WINCH; tty; stty size; echo $TERM; while :; do sleep 0.05; done"
    async with agent.client() as client:
        call, _ = await client.exec("sh", "-c", script, terminal=pb.Terminal(columns=100, rows=30))
        seen = bytearray()
        while b"xterm-256color" not in seen:
            seen += (await call.read()).event.output.data
        assert b"/dev/pts/" in seen
        assert b"30 100" in seen
        await call.write(pb.ExecRequest(input=pb.ExecInput(resize=pb.Terminal(columns=132, rows=50))))
        result = Result(stdout=seen)
        async for event in events(call):
            result.take(event)
        assert b"50 132" in result.stdout
        assert result.code == 0
        assert not result.stderr


async def test_a_terminal_is_the_controlling_one(agent: AgentProcess) -> None:
    async with agent.client() as client:
        call, _ = await client.exec(
            "sh", "-c", "echo to-tty > /dev/tty; cat", terminal=pb.Terminal(), stdin=True
        )
        result = Result()
        while b"to-tty\r\n" not in result.stdout:
            result.take((await call.read()).event)
        await call.write(stdin(b"typed\n"))
        while b"typed\r\ntyped\r\n" not in result.stdout:  # the echo, then cat's copy
            result.take((await call.read()).event)
        await call.write(stdin(b"\x03", 6))  # Ctrl-C
        seen = [event async for event in events(call)]
        assert seen[-1].exit.signal == 2
        call, _ = await client.exec("cat", terminal=pb.Terminal(), stdin=True)
        await call.write(stdin(b"x\n", 0, eof=True))
        seen = [event async for event in events(call)]
        assert seen[-1].exit.exit_code == 0
