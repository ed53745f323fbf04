"""Starts what stands beside a box's machine, and outlives the service as the machine does."""

from __future__ import annotations

import subprocess
import sys
from typing import BinaryIO

from services.common.process import clean_env


def spawn(module: str, config_fd: int, fds: tuple[int, ...], log: int) -> int:
    """Start `python -m module` in a session of its own; returns its pid.

    Args:
        module: What it runs.
        config_fd: Where it reads its configuration, among `fds`.
        fds: What it inherits.
        log: Where it complains.

    Raises:
        OSError: it cannot be started.
    """
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", module, "--config-fd", str(config_fd)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd="/",
        env=clean_env(),
        pass_fds=fds,
        start_new_session=True,
    )
    child.returncode = 0  # it is watched and reaped by pidfd; Popen must not try, nor warn
    return child.pid


def write(pipe: BinaryIO, data: bytes) -> None:
    """Write a configuration to its end, and close the pipe.

    Raises:
        BrokenPipeError: the process has ended.
    """
    with pipe:
        pipe.write(data)
