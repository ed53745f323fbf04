"""`voidbox cp`: files and directories into and out of a running box."""

from __future__ import annotations

import asyncio
import os
import posixpath
import stat
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from services.common.errors import InvalidInput, NotFound, WrongState
from voidbox.archive import pack, read_file, unpack
from voidbox.cli.boxes import find_box
from voidbox.cli.connection import Context, Stack
from voidbox.cli.exitcode import ExitCode
from voidbox.cli.screen import size
from voidbox.client import Client, in_thread
from voidbox.guest.v1 import guest_pb2

DIRECTORY = guest_pb2.FILE_TYPE_DIRECTORY
REGULAR = guest_pb2.FILE_TYPE_REGULAR


def split(argument: str) -> tuple[str, str]:
    """`BOX:PATH` as box and path; a local path has no box.

    A colon after a slash belongs to a local name: `./a:b`.
    """
    box, colon, path = argument.partition(":")
    return (
        (box, path)
        if colon and box and "/" not in box.partition("/")[2] and not box.startswith((".", "/"))
        else ("", argument)
    )


def cp_command(context: Context) -> int:
    """Copy in one of the two directions."""
    args = context.args
    from_box, source = split(args.source)
    to_box, target = split(args.target)
    if bool(from_box) == bool(to_box):
        raise InvalidInput(
            "one of the two must be BOX:PATH and the other a local path: voidbox cp RUN:/workspace/out .",
            reason="BAD_COPY",
        )
    path = source if from_box else target
    if not path.startswith("/"):
        raise InvalidInput(f"{path!r}: a path in a box must be absolute", reason="BAD_COPY")
    if to_box and not Path(source).exists():
        raise InvalidInput(f"{source}: no such file or directory", reason="BAD_FILE", path=source)
    count = asyncio.run(_copy(context.stack(), from_box or to_box, source, target, out=bool(from_box)))
    context.screen.note(f"copied {size(count)}")
    if context.screen.json:
        context.screen.data({"bytes": count})
    return ExitCode.OK


async def _copy(stack: Stack, name: str, source: str, target: str, *, out: bool) -> int:
    async with stack.connect() as client:
        box = await find_box(client, name)
        if out:
            return await copy_out(client, box, source, Path(target))
        return await copy_in(client, box, Path(source), target)


async def copy_out(client: Client, box: str, source: str, target: Path) -> int:
    """Copy from a box; returns the number of bytes.

    Raises:
        Denied: an entry of the box's archive would land outside of `target`.
        WrongState: the target is in the way.
    """
    info = await client.stat(box, source)
    name = posixpath.basename(source.rstrip("/"))
    if target.is_dir() and name not in ("", ".", ".."):
        target = target / name
    if info.type == DIRECTORY:
        try:
            target.mkdir(exist_ok=True)
        except OSError as error:
            raise WrongState(f"cannot make {target}: {error.strerror}", reason="WRITE_FAILED") from error
        return (await unpack(client.read_tree(box, source), target)).size_bytes
    if info.type != REGULAR:
        raise InvalidInput(f"{source} is neither a file nor a directory", reason="BAD_FILE", path=source)
    if target.is_dir():
        raise WrongState(f"{target} is a directory; name a file in it", reason="WRITE_FAILED", path=target)
    return await _save(client.read_file(box, source), target, info.mode & 0o777)


async def _save(chunks: AsyncIterator[bytes], target: Path, mode: int) -> int:
    """Write a local file that appears whole or not at all."""
    count = 0
    try:
        fd, draft = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(fd, "wb") as file:
                async for data in chunks:
                    await asyncio.to_thread(file.write, data)
                    count += len(data)
                os.fchmod(file.fileno(), mode | stat.S_IRUSR)
            os.replace(draft, target)
        except BaseException:
            os.unlink(draft)
            raise
    except OSError as error:
        raise WrongState(
            f"cannot write {target}: {error.strerror}", reason="WRITE_FAILED", path=target
        ) from error
    return count


async def copy_in(client: Client, box: str, source: Path, target: str) -> int:
    """Copy into a box; returns the number of bytes sent."""
    try:
        into = (await client.stat(box, target)).type == DIRECTORY
    except NotFound:
        into = target.endswith("/")
    name = source.resolve().name
    path = posixpath.join(target, name) if into and name else target
    counter = _Counter()
    if source.is_dir():
        await client.write_tree(box, path, counter.count(in_thread(pack(source))))
    else:
        mode = stat.S_IMODE(source.stat().st_mode) & 0o777
        await client.write_file(box, path, mode, counter.count(in_thread(read_file(source))))
    return counter.total


class _Counter:
    """Counts what passes."""

    def __init__(self) -> None:
        self.total = 0

    async def count(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The pieces, counted."""
        async for data in chunks:
            self.total += len(data)
            yield data
