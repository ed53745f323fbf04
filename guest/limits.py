"""What the programs of a box may take: cgroup v2 limits for all together, rlimits for each process."""

from __future__ import annotations

from typing import NamedTuple

from guest.errors import AgentError, Code, invalid
from guest.wire import Message

_SMALLEST_MEMORY = 4 << 20
_CPU_PERIOD = 100_000  # microseconds; the kernel's default
_MAX_ENTRIES, _MAX_ENTRY = 512, 4096


class Confinement(NamedTuple):
    """Limits, 0 for none, and the programs that may be executed, None for all.

    Attributes:
        memory: Bytes of all programs together, their page cache and tmpfs files included.
        processes: Processes and threads of all programs together.
        cpu_millis: Processor time of all programs together; 1000 is one processor.
        open_files: Open files of each process.
        file_size: Bytes of the largest file that a process may write.
        allowed: Names and absolute paths, see `landlock.restrict`.
    """

    memory: int = 0
    processes: int = 0
    cpu_millis: int = 0
    open_files: int = 0
    file_size: int = 0
    allowed: list[str] | None = None

    def validate(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            AgentError: INVALID_ARGUMENT, naming the field.
        """
        for name in ("memory", "processes", "cpu_millis", "open_files", "file_size"):
            value = getattr(self, name)
            if value < 0:
                raise invalid(f"limit {name} is {value}; 0 means none")
        if 0 < self.memory < _SMALLEST_MEMORY:
            raise invalid(
                f"a memory limit of {self.memory} bytes; a program needs {_SMALLEST_MEMORY} to start"
            )
        if 0 < self.open_files < 16:
            raise invalid(f"a limit of {self.open_files} open files; a program needs 16 to start")
        for entry in self.allowed or ():
            if not entry or "\0" in entry or len(entry) > _MAX_ENTRY or ("/" in entry and entry[0] != "/"):
                raise invalid(
                    f"allowed program {entry[:80]!r} is neither a name nor an absolute path",
                    reason="BAD_ALLOWLIST",
                )
        if len(self.allowed or ()) > _MAX_ENTRIES:
            raise invalid(f"more than {_MAX_ENTRIES} allowed programs", reason="BAD_ALLOWLIST")

    def changed(self, new: Confinement) -> Confinement:
        """This with the limits of `new` that are not 0."""
        given = {name: value for name, value in new._asdict().items() if value}
        return self._replace(**given)

    def for_group(self) -> dict[str, str]:
        """The files of a cgroup and what to write to them."""
        files: dict[str, str] = {}
        if self.memory:
            files["memory.max"] = str(self.memory)
        if self.processes:
            files["pids.max"] = str(self.processes)
        if self.cpu_millis:
            files["cpu.max"] = f"{max(1000, self.cpu_millis * _CPU_PERIOD // 1000)} {_CPU_PERIOD}"
        return files

    def for_process(self) -> Message:
        """What `child.become` needs to confine a process."""
        return {"open_files": self.open_files, "file_size": self.file_size, "allowed": self.allowed}


def unlimited(error: Exception) -> AgentError:
    """The answer to a claim whose limits cannot be put in force."""
    return AgentError(
        Code.FAILED_PRECONDITION,
        "NO_LIMITS",
        f"the guest's kernel cannot put the limits in force: {error}",
    )
