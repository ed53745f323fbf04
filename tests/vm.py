"""The real hypervisor as a process of its own, and boxes on it, for every test that needs one.

`HypervisorProcess` starts the service in private directories and, at its end, proves that nothing
of it is left: no process, no box directory. Readiness comes through the supervisor's socket, so
nothing is polled.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from services.common.address import Address
from services.common.channel import open_channel
from services.common.errors import VoidboxError, from_rpc_error
from services.common.paths import Paths
from services.common.supervision import FD_VARIABLE, READY
from services.hypervisor import console
from services.hypervisor.layout import Layout
from services.imager.guest_store import GuestImage, load_guest_image
from tests.soak import census
from voidbox.guest.v1 import guest_pb2, guest_pb2_grpc
from voidbox.hypervisor.v1 import hypervisor_pb2, hypervisor_pb2_grpc

if TYPE_CHECKING:
    from voidbox.guest.v1.guest_pb2_grpc import GuestServiceAsyncStub
    from voidbox.hypervisor.v1.hypervisor_pb2_grpc import HypervisorServiceAsyncStub

ROOT = Path(__file__).resolve().parents[1]
# Python starts and imports gRPC within 2 s on an idle machine; adoption of boxes takes longer.
READY_SECONDS = 60.0
STOP_SECONDS = 30.0
# A cold boot takes 4 to 10 s under emulation on an idle machine.
BOOT_SECONDS = 120.0


def guest_image() -> GuestImage:
    """The default guest image; `make guest` builds it."""
    return load_guest_image(Paths.from_env(os.environ).cache)


def box_config(**changes: Any) -> hypervisor_pb2.BoxConfig:
    """The configuration of a small box with the default guest image."""
    image = guest_image()
    values: dict[str, Any] = {
        "kernel_path": str(image.kernel),
        "initramfs_path": str(image.initramfs),
        "resources": {"memory_mib": 320},
    }
    return hypervisor_pb2.BoxConfig(**(values | changes))


class HypervisorProcess:
    """The service as a subprocess. A context manager; `restart` may follow `kill`.

    Args:
        command: Words before the interpreter, e.g. `setpriv …` to be another user.
        flags: Flags of the service.
        env: More environment, e.g. another PATH.
        directory: Where its files go; a new temporary directory if not given.
    """

    def __init__(
        self,
        *,
        command: Sequence[str] = (),
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self._command = [*command]
        self._flags = [*flags]
        self._env = dict(env or {})
        self._owned = None if directory else tempfile.TemporaryDirectory(prefix="voidbox-test-")
        self.directory = directory or Path(self._owned.name if self._owned else "")
        self.paths = Paths(
            state=self.directory / "state", cache=self.directory / "cache", runtime=self.directory / "run"
        )
        self.layout = Layout(self.paths.state)
        self.socket = self.paths.runtime / "hypervisor.sock"
        self.log = self.directory / "hypervisor.log"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> HypervisorProcess:
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            print(self.evidence())
        try:
            self.stop()
            self.reap()
            self.assert_nothing_runs()
        finally:
            if self._owned is not None:
                self._owned.cleanup()

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "VOIDBOX_STATE_DIR": str(self.paths.state),
            "VOIDBOX_CACHE_DIR": str(self.paths.cache),
            "VOIDBOX_RUNTIME_DIR": str(self.paths.runtime),
            "PYTHONPATH": str(ROOT),
            # Most tests count machines and processes; those of machines started ahead ask for them.
            "VOIDBOX_HYPERVISOR_READY_SIZE": "0",
            **self._env,
        }

    def start(self) -> None:
        """Start the service and wait until it serves."""
        ours, theirs = socket.socketpair()
        with ours, theirs, self.log.open("ab") as log:
            env = self._environment() | {FD_VARIABLE: str(theirs.fileno())}
            self.process = subprocess.Popen(
                [*self._command, sys.executable, "-P", "-m", "services.hypervisor", *self._flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                cwd=self.directory,
                pass_fds=[theirs.fileno()],
            )
            theirs.close()
            ours.settimeout(READY_SECONDS)
            said = ours.recv(len(READY))
            # Kept open: its end would tell the service to end.
            self._tie = ours.dup()
        assert said == READY, f"the hypervisor did not start:\n{self.log.read_text()}"

    def kill(self) -> None:
        """Kill the service outright, as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP_SECONDS)
        self._tie.close()

    def stop(self) -> None:
        """End the service in order; boxes go on. Idempotent."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(STOP_SECONDS)
        self._tie.close()

    def evidence(self) -> str:
        """What tells why a test failed: the service's log, each box's state and console."""
        parts = [self.log.read_text(errors="replace")[-20_000:]]
        for box_id in self.layout.box_ids():
            directory = self.layout.box(box_id)
            with contextlib.suppress(OSError):
                parts.append(f"--- {box_id}: {(directory / 'state.json').read_text()}")
            parts.append(console.tail(directory / "console.log"))
        return "\n".join(parts)

    def reap(self) -> list[str]:
        """End and remove what boxes are left; their ids."""
        done = subprocess.run(
            [*self._command, sys.executable, "-P", "-m", "services.hypervisor.reap"],
            env=self._environment(),
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    def restart(self, flags: Sequence[str] | None = None) -> None:
        """Start it again after `kill` or `stop`, this once with other flags if some are given."""
        mine = self._flags
        self._flags = mine if flags is None else [*flags]
        self.start()
        self._flags = mine

    def box_processes(self) -> list[int]:
        """Processes that still have one of our boxes' files open, or run in their directory."""
        return census.holding(self.layout.boxes)

    def assert_nothing_runs(self) -> None:
        """No process, socket or file of any box is left."""
        held = {pid: census.held(pid, self.layout.boxes) for pid in self.box_processes()}
        assert not held, held
        left = [str(path) for path in self.layout.boxes.rglob("*")] if self.layout.boxes.exists() else []
        assert left == []

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Client]:
        """A client of the service."""
        async with open_channel(Address(path=self.socket)) as channel:
            yield Client(channel)


class Client:
    """Calls to the hypervisor and, by box id, to the guests behind it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.hypervisor: HypervisorServiceAsyncStub = hypervisor_pb2_grpc.HypervisorServiceStub(channel)  # type: ignore[assignment]
        self.guest: GuestServiceAsyncStub = guest_pb2_grpc.GuestServiceStub(channel)  # type: ignore[assignment]

    async def create(self, box_id: str, **changes: Any) -> hypervisor_pb2.Box:
        """Start a box with the default guest image; `changes` are fields of its `BoxConfig`."""
        request = hypervisor_pb2.CreateBoxRequest(box_id=box_id, config=box_config(**changes))
        return (await self.hypervisor.CreateBox(request, timeout=BOOT_SECONDS)).box

    async def get(self, box_id: str) -> hypervisor_pb2.Box:
        """The box as it is now."""
        return (await self.hypervisor.GetBox(hypervisor_pb2.GetBoxRequest(box_id=box_id))).box

    async def delete(self, box_id: str) -> None:
        """Remove the box at once."""
        await self.hypervisor.DeleteBox(hypervisor_pb2.DeleteBoxRequest(box_id=box_id, force=True))

    async def until(self, box_id: str, state: hypervisor_pb2.BoxState.ValueType) -> hypervisor_pb2.Box:
        """Watch the box until it is in `state`."""
        watch = self.hypervisor.WatchBoxes(hypervisor_pb2.WatchBoxesRequest(box_id=box_id), timeout=60)
        async for change in watch:
            if change.box.state == state:
                watch.cancel()
                return change.box
        raise AssertionError(f"the watch ended before box {box_id} was in state {state}")

    async def run(
        self, box_id: str, program: str, *args: str, **start: Any
    ) -> tuple[guest_pb2.ExecExit, bytes, bytes]:
        """Run a program in the box: its exit, standard output and standard error."""
        call = self.guest.Exec(metadata=((BOX_KEY, box_id),), timeout=120)
        await call.write(
            guest_pb2.ExecRequest(start=guest_pb2.ExecStart(program=program, args=args, **start))
        )
        await call.done_writing()
        output = {1: bytearray(), 2: bytearray()}
        async for message in call:
            if message.event.HasField("output"):
                output[message.event.output.stream] += message.event.output.data
            elif message.event.HasField("exit"):
                return message.event.exit, bytes(output[1]), bytes(output[2])
        raise AssertionError("the stream ended without an exit")


BOX_KEY = "voidbox-box-id"


async def refused(call: Awaitable[object]) -> VoidboxError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


def init_archive(script: bytes) -> bytes:
    """A cpio archive (newc) with `script` as /init; appended to an initramfs it replaces that one's."""

    def entry(name: bytes, mode: int, data: bytes) -> bytes:
        numbers = (1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % number for number in numbers) + name + b"\0"
        return _padded(head) + _padded(data)

    return entry(b"init", 0o100755, script) + entry(b"TRAILER!!!", 0, b"")


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


@contextlib.contextmanager
def host_directory(owner: int, mode: int = 0o755) -> Iterator[Path]:
    """A temporary directory that belongs to `owner`, reachable by everyone."""
    with tempfile.TemporaryDirectory(prefix="voidbox-share-") as name:
        path = Path(name)
        if os.geteuid() == 0:
            os.chown(path, owner, owner)
        path.chmod(mode)
        yield path
