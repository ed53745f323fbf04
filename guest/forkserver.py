"""The part of PID 1 that starts, signals and reaps programs for the agent.

One loop over the agent's channel, the pipes on which starting children tell their fate,
and SIGCHLD. A pid is only signalled while its process has not been reaped, and both
happen here, so no signal ever reaches a stranger with a reused pid.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import select
import signal
import socket
import time
from collections import deque

from guest import cgroups, child, log, namespace, seccomp, wire
from guest.settings import Settings
from guest.wire import Message

# Children between fork and execve at the same time: each is a Python process of a megabyte or
# two, so two hundred at once would use up a small machine.
_STARTING = 8


class Program:
    """A program that was started and has not been reaped."""

    __slots__ = ("cgroup", "name", "pid")

    def __init__(self, name: str, pid: int, cgroup: str) -> None:
        self.name = name
        self.pid = pid
        self.cgroup = cgroup


class Starting:
    """A child between fork and execve."""

    __slots__ = ("program", "request", "status")

    def __init__(self, program: Program, request: int, status: int) -> None:
        self.program = program
        self.request = request
        self.status = status


class ForkServer:
    """Serves one agent after the other; programs outlive their agent."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.state = b""
        self._channel: socket.socket | None = None
        self._agent = 0
        self._programs: dict[int, Program] = {}
        self._starting: dict[int, Starting] = {}
        self._lingering: set[str] = set()
        self._queue: deque[tuple[Message, list[int]]] = deque()
        self._outbox: deque[tuple[Message, tuple[int, ...]]] = deque()
        self._namespace = -1
        self._cgroup_base = settings.cgroup if cgroups.prepare(settings.cgroup) else ""
        self._poll = select.poll()
        self._wake, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, lambda *_: None)
        self._poll.register(self._wake, select.POLLIN)
        self._privileged = os.geteuid() == 0
        if self._privileged and settings.guest:
            with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
                file.write("-1000")

    def attach(self, channel: socket.socket, agent: int, state: bytes) -> None:
        """Serve the agent with this pid over `channel`, and tell it what came before it."""
        channel.setblocking(False)
        self._channel, self._agent = channel, agent
        self._poll.register(channel, select.POLLIN)
        running = [(program.name, program.pid) for program in self._programs.values() if program.name]
        self._send({"op": "hello", "state": state, "running": running, "cgroups": self._cgroup_base})

    def pass_listener(self, listener: socket.socket) -> None:
        """Give the agent the socket that the host connects to."""
        self._send({"op": "listener", "family": int(listener.family)}, (listener.fileno(),))

    def serve(self) -> bool:
        """Work until the agent asks for the end (True) or dies (False)."""
        assert self._channel is not None
        number = self._channel.fileno()
        done: bool | None = None
        while done is None:
            self._flush()
            for fd, _ in self._poll.poll():
                if fd == number:
                    done = self._receive()
                elif fd == self._wake:
                    with contextlib.suppress(BlockingIOError):
                        while os.read(self._wake, 4096):
                            pass
                    self._reap()
                elif fd in self._starting:
                    self._started(fd)
                if done is not None:
                    break
        self._poll.unregister(number)
        self._channel.close()
        self._channel = None
        self._outbox.clear()
        while self._queue:
            for fd in self._queue.popleft()[1]:
                os.close(fd)
        if not done:
            self._end_agent()
        return done

    def _end_agent(self) -> None:
        if self._agent:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._agent, signal.SIGKILL)
            while self._agent:
                self._poll.poll(1000)
                self._reap()

    def _receive(self) -> bool | None:
        assert self._channel is not None
        try:
            got = wire.receive(self._channel)
        except BlockingIOError:
            return None
        except OSError:
            return False
        if got is None:
            return False
        message, fds = got
        try:
            return self._handle(message, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _handle(self, message: Message, fds: list[int]) -> bool | None:
        operation = message["op"]
        if operation == "spawn":
            self._spawn(message, fds)
        elif operation == "signal":
            self._signal(message)
        elif operation == "namespace":
            self._make_namespace(message)
        elif operation == "limit":
            seccomp.prepare()  # now, and not in every child
            try:
                cgroups.limit(self._cgroup_base, message["files"])
                self._reply(message)
            except OSError as error:
                self._reply(message, error=("limit", error.errno, error.filename or str(error)))
        elif operation == "state":
            self.state = message["state"]
        elif operation == "stop":
            self._stop_programs(message["grace"])
            self._reply(message)
        elif operation == "end":
            return True
        else:
            log.error(f"unknown request {operation!r} of the agent")
        return None

    # Starting

    def _spawn(self, message: Message, fds: list[int]) -> None:
        if len(self._starting) >= _STARTING:
            self._queue.append((message, [os.dup(fd) for fd in fds]))
            return
        cgroup = ""
        if self._cgroup_base:
            try:
                cgroup = cgroups.create(self._cgroup_base, message["id"])
            except OSError as error:
                self._reply(message, error=("cgroup", error.errno, str(error)))
                return
        status_read, status_write = os.pipe2(os.O_CLOEXEC)
        message["privileged"] = self._privileged
        try:
            pid = os.fork()
        except OSError as error:
            os.close(status_read)
            os.close(status_write)
            self._remove(cgroup)
            self._reply(message, error=("fork", error.errno, ""))
            return
        if pid == 0:
            child.become(message, fds, status_write, self._namespace, cgroup)
        os.close(status_write)
        os.set_blocking(status_read, False)
        program = Program(message["id"], pid, cgroup)
        self._programs[pid] = program
        self._starting[status_read] = Starting(program, message["seq"], status_read)
        self._poll.register(status_read, select.POLLIN)

    def _started(self, status: int) -> None:
        try:
            data = os.read(status, 65536)
        except BlockingIOError:
            return
        starting = self._starting.pop(status)
        self._poll.unregister(status)
        os.close(status)
        while self._queue and len(self._starting) < _STARTING:
            message, fds = self._queue.popleft()
            self._spawn(message, fds)
            for fd in fds:
                os.close(fd)
        program = starting.program
        if data:
            failure = marshal.loads(data)  # noqa: S302 - written by our own code before execve
            program.name = ""  # its end is nobody's business
            self._send({"op": "reply", "seq": starting.request, "error": failure})
        else:
            self._send({"op": "reply", "seq": starting.request, "pid": program.pid})

    def _make_namespace(self, message: Message) -> None:
        """Build the programs' mount namespace in a child and keep a handle on it."""
        report, report_write = os.pipe2(os.O_CLOEXEC)
        hold, hold_write = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            try:
                os.close(hold_write)
                namespace.enter_program_namespace(self.settings, message["root"])
                os.write(report_write, b"+")
                os.read(hold, 1)
            except OSError as error:
                os.write(report_write, marshal.dumps(("namespace", error.errno, str(error))))
            finally:
                os._exit(0)
        os.close(report_write)
        os.close(hold)
        answer = os.read(report, 65536)
        os.close(report)
        if answer == b"+":
            handle = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            if self._namespace >= 0:
                os.close(self._namespace)
            self._namespace = handle
            self._reply(message)
        else:
            failure = marshal.loads(answer) if answer else ("namespace", 5, "the child died")  # noqa: S302
            self._reply(message, error=failure)
        os.close(hold_write)

    # Signals and ends

    def _signal(self, message: Message) -> None:
        name, number, tree = message["id"], message["signal"], message["tree"]
        program = next((one for one in self._programs.values() if one.name == name), None)
        if program is not None:
            self._signal_program(program, number, tree)
        elif tree and self._cgroup_base:
            # The program has ended, its daemons may live on.
            for directory in tuple(self._lingering):
                if os.path.basename(directory) == f"exec-{name}":
                    self._signal_cgroup(directory, number)

    def _signal_program(self, program: Program, number: int, tree: bool) -> None:
        if tree and program.cgroup:
            self._signal_cgroup(program.cgroup, number)
        elif tree:
            for pid in cgroups.descendants(program.pid):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
        else:
            try:
                os.killpg(program.pid, number)
            except ProcessLookupError:
                # Between fork and setsid; or the leader has left its group.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(program.pid, number)

    @staticmethod
    def _signal_cgroup(directory: str, number: int) -> None:
        if number == signal.SIGKILL:
            cgroups.kill(directory)
        else:
            cgroups.terminate(directory)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == self._agent:
                self._agent = 0
                log.error(f"the agent has ended with status {status}")
                continue
            program = self._programs.pop(pid, None)
            if program is None:
                continue
            # Its start must be told before its end.
            for fd, starting in tuple(self._starting.items()):
                if starting.program is program:
                    self._started(fd)
            self._ended(program, status)
        for directory in tuple(self._lingering):
            if cgroups.remove(directory):
                self._lingering.discard(directory)

    def _ended(self, program: Program, status: int) -> None:
        oom = bool(program.cgroup) and status != 0 and cgroups.out_of_memory(program.cgroup)
        self._remove(program.cgroup)
        if program.name:
            self._send({"op": "exit", "id": program.name, "pid": program.pid, "status": status, "oom": oom})

    def _remove(self, cgroup: str) -> None:
        if cgroup and not cgroups.remove(cgroup):
            self._lingering.add(cgroup)

    def _stop_programs(self, grace: float) -> None:
        """TERM everything, wait at most `grace` seconds, KILL the rest, reap all."""
        for program in tuple(self._programs.values()):
            self._signal_program(program, signal.SIGTERM, tree=True)
        for directory in self._lingering:
            cgroups.terminate(directory)
        deadline = time.monotonic() + grace
        self._wait_for_programs(deadline)
        for program in tuple(self._programs.values()):
            self._signal_program(program, signal.SIGKILL, tree=True)
        for directory in self._lingering:
            cgroups.kill(directory)
        self._wait_for_programs(
            time.monotonic() + 2.0
        )  # KILL is quick; a process in D state is not waited for
        if self.settings.guest:
            os.sync()

    def _wait_for_programs(self, deadline: float) -> None:
        only = select.poll()
        only.register(self._wake, select.POLLIN)
        while self._programs or self._lingering:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            # A cgroup empties when its last process is reaped, which may be by its parent and not by us.
            only.poll(min(left, 0.1 if self._lingering else left) * 1000)
            with contextlib.suppress(BlockingIOError):
                while os.read(self._wake, 4096):
                    pass
            self._reap()

    # Talking to the agent

    def _reply(self, message: Message, **result: object) -> None:
        self._send({"op": "reply", "seq": message["seq"], **result})

    def _send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        self._outbox.append((message, fds))
        self._flush()

    def _flush(self) -> None:
        while self._outbox and self._channel is not None:
            message, fds = self._outbox[0]
            try:
                wire.send(self._channel, message, fds)
            except BlockingIOError:
                self._poll.modify(self._channel, select.POLLIN | select.POLLOUT)
                return
            except OSError:
                return  # the agent is gone; its end is noticed by the loop
            self._outbox.popleft()
        if self._channel is not None:
            self._poll.modify(self._channel, select.POLLIN)
