"""One box's own process: it starts QEMU, becomes unprivileged, and serves the guest's vsock; both confined.

`python -m services.hypervisor.shim --config-fd N` reads a `ShimConfig` from descriptor N to its end.
It must be started in a session of its own and outlives whoever started it. What holds:

- The shim is gone => QEMU is gone (PDEATHSIG), however it went.
- QEMU is gone => the `ExitRecord` is on disk, then the shim is gone.
- SIGTERM (or SIGINT) => QEMU gets SIGTERM, after `term_seconds` SIGKILL.
- A defect of the device, or a violation of the seccomp list, costs this box only.

`ready_fd` receives one line each, the first time it happens:
`spawned <pid>` (QEMU runs), `connected` (its chardev has), `running` (the guest's driver is up).
With `vhost-vsock` only the first. QEMU inherits stdin, stdout and stderr. Logs go to stderr as JSON
lines. Nothing here imports gRPC or asyncio: a box starts in the time this takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from types import FrameType, TracebackType
from typing import NoReturn

from services.hypervisor import confine, console_ring, ram_descriptor, seccomp
from services.hypervisor.shim_config import (
    MAX_CONFIG_BYTES,
    STATS,
    ConfigInvalid,
    ExitRecord,
    Reason,
    ShimConfig,
)
from services.hypervisor.vsock.device import Limits, VsockDevice
from services.hypervisor.vsock.errors import MachineGone
from services.hypervisor.vsock.loop import IN, Loop
from services.hypervisor.vsock.memory import ProcessMemory
from services.hypervisor.vsock.relay import VsockRelay, vsock_dialer

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4

SHIM_FILES = 640
"""256 streams, with `vhost-vsock` two sockets each, and what the loop itself needs."""
QEMU_FILES = 4096
SHIM_DATA_BYTES = 512 << 20
"""A backstop: the device's own bounds come to some 30 MiB above the interpreter."""
GONE_SECONDS = 2.0
"""From unreachable memory to a dead process: a QEMU that is ending is reaped well within it."""
LOG_BURST = 50
LOG_PER_SECOND = 1.0
"""What the log of a box may grow by: a guest decides how often there is something to say."""

COUNT_SECONDS = 1.0
"""How old the counters on disk may be."""

EXIT_FAILED = 1
EXIT_USAGE = 64


class SetupFailed(Exception):
    """The box cannot be started the way it was asked for."""


class Log:
    """JSON lines on stderr, bounded in rate. Uses no module that opens files later on."""

    def __init__(self, cid: int) -> None:
        self._cid = cid
        self._pid = os.getpid()
        self._tokens = float(LOG_BURST)
        self._at = time.monotonic()
        self._dropped = 0

    def __call__(self, message: str) -> None:
        now = time.monotonic()
        self._tokens = min(float(LOG_BURST), self._tokens + (now - self._at) * LOG_PER_SECOND)
        self._at = now
        if self._tokens < 1:
            self._dropped += 1
            return
        self._tokens -= 1
        line: dict[str, object] = {"at": round(time.time(), 3), "shim": self._pid, "cid": self._cid}
        if self._dropped:
            line["dropped"], self._dropped = self._dropped, 0
        line["message"] = message
        with contextlib.suppress(OSError):
            os.write(2, json.dumps(line).encode() + b"\n")


class Shim:
    """The life of one machine, from configuration to exit record."""

    def __init__(self, config: ShimConfig) -> None:
        self._config = config
        self._log = Log(config.cid)
        self._loop = Loop()
        self._pid = 0
        self._pidfd = -1
        self._said: set[str] = set()
        self._reason: Reason = "exited"
        self._detail = ""
        self._status: int | None = None
        self._wakeup = socket.socketpair()
        self._console: console_ring.Writer | None = None
        self._counters: dict[str, int] = {}
        self._counted = (0, 0)
        self._counting = False

    def run(self) -> int:
        """Serve the machine to its end; returns the shim's own exit code."""
        try:
            self._prepare()
            self._spawn()
        except (SetupFailed, seccomp.SeccompUnavailable, OSError) as error:
            self._fail("setup-failed" if not self._pid else "spawn-failed", error)
            self._kill_and_reap()
            return self._record()
        try:
            self._confine()
        except (SetupFailed, seccomp.SeccompUnavailable, OSError) as error:
            self._fail("setup-failed", error)
            self._kill_and_reap()
            return self._record()
        while self._status is None:
            try:
                self._loop.run()
            except MachineGone as error:
                # Usually the machine is just ending; then its pidfd says so, and the exit is its own.
                self._log(f"memory lost: {error}")
                self._loop.retire({self._pidfd, self._wakeup[0].fileno()})
                self._loop.set_timer("gone", time.monotonic() + GONE_SECONDS, self._memory_lost)
            except Exception as error:
                # A defect of the device must end in a record, not in a traceback that nobody reads.
                self._fail("device-failed", error)
                self._kill_and_reap()
                break
        return self._record()

    # Setting up

    def _prepare(self) -> None:
        """Become who the machine is to be, for good."""
        config = self._config
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for fd in config.inherited_fds():
            try:
                os.set_inheritable(fd, False)
            except OSError as error:
                raise SetupFailed(f"descriptor {fd} is not open") from error
        if config.uid is not None and os.geteuid() not in (0, config.uid):
            raise SetupFailed(f"only root can become uid {config.uid} and gid {config.gid}")
        try:
            confine.unshare(config.namespaces)
        except OSError as error:
            raise SetupFailed(f"cannot make the machine's namespaces: {error}") from error
        if (os.geteuid() if config.uid is None else config.uid) == 0:
            self._log("runs as root: the machine's process is not separated from the host's root user")
        seccomp.no_new_privileges()
        # No other process of this user may read or trace the shim. QEMU gets its own flag at exec.
        seccomp.prctl(PR_SET_DUMPABLE, 0)
        for one in self._wakeup:
            one.setblocking(False)
        signal.set_wakeup_fd(self._wakeup[1].fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _note)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._loop.add(self._wakeup[0].fileno(), IN, self._signalled)

    def _spawn(self) -> None:
        """Start QEMU.

        Raises:
            SetupFailed: it could not be executed.
        """
        config = self._config
        failure, report = os.pipe()  # closed by exec; holds a line if exec failed
        ours, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(failure)
            _become_machine(config, report, theirs)
        os.close(report)
        theirs.close()
        self._memory_report = ours
        with open(failure, "rb", closefd=True) as pipe:
            problem = pipe.read(4096)
        if problem:
            raise SetupFailed(problem.decode(errors="replace"))
        # Only now: its own root and user were for QEMU's process to take on.
        confine.drop_privileges(config.uid, config.gid, config.groups)
        self._pidfd = os.pidfd_open(self._pid)
        for fd in {*config.pass_fds, *config.layer_fds()} - {config.memory_fd}:
            os.close(fd)
        self._loop.add(self._pidfd, IN, self._exited)
        if config.console_read_fd is not None and config.console_log_fd is not None:
            os.set_blocking(config.console_read_fd, False)
            self._console = console_ring.Writer(config.console_log_fd)
            self._loop.add(config.console_read_fd, IN, self._printed)
        self._say(f"spawned {self._pid}")

    def _confine(self) -> None:
        """Open the last descriptors, then give up everything but serving them."""
        config = self._config
        guest = socket.socket(fileno=config.guest_listen_fd)
        guest.setblocking(False)
        if config.vhost_listen_fd is not None:
            vhost = socket.socket(fileno=config.vhost_listen_fd)
            vhost.setblocking(False)
            try:
                # The exec is over (the pipe has closed), so this is QEMU's address space, not a copy
                # of ours. Being its parent is what Yama asks for; same user and dumpable the rest.
                memory = os.open(f"/proc/{self._pid}/mem", os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                # A QEMU that dislikes its command line is gone before this; its exit says why.
                if select.select([self._pidfd], [], [], GONE_SECONDS)[0]:
                    self._exited(IN)
                    return
                raise SetupFailed(f"cannot open the machine's memory: {error}") from error
            device = VsockDevice(
                self._loop,
                space=ProcessMemory(memory),
                machine_pid=self._pid,
                vhost_listener=vhost,
                guest_listener=guest,
                guest_cid=config.cid,
                limits=Limits(connect_seconds=config.connect_seconds),
                log=self._log,
                on_state=self._say,
            )
            self._counters = device.counters
            self._loop.at_turn_end(self._count)
            profile = seccomp.Profile.DEVICE
        else:
            VsockRelay(
                self._loop,
                guest_listener=guest,
                dial=vsock_dialer(config.cid),
                connect_seconds=config.connect_seconds,
                log=self._log,
            )
            profile = seccomp.Profile.RELAY
        # Whatever can be loaded lazily is loaded now: no file can be opened afterwards.
        self._log(f"serves process {self._pid} by {config.transport}")
        self._hand_over_memory()
        resource.setrlimit(resource.RLIMIT_NOFILE, (SHIM_FILES, SHIM_FILES))
        resource.setrlimit(resource.RLIMIT_DATA, (SHIM_DATA_BYTES, SHIM_DATA_BYTES))
        seccomp.install(profile)

    def _hand_over_memory(self) -> None:
        """Answer QEMU's open of its RAM; what it needs for that is closed then."""
        memory = self._config.memory_fd
        with self._memory_report:
            if memory is None:
                return
            try:
                listener = ram_descriptor.receive(self._memory_report)
                try:
                    ram_descriptor.answer(listener, memory, self._pidfd)
                finally:
                    os.close(listener)
            except ram_descriptor.NotOpened as error:
                raise SetupFailed(str(error)) from error
            finally:
                os.close(memory)

    # Serving

    def _count(self) -> bool:
        """Have the counters written within a second, if they changed; asks for no further turn."""
        counted = self._counters["bytes_out"], self._counters["bytes_in"]
        if self._config.stats_fd is not None and counted != self._counted:
            self._counted = counted
            if not self._counting:
                self._counting = True
                self._loop.set_timer("count", time.monotonic() + COUNT_SECONDS, self._write_counts)
        return False

    def _write_counts(self) -> None:
        self._counting = False
        if self._config.stats_fd is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._config.stats_fd, STATS.pack(*self._counted), 0)

    def _say(self, line: str) -> None:
        """Tell `ready_fd`, once per line; whoever listened may be gone."""
        if self._config.ready_fd is None or line in self._said or line in ("stopped", "disconnected"):
            return
        self._said.add(line)
        with contextlib.suppress(OSError):
            os.write(self._config.ready_fd, line.encode() + b"\n")

    def _signalled(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wakeup[0].recv(64)
        if self._reason == "exited":
            self._reason = "terminated"
            self._signal(signal.SIGTERM)
            self._loop.set_timer("kill", time.monotonic() + self._config.term_seconds, self._kill)

    def _kill(self) -> None:
        self._detail = f"did not end within {self._config.term_seconds:g} s of SIGTERM"
        self._signal(signal.SIGKILL)

    def _memory_lost(self) -> None:
        self._fail("memory-lost", None)
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def _printed(self, _events: int) -> None:
        """One piece at a time, so that a flood leaves the streams their turns."""
        self._keep_console()

    def _keep_console(self) -> bool:
        """Take one piece of the console; whether there was one."""
        fd = self._config.console_read_fd
        if fd is None or self._console is None:
            return False
        try:
            data = os.read(fd, console_ring.CHUNK_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove(fd)
            return False
        # What a full disk does not take is lost; the log's other bytes stay right.
        with contextlib.suppress(OSError):
            self._console.append(data)
        return True

    def _exited(self, _events: int) -> None:
        _, self._status = os.waitpid(self._pid, 0)
        while self._keep_console():
            pass
        self._loop.stop()

    # Ending

    def _fail(self, reason: Reason, error: Exception | None) -> None:
        if self._reason == "exited":
            self._reason = reason
        if error is not None:
            self._detail = f"{type(error).__name__}: {error}{_where(error.__traceback__)}"
        self._log(f"{reason}: {self._detail}")

    def _kill_and_reap(self) -> None:
        if self._pid and self._status is None:
            if self._pidfd >= 0:
                self._signal(signal.SIGKILL)
            else:
                os.kill(self._pid, signal.SIGKILL)
            _, status = os.waitpid(self._pid, 0)
            # What never became QEMU has no exit of QEMU's to tell of.
            self._status = None if self._reason == "spawn-failed" else status

    def _record(self) -> int:
        """Write the exit record; returns the shim's exit code."""
        status = self._status
        record = ExitRecord(
            exit_code=os.WEXITSTATUS(status) if status is not None and os.WIFEXITED(status) else None,
            signal=os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else None,
            reason=self._reason,
            detail=self._detail,
            at=round(time.time(), 3),
        )
        if self._config.exit_fd is not None:
            try:
                os.write(self._config.exit_fd, record.to_json())
                os.fsync(self._config.exit_fd)
            except OSError as error:
                self._log(f"cannot write the exit record: {error.strerror}")
                return EXIT_FAILED
        return 0 if record.reason in ("exited", "terminated") else EXIT_FAILED


def _note(_number: int, _frame: FrameType | None) -> None:
    """The wakeup descriptor carries the news; Python only needs a handler to be set."""


def _become_machine(config: ShimConfig, report: int, memory_report: socket.socket) -> NoReturn:
    """In the child: keep only what QEMU is to have, and become it."""
    try:
        signal.set_wakeup_fd(-1)
        # What the shim, its interpreter or whoever started it handles or ignores: ignoring survives exec.
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        files = QEMU_FILES if hard == resource.RLIM_INFINITY else min(QEMU_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        for fd in config.pass_fds:
            os.set_inheritable(fd, True)
        keep = sorted({0, 1, 2, report, memory_report.fileno(), *config.pass_fds, *config.layer_fds()})
        for low, high in zip(keep, [*keep[1:], 1 << 20], strict=True):
            os.closerange(low + 1, high)
        program = config.argv[0]
        if config.namespaces:
            confine.change_root(
                program,
                config.pass_fds,
                config.writable_fds,
                config.devices,
                config.file_fds,
                config.overlays,
                config.rooted_fds,
                (config.uid, config.gid) if config.uid is not None and config.gid is not None else None,
            )
        confine.drop_privileges(config.uid, config.gid, config.groups)
        if config.landlock:
            confine.restrict(program, config.pass_fds, config.writable_fds, config.devices)
        # Last: a change of user takes it back. A parent that had died before is told by its pipe.
        seccomp.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if _reader_gone(report):
            os._exit(EXIT_FAILED)
        if config.memory_fd is not None:
            ram_descriptor.install(memory_report)
        os.execve(program, config.argv, dict(config.env))  # noqa: S606
    except BaseException as error:
        os.write(report, f"cannot start {config.argv[0]}: {error}".encode()[:4096])
    finally:
        os._exit(127)


def _reader_gone(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return bool(poll.poll(0))


def _where(trace: TracebackType | None) -> str:
    """The innermost frames; the traceback module would open the source files."""
    frames = []
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f"{os.path.basename(code.co_filename)}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return f" ({' < '.join(reversed(frames[-4:]))})" if frames else ""


def _read_config(argv: list[str]) -> ShimConfig:
    if len(argv) != 2 or argv[0] != "--config-fd" or not argv[1].isdecimal():
        raise ConfigInvalid("usage: python -m services.hypervisor.shim --config-fd N")
    try:
        with open(int(argv[1]), "rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigInvalid(f"cannot read descriptor {argv[1]}: {error.strerror}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigInvalid(f"more than {MAX_CONFIG_BYTES} bytes of configuration")
    return ShimConfig.from_json(data)


def main() -> NoReturn:
    """Run the shim; never returns, and never runs the interpreter's own shutdown."""
    try:
        config = _read_config(sys.argv[1:])
    except ConfigInvalid as error:
        os.write(2, f"shim: {error}\n".encode())
        os._exit(EXIT_USAGE)
    os._exit(Shim(config).run())


if __name__ == "__main__":
    main()
