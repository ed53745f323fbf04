"""The memory of a restored machine: what QEMU does to its file while a child process plays QEMU."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys

import pytest

from services.hypervisor import ram_descriptor, reclaim
from services.hypervisor.ram_descriptor import NotOpened, answer, receive

# Opens as QEMU does: Python's own open(2) adds O_CLOEXEC.
PLAYER = """
import ctypes, os, socket, sys
from services.hypervisor import ram_descriptor, seccomp
seccomp.no_new_privileges()
report = socket.socket(fileno=int(sys.argv[1]))
ram_descriptor.install(report)
report.close()
libc = ctypes.CDLL(None, use_errno=True)
def ram():
    return libc.open(ram_descriptor.PATH.encode(), ram_descriptor.OPEN_FLAGS, ram_descriptor.OPEN_MODE)
def punch(fd, length=4096):
    return libc.fallocate(fd, ram_descriptor.PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(length))
"""


def play(script: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start `script` after `PLAYER`: the process, and what it reports to."""
    ours, theirs = socket.socketpair()
    with theirs:
        child = subprocess.Popen(
            [sys.executable, "-c", PLAYER + script, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    return child, ours


def serve(child: subprocess.Popen[bytes], ours: socket.socket, memory: int) -> str:
    """Hand the memory over; what the child prints."""
    with ours:
        listener = receive(ours)
    pidfd = os.pidfd_open(child.pid)
    try:
        answer(listener, memory, pidfd)
    finally:
        os.close(listener)
        os.close(pidfd)
    out, error = child.communicate(timeout=60)
    assert child.returncode == 0, error.decode()
    return out.decode()


@pytest.fixture
def memory() -> int:
    """A file in memory with 8 KiB of content."""
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.write(fd, b"x" * 8192)
    return fd


def test_the_memory_is_said_to_be_punched_and_is_not(memory: int) -> None:
    child, ours = play("fd = ram(); print(fd, punch(fd))")
    assert serve(child, ours, memory).split() == [str(ram_descriptor.NUMBER), "0"]
    assert os.pread(memory, 8192, 0) == b"x" * 8192
    os.close(memory)


def test_other_files_are_punched_and_other_changes_of_the_memory_are_made(memory: int) -> None:
    script = """
fd = ram()
other = os.memfd_create('disk')
os.write(other, b'y' * 8192)
print(punch(other), os.pread(other, 8192, 0) == bytes(4096) + b'y' * 4096)
print(libc.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(16384)), os.fstat(fd).st_size)
"""
    child, ours = play(script)
    assert serve(child, ours, memory).split() == ["0", "True", "0", "16384"]
    os.close(memory)


def test_only_the_first_such_open_is_answered_and_others_are_not_concerned(memory: int) -> None:
    script = """
print(libc.open(b'/dev/null', os.O_RDONLY) > 2, libc.open(b'/dev/null', os.O_RDWR) > 2)
print(ram())
print(ram(), ctypes.get_errno())
print(libc.open(b'/dev/null', os.O_RDWR) > 2)
"""
    child, ours = play(script)
    assert serve(child, ours, memory).split() == ["True", "True", "1000", "-1", "38", "True"]  # ENOSYS
    os.close(memory)


def test_a_machine_that_ends_before_is_not_waited_for(memory: int) -> None:
    child, ours = play("")
    assert serve(child, ours, memory) == ""
    os.close(memory)


def test_one_that_says_nothing_is_noticed() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(NotOpened):
        receive(ours)


async def test_this_host_is_found_able_or_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await reclaim.supported() == ""
    done = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import sys; from services.hypervisor import ram_descriptor, reclaim;"
        "ram_descriptor.SYSTEM_CALLS.clear(); sys.exit(reclaim.main())",
        stderr=asyncio.subprocess.PIPE,
    )
    _, error = await done.communicate()
    assert done.returncode == 1
    assert b"no numbers of system calls" in error
