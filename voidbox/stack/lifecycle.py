"""What clients do with the embedded stack: start it, look at it, stop it.

Any number of clients may do so at once: `start.lock` serialises them, `stack.lock` is held
by the supervisor for its whole life, and its control socket is bound by the client that
starts it, so there is no moment at which a stack exists that cannot be waited for.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import voidbox
from services.common.errors import InvalidInput, TimedOut, Unavailable, WrongState
from voidbox.stack.control import NoAnswer, ask
from voidbox.stack.identity import Identity
from voidbox.stack.layout import Layout
from voidbox.stack.logfile import tail
from voidbox.stack.sweep import Swept, processes, read_record, sweep, write_record

Say = Callable[[str], None]

# Longer than a service may take to serve, twice (voidbox.stack.service).
START_SECONDS = 150.0
STATUS_SECONDS = 10.0
# The longest single step of an orderly shutdown is cancelling runs (45 s).
DOWN_SILENCE_SECONDS = 75.0
# A supervisor that works answers within milliseconds.
PING_SECONDS = 5.0
# A stack can be stopped by another client between our look and our question.
_ATTEMPTS = 5


class StackNotRunning(WrongState):
    """There is no stack, or it does not answer."""

    default_reason = "STACK_NOT_RUNNING"


def _silent(_: str) -> None:
    return


def up(layout: Layout, env: Mapping[str, str], say: Say = _silent) -> tuple[Layout, dict[str, Any]]:
    """Make sure that the stack runs and answers.

    Returns:
        The layout with the runtime directory that the running stack uses, and its status.

    Raises:
        Unavailable: a service cannot be started (reason `STACK_FAILED`); the message holds
            the end of its log.
        WrongState: a stack of another version runs.
        TimedOut: it does not answer.
    """
    layout.prepare()
    for _ in range(_ATTEMPTS):
        with _locked(layout.start_lock):
            held = _try_lock(layout.stack_lock)
            started = held is not None
            if held is not None:
                try:
                    say("starting the voidbox stack")
                    _start(layout, env, held)
                finally:
                    os.close(held)
            layout = _recorded(layout)
        try:
            status = ask(layout.control, {"op": "wait"}, seconds=START_SECONDS)
        except NoAnswer:
            _await_end(layout)
            continue
        except TimeoutError as error:
            raise TimedOut(
                f"the voidbox stack did not answer within {START_SECONDS:g} s; "
                f"see {layout.log('supervisor')}, then: voidbox down --force",
                reason="STACK_SILENT",
            ) from error
        if status.get("ending"):
            _await_end(layout)
            # Another client's attempt says nothing about ours: its environment was another.
            if not started:
                continue
        _check(layout, status, env)
        return layout, status
    raise Unavailable(
        "the voidbox stack does not stay up; the end of its log:\n" + _indented(layout.log("supervisor")),
        reason="STACK_FAILED",
    )


def status(layout: Layout) -> tuple[Layout, dict[str, Any]]:
    """Describe the running stack, without starting one.

    Raises:
        StackNotRunning: there is none.
    """
    layout = _recorded(layout)
    try:
        return layout, ask(layout.control, {"op": "status"}, seconds=STATUS_SECONDS)
    except NoAnswer:
        raise StackNotRunning("no voidbox stack is running; start it: voidbox up") from None
    except TimeoutError as error:
        raise StackNotRunning(
            "the voidbox stack does not answer; remove it: voidbox down --force", reason="STACK_SILENT"
        ) from error


def down(layout: Layout, env: Mapping[str, str], *, force: bool = False, say: Say = _silent) -> Swept | None:
    """Stop the stack, whatever state it is in, and everything that belongs to it.

    Returns:
        What was found; None if there was nothing at all to stop.

    Raises:
        WrongState: something is left (reason `LEFT_BEHIND`); the message names it.
    """
    if not layout.state.is_dir():
        return None
    layout.prepare()
    recorded = _recorded(layout)
    # A supervisor removes its record before it ends, so it is read while it still stands.
    before = read_record(layout)
    answered = _ask_down(recorded, force=force, say=say)
    with _locked(layout.start_lock):
        record = read_record(layout) or before
        supervisor = processes(record).get("supervisor")
        if (
            supervisor is not None
            and supervisor.pid != os.getpid()
            and not supervisor.wait(5 if answered else 1)
        ):
            say(f"killing the supervisor (pid {supervisor.pid}), which does not end")
            supervisor.end(0 if force else 5)
        held = _try_lock(layout.stack_lock)
        if held is None:
            raise WrongState(
                f"another process holds {layout.stack_lock}; find it: fuser {layout.stack_lock}",
                reason="LEFT_BEHIND",
            )
        try:
            existed = answered or bool(record)
            swept = sweep(recorded, env, say)
        finally:
            os.close(held)
    if swept.left:
        raise WrongState(
            "left behind: " + "; ".join(swept.left) + " (try again: voidbox down --force)",
            reason="LEFT_BEHIND",
        )
    return swept if existed or swept.ended else None


def _ask_down(layout: Layout, *, force: bool, say: Say) -> bool:
    """Ask the supervisor to stop; returns whether it answered that it did."""
    try:
        ask(layout.control, {"op": "status"}, seconds=PING_SECONDS)
        ask(layout.control, {"op": "down", "force": force}, seconds=DOWN_SILENCE_SECONDS, progress=say)
    except NoAnswer:
        return False
    except TimeoutError:
        say("the supervisor does not answer")
        return False
    return True


def _start(layout: Layout, env: Mapping[str, str], lock_fd: int) -> None:
    """Start a supervisor that inherits the held lock and a listening control socket."""
    # Boxes are left alone: the hypervisor adopts those of runs that go on.
    swept = sweep(_recorded(layout), env, boxes=False)
    if swept.left:
        raise WrongState(
            "an earlier stack left behind: " + "; ".join(swept.left) + " (try: voidbox down --force)",
            reason="LEFT_BEHIND",
        )
    layout.prepare()
    # Fails early, with the cure, if the path is too long for a socket.
    for name in ("orchestrator", "hypervisor", "imager"):
        layout.address(name)
    write_record(layout, {"version": voidbox.__version__, "runtime": str(layout.runtime)})
    with socket.socket(socket.AF_UNIX) as listener, _log_file(layout.log("supervisor")) as log_fd:
        before = os.umask(0o177)
        try:
            listener.bind(str(layout.control))
        except OSError as error:
            raise InvalidInput(
                f"cannot make {layout.control}: {error.strerror or error}; set VOIDBOX_RUNTIME_DIR to a "
                "short path of a local file system",
                reason="BAD_RUNTIME_DIR",
            ) from error
        finally:
            os.umask(before)
        listener.listen(64)
        null = os.open(os.devnull, os.O_RDWR)
        # Copies above 9, so that none of them is overwritten while 0 to 4 are put in place.
        wanted = (null, log_fd, log_fd, lock_fd, listener.fileno())
        sources = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in wanted]
        actions: list[Any] = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(sources)]
        # A pipe that this client inherited would stay open as long as the stack runs.
        actions += [(os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable() if fd > 4]
        try:
            os.posix_spawn(
                sys.executable,
                [sys.executable, "-P", "-m", "voidbox.stack", "--lock-fd", "3", "--listen-fd", "4"],
                layout.service_env(env),
                file_actions=actions,
                setsid=True,
            )
        finally:
            for fd in (null, *sources):
                os.close(fd)


def _inheritable() -> list[int]:
    numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    found = []
    for fd in numbers:
        with contextlib.suppress(OSError):  # the one that listed the directory is closed already
            if os.get_inheritable(fd):
                found.append(fd)
    return found


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[int]:
    """The supervisor's log, opened for appending; one older file is kept."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > 1024 * 1024:
            path.replace(path.with_name(path.name + ".1"))
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _recorded(layout: Layout) -> Layout:
    """The layout with the runtime directory of the stack that runs or ran last."""
    runtime = read_record(layout).get("runtime")
    return layout.at(Path(runtime)) if isinstance(runtime, str) and runtime.startswith("/") else layout


def _check(layout: Layout, found: Mapping[str, Any], env: Mapping[str, str]) -> None:
    if found.get("version") != voidbox.__version__:
        raise WrongState(
            f"a voidbox stack of version {found.get('version')} is running, this is {voidbox.__version__}; "
            "stop it first: voidbox down",
            reason="OTHER_VERSION",
        )
    theirs = found.get("choices") or {}
    for name, value in layout.choices(env).items():
        if theirs.get(name) != value:
            raise WrongState(
                f"{name} is {value}, but the running stack was started with "
                f"{theirs.get(name) or 'none'}; restart it: voidbox down",
                reason="OTHER_ENVIRONMENT",
            )
    failed = [entry for entry in found.get("services", ()) if entry.get("state") == "failed"]
    if failed:
        parts = [
            f"{entry['name']} {entry['detail']}; the end of {entry['log']}:\n"
            + "\n".join(f"    {line}" for line in entry.get("log_tail", ()))
            for entry in failed
        ]
        raise Unavailable("the voidbox stack is not up: " + "\n".join(parts), reason="STACK_FAILED")


def _await_end(layout: Layout) -> None:
    """Wait until the supervisor that is on record has ended."""
    supervisor: Identity | None = processes(read_record(layout)).get("supervisor")
    if supervisor is not None:
        supervisor.wait(DOWN_SILENCE_SECONDS)


def _indented(path: Path) -> str:
    return "\n".join(f"    {line}" for line in tail(path))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock, waiting for it; holders are bounded by the limits above."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _try_lock(path: Path) -> int | None:
    """The held lock as a descriptor, or None if another process has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd
