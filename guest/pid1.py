"""PID 1: starts the machine, forks the agent, starts programs for it, reaps everything.

Single-threaded and without grpc, so that a fork is cheap and safe, and so that the
process that must never die has little that could kill it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import sys
import time
from typing import NoReturn

from guest import boot, child, log, syscalls
from guest.forkserver import ForkServer
from guest.settings import Settings

_ON_DISK, _REMOTE = ("ext4",), ("9p", "virtiofs", "overlay")
_RESTARTS = 5
_RESTART_WINDOW = 60.0  # seconds; five deaths within it and the agent stays down


def main() -> NoReturn:
    """Entry point of `/init`."""
    settings = Settings()
    try:
        _boot(settings)
        run(settings)
    except BaseException as error:
        # A PID 1 that ends panics the kernel; the log says why before the power goes.
        log.error(f"PID 1 failed: {error!r}")
    power_off()


def run(settings: Settings) -> None:
    """Serve the agent until it asks for the end of the machine."""
    log.open_log(settings.log)
    if os.getpid() != 1:
        syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    if os.geteuid() == 0:
        # Counts at execve only, and of all that is forked here only programs do that.
        syscalls.drop_bounding_set()
    os.makedirs(settings.run_dir, mode=0o700, exist_ok=True)
    listener: socket.socket | None = None
    state: bytes = b""
    deaths: list[float] = []
    server = ForkServer(settings)
    gc.freeze()  # what both have stays shared: a collection would write to every page
    while True:
        channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            _become_agent(settings, theirs, [channel, listener])
        gc.enable()
        theirs.close()
        if listener is None:
            # While the agent imports grpc: modules and the listener, on another processor if there is one.
            if settings.guest:
                boot.load_modules(f"{settings.modules}/boot")
            listener = listen(settings.listen)
        server.attach(channel, pid, state)
        server.pass_listener(listener)
        if server.serve():
            return
        state = server.state
        now = time.monotonic()
        deaths = [moment for moment in deaths if now - moment < _RESTART_WINDOW] + [now]
        if len(deaths) > _RESTARTS:
            log.error(f"the agent has died {len(deaths)} times; giving up")
            return
        log.error("the agent has died; starting it again")


def listen(address: str) -> socket.socket:
    """The listening socket that the host connects to."""
    kind, _, rest = address.partition(":")
    if kind == "unix":
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(rest)
    else:
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        listener.bind((socket.VMADDR_CID_ANY, int(rest)))
    listener.listen(64)
    return listener


def power_off() -> NoReturn:
    """Flush, unmount and switch off; restart if there is no way to switch off."""
    os.sync()
    try:
        with open("/proc/self/mounts") as file:
            mounts = [line.split()[:3] for line in file]
        for _, escaped, kind in reversed(mounts):
            target = escaped.encode().decode("unicode_escape")
            if kind in _ON_DISK:
                # Read-only first: that closes the journal even where another namespace has the mount too.
                with contextlib.suppress(OSError):
                    syscalls.mount("", target, flags=syscalls.MS_REMOUNT | syscalls.MS_RDONLY)
            if kind in _ON_DISK or kind in _REMOTE:
                with contextlib.suppress(OSError):
                    syscalls.umount(target, syscalls.MNT_DETACH)
    except OSError as error:
        log.warning(f"cannot unmount: {error}")
    os.sync()
    for how in (syscalls.REBOOT_POWER_OFF, syscalls.REBOOT_RESTART):
        try:
            syscalls.reboot(how)
        except OSError as error:
            log.error(f"cannot power off: {error}")
    while True:
        signal.pause()


def _boot(settings: Settings) -> None:
    os.environ.clear()
    os.chdir("/")
    os.umask(0o022)
    os.chmod("/", 0o755)  # noqa: S103 - a tmpfs that is the rootfs starts as 1777
    syscalls.mallopt(syscalls.M_ARENA_MAX, 2)
    # The kernel's own limits for processes are half of what the `pids` controller grants all programs.
    resource.setrlimit(resource.RLIMIT_NPROC, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (child.OPEN_FILES, child.OPEN_FILES))
    boot.mount_all(boot.FIRST_MOUNTS)
    log.open_log(settings.log)
    log.info(f"python {sys.version.split()[0]} is PID {os.getpid()}")
    boot.mount_all(boot.LATER_MOUNTS)
    # What the agent mounts shall appear in the programs' namespace, which is its slave.
    syscalls.mount("", "/", flags=syscalls.MS_REC | syscalls.MS_SHARED)
    for path, text in (
        ("/proc/sys/kernel/modprobe", "\n"),  # no program makes the kernel load a module
        ("/proc/sys/kernel/yama/ptrace_scope", "1\n"),  # only its own children; Debian's default is all
        ("/proc/sys/kernel/ctrl-alt-del", "0"),
        ("/proc/sys/kernel/printk_devkmsg", "on\n"),  # the default rate limit would drop our lines
        ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"),
    ):
        try:
            with open(path, "w") as file:
                file.write(text)
        except FileNotFoundError:
            pass  # a kernel without the feature
        except OSError as error:
            log.warning(f"{path}: {error.strerror}")
    os.makedirs(settings.run_dir, mode=0o700, exist_ok=True)
    boot.make_program_dev(settings)
    boot.make_directories()
    try:
        boot.bring_up_loopback()
    except OSError as error:
        log.error(f"cannot set lo up: {error}")


def _become_agent(settings: Settings, channel: socket.socket, close: list[socket.socket | None]) -> NoReturn:
    code = 1
    try:
        for sock in close:
            if sock is not None:
                sock.close()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != 1:
            os.setsid()
        from guest.agent import main as agent_main

        agent_main(settings, channel)
        code = 0
    except BaseException as error:
        import traceback

        log.error(f"agent: {error!r}: {traceback.format_exc()[-700:]}")
    finally:
        os._exit(code)
