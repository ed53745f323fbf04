"""The one way to run a short host program: explicit environment, no stdin, no shell."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence

from services.common.errors import Internal, TimedOut, WrongState

_TAIL = 2000


class CommandFailed(Internal):
    """A host program failed; the message holds argv, exit code and the end of its stderr."""

    default_reason = "COMMAND_FAILED"


def clean_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """A minimal environment: PATH, locale and temporary directory of ours, then `extra`."""
    env = {key: os.environ[key] for key in ("PATH", "TMPDIR", "HOME") if key in os.environ}
    env.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    return env | {"LC_ALL": "C.UTF-8"} | dict(extra or {})


async def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    seconds: float = 600,
    pass_fds: Sequence[int] = (),
    on_line: Callable[[str], None] | None = None,
    stdin: bytes = b"",
    group: bool = False,
) -> bytes:
    """Run `argv` to its end and return its stdout.

    Args:
        stdin: What it reads; nothing unless given, and never a terminal.
        group: Whether what it starts is killed with it when the time is up.
        on_line: Told each line of stdout as it comes; nothing is kept and returned then.

    Raises:
        WrongState: the program is not installed (reason `PROGRAM_MISSING`).
        TimedOut: it ran longer than `seconds`; it has been killed.
        CommandFailed: it exited with another code than 0.
    """
    words = [os.fspath(word) for word in argv]
    try:
        child = await asyncio.create_subprocess_exec(
            *words,
            cwd=cwd,
            env=clean_env(env),
            stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=pass_fds,
            start_new_session=group,
        )
    except FileNotFoundError as error:
        raise WrongState(
            f"{words[0]} is not installed", reason="PROGRAM_MISSING", program=words[0]
        ) from error
    try:
        async with asyncio.timeout(seconds):
            out, err = await (_follow(child, on_line) if on_line else child.communicate(stdin or None))
    except TimeoutError as error:
        raise TimedOut(f"{words[0]} took longer than {seconds:g} s", argv=words) from error
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                if group:
                    os.killpg(child.pid, signal.SIGKILL)
                else:
                    child.kill()
            await child.wait()
    if child.returncode != 0:
        tail = (err.strip() or out)[-_TAIL:].decode(errors="replace").strip()
        raise CommandFailed(
            f"{' '.join(words)} exited with {child.returncode}: {tail}", exit_code=child.returncode
        )
    return out


async def _follow(child: asyncio.subprocess.Process, on_line: Callable[[str], None]) -> tuple[bytes, bytes]:
    """As `communicate`, but stdout goes to `on_line`."""
    assert child.stdout is not None
    assert child.stderr is not None
    async with asyncio.TaskGroup() as group:
        err = group.create_task(child.stderr.read())
        async for line in child.stdout:
            on_line(line.decode(errors="replace").rstrip("\n"))
    await child.wait()
    return b"", err.result()
