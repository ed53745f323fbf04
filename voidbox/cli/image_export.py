"""`voidbox image export`: a cached image as one file, complete or not there at all."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO

from services.common.errors import AlreadyExists, Exhausted, InvalidInput, NotFound
from voidbox.cli.bars import Bars
from voidbox.cli.connection import Context
from voidbox.cli.screen import size
from voidbox.client import Client
from voidbox.imager.v1 import imager_pb2 as pb

FORMATS = {
    "ext4": pb.EXPORT_FORMAT_EXT4,
    "tar": pb.EXPORT_FORMAT_TAR,
    "initramfs": pb.EXPORT_FORMAT_INITRAMFS,
}
_FLUSH_BYTES = 1 << 20
_SHOWN_BITS = 24  # every 16 MiB


async def export(context: Context, client: Client, reference: str, messages: Any) -> None:
    """Write the stream `messages` of the image `reference` where the options say."""
    args = context.args
    if args.file == "-":
        await _to_standard_output(messages(client))
        return
    target = Path(args.file)
    if target.is_dir():
        raise InvalidInput(f"{target} is a directory; name a file: -o {target}/image", reason="BAD_FILE")
    if not target.parent.is_dir():
        raise NotFound(f"the directory {target.parent} does not exist", path=target.parent)
    if not args.force and os.path.lexists(target):
        raise _exists(target)
    bars = Bars(context.screen)
    with bars:
        count = await _to_file(_counted(messages(client), target.name, bars), target, force=args.force)
    context.screen.result(
        f"{target} ({size(count)})",
        {"path": str(target.absolute()), "size_bytes": count, "format": args.format, "reference": reference},
    )


async def _counted(
    messages: AsyncIterator[pb.ExportImageResponse], name: str, bars: Bars
) -> AsyncIterator[pb.ExportImageResponse]:
    """The messages, with a line that says how much has come."""
    count = 0
    shown = -1
    async for message in messages:
        count += message.zeros + len(message.data)
        if count >> _SHOWN_BITS != shown:
            shown = count >> _SHOWN_BITS
            bars.show(pb.Progress(subject=name, action="export", done=count, unit="bytes"))
        yield message


async def _to_standard_output(messages: AsyncIterator[pb.ExportImageResponse]) -> None:
    if sys.stdout.isatty():
        raise InvalidInput("standard output is a terminal; use -o FILE or a pipe", reason="BAD_FILE")
    async for message in messages:
        left = message.zeros
        while left:
            left -= await asyncio.to_thread(sys.stdout.buffer.write, bytes(min(left, _FLUSH_BYTES)))
        await asyncio.to_thread(sys.stdout.buffer.write, message.data)
    await asyncio.to_thread(sys.stdout.buffer.flush)


async def _to_file(messages: AsyncIterator[pb.ExportImageResponse], target: Path, *, force: bool) -> int:
    """Write a file beside `target` and give it that name once it is whole; its length."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", suffix=".part", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb", buffering=_FLUSH_BYTES) as file:
            async for message in messages:
                if message.zeros:
                    file.seek(message.zeros, os.SEEK_CUR)
                elif file.write(message.data) and file.tell() % _FLUSH_BYTES < len(message.data):
                    await asyncio.to_thread(file.flush)
            file.truncate()  # a hole at the end has no data behind it
            await asyncio.to_thread(_sync, file)
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(file.fileno(), 0o666 & ~mask)
            count = file.tell()
        if force:
            temporary.rename(target)
        else:
            os.link(temporary, target)  # fails if somebody else has made it meanwhile
    except FileExistsError as error:
        raise _exists(target) from error
    except OSError as error:
        raise Exhausted(f"cannot write {target}: {error.strerror or error}", path=target) from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _exists(target: Path) -> AlreadyExists:
    return AlreadyExists(f"{target} exists; name another file, or replace it with --force", path=target)
