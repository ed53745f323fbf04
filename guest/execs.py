"""The programs of a box: started, fed, watched, remembered."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import signal
import struct
import termios
import time
from collections.abc import Callable
from typing import NamedTuple

from guest import log
from guest.control import Control, SpawnFailed
from guest.errors import AgentError, Code, denied, exhausted, invalid, not_found, wrong_state
from guest.limits import Confinement
from guest.streams import SMALLEST_RING, STDIN_WINDOW, Budget, Input, Output
from guest.users import Account
from guest.wire import Message

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
_MAX_RUNNING = 1024
_MAX_ENDED = 256
_EOF_GRACE = 2.0  # seconds a daemon may go on writing after its program has ended
_TERM_GRACE = 2.0  # guest.proto: SignalExec 0 is TERM, then KILL after two seconds
_RING_DEFAULT, _RING_MAX = 1 << 20, 16 << 20

# guest.proto: KillReason
TIMEOUT, CANCELLED, ABANDONED, OUT_OF_MEMORY = 1, 2, 3, 4


class Size(NamedTuple):
    """A terminal's size."""

    columns: int
    rows: int


class Start(NamedTuple):
    """A validated request to start a program."""

    exec_id: str
    program: str
    args: list[str]
    env: dict[str, str]
    directory: str
    default_directory: bool
    make_directory: bool
    account: Account
    terminal: Size | None
    timeout: float
    stdin: bool
    detach: bool
    detach_grace: float
    ring: int


class Exit(NamedTuple):
    """How a program has ended."""

    code: int
    signal: int
    reason: int
    seconds: float


class Client:
    """One attached client: what it was sent, and what it has taken over."""

    __slots__ = ("acks", "changed", "sent", "stdin", "stdin_told", "taken")

    def __init__(self, *, acks: bool, stdin: bool, offsets: list[int]) -> None:
        self.acks = acks
        self.stdin = stdin
        self.sent = list(offsets)
        self.taken = list(offsets)
        self.stdin_told = 0
        self.changed = asyncio.Event()


class Exec:
    """A program that runs or whose end is kept."""

    def __init__(self, table: Execs, start: Start, sequence: int) -> None:
        self.id = start.exec_id
        self.program = start.program
        self.args = start.args
        self.sequence = sequence
        self.pid = 0
        self.start_time = 0.0
        self.outputs: list[Output] = []
        self.input: Input | None = None
        self.exit: Exit | None = None
        self.clients: set[Client] = set()
        self.adopted = False
        self._table = table
        self._detach = start.detach
        self._detach_grace = start.detach_grace
        self._delivered = [0, 0]
        self._started = 0.0
        self._reason = 0
        self._ending: tuple[int, bool, float] | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._master = -1

    @property
    def ended(self) -> bool:
        """Whether the exit is known and all output has been read."""
        return self.exit is not None

    # Clients

    def attach(self, *, acks: bool, stdin: bool, offsets: list[int]) -> Client:
        """Add a client that wants each stream from its offset on.

        Raises:
            AgentError: OUT_OF_RANGE if one is not kept any more or not there yet.
        """
        for output, offset, name in zip(self.outputs, offsets, ("stdout", "stderr"), strict=False):
            first, end = output.ring.start, output.ring.end
            if not first <= offset <= end:
                raise AgentError(
                    Code.OUT_OF_RANGE,
                    "OFFSET_LOST",
                    f"offset {offset} of the {name} of exec {self.id!r} is not kept: it has {first} to {end}",
                    exec_id=self.id, stream=name, first_offset=first, end_offset=end,
                )  # fmt: skip
        client = Client(acks=acks, stdin=stdin, offsets=offsets[: len(self.outputs)])
        if self.input is not None:
            client.stdin_told = self.input.taken
        self.clients.add(client)
        self._cancel_timer("abandon")
        self._update_floors()
        return client

    def detach(self, client: Client) -> None:
        """Remove a client; the last one's going may doom the program."""
        self.clients.discard(client)
        self._update_floors()
        self._maybe_abandon()

    def delivered(self, client: Client, stream: int, offset: int) -> None:
        """Note that the client has taken over all bytes of the stream before `offset`."""
        client.taken[stream] = max(client.taken[stream], offset)
        client.changed.set()
        self._update_floors()

    def _update_floors(self) -> None:
        for stream, output in enumerate(self.outputs):
            taken = [client.taken[stream] for client in self.clients]
            self._delivered[stream] = max([self._delivered[stream], *taken])
            floor = min(taken) if taken else self._delivered[stream]
            if floor != output.floor:
                output.set_floor(floor)

    def abandon(self) -> None:
        """Its client went away before it was attached."""
        self._maybe_abandon()

    def _maybe_abandon(self) -> None:
        if not self.clients and not self._detach and not self.ended and self._ending is None:
            self._set_timer("abandon", self._detach_grace, lambda: self.kill(ABANDONED))

    def _changed(self) -> None:
        for client in self.clients:
            client.changed.set()
        if self._ending is not None and self.exit is None and all(output.ended for output in self.outputs):
            self._finish()

    # Input, signals

    def resize(self, size: Size) -> None:
        """Change the terminal's size, which also signals SIGWINCH."""
        if self._master < 0:
            raise wrong_state(f"exec {self.id!r} has no terminal", reason="NO_TERMINAL", exec_id=self.id)
        if not self.outputs[0].ended:
            set_size(self._master, size)

    def signal(self, number: int) -> None:
        """Send a signal to the program's process group; nothing if it has ended."""
        if not 1 <= number <= 64:
            raise invalid(f"{number} is not a signal number (1 to 64)", exec_id=self.id)
        if self._ending is None and not self.ended:
            self._table.control.tell({"op": "signal", "id": self.id, "signal": number, "tree": False})

    def kill(self, reason: int) -> None:
        """Kill the whole process tree at once."""
        if self._ending is None and not self.ended and not self._reason:
            self._reason = reason
        self._signal_tree(signal.SIGKILL)

    def terminate(self) -> None:
        """End the whole process tree: TERM, then KILL."""
        if self._ending is None and not self.ended and not self._reason:
            self._reason = CANCELLED
        self._signal_tree(signal.SIGTERM)
        self._set_timer("kill", _TERM_GRACE, lambda: self._signal_tree(signal.SIGKILL))

    def _signal_tree(self, number: int) -> None:
        self._table.control.tell({"op": "signal", "id": self.id, "signal": int(number), "tree": True})

    # Life

    async def start(self, start: Start) -> None:
        """Have PID 1 start the program.

        Raises:
            AgentError: it could not be started; nothing is left of it.
        """
        budget = self._table.budget
        ours: list[int] = []
        theirs: list[int] = []
        try:
            if start.terminal is not None:
                master, slave = os.openpty()
                ours, theirs = [master], [slave]
                set_size(slave, start.terminal)
                if os.geteuid() == 0:
                    os.fchown(slave, start.account.uid, -1)
                passed = (slave, slave, slave)
            else:
                passed = self._make_pipes(start.stdin, ours, theirs)
            self._started = time.monotonic()
            self.start_time = time.time()
            answer = await self._table.control.request(_spawn_message(start, self._table.confinement), passed)
        except SpawnFailed as failure:
            _close_all(ours)
            raise _explain(failure, start, self._table.confinement.allowed) from None
        except OSError as error:
            _close_all(ours)
            raise exhausted(f"cannot make the streams of exec {self.id!r}: {error.strerror}") from error
        finally:
            _close_all(theirs)
        self.pid = answer["pid"]
        if start.terminal is not None:
            self._master = ours[0]
            self.outputs = [Output(ours[0], start.ring, budget, self._changed)]
            self.input = Input(os.dup(ours[0]), terminal=True, changed=self._changed)
        else:
            self.outputs = [Output(fd, start.ring, budget, self._changed) for fd in ours[:2]]
            self.input = Input(ours[2], terminal=False, changed=self._changed) if start.stdin else None
        if start.timeout > 0:
            self._set_timer("timeout", start.timeout, lambda: self.kill(TIMEOUT))

    @staticmethod
    def _make_pipes(stdin: bool, ours: list[int], theirs: list[int]) -> tuple[int, int, int]:
        for _ in range(2):
            read, write = os.pipe2(os.O_CLOEXEC)
            ours.append(read)
            theirs.append(write)
        if stdin:
            read, write = os.pipe2(os.O_CLOEXEC)
            ours.append(write)
        else:
            read = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        theirs.append(read)
        return read, theirs[0], theirs[1]

    def reaped(self, status: int, *, oom: bool) -> None:
        """PID 1 has reaped the program's first process."""
        self.pid = 0
        self._ending = (status, oom, time.monotonic() - self._started)
        for name in ("timeout", "abandon"):
            self._cancel_timer(name)
        if self.input is not None:
            self.input.close()
        if all(output.ended for output in self.outputs):
            self._finish()
        else:
            self._set_timer("eof", _EOF_GRACE, self._end_outputs)

    def _end_outputs(self) -> None:
        for output in self.outputs:
            output.end_soon()

    def _finish(self) -> None:
        assert self._ending is not None
        status, oom, seconds = self._ending
        code = os.waitstatus_to_exitcode(status)
        number = -code if code < 0 else 0
        reason = self._reason
        if oom and (number == signal.SIGKILL or code == 128 + signal.SIGKILL) and not reason:
            reason = OUT_OF_MEMORY
        if reason in (TIMEOUT, ABANDONED) and number != signal.SIGKILL:
            reason = 0  # it ended by itself just before the signal came
        self.exit = Exit(max(code, 0), number, reason, seconds)
        self._cancel_timer("eof")
        self._master = -1
        for client in self.clients:
            client.changed.set()
        self._table.has_ended(self)

    def forget(self) -> None:
        """Give back all that the program still uses."""
        for name in tuple(self._timers):
            if name != "kill":
                self._cancel_timer(name)
        for output in self.outputs:
            output.forget()
        if self.input is not None:
            self.input.close()

    def _set_timer(self, name: str, seconds: float, action: Callable[[], object]) -> None:
        self._cancel_timer(name)
        self._timers[name] = asyncio.get_running_loop().call_later(seconds, action)

    def _cancel_timer(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()


class Execs:
    """All programs of the box, by id, in order of their start."""

    def __init__(self, control: Control, budget: Budget) -> None:
        self.control = control
        self.budget = budget
        self.closed = False
        self.confinement = Confinement()
        self._all: dict[str, Exec] = {}
        self._sequence = 0

    def get(self, exec_id: str) -> Exec:
        """The program with this id.

        Raises:
            AgentError: NOT_FOUND.
        """
        try:
            return self._all[exec_id]
        except KeyError:
            raise not_found(
                f"there is no exec {exec_id!r}", reason="EXEC_NOT_FOUND", exec_id=exec_id
            ) from None

    def after(self, sequence: int, limit: int) -> tuple[list[Exec], bool]:
        """Up to `limit` programs started after number `sequence`, and whether there are more."""
        found = [
            one for one in self._all.values() if one.sequence > sequence and (one.outputs or one.adopted)
        ]
        return found[:limit], len(found) > limit

    async def start(self, start: Start) -> Exec:
        """Start a program.

        Raises:
            AgentError: the id is bad or taken, or the program cannot be started.
        """
        if self.closed:
            raise wrong_state("the box is shutting down", reason="SHUTTING_DOWN")
        if not start.exec_id:
            start = start._replace(exec_id=f"x{os.urandom(6).hex()}")
        if not _ID.match(start.exec_id) or start.exec_id in (".", ".."):
            raise invalid(f"exec_id {start.exec_id!r} is not 1 to 64 of [A-Za-z0-9._-]")
        if start.exec_id in self._all:
            raise AgentError(
                Code.ALREADY_EXISTS, "EXEC_EXISTS", f"exec {start.exec_id!r} exists", exec_id=start.exec_id
            )
        if sum(not one.ended for one in self._all.values()) >= _MAX_RUNNING:
            raise exhausted(f"{_MAX_RUNNING} programs run in this box", reason="TOO_MANY_EXECS")
        self._sequence += 1
        program = Exec(self, start, self._sequence)
        self._all[program.id] = program
        try:
            await program.start(start)
        except BaseException:
            del self._all[program.id]
            raise
        return program

    def adopt(self, exec_id: str, pid: int) -> None:
        """Take over a program of an agent that has died: it can be listed, signalled and awaited.

        Its streams went with that agent, so nobody can attach to it.
        """
        account = Account(0, 0, (), "", "", "")
        start = Start(
            exec_id=exec_id,
            program="",
            args=[],
            env={},
            directory="",
            default_directory=True,
            make_directory=False,
            account=account,
            terminal=None,
            timeout=0,
            stdin=False,
            detach=True,
            detach_grace=0,
            ring=0,
        )
        self._sequence += 1
        program = self._all[exec_id] = Exec(self, start, self._sequence)
        program.adopted = True
        program.pid = pid

    def delete(self, exec_id: str) -> None:
        """Forget a program that has ended.

        Raises:
            AgentError: FAILED_PRECONDITION while it runs.
        """
        program = self.get(exec_id)
        if not program.ended:
            raise wrong_state(
                f"exec {exec_id!r} is running; end it first", reason="EXEC_RUNNING", exec_id=exec_id
            )
        del self._all[exec_id]
        program.forget()

    def on_exit(self, message: Message) -> None:
        """PID 1 tells that a program has ended."""
        program = self._all.get(message["id"])
        if program is None or program.pid != message["pid"]:
            log.warning(f"unknown program {message['id']!r} has ended")
            return
        program.reaped(message["status"], oom=message["oom"])

    def has_ended(self, _program: Exec) -> None:
        """Keep a bounded number of ended programs and bytes: the oldest go first."""
        ended = [one for one in self._all.values() if one.ended and not one.clients]
        size = sum(len(output.ring) for one in ended for output in one.outputs)
        for one in ended:
            if len(ended) <= _MAX_ENDED and size <= self.budget.limit // 2:
                break
            if one is _program:
                continue
            size -= sum(len(output.ring) for output in one.outputs)
            ended = ended[1:]
            self.delete(one.id)


def ring_size(requested: int) -> int:
    """The ring that a request gets, in bytes."""
    if requested == 0:
        return _RING_DEFAULT
    if not SMALLEST_RING <= requested <= _RING_MAX:
        raise invalid(f"ring_bytes is {requested}, not {SMALLEST_RING} to {_RING_MAX}")
    return requested


def set_size(fd: int, size: Size) -> None:
    """Set the size of the terminal behind `fd`."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", size.rows, size.columns, 0, 0))


def _spawn_message(start: Start, confinement: Confinement) -> Message:
    return {
        "op": "spawn",
        "id": start.exec_id,
        "argv": [start.program, *start.args],
        "env": start.env,
        "cwd": start.directory,
        "default_cwd": start.default_directory,
        "make_cwd": start.make_directory,
        "uid": start.account.uid,
        "gid": start.account.gid,
        "groups": list(start.account.groups),
        "terminal": start.terminal is not None,
        "confine": confinement.for_process(),
    }


def _explain(failure: SpawnFailed, start: Start, allowed: list[str] | None) -> AgentError:
    """What a caller can make of a program that did not start."""
    text = os.strerror(failure.number)
    where = {"program": start.program, "path": failure.path, "stage": failure.stage}
    search = start.env.get("PATH", "")
    if failure.stage == "directory":
        message = f"working directory {failure.path}: {text}"
        code = Code.NOT_FOUND if failure.number in (2, 20) else Code.PERMISSION_DENIED
        return AgentError(code, "BAD_DIRECTORY", message, **where)
    if failure.stage == "interpreter":
        return not_found(
            f"{failure.path} exists, but the interpreter or loader that it names does not",
            reason="INTERPRETER_NOT_FOUND", **where,
        )  # fmt: skip
    if failure.stage == "program":
        if failure.number == 2:
            looked = "" if "/" in start.program else f" on PATH {search}"
            return not_found(
                f"there is no program {start.program!r}{looked}",
                reason="PROGRAM_NOT_FOUND",
                PATH=search,
                **where,
            )
        if failure.number == 13:
            if allowed is not None:
                return denied(
                    f"{failure.path} may not be executed: it, or the interpreter that it names, is not "
                    f"executable for this user or not among the allowed programs ({', '.join(allowed)})",
                    reason="NOT_ALLOWED", **where,
                )  # fmt: skip
            return denied(f"{failure.path} is not executable for this user", reason="NOT_EXECUTABLE", **where)
        if failure.number == 8:
            return invalid(
                f"{failure.path} is no program: it has no #! line and no known format",
                reason="EXEC_FORMAT",
                **where,
            )
        if failure.number == 7:
            return invalid(
                "arguments and environment are too long for execve", reason="ARGUMENTS_TOO_LONG", **where
            )
    if failure.number in (11, 12):
        return exhausted(f"cannot start {start.program!r}: {text}", reason="NO_PROCESS", **where)
    return AgentError(
        Code.INTERNAL,
        "SPAWN_FAILED",
        f"cannot start {start.program!r}: {failure.stage}: {failure.path}: {text}",
        **where,
    )


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


__all__ = ["STDIN_WINDOW", "Client", "Exec", "Execs", "Exit", "Size", "Start", "ring_size", "set_size"]
