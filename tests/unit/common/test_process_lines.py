"""A program's lines arrive as they are printed, and its failure still carries its stderr."""

from __future__ import annotations

import sys

import pytest

from services.common.errors import TimedOut
from services.common.process import CommandFailed, run


async def test_each_line_is_told_and_nothing_is_kept() -> None:
    lines: list[str] = []
    script = "print('one'); print('zwei \\xe9'); print('last', end='')"
    assert await run([sys.executable, "-c", script], on_line=lines.append) == b""
    assert lines == ["one", "zwei \xe9", "last"]


async def test_a_failure_after_some_lines_carries_the_end_of_stderr() -> None:
    lines: list[str] = []
    script = "import sys; print('a'); sys.exit('broken')"
    with pytest.raises(CommandFailed, match="exited with 1: broken"):
        await run([sys.executable, "-c", script], on_line=lines.append)
    assert lines == ["a"]


async def test_a_program_that_goes_on_is_killed_when_its_time_is_up() -> None:
    lines: list[str] = []
    script = "import signal; print('a', flush=True); signal.pause()"
    with pytest.raises(TimedOut):
        await run([sys.executable, "-c", script], on_line=lines.append, seconds=1)
    assert lines == ["a"]
