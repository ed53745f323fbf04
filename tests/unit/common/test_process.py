"""The subprocess helper: clean surroundings, bounded time, errors that say what happened."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from services.common.errors import TimedOut, WrongState
from services.common.process import CommandFailed, run


async def test_output_comes_back_and_stdin_is_empty() -> None:
    assert await run(["cat"]) == b""
    assert await run(["printf", "%s", "a b"]) == b"a b"


async def test_secrets_of_the_environment_do_not_reach_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    names = (await run(["env"], env={"EXTRA": "1"})).decode()
    assert "SECRET_KEY" not in names
    assert "EXTRA=1" in names


async def test_a_failure_holds_argv_code_and_the_end_of_stderr() -> None:
    with pytest.raises(CommandFailed, match=r"sh -c .* exited with 3: no luck") as caught:
        await run(["sh", "-c", "echo no luck >&2; exit 3"])
    assert caught.value.metadata["exit_code"] == "3"


async def test_a_missing_program_is_named() -> None:
    with pytest.raises(WrongState, match="no-such-program is not installed") as caught:
        await run(["no-such-program"])
    assert caught.value.reason == "PROGRAM_MISSING"


async def test_a_program_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(TimedOut, match=r"longer than 0\.2 s"):
        await run(["sh", "-c", f"echo $$ > {pid_file}; exec sleep 60"], seconds=0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


async def test_cancelling_kills_the_program(tmp_path: Path) -> None:
    fifo = tmp_path / "started"
    os.mkfifo(fifo)
    task = asyncio.create_task(run(["sh", "-c", f"echo $$ > {fifo}; exec sleep 60"]))
    pid = int(await asyncio.to_thread(fifo.read_text))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
