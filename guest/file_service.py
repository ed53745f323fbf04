"""The file calls of `GuestService`."""

from __future__ import annotations

import asyncio
import functools
import os
import stat
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from guest import files, tree
from guest.errors import from_os_error, invalid, not_implemented
from guest.files import Entry, Owner, Writer
from guest.guest_state import Guest
from guest.pipe import ReadEnd, WriteEnd, in_thread
from guest.rpc import CHUNK_LIMIT, Gate, call
from voidbox.guest.v1 import guest_pb2 as pb

_BATCH = 4 * CHUNK_LIMIT  # bytes for one trip to the thread that may block
_DEFAULT_PAGE, _MAX_PAGE = 1000, 10000
_DEFAULT_ARCHIVE = 1 << 30  # guest.proto: ReadTreeRequest.max_bytes
_KINDS = {
    stat.S_IFREG: pb.FILE_TYPE_REGULAR,
    stat.S_IFDIR: pb.FILE_TYPE_DIRECTORY,
    stat.S_IFLNK: pb.FILE_TYPE_SYMLINK,
    stat.S_IFBLK: pb.FILE_TYPE_DEVICE,
    stat.S_IFCHR: pb.FILE_TYPE_DEVICE,
    stat.S_IFIFO: pb.FILE_TYPE_FIFO,
    stat.S_IFSOCK: pb.FILE_TYPE_SOCKET,
}
_Result = TypeVar("_Result")


class FileCalls:
    """Translates between protobuf and `files` and `tree`."""

    gate: Gate
    guest: Guest

    @call()
    async def ReadFile(self, request: pb.ReadFileRequest, context: Any) -> None:
        """Stream a file."""
        if request.offset < 0 or request.length < 0:
            raise invalid("offset and length cannot be negative", path=request.path)
        fd = await _blocking(
            request.path, lambda: files.open_regular(self.guest.root, request.path), undo=os.close
        )
        try:
            at, left = request.offset, request.length or None
            while left is None or left > 0:
                size = _BATCH if left is None else min(_BATCH, left)
                data = await _blocking(request.path, functools.partial(os.pread, fd, size, at))
                if not data:
                    break
                at += len(data)
                left = None if left is None else left - len(data)
                for start in range(0, len(data), CHUNK_LIMIT):
                    await context.write(pb.ReadFileResponse(data=data[start : start + CHUNK_LIMIT]))
        finally:
            os.close(fd)

    @call(drain=True)
    async def WriteFile(
        self, requests: AsyncIterator[pb.WriteFileRequest], _context: Any
    ) -> pb.WriteFileResponse:
        """Write a file."""
        header = await _header(requests)
        path = header.path
        owner = _owner(header.owner) if header.HasField("owner") else None

        def begin() -> Writer:
            if header.make_parents:
                self.guest.root.make_parents(path, *(owner or self._default))
            return Writer(
                self.guest.root,
                path,
                mode=header.mode & 0o7777 if header.mode else None,
                owner=owner,
                default=self._default,
                offset=header.offset if header.HasField("offset") else None,
            )

        with await _blocking(path, begin, undo=Writer.close) as writer:
            batch = bytearray()
            async for data in _chunks(requests):
                batch += data
                if len(batch) >= _BATCH:
                    await _blocking(path, functools.partial(writer.write, batch))
                    batch = bytearray()
            await _blocking(path, functools.partial(writer.write, batch))
            await _blocking(path, writer.commit)
            return pb.WriteFileResponse(size_bytes=writer.size)

    @call()
    async def StatFile(self, request: pb.StatFileRequest, _context: Any) -> pb.StatFileResponse:
        """Describe a file."""
        entry = await _blocking(request.path, lambda: files.describe(self.guest.root, request.path))
        return pb.StatFileResponse(file=_to_info(entry))

    @call()
    async def ListDirectory(
        self, request: pb.ListDirectoryRequest, _context: Any
    ) -> pb.ListDirectoryResponse:
        """List a directory."""
        if request.page_size < 0:
            raise invalid(f"page_size is {request.page_size}")
        limit = min(request.page_size or _DEFAULT_PAGE, _MAX_PAGE)
        try:
            after = os.fsdecode(bytes.fromhex(request.page_token))
        except ValueError:
            raise invalid("page_token is not one that ListDirectory gave", reason="BAD_PAGE_TOKEN") from None
        entries, more = await _blocking(
            request.path, lambda: files.list_directory(self.guest.root, request.path, after, limit)
        )
        token = os.fsencode(entries[-1].path).hex() if more and entries else ""
        return pb.ListDirectoryResponse(files=[_to_info(entry) for entry in entries], next_page_token=token)

    @call()
    async def MakeDirectory(
        self, request: pb.MakeDirectoryRequest, _context: Any
    ) -> pb.MakeDirectoryResponse:
        """Make a directory."""
        owner = _owner(request.owner) if request.HasField("owner") else self._default
        mode = request.mode & 0o7777 or 0o755
        await _blocking(
            request.path,
            lambda: files.make(
                self.guest.root, request.path, mode=mode, owner=owner, parents=request.make_parents
            ),
        )
        return pb.MakeDirectoryResponse()

    @call()
    async def RemoveFile(self, request: pb.RemoveFileRequest, _context: Any) -> pb.RemoveFileResponse:
        """Remove a file or a tree."""
        await _blocking(
            request.path, lambda: files.remove(self.guest.root, request.path, recursive=request.recursive)
        )
        return pb.RemoveFileResponse()

    @call()
    async def RenameFile(self, request: pb.RenameFileRequest, _context: Any) -> pb.RenameFileResponse:
        """Rename a file."""
        await _blocking(
            request.from_path, lambda: files.rename(self.guest.root, request.from_path, request.to_path)
        )
        return pb.RenameFileResponse()

    @call()
    async def ReadTree(self, request: pb.ReadTreeRequest, context: Any) -> None:
        """Stream a tree as an archive."""
        if request.max_bytes < 0:
            raise invalid("max_bytes cannot be negative")
        read, write = os.pipe2(os.O_CLOEXEC)
        end = ReadEnd(read)

        def work() -> None:
            with open(write, "wb", buffering=CHUNK_LIMIT) as sink:
                tree.pack(self.guest.root, request.path, sink, request.max_bytes or _DEFAULT_ARCHIVE)

        packing = in_thread(work)
        try:
            while data := await end.read(CHUNK_LIMIT):
                await context.write(pb.ReadTreeResponse(data=data))
            await packing
        except OSError as error:
            raise from_os_error(error, request.path) from error
        finally:
            end.close()
            packing.cancel()

    @call(drain=True)
    async def WriteTree(
        self, requests: AsyncIterator[pb.WriteTreeRequest], _context: Any
    ) -> pb.WriteTreeResponse:
        """Unpack an archive."""
        header = await _header(requests)
        owner = _owner(header.owner) if header.HasField("owner") else self._default
        read, write = os.pipe2(os.O_CLOEXEC)
        end = WriteEnd(write)

        def work() -> tuple[int, int]:
            with open(read, "rb", buffering=CHUNK_LIMIT) as source:
                done = tree.unpack(self.guest.root, header.path, source, *owner)
                while source.read(CHUNK_LIMIT):
                    pass  # what follows an archive's end is padding
                return done

        unpacking = in_thread(work)
        try:
            try:
                async for data in _chunks(requests):
                    await end.write(data)
            except BrokenPipeError:
                pass  # the thread has failed; its reason counts
            end.close()
            entries, size = await unpacking
        except OSError as error:
            raise from_os_error(error, header.path) from error
        finally:
            end.close()
            unpacking.cancel()
        return pb.WriteTreeResponse(entries=entries, size_bytes=size)

    @call()
    async def WatchFiles(self, _request: pb.WatchFilesRequest, _context: Any) -> None:
        """Not in this version."""
        raise not_implemented("WatchFiles")

    @property
    def _default(self) -> Owner:
        return Owner(self.guest.uid, self.guest.gid)


async def _blocking(
    path: str, work: Callable[[], _Result], undo: Callable[[_Result], object] | None = None
) -> _Result:
    """Run file work in a thread; its failure names the path.

    A thread cannot be cancelled, and it uses descriptors that the caller is about to close: a
    cancelled call waits for it first, and hands what it would have returned to `undo`.
    """
    thread = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait([thread])
        if thread.exception() is None and undo is not None:
            undo(thread.result())
        raise
    except OSError as error:
        raise from_os_error(error, path) from error


async def _header(requests: AsyncIterator[Any]) -> Any:
    first = await anext(aiter(requests), None)
    if first is None or not first.HasField("header"):
        raise invalid("the first message is `header`", reason="NO_HEADER")
    return first.header


async def _chunks(requests: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    async for request in requests:
        if not request.HasField("data"):
            raise invalid("all messages after the first are `data`", reason="NO_DATA")
        if len(request.data) > CHUNK_LIMIT:
            raise invalid(
                f"a chunk of {len(request.data)} bytes; the limit is {CHUNK_LIMIT}", reason="CHUNK_TOO_LARGE"
            )
        yield request.data


def _owner(user: pb.User) -> Owner:
    return Owner(user.uid, user.gid)


def _to_info(entry: Entry) -> pb.FileInfo:
    status = entry.status
    info = pb.FileInfo(
        path=os.fsencode(entry.path).decode(errors="replace"),
        type=_KINDS.get(stat.S_IFMT(status.st_mode), pb.FILE_TYPE_UNSPECIFIED),
        size_bytes=status.st_size,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        link_target=os.fsencode(entry.link).decode(errors="replace"),
    )
    info.modify_time.FromNanoseconds(status.st_mtime_ns)
    return info
