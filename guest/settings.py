"""Where the guest's programs keep their things; one value for a guest, others for tests."""

from __future__ import annotations

from typing import NamedTuple

AGENT_ID = 0xFFFFFFF0
"""Real and saved uid of the agent: a program of uid 0, which has no capabilities, may signal
processes with the same ones, and the agent shall not be among them."""


class Settings(NamedTuple):
    """The paths and powers of PID 1 and the agent.

    Attributes:
        run_dir: Private directory of the agent: its socket, the root disk's mount point.
        listen: "vsock:PORT" or "unix:PATH".
        files_root: The root that file calls act in until a root disk is mounted.
        cgroup: Directory in which each program gets its cgroup; empty for none.
        modules: Directory of the module lists `boot` and `lazy/NAME`; empty for none.
        log: Where log lines go.
        guest: Whether this machine is ours: host name, clock, mounts, power.
    """

    run_dir: str = "/run/voidbox"
    listen: str = "vsock:1024"
    files_root: str = "/"
    cgroup: str = "/sys/fs/cgroup/programs"
    modules: str = "/lib/modules/voidbox"
    log: str = "/dev/kmsg"
    guest: bool = True

    @property
    def root_disk(self) -> str:
        """Where the root disk is mounted."""
        return f"{self.run_dir}/root"

    @property
    def program_dev(self) -> str:
        """The small /dev that programs get."""
        return f"{self.run_dir}/dev"
