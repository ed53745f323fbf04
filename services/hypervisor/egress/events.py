"""Reading the events that a box's gateway has written, from an offset on, also while it writes."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from services.common.errors import OffsetLost
from services.hypervisor.inotify import rounds

MAX_BATCH = 128
_CHUNK = 1 << 18


async def read(
    path: Path, offset: int, *, follow: bool, ended: asyncio.Event
) -> AsyncIterator[tuple[int, list[dict[str, Any]]]]:
    """Yield events in batches, each with the offset of what comes after it.

    Args:
        path: The file; without one there are no events.
        offset: Where to start: 0, or an offset that this function has yielded.
        follow: Whether to wait for more until `ended`.
        ended: Set when the box, with its gateway, has ended.

    Raises:
        OffsetLost: there is nothing at this offset.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not 0 <= offset <= os.fstat(fd).st_size or (offset and os.pread(fd, 1, offset - 1) != b"\n"):
            raise OffsetLost(f"offset {offset} is none of the egress log", offset=offset)
        async with aclosing(rounds(path, follow=follow, ended=ended)) as following:
            async for _ in following:
                while data := os.pread(fd, _CHUNK, offset):
                    whole = data[: data.rfind(b"\n") + 1]
                    if not whole:
                        break  # a line that is being written
                    lines = whole.splitlines(keepends=True)
                    for at in range(0, len(lines), MAX_BATCH):
                        batch = lines[at : at + MAX_BATCH]
                        offset += sum(map(len, batch))
                        yield offset, [json.loads(line) for line in batch]
    finally:
        os.close(fd)
