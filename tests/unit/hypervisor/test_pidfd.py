"""Processes are named by pid and start time, watched without polling, and killed as a group."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from services.common.errors import NotFound
from services.hypervisor.pidfd import Process, children, kill_now, start_time

GROUP = (
    "import subprocess,time; p=subprocess.Popen(['sleep','1000']); print(p.pid,flush=True); time.sleep(1000)"
)


def sleeper() -> subprocess.Popen[bytes]:
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    child.returncode = 0  # reaped by what is tested
    return child


async def test_the_end_of_a_process_is_noticed_and_it_is_reaped() -> None:
    child = sleeper()
    process = Process.watch(child.pid)
    assert process.alive
    assert not await process.wait(0.01)
    process.send(signal.SIGTERM)
    assert await process.wait(10)
    assert start_time(child.pid) is None
    process.send(signal.SIGTERM)
    process.kill_group()
    process.close()
    process.close()
    with pytest.raises(NotFound):
        Process.watch(child.pid)


async def test_another_process_with_the_same_pid_is_not_taken_for_it() -> None:
    child = sleeper()
    started = start_time(child.pid)
    assert started is not None
    with pytest.raises(NotFound):
        Process.watch(child.pid, started + 1)
    assert kill_now(child.pid, started + 1)
    assert start_time(child.pid) == started
    assert kill_now(child.pid, started)
    assert start_time(child.pid) is None
    assert kill_now(child.pid, started)


def family() -> tuple[int, int]:
    """A process that leads a group, and its child."""
    leader = subprocess.Popen([sys.executable, "-c", GROUP], stdout=subprocess.PIPE, start_new_session=True)
    assert leader.stdout is not None
    with leader.stdout:
        follower = int(leader.stdout.readline())
    leader.returncode = 0  # reaped by what is tested
    return leader.pid, follower


async def test_a_group_is_killed_with_its_leader() -> None:
    leader, follower = family()
    assert children(leader) == [follower]
    watched, process = Process.watch(follower), Process.watch(leader)
    process.kill_group()
    assert await process.wait(10)
    assert await watched.wait(10)
    process.close()
    watched.close()


def test_killing_without_a_loop_waits_for_the_children_too() -> None:
    leader, follower = family()
    started = start_time(leader)
    assert started is not None
    assert kill_now(leader, started)
    assert start_time(leader) is None
    assert start_time(follower) is None
