"""What runs machines, as the boxes see it; one implementation per kind of hypervisor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc

from services.common.errors import Unavailable
from services.hypervisor.egress.settings import GatewaySettings
from services.hypervisor.failure import Remains
from services.hypervisor.inputs import Identity
from services.hypervisor.model import Accelerator, BoxConfig, BoxRecord, Transport
from services.hypervisor.saved import Saved


@dataclass(frozen=True, slots=True, kw_only=True)
class MachinePlan:
    """A machine to start: what it is made of, where its files go, and who runs it.

    The descriptors belong to whoever made the plan and may be closed once `start` returns.
    `disk_fds` are (base, private layer or None) per disk, the root disk first. `file_fds` are those of
    `mount_fds` that are single files, `overlays` (lower, upper, work directory) those that are overlays,
    `rooted_fds` those of these whose files of root's the machine's user is to see as its own.

    With `saved` the machine is restored from it instead of booted, the first `restored_disks` of its
    disks being those that the saved machine had; with `into` it boots so that it can be saved there.
    One that is started `ahead` waits for `Machine.complete` before it is restored.
    `note` hears the name of each phase that has ended. `gateway` is there if the box has a network.
    """

    box_id: str
    directory: Path
    config: BoxConfig
    accelerator: Accelerator
    transport: Transport
    cid: int
    identity: Identity
    kernel_fd: int | None = None
    initramfs_fd: int | None = None
    disk_fds: tuple[tuple[int, int | None], ...] = ()
    mount_fds: tuple[int, ...] = ()
    file_fds: tuple[int, ...] = ()
    overlays: tuple[tuple[int, int, int], ...] = ()
    rooted_fds: tuple[int, ...] = ()
    saved: Saved | None = None
    into: Saved | None = None
    restored_disks: int = 0
    ahead: bool = False
    note: Callable[[str], None] = lambda _phase: None
    gateway: GatewaySettings | None = None

    @property
    def nic_port(self) -> int:
        """The port that is free for a restored machine's network device."""
        return int(self.saved.facts.get("nic_port", 0)) if self.saved is not None else 0

    @property
    def files(self) -> tuple[int, ...]:
        """Which of the mounts are single files."""
        return tuple(self.mount_fds.index(fd) for fd in self.file_fds)

    @property
    def frozen(self) -> bool:
        """Whether the saved machine's programs stand still and wait to be let go on."""
        return self.saved is not None and bool(self.saved.facts.get("frozen"))

    @property
    def vsock_port(self) -> int:
        """The root port that is free for a restored machine's vsock device."""
        return int(self.saved.facts.get("vsock_port", 0)) if self.saved is not None else 0

    @property
    def former(self) -> bytes:
        """The secret of the saved machine's guest; empty if nobody has claimed it."""
        return bytes.fromhex(self.saved.facts["secret"]) if self.saved is not None else b""


class NotRestored(Unavailable):
    """A saved machine could not be brought back to life; nothing of the new one runs."""

    default_reason = "NOT_RESTORED"


class Machine(Protocol):
    """A running machine. `ended` is set once all its processes are gone."""

    ended: asyncio.Event
    vmm_pid: int

    @property
    def pids(self) -> tuple[int, ...]:
        """Its processes on the host."""
        ...

    def guest_channel(self) -> grpc.aio.Channel:
        """A new channel to the agent; the caller closes it."""
        ...

    async def pause(self) -> None:
        """Stop its processors."""
        ...

    async def resume(self) -> None:
        """Let its processors go on."""
        ...

    async def paused(self) -> bool:
        """Whether its processors are stopped."""
        ...

    def moved(self, directory: Path) -> None:
        """Note that its directory has been renamed to `directory`."""
        ...

    async def complete(self, plan: MachinePlan) -> None:
        """Make a machine that has waited the one of `plan`, and let it go on.

        One that was started ahead is restored first; then the disks are plugged in.

        Raises:
            VoidboxError: it is not what was expected.
        """
        ...

    async def plug_nic(self, tap: int, port: int = 0) -> None:
        """Give the running machine a network device on the tap with descriptor `tap`, in its port `port`."""
        ...

    async def capture(self, into: Saved, layers: Path, before: Callable[[], Awaitable[None]]) -> None:
        """Save the running machine, and copies of its disks' private layers to `layers`; it goes on.

        Its vsock device is taken out and put back, which ends all streams to the guest; `before` is
        awaited before that.

        Raises:
            WrongState: it is not one that can be saved.
            VoidboxError: it could not be saved; it goes on, or has ended.
        """
        ...

    async def recover(self) -> None:
        """Bring a machine that was left in the middle of `capture` back to life: running, reachable."""
        ...

    async def save(self, into: Saved) -> None:
        """Take out the vsock device, stop the machine and save it; it stays stopped.

        Raises:
            VoidboxError: it could not be saved.
        """
        ...

    async def kill(self, *, gently: bool) -> None:
        """End it; returns when its processes are gone. Idempotent.

        Args:
            gently: Let it flush its disks first, for a bounded time.
        """
        ...

    def remains(self) -> Remains:
        """What it left behind; meaningful once `ended` is set."""
        ...

    def cpu_seconds(self) -> float:
        """Processor time that it has used so far; cheap."""
        ...

    def vsock_bytes(self) -> tuple[int, int]:
        """Bytes sent to and received from the guest over vsock."""
        ...

    async def close(self) -> None:
        """Let go of it; it goes on running. Idempotent."""
        ...


class Driver(Protocol):
    """Starts machines and finds them again."""

    async def start(self, plan: MachinePlan, on_spawned: Callable[[int, int], None]) -> Machine:
        """Start a machine.

        Args:
            plan: What to start.
            on_spawned: Called with pid and start time of the machine's leading process before
                that process does anything; when it fails, the process ends by itself.

        Raises:
            NotRestored: the saved machine of the plan does not come up.
            VoidboxError: it did not start; nothing of it runs.
        """
        ...

    async def adopt(self, record: BoxRecord, directory: Path) -> Machine:
        """Take up a machine that another process started.

        Raises:
            NotFound: it is gone.
            VoidboxError: it cannot be talked to.
        """
        ...

    def leftovers(self, record: BoxRecord, directory: Path) -> Remains:
        """What a machine left behind that ended while nobody watched."""
        ...
