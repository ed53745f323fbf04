"""Fake imager, hypervisor and guests for the orchestrator: real gRPC servers, boxes in memory.

A box is a dictionary of files and programs written in Python. The fakes keep what they
were asked, and can be stopped, restarted and made to fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import posixpath
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.common.errors import (
    AlreadyExists,
    Exhausted,
    InvalidInput,
    NotFound,
    VoidboxError,
    WrongState,
    abort,
)
from voidbox.guest.v1 import guest_pb2, guest_pb2_grpc
from voidbox.hypervisor.v1 import hypervisor_pb2, hypervisor_pb2_grpc
from voidbox.imager.v1 import imager_pb2, imager_pb2_grpc

OUT, ERR = 1, 2


@dataclass(eq=False)
class Box:
    """A micro-VM that is none."""

    id: str
    config: hypervisor_pb2.BoxConfig
    state: int = hypervisor_pb2.BOX_STATE_RUNNING
    reason: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    directories: set[str] = field(default_factory=set)
    processes: dict[str, Process] = field(default_factory=dict)

    def message(self) -> hypervisor_pb2.Box:
        return hypervisor_pb2.Box(
            id=self.id,
            config=self.config,
            state=hypervisor_pb2.BoxState.ValueType(self.state),
            reason=self.reason,
            boot_id=f"boot-of-{self.id}",
        )


class Process:
    """A program in a fake box: what a fake program has in its hands."""

    def __init__(self, box: Box, start: guest_pb2.ExecStart) -> None:
        self.box, self.start = box, start
        self.streams = {OUT: bytearray(), ERR: bytearray()}
        self.acked = {OUT: 0, ERR: 0}
        self.stdin = bytearray()
        self.stdin_closed = not start.stdin
        self.end: guest_pb2.ExecExit | None = None
        self.changed = asyncio.Condition()
        self.task: asyncio.Task[None] | None = None

    @property
    def args(self) -> list[str]:
        return list(self.start.args)

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def print(self, data: str | bytes, stream: int = OUT) -> None:
        self.streams[stream] += data.encode() if isinstance(data, str) else data
        await self._notify()

    async def read_stdin(self) -> bytes:
        async with self.changed:
            await self.changed.wait_for(lambda: self.stdin_closed)
        return bytes(self.stdin)

    async def take(self, chunk: guest_pb2.StdinChunk) -> None:
        if chunk.offset <= len(self.stdin):
            self.stdin += chunk.data[len(self.stdin) - chunk.offset :]
        self.stdin_closed |= chunk.eof
        await self._notify()

    async def run(self, program: Callable[[Process], Awaitable[int | None]]) -> None:
        limit = self.start.timeout.ToTimedelta().total_seconds() or None
        code, reason = 0, guest_pb2.KILL_REASON_UNSPECIFIED
        try:
            async with asyncio.timeout(limit):
                code = await program(self) or 0
        except TimeoutError:
            reason = guest_pb2.KILL_REASON_TIMEOUT
        except MemoryError:
            reason = guest_pb2.KILL_REASON_OUT_OF_MEMORY
        except asyncio.CancelledError:
            reason = guest_pb2.KILL_REASON_CANCELLED
        self.end = guest_pb2.ExecExit(
            exit_code=code & 0xFF if code >= 0 else 0,
            signal=9 if reason else max(0, -code),
            kill_reason=reason,
            stdout_bytes=len(self.streams[OUT]),
            stderr_bytes=len(self.streams[ERR]),
        )
        await self._notify()


Program = Callable[[Process], Awaitable[int | None]]


class Fakes:
    """One imager and one hypervisor with its boxes, on unix sockets in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.hypervisor_socket = directory / "hv.sock"
        self.imager_socket = directory / "im.sock"
        self.boxes: dict[str, Box] = {}
        self.programs: dict[str, Program] = {}
        self.created: list[str] = []
        self.deleted: list[str] = []
        self.most_at_once = 0
        self.create_error: VoidboxError | None = None
        self.create_hook: Callable[[str], Awaitable[None]] | None = None
        self.delete_hook: Callable[[], Awaitable[None]] | None = None
        self.room = 1000
        self.refused = 0
        self.image_requests: list[Any] = []
        self.changed = asyncio.Condition()
        self._servers: dict[str, grpc.aio.Server] = {}

    async def start(self, name: str = "") -> None:
        """Serve the service `name`, or both."""
        for service in (name,) if name else ("hypervisor", "imager"):
            server = grpc.aio.server()
            checker = health.aio.HealthServicer()
            health_pb2_grpc.add_HealthServicer_to_server(checker, server)
            await checker.set("", health_pb2.HealthCheckResponse.SERVING)
            if service == "hypervisor":
                hypervisor_pb2_grpc.add_HypervisorServiceServicer_to_server(_Hypervisor(self), server)  # type: ignore[abstract]
                guest_pb2_grpc.add_GuestServiceServicer_to_server(_Guest(self), server)  # type: ignore[abstract]
                server.add_insecure_port(f"unix:{self.hypervisor_socket}")
            else:
                imager_pb2_grpc.add_ImagerServiceServicer_to_server(_Imager(self), server)  # type: ignore[abstract]
                server.add_insecure_port(f"unix:{self.imager_socket}")
            await server.start()
            self._servers[service] = server

    async def stop(self, name: str = "") -> None:
        """Stop serving at once, as if killed; the boxes live on."""
        for service in (name,) if name else tuple(self._servers):
            await self._servers.pop(service).stop(None)

    async def close(self) -> None:
        await self.stop()
        tasks = [
            process.task for box in self.boxes.values() for process in box.processes.values() if process.task
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds."""
        async with asyncio.timeout(20), self.changed:
            await self.changed.wait_for(condition)

    async def kill_box(self, box_id: str, reason: str) -> None:
        """The box dies by itself."""
        box = self.boxes[box_id]
        box.state, box.reason = hypervisor_pb2.BOX_STATE_FAILED, reason
        for process in box.processes.values():
            assert process.task is not None
            process.task.cancel()
        await self.notify()

    def box_of(self, stage: str) -> Box:
        """The newest box of a stage."""
        found = [self.boxes[name] for name in self.created if name in self.boxes]
        return next(box for box in reversed(found) if box.config.labels["voidbox-stage"] == stage)


class _Base:
    def __init__(self, fakes: Fakes) -> None:
        self._fakes = fakes


def _answers(method: Callable[..., Awaitable[Any]]) -> Any:
    async def call(self: Any, request: Any, context: Any) -> Any:
        try:
            return await method(self, request, context)
        except VoidboxError as error:
            await abort(context, error)

    return call


class _Hypervisor(_Base, hypervisor_pb2_grpc.HypervisorServiceServicer):
    @_answers
    async def CreateBox(self, request: Any, context: Any) -> Any:  # noqa: N802
        fakes = self._fakes
        if fakes.create_error is not None:
            raise fakes.create_error
        box = fakes.boxes.get(request.box_id)
        if box is None and len(fakes.boxes) >= fakes.room:
            fakes.refused += 1
            raise Exhausted("the host has no memory left", reason="HOST_MEMORY")
        if box is None:
            box = Box(request.box_id, request.config)
            fakes.boxes[box.id] = box
            fakes.created.append(box.id)
            running = [b for b in fakes.boxes.values() if b.state == hypervisor_pb2.BOX_STATE_RUNNING]
            fakes.most_at_once = max(fakes.most_at_once, len(running))
            await fakes.notify()
            if fakes.create_hook is not None:
                await fakes.create_hook(box.id)
        elif box.config != request.config:
            raise AlreadyExists("another box")
        return hypervisor_pb2.CreateBoxResponse(box=box.message())

    @_answers
    async def GetBox(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.box_id not in self._fakes.boxes:
            raise NotFound(f"no box {request.box_id}", reason="NO_BOX")
        return hypervisor_pb2.GetBoxResponse(box=self._fakes.boxes[request.box_id].message())

    @_answers
    async def ListBoxes(self, request: Any, context: Any) -> Any:  # noqa: N802
        found = [
            box.message()
            for box in self._fakes.boxes.values()
            if all(box.config.labels.get(key) == value for key, value in request.labels.items())
        ]
        return hypervisor_pb2.ListBoxesResponse(boxes=found)

    async def WatchBoxes(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        fakes = self._fakes
        last = None
        while True:
            box = fakes.boxes.get(request.box_id)
            if box is None:
                gone = hypervisor_pb2.Box(id=request.box_id)
                yield hypervisor_pb2.WatchBoxesResponse(box=gone, deleted=True)
                return
            if box.state != last:
                last = box.state
                yield hypervisor_pb2.WatchBoxesResponse(box=box.message())
            async with fakes.changed:
                await fakes.changed.wait_for(partial(_moved, fakes, request.box_id, last))

    @_answers
    async def DeleteBox(self, request: Any, context: Any) -> Any:  # noqa: N802
        fakes = self._fakes
        if fakes.delete_hook is not None:
            await fakes.delete_hook()
        box = fakes.boxes.pop(request.box_id, None)
        if box is not None:
            fakes.deleted.append(box.id)
            for process in box.processes.values():
                assert process.task is not None
                process.task.cancel()
            await fakes.notify()
        return hypervisor_pb2.DeleteBoxResponse()


class _Guest(_Base, guest_pb2_grpc.GuestServiceServicer):
    def _box(self, context: Any) -> Box:
        box_id = dict(context.invocation_metadata()).get("voidbox-box-id")
        box = self._fakes.boxes.get(str(box_id))
        if box is None:
            raise NotFound(f"no box {box_id}", reason="NO_BOX")
        if box.state != hypervisor_pb2.BOX_STATE_RUNNING:
            raise WrongState(f"box {box_id} does not run", reason="BOX_NOT_RUNNING")
        return box

    @_answers
    async def GetGuest(self, request: Any, context: Any) -> Any:  # noqa: N802
        box = self._box(context)
        return guest_pb2.GetGuestResponse(boot_id=f"boot-of-{box.id}", kernel_release="6.1.0-fake")

    @_answers
    async def MakeDirectory(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._box(context).directories.add(request.path)
        return guest_pb2.MakeDirectoryResponse()

    @_answers
    async def WriteFile(self, requests: Any, context: Any) -> Any:  # noqa: N802
        box = self._box(context)
        header = (await anext(requests)).header
        data = b"".join([request.data async for request in requests])
        box.files[header.path] = data
        return guest_pb2.WriteFileResponse(size_bytes=len(data))

    @_answers
    async def WriteTree(self, requests: Any, context: Any) -> Any:  # noqa: N802
        box = self._box(context)
        header = (await anext(requests)).header
        data = b"".join([request.data async for request in requests])
        try:
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for member in tar:
                    content = tar.extractfile(member)
                    if content is not None:
                        box.files[posixpath.join(header.path, member.name)] = content.read()
        except tarfile.TarError as error:
            raise InvalidInput(f"not a tar archive: {error}", reason="BAD_TAR") from error
        box.directories.add(header.path)
        return guest_pb2.WriteTreeResponse()

    async def ReadFile(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        try:
            box = self._box(context)
            if request.path not in box.files:
                raise NotFound(f"no file {request.path}", reason="NO_FILE")
        except VoidboxError as error:
            await abort(context, error)
        data = box.files[request.path]
        for at in range(0, len(data), 65536):
            yield guest_pb2.ReadFileResponse(data=data[at : at + 65536])

    async def ReadTree(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        try:
            box = self._box(context)
            prefix = request.path + "/"
            found = {path[len(prefix) :]: data for path, data in box.files.items() if path.startswith(prefix)}
            if request.path in box.files:
                found[posixpath.basename(request.path)] = box.files[request.path]
            if not found and request.path not in box.directories:
                raise NotFound(f"no file {request.path}", reason="NO_FILE")
        except VoidboxError as error:
            await abort(context, error)
        yield guest_pb2.ReadTreeResponse(data=tar_of(found))

    async def Exec(self, requests: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        try:
            box = self._box(context)
            start = (await anext(requests)).start
            if start.exec_id in box.processes:
                raise AlreadyExists(f"exec {start.exec_id} exists", reason="EXEC_EXISTS")
            if start.program not in self._fakes.programs:
                raise NotFound(f"no program {start.program}", reason="PROGRAM_NOT_FOUND")
        except VoidboxError as error:
            await abort(context, error)
        process = Process(box, start)
        box.processes[start.exec_id] = process
        process.task = asyncio.create_task(process.run(self._fakes.programs[start.program]))
        await self._fakes.notify()
        async for event in _follow(process, requests, {OUT: 0, ERR: 0}):
            yield guest_pb2.ExecResponse(event=event)

    async def Attach(self, requests: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        try:
            box = self._box(context)
            request = (await anext(requests)).open
            process = box.processes.get(request.exec_id)
            if process is None:
                raise NotFound(f"no exec {request.exec_id}", reason="NO_EXEC")
        except VoidboxError as error:
            await abort(context, error)
        assert process is not None
        asked = {OUT: request.stdout_offset, ERR: request.stderr_offset}
        # Some bytes come again, as they may whenever a stream is taken up.
        offsets = {stream: max(process.acked[stream], at - 100) for stream, at in asked.items()}
        assert all(asked[stream] >= process.acked[stream] for stream in (OUT, ERR)), (
            "acknowledged bytes are gone"
        )
        async for event in _follow(process, requests, offsets):
            yield guest_pb2.AttachResponse(event=event)

    @_answers
    async def SignalExec(self, request: Any, context: Any) -> Any:  # noqa: N802
        process = self._box(context).processes.get(request.exec_id)
        if process is None:
            raise NotFound("no exec", reason="NO_EXEC")
        assert process.task is not None
        process.task.cancel()
        return guest_pb2.SignalExecResponse()

    @_answers
    async def DeleteExec(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._box(context).processes.pop(request.exec_id, None)
        return guest_pb2.DeleteExecResponse()


async def _follow(
    process: Process, requests: Any, offsets: dict[int, int]
) -> AsyncIterator[guest_pb2.ExecEvent]:
    async def take() -> None:
        async for request in requests:
            match request.input.WhichOneof("input"):
                case "stdin":
                    await process.take(request.input.stdin)
                case "ack":
                    ack = request.input.ack
                    assert ack.offset <= len(process.streams[ack.stream])
                    process.acked[ack.stream] = ack.offset

    taker = asyncio.create_task(take())
    try:
        started = guest_pb2.ExecStarted(
            exec_id=process.start.exec_id, pid=7, stdin_window_bytes=1 << 17, stdin_offset=len(process.stdin)
        )
        yield guest_pb2.ExecEvent(started=started)
        told = len(process.stdin)
        while True:
            for stream, data in process.streams.items():
                while offsets[stream] < len(data):
                    at = offsets[stream]
                    piece = bytes(data[at : at + 65536])
                    offsets[stream] += len(piece)
                    chunk = guest_pb2.OutputChunk(stream=stream, offset=at, data=piece)  # type: ignore[arg-type]
                    yield guest_pb2.ExecEvent(output=chunk)
            if len(process.stdin) > told:
                told = len(process.stdin)
                yield guest_pb2.ExecEvent(stdin_offset=told)
            if process.end is not None and all(offsets[s] == len(d) for s, d in process.streams.items()):
                yield guest_pb2.ExecEvent(exit=process.end)
                return
            async with process.changed:
                await process.changed.wait_for(partial(_news, process, offsets, told))
    finally:
        taker.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await taker


def _moved(fakes: Fakes, box_id: str, last: int | None) -> bool:
    box = fakes.boxes.get(box_id)
    return box is None or box.state != last


def _news(process: Process, offsets: dict[int, int], told: int) -> bool:
    fresh = any(offsets[stream] < len(data) for stream, data in process.streams.items())
    return process.end is not None or len(process.stdin) > told or fresh


class _Imager(_Base, imager_pb2_grpc.ImagerServiceServicer):
    @_answers
    async def ResolveGuestImage(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._fakes.image_requests.append(request)
        if request.kernel_path == "/missing":
            raise NotFound("kernel /missing does not exist", reason="NO_KERNEL")
        image = imager_pb2.GuestImage(
            kernel_path="/k/vmlinux", initramfs_path="/k/initramfs", origin="default"
        )
        return imager_pb2.ResolveGuestImageResponse(guest_image=image)

    async def BuildDisk(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self._fakes.image_requests.append(request)
        progress = imager_pb2.Progress(
            subject=request.reference, action="download", done=1, total=2, unit="bytes"
        )
        yield imager_pb2.BuildDiskResponse(progress=progress)
        disk = imager_pb2.DiskImage(path="/d/disk.ext4", format="raw")
        disk.digest.value = "sha256:" + "0" * 64
        yield imager_pb2.BuildDiskResponse(disk=disk)


def tar_of(files: dict[str, bytes]) -> bytes:
    """A tar archive of `files`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in sorted(files.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
