"""A program's output on its way: to a file on disk, into the run's log, through the agent's parser.

The file is written before the log is, and the log before the guest may forget the bytes.
After a restart the file is cut to what the log holds, so the two agree again.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import IO, Final

from services.orchestrator import records as r
from services.orchestrator.blobs import CHUNK, disk_errors
from services.orchestrator.context import RunContext
from services.orchestrator.plan import PlannedStage
from services.orchestrator.store import Store
from services.orchestrator.stream_json import StreamJson

_NAMES: Final = {r.STDOUT: "stdout", r.STDERR: "stderr"}
_TAIL_BYTES: Final = 2000
_TAIL_LINES: Final = 5


class Spool:
    """The output of one attempt.

    Args:
        context: The run.
        planned: The stage.
        attempt: Which attempt.
        agent: Reads standard output, if an agent prints it.
    """

    def __init__(
        self, context: RunContext, planned: PlannedStage, attempt: int, agent: StreamJson | None
    ) -> None:
        self._context = context
        self._planned = planned
        self._agent = agent
        directory = context.scratch
        self._paths = {
            stream: directory / f"{context.generation}.{planned.position}.{attempt}.{name}"
            for stream, name in _NAMES.items()
        }
        self._files: dict[int, IO[bytes]] = {}
        self._cut: set[int] = set()
        overflow = r.Notice(
            text=f"the output of this run is longer than {context.limits.event_bytes} bytes; "
            "what follows is not in its log, but in the stages' artifacts",
            warning=True,
        )
        self._overflow = context.encode("", [overflow])[0]

    async def open(self, *, resume: bool) -> tuple[int, int]:
        """Make the files, or take them up again; returns how much of each stream is stored."""
        context, position = self._context, self._planned.position
        if not resume:
            await context.database(Store.reset_offsets, context.run_id, position)
        out, err = await context.database(Store.offsets, context.run_id, position)
        for stream, length in ((r.STDOUT, out), (r.STDERR, err)):
            # Not in a thread: one that is cancelled would leave a file open that nobody closes.
            self._open(stream, length)
        if self._agent is not None and out:
            await asyncio.to_thread(self._replay, self._agent)
        return out, err

    def _open(self, stream: int, length: int) -> None:
        path = self._paths[stream]
        with disk_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            file = os.fdopen(descriptor, "r+b", buffering=0)
            file.truncate(min(length, self._context.limits.stream_bytes))
            file.seek(0, os.SEEK_END)
        self._files[stream] = file

    def _replay(self, agent: StreamJson) -> None:
        # What it says is in the log already; only the parser's own state is wanted.
        with open(self._paths[r.STDOUT], "rb") as file:
            while data := file.read(CHUNK):
                agent.feed(data)

    async def store(self, stream: int, offset: int, data: bytes) -> None:
        """Keep a piece of output; returns once it is stored."""
        context = self._context
        kept = data[: max(0, context.limits.stream_bytes - offset)]
        if kept:
            with disk_errors(self._paths[stream]):
                self._files[stream].write(kept)
        entries: list[r.Entry] = []
        if len(kept) < len(data) and stream not in self._cut:
            self._cut.add(stream)
            limit = context.limits.stream_bytes
            text = f"{_NAMES[stream]} is longer than {limit} bytes; what follows is dropped"
            await context.log(self._planned.name, r.Notice(text=text, warning=True))
        output = r.Output(stream=stream, offset=offset, data=data)
        entries.append(output)
        if self._agent is not None and stream == r.STDOUT:
            entries += self._agent.feed(data)
        await context.database(
            Store.append_output,
            context.run_id,
            self._planned.position,
            output,
            events=context.encode(self._planned.name, entries),
            overflow=self._overflow,
            limit=context.limits.event_bytes,
        )
        context.bell.ring()

    def path(self, stream: int) -> Path:
        """The file that holds a stream."""
        return self._paths[stream]

    def tail(self) -> str:
        """The last lines of standard error, else of standard output, for a message."""
        for stream in (r.STDERR, r.STDOUT):
            if stream == r.STDOUT and self._agent is not None:
                break
            with open(self._paths[stream], "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
                text = file.read(_TAIL_BYTES).decode(errors="replace").replace("\0", "").strip()
            if text:
                return "\n".join(text.splitlines()[-_TAIL_LINES:])
        return ""

    def close(self) -> None:
        """Let go of the files, which stay. Idempotent."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def remove(self) -> None:
        """Remove the files. Idempotent."""
        self.close()
        for path in self._paths.values():
            path.unlink(missing_ok=True)
