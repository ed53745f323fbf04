"""PID 1's loop and the real agent as ordinary processes of this host, and a small client.

Nothing of the host is changed: no mounts, no host name, no clock. Programs run on the
host; file calls act in a temporary directory. With cgroup v2 (as root) programs get
cgroups as in a guest, else the agent falls back to sessions.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from voidbox.guest.v1 import guest_pb2 as pb
from voidbox.guest.v1 import guest_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
SECRET = bytes(range(32))
METADATA = (("voidbox-secret-bin", SECRET),)
CHUNK = 65536
_START = """
import os, sys
sys.path.insert(0, {root!r})
from guest.pid1 import run
from guest.settings import Settings
from guest.syscalls import prctl
prctl(1, 9)  # PR_SET_PDEATHSIG: a test runner that is killed leaves nothing running
run(Settings(
    run_dir={run!r}, listen="unix:" + {listen!r}, files_root={files!r}, cgroup={cgroup!r}, log={log!r},
    guest=False,
))
"""


def cgroup_base() -> str:
    """A directory of our own in a cgroup v2 hierarchy that we may write, or ""."""
    for line in Path("/proc/mounts").read_text().splitlines():
        words = line.split()
        if words[2] == "cgroup2" and os.access(words[1], os.W_OK):
            base = f"{words[1]}/voidbox-test-{os.getpid()}-{os.urandom(3).hex()}"
            with contextlib.suppress(OSError):
                os.mkdir(base)
                return base
    return ""


class AgentProcess:
    """A running agent with its PID 1; a context manager that proves that both have gone."""

    def __init__(self, files: str = "") -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="vbg-"))
        self.files = Path(files) if files else self.directory / "files"
        self.files.mkdir(exist_ok=True)
        self.socket = self.directory / "agent"
        self.log = self.directory / "log"
        self.cgroup = cgroup_base()

    def __enter__(self) -> AgentProcess:
        code = _START.format(
            root=str(ROOT),
            run=f"{self.directory}/run",
            listen=str(self.socket),
            files=str(self.files),
            cgroup=f"{self.cgroup}/programs" if self.cgroup else "",
            log=str(self.log),
        )
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", code], stdin=subprocess.DEVNULL, start_new_session=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        try:
            agent = self.agent_pid()
            if self.process.poll() is None:
                self.process.kill()  # the agent notices and goes
            self.process.wait(10)
            if agent:
                wait_gone(agent)
            if self.cgroup:
                self._remove_cgroup()
        finally:
            shutil.rmtree(self.directory)

    def _remove_cgroup(self) -> None:
        for path in sorted(Path(self.cgroup).rglob("*"), key=lambda one: -len(str(one))):
            if path.is_dir():
                for pid in (path / "cgroup.procs").read_text().split():
                    try:
                        wait_gone(int(pid), 2.0)  # a start that has just failed may still be ending
                    except AssertionError as error:
                        raise AssertionError(f"{error} in {path}; {self.log_text()}") from None
                path.rmdir()
        os.rmdir(self.cgroup)

    def agent_pid(self) -> int:
        """The agent's pid, or 0."""
        pid = self.process.pid
        if self.process.poll() is not None:
            return 0
        for child in _children(pid):
            if Path(f"/proc/{child}/cmdline").read_bytes() == Path(f"/proc/{pid}/cmdline").read_bytes():
                return child
        return 0

    def agent_rss(self) -> int:
        """Resident bytes of the agent."""
        return int(Path(f"/proc/{self.agent_pid()}/statm").read_text().split()[1]) * 4096

    def open_files(self) -> int:
        """How many descriptors the agent has open."""
        return len(os.listdir(f"/proc/{self.agent_pid()}/fd"))

    def log_text(self) -> str:
        """What was logged."""
        return self.log.read_text() if self.log.exists() else ""

    def channel(self) -> aio.Channel:
        """A channel to the agent."""
        # A pool of its own: the shared one may hand out the connection of a channel that closes.
        options = (
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 20),
            ("grpc.max_reconnect_backoff_ms", 100),
        )
        return aio.insecure_channel(f"unix:{self.socket}", options=options)

    @contextlib.asynccontextmanager
    async def client(self, *, claim: bool = True) -> AsyncIterator[Client]:
        """A client of the agent, which is claimed first."""
        async with self.channel() as channel:
            client = Client(channel)
            await client.stub.GetGuest(
                pb.GetGuestRequest(), wait_for_ready=True, timeout=20, metadata=METADATA
            )
            if claim:
                await client.claim()
            yield client


def wait_gone(pid: int, seconds: float = 5.0) -> None:
    """Return once the process has ended, or fail."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not select.select([fd], [], [], seconds)[0]:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"process {pid} was left")
    finally:
        os.close(fd)


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _children(pid: int) -> Iterator[int]:
    for thread in os.listdir(f"/proc/{pid}/task"):
        for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
            yield int(child)


@dataclass(slots=True)
class Result:
    """What one program has printed, and how it ended."""

    started: pb.ExecStarted = field(default_factory=pb.ExecStarted)
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    exit: pb.ExecExit | None = None

    @property
    def code(self) -> int:
        """The exit code."""
        assert self.exit is not None
        return self.exit.exit_code

    def take(self, event: pb.ExecEvent) -> None:
        """Add one event; offsets must be without gap."""
        if event.HasField("started"):
            self.started = event.started
        elif event.HasField("output"):
            into = self.stdout if event.output.stream == 1 else self.stderr
            assert event.output.offset == len(into), "a gap in the stream"
            assert 0 < len(event.output.data) <= CHUNK
            into += event.output.data
        elif event.HasField("exit"):
            self.exit = event.exit


class Client:
    """The calls that tests make most."""

    def __init__(self, channel: aio.Channel) -> None:
        self.channel = channel
        self.stub: Any = guest_pb2_grpc.GuestServiceStub(channel)

    async def claim(self, **fields: Any) -> pb.ClaimResponse:
        """Claim the box for this host's own user."""
        user = pb.User(uid=os.geteuid(), gid=os.getegid())
        request = pb.ClaimRequest(secret=SECRET, default_user=user, **fields)
        answer: pb.ClaimResponse = await self.stub.Claim(request, metadata=METADATA)
        return answer

    async def exec(self, program: str, *args: str, **fields: Any) -> tuple[Any, pb.ExecStarted]:
        """Start a program; the open call and its first event."""
        seconds = fields.pop("timeout", None)
        start = pb.ExecStart(program=program, args=(*args, *fields.pop("args", ())), **fields)
        if seconds is not None:
            start.timeout.CopyFrom(duration(seconds))
        call = self.stub.Exec(metadata=METADATA)
        await call.write(pb.ExecRequest(start=start))
        first = await call.read()
        if first is aio.EOF:
            _ = [event async for event in events(call)]  # raises
        assert first.event.HasField("started")
        return call, first.event.started

    async def run(self, program: str, *args: str, **fields: Any) -> Result:
        """Run a program to its end."""
        call, started = await self.exec(program, *args, **fields)
        result = Result(started=started)
        async for event in events(call):
            result.take(event)
        return result

    async def sh(self, script: str, **fields: Any) -> Result:
        """Run a shell script."""
        return await self.run("sh", "-c", script, **fields)

    async def read(self, path: str, **fields: Any) -> bytes:
        """Read a file."""
        parts = [
            part.data
            async for part in self.stub.ReadFile(pb.ReadFileRequest(path=path, **fields), metadata=METADATA)
        ]
        return b"".join(parts)

    async def write(self, path: str, data: bytes, **fields: Any) -> pb.WriteFileResponse:
        """Write a file."""

        async def requests() -> AsyncIterator[pb.WriteFileRequest]:
            yield pb.WriteFileRequest(header=pb.WriteFileHeader(path=path, **fields))
            for start in range(0, len(data), CHUNK):
                yield pb.WriteFileRequest(data=data[start : start + CHUNK])

        answer: pb.WriteFileResponse = await self.stub.WriteFile(requests(), metadata=METADATA)
        return answer

    async def read_tree(self, path: str, max_bytes: int = 0) -> bytes:
        """Read a tree as a tar archive."""
        request = pb.ReadTreeRequest(path=path, max_bytes=max_bytes)
        return b"".join([part.data async for part in self.stub.ReadTree(request, metadata=METADATA)])

    async def write_tree(self, path: str, archive: bytes) -> pb.WriteTreeResponse:
        """Unpack a tar archive."""

        async def requests() -> AsyncIterator[pb.WriteTreeRequest]:
            yield pb.WriteTreeRequest(header=pb.WriteTreeHeader(path=path))
            for start in range(0, len(archive), CHUNK):
                yield pb.WriteTreeRequest(data=archive[start : start + CHUNK])

        answer: pb.WriteTreeResponse = await self.stub.WriteTree(requests(), metadata=METADATA)
        return answer


async def events(call: Any) -> AsyncIterator[pb.ExecEvent]:
    """The events that an Exec or Attach call still brings; its failure is raised."""
    while (response := await call.read()) is not aio.EOF:
        yield response.event
    if await call.code() is not grpc.StatusCode.OK:
        raise aio.AioRpcError(
            await call.code(),
            await call.initial_metadata(),
            await call.trailing_metadata(),
            await call.details(),
        )


def stdin(data: bytes, offset: int = 0, *, eof: bool = False) -> pb.ExecRequest:
    """A request that carries standard input."""
    return pb.ExecRequest(input=pb.ExecInput(stdin=pb.StdinChunk(data=data, offset=offset, eof=eof)))


def duration(seconds: float) -> duration_pb2.Duration:
    """A protobuf duration."""
    value = duration_pb2.Duration()
    value.FromNanoseconds(int(seconds * 1e9))
    return value


def reason(error: aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    """The one ErrorInfo of a failure."""
    [raw] = [value for key, value in error.trailing_metadata() or () if key == "grpc-status-details-bin"]
    status = status_pb2.Status.FromString(raw if isinstance(raw, bytes) else raw.encode())
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    [detail] = status.details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    assert info.domain == "voidbox"
    return info
