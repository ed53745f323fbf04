"""`voidbox.imager.v1.ImagerService`: checks, converts, calls, converts."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

from services.common.errors import InvalidInput
from services.imager import convert
from services.imager.agent_packages import pinned_package
from services.imager.agents import AgentDisk, AgentStore, absolute_package
from services.imager.compression import compression_from
from services.imager.disk import Disk
from services.imager.export import PIECE, Export, pieces
from services.imager.guest_choice import Wish, choose_guest
from services.imager.guest_image import build_guest_image
from services.imager.guest_registry import GuestRegistry
from services.imager.guest_store import GuestImage
from services.imager.images import CachedImage
from services.imager.jobs import Jobs
from services.imager.limits import Cancel
from services.imager.manifest import host_default
from services.imager.outflow import outflow
from services.imager.progress import Progress, Report
from services.imager.prune import Housekeeper
from services.imager.pull import ImageStore
from services.imager.push import push_image
from services.imager.stored import StoredContent, stored_disks, stored_guests
from services.imager.verify import Verifier
from voidbox.common.v1 import common_pb2
from voidbox.imager.v1 import imager_pb2, imager_pb2_grpc

Context = Any
_MAX_PAGE: Final = 1000
_DEFAULT_PAGE: Final = 100
_TOKEN: Final = re.compile(r"[0-9]{1,9}")


class ImagerServicer(imager_pb2_grpc.ImagerServiceServicer):
    """Serves one image cache.

    Args:
        store: The images.
        jobs: Where blocking work runs.
        cache: The cache directory, which also holds guest images.
        environment: Kernel and initramfs of boxes whose spec names none.
        build_env: Extra environment of what builds fetch with (proxies, pip, npm).
    """

    def __init__(
        self, store: ImageStore, jobs: Jobs, *, cache: Path, environment: Wish, build_env: Mapping[str, str]
    ) -> None:
        self._store = store
        self._guests = GuestRegistry(store, cache)
        self._agents = AgentStore(store.cache, store.limits, build_env)
        self._keeper = Housekeeper(store.catalog, cache)
        self._verifier = Verifier(store.catalog, cache, store.limits)
        self._jobs = jobs
        self._cache = cache
        self._environment = environment
        self._build_env = dict(build_env)

    def _pull(self, request: Any, report: Report, cancel: Cancel) -> CachedImage:
        return self._store.pull(
            request.reference,
            policy=convert.policy_from(request.policy),
            platform=convert.platform_from(request.platform),
            insecure=request.insecure,
            cancel=cancel,
            report=report,
        )

    def _pull_any(self, request: Any, report: Report, cancel: Cancel) -> CachedImage | GuestImage:
        """An image, or a guest image if that is what the reference names."""
        try:
            return self._pull(request, report, cancel)
        except InvalidInput as error:
            if error.reason != "NOT_AN_IMAGE":
                raise
            try:
                return self._guests.pull(
                    request.reference,
                    policy=convert.policy_from(request.policy),
                    platform=convert.platform_from(request.platform),
                    insecure=request.insecure,
                    cancel=cancel,
                    report=report,
                )
            except InvalidInput as other:
                raise (error if other.reason == "NOT_A_GUEST_IMAGE" else other) from None

    async def PullImage(
        self, request: imager_pb2.PullImageRequest, context: Context
    ) -> AsyncIterator[imager_pb2.PullImageResponse]:
        work = self._jobs.stream(lambda report, cancel: self._pull_any(request, report, cancel))
        async with contextlib.aclosing(work) as items:
            async for item in items:
                if isinstance(item, Progress):
                    yield imager_pb2.PullImageResponse(progress=convert.progress_to(item))
                elif isinstance(item, GuestImage):
                    yield imager_pb2.PullImageResponse(guest_image=convert.guest_image_to(item))
                else:
                    yield imager_pb2.PullImageResponse(image=convert.image_to(item))

    async def BuildDisk(
        self, request: imager_pb2.BuildDiskRequest, context: Context
    ) -> AsyncIterator[imager_pb2.BuildDiskResponse]:
        free_mib = convert.free_mib_from(request.free_mib)

        def build(report: Report, cancel: Cancel) -> tuple[Disk, CachedImage]:
            image, disk = self._store.prepare(
                request.reference,
                free_mib=free_mib,
                policy=convert.policy_from(request.policy),
                platform=convert.platform_from(request.platform),
                insecure=request.insecure,
                cancel=cancel,
                report=report,
            )
            return disk, image

        async with contextlib.aclosing(self._jobs.stream(build)) as items:
            async for item in items:
                if isinstance(item, Progress):
                    yield imager_pb2.BuildDiskResponse(progress=convert.progress_to(item))
                else:
                    yield imager_pb2.BuildDiskResponse(disk=convert.disk_to(*item))

    async def GetImage(
        self, request: imager_pb2.GetImageRequest, context: Context
    ) -> imager_pb2.GetImageResponse:
        image = await self._jobs.run(lambda _: self._store.catalog.get(request.reference))
        return imager_pb2.GetImageResponse(image=convert.image_to(image))

    async def ListImages(
        self, request: imager_pb2.ListImagesRequest, context: Context
    ) -> imager_pb2.ListImagesResponse:
        if request.page_size < 0 or (request.page_token and not _TOKEN.fullmatch(request.page_token)):
            raise InvalidInput("page_size is negative or page_token is none of ours", reason="BAD_PAGE")
        size = min(request.page_size or _DEFAULT_PAGE, _MAX_PAGE)
        start = int(request.page_token or 0)
        images = await self._jobs.run(lambda _: self._store.catalog.list_images())
        stored: list[StoredContent] = []
        if request.include_stored and start == 0:
            stored = await self._jobs.run(
                lambda _: [*stored_guests(self._cache), *stored_disks(self._store.cache)]
            )
        more = start + size < len(images)
        return imager_pb2.ListImagesResponse(
            images=[convert.image_to(image) for image in images[start : start + size]],
            next_page_token=str(start + size) if more else "",
            stored=[convert.stored_to(item) for item in stored],
        )

    async def DeleteImage(
        self, request: imager_pb2.DeleteImageRequest, context: Context
    ) -> imager_pb2.DeleteImageResponse:
        freed = await self._jobs.run(lambda cancel: self._keeper.delete(request.reference, cancel))
        return imager_pb2.DeleteImageResponse(freed_bytes=freed)

    async def PruneImages(
        self, request: imager_pb2.PruneImagesRequest, context: Context
    ) -> imager_pb2.PruneImagesResponse:
        older = convert.seconds_from(request.older_than) if request.HasField("older_than") else None
        removed, freed = await self._jobs.run(
            lambda cancel: self._keeper.prune(
                max_size_bytes=request.max_size_bytes, older_than_seconds=older, cancel=cancel
            )
        )
        return imager_pb2.PruneImagesResponse(references=removed, freed_bytes=freed)

    async def VerifyImage(
        self, request: imager_pb2.VerifyImageRequest, context: Context
    ) -> imager_pb2.VerifyImageResponse:
        checked, found = await self._jobs.run_long(
            lambda cancel: self._verifier.verify(request.reference, repair=request.repair, cancel=cancel)
        )
        return imager_pb2.VerifyImageResponse(
            checked=checked,
            damaged=[damage.digest for damage in found],
            problems=[convert.damage_to(damage) for damage in found],
        )

    async def ExportImage(
        self, request: imager_pb2.ExportImageRequest, context: Context
    ) -> AsyncIterator[imager_pb2.ExportImageResponse]:
        format_ = convert.format_from(request.format)
        compression = compression_from(request.compression)
        image = await self._jobs.run(lambda _: self._store.catalog.get(request.reference))
        export = Export(store=self._store, image=image, format=format_, compression=compression)
        if not export.is_plain_disk:
            async with contextlib.aclosing(outflow(self._jobs, export.write, PIECE)) as flow:
                async for data in flow:
                    yield imager_pb2.ExportImageResponse(data=data)
            return
        with await self._jobs.run_long(export.open_disk) as disk:
            parts = pieces(disk)
            while (part := await self._jobs.run(lambda _: next(parts, None))) is not None:
                yield convert.piece_to(part)

    async def BuildGuestImage(
        self, request: imager_pb2.BuildGuestImageRequest, context: Context
    ) -> AsyncIterator[imager_pb2.BuildGuestImageResponse]:
        slim = convert.wants_slim_kernel(request.kernel)
        queue: asyncio.Queue[Progress | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def report(progress: Progress) -> None:  # it comes from threads, too
            loop.call_soon_threadsafe(queue.put_nowait, progress)

        task = asyncio.create_task(
            build_guest_image(
                self._cache,
                kernel="slim" if slim else "debian",
                progress=report,
                env=self._build_env,
                make_default=request.make_default,
            )
        )
        task.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (item := await queue.get()) is not None:
                yield imager_pb2.BuildGuestImageResponse(progress=convert.progress_to(item))
            image = task.result()
        finally:
            task.cancel()
        yield imager_pb2.BuildGuestImageResponse(guest_image=convert.guest_image_to(image))

    async def ResolveGuestImage(
        self, request: imager_pb2.ResolveGuestImageRequest, context: Context
    ) -> imager_pb2.ResolveGuestImageResponse:
        wish = Wish(kernel=request.kernel_path, initramfs=request.initramfs_path)
        policy = convert.policy_from(request.policy)
        choice = await self._jobs.run_long(
            lambda cancel: choose_guest(
                self._cache,
                spec=wish,
                environment=self._environment,
                guest_image=request.guest_image,
                pull=lambda reference: self._guests.pull(
                    reference, policy=policy, insecure=request.insecure, cancel=cancel
                ),
            )
        )
        return imager_pb2.ResolveGuestImageResponse(guest_image=convert.guest_to(choice))

    async def PushImage(
        self, request: imager_pb2.PushImageRequest, context: Context
    ) -> AsyncIterator[imager_pb2.PushImageResponse]:
        if request.guest_image:

            def push(report: Report, cancel: Cancel) -> str:
                return self._guests.push(
                    request.source, request.reference, insecure=request.insecure, cancel=cancel, report=report
                )
        else:

            def push(report: Report, cancel: Cancel) -> str:
                return push_image(
                    self._store,
                    request.source,
                    request.reference,
                    insecure=request.insecure,
                    cancel=cancel,
                    report=report,
                )

        async with contextlib.aclosing(self._jobs.stream(push)) as items:
            async for item in items:
                if isinstance(item, Progress):
                    yield imager_pb2.PushImageResponse(progress=convert.progress_to(item))
                else:
                    yield imager_pb2.PushImageResponse(digest=common_pb2.Digest(value=item))

    async def BuildAgentImage(
        self, request: imager_pb2.BuildAgentImageRequest, context: Context
    ) -> AsyncIterator[imager_pb2.BuildAgentImageResponse]:
        architecture = request.architecture or host_default().architecture
        package = pinned_package(request.agent, architecture)
        tarball = absolute_package(request.package_path)

        def build(report: Report, cancel: Cancel) -> AgentDisk:
            return self._agents.disk(package, tarball=tarball, cancel=cancel, report=report)

        async with contextlib.aclosing(self._jobs.stream(build)) as items:
            async for item in items:
                if isinstance(item, Progress):
                    yield imager_pb2.BuildAgentImageResponse(progress=convert.progress_to(item))
                else:
                    yield imager_pb2.BuildAgentImageResponse(disk=convert.agent_disk_to(item))
