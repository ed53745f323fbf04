"""Locks between builders, wheels by hash, and the tools that a kernel build needs."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from services.common.errors import Corrupt, Exhausted, Unavailable, WrongState
from services.imager import slim_kernel
from services.imager.lock import locked
from services.imager.wheels import Wheel, fetch_wheels

_HOLD = """
import fcntl, sys
handle = open(sys.argv[1], "w")
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def free(path: Path) -> bool:
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


async def test_a_lock_waits_for_another_process_and_survives_its_death(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _HOLD, str(path)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    await holder.stdout.readline()
    entered = asyncio.Event()

    async def build() -> None:
        async with locked(path):
            entered.set()
            assert not free(path)

    task = asyncio.create_task(build())
    done, _ = await asyncio.wait([task], timeout=0.2)
    assert not done
    assert not entered.is_set()
    holder.kill()
    await holder.wait()
    await task
    assert free(path)


async def test_a_cancelled_waiter_gives_the_lock_back_when_it_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    async with locked(path):
        waiter = asyncio.create_task(locked(path).__aenter__())
        await asyncio.wait([waiter], timeout=0.1)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
    # The abandoned thread may hold it for a moment; it closes it, so this ends.
    async with asyncio.timeout(10), locked(path):
        assert not free(path)


def wheel_at(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return path


def wheel(path: Path) -> Wheel:
    return Wheel(name="a", version="1", sha256="", path=path)


def test_a_wheels_files_come_in_name_order(tmp_path: Path) -> None:
    path = wheel_at(tmp_path / "a-1-py3-none-any.whl", "b.py", "a/c.py", "a.py")
    assert [name for name, _ in wheel(path).files()] == ["a.py", "a/c.py", "b.py"]


@pytest.mark.parametrize("name", ["../evil.py", "/etc/passwd", "a//b.py", "a/../../b.py"])
def test_a_wheel_that_leaves_its_directory_is_corrupt(tmp_path: Path, name: str) -> None:
    with pytest.raises(Corrupt, match="holds"):
        list(wheel(wheel_at(tmp_path / "a-1-py3-none-any.whl", name)).files())


async def test_a_cached_wheel_of_another_content_is_removed_and_reported(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"a==1 --hash=sha256:{'0' * 64}\n")
    home = tmp_path / "wheels" / hashlib.sha256(lock.read_bytes()).hexdigest()[:32]
    wheel_at(home / "a-1-py3-none-any.whl", "a.py")
    with pytest.raises(Corrupt, match="does not match the lock file"):
        await fetch_wheels(lock, tmp_path)
    assert not home.exists()


async def test_wheels_that_cannot_be_downloaded_name_the_cure(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"voidbox-not-there==1 --hash=sha256:{'0' * 64}\n")
    env = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(tmp_path)}
    with pytest.raises(Unavailable, match=r"connect to the network.*or copy the cache"):
        await fetch_wheels(lock, tmp_path / "cache", env=env)
    assert [path.name for path in (tmp_path / "cache/wheels").iterdir()] == ["lock"]


async def test_missing_build_tools_are_named_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name in ("flex", "gcc") else real(name))
    with pytest.raises(WrongState, match=r"type: sudo apt-get install -y .*flex gcc libelf-dev"):
        await slim_kernel._check_tools()


def test_too_little_disk_space_is_said_before_anything_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slim_kernel, "_ROOM", 1 << 60)
    with pytest.raises(Exhausted, match="MiB are free"):
        slim_kernel._check_room(tmp_path)
