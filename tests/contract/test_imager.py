"""Every RPC of the imager on a real server over a unix socket: answers, refusals, cancellation.

The cache is real and the images are OCI layouts; only the guest image's build has its own tests.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from services.common.channel import open_channel
from services.common.errors import (
    Corrupt,
    InvalidInput,
    NotBuilt,
    NotFound,
    Unavailable,
    VoidboxError,
    WrongState,
    from_rpc_error,
)
from services.common.paths import Paths
from services.imager.__main__ import running
from services.imager.config import Config
from services.imager.ext4_format import SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, unpack_superblock
from tests.guest_images import guest_at
from tests.imager_images import Item, directory, make_layout, make_tar
from voidbox.imager.v1 import imager_pb2 as pb
from voidbox.imager.v1 import imager_pb2_grpc

TARS = [make_tar([directory(b"bin"), Item(name=b"bin/x", data=os.urandom(200_000), mode=0o755)])]
CONFIG = {
    "Entrypoint": ["/bin/x"],
    "Cmd": ["a", "b"],
    "Env": ["K=V"],
    "WorkingDir": "/bin",
    "User": "7:8",
    "Labels": {"l": "v"},
}
KERNEL = b"\x7fELF" + bytes(2000)


def head(path: Path) -> bytes:
    """The superblock."""
    with path.open("rb") as file:
        file.seek(SUPERBLOCK_OFFSET)
        return file.read(SUPERBLOCK_SIZE)


class Imager:
    """A running imager and a stub for it."""

    def __init__(self, stub: Any, cache: Path, layout: Path) -> None:
        self.stub = stub
        self.cache = cache
        self.layout = layout
        self.reference = f"oci:{layout}:t"

    async def all(self, call: Any) -> list[Any]:
        """All messages of a stream, or the error that ended it."""
        try:
            return [message async for message in call]
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def one(self, call: Any) -> Any:
        """The answer, or the error."""
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def pull(self, **more: Any) -> pb.Image:
        """Pull the layout's image."""
        request = pb.PullImageRequest(**{"reference": self.reference, **more})
        image: pb.Image = (await self.all(self.stub.PullImage(request)))[-1].image
        return image


@pytest.fixture
async def imager(tmp_path: Path) -> AsyncIterator[Imager]:
    layout = make_layout(tmp_path / "layout", TARS, config=CONFIG)
    with TemporaryDirectory(prefix="vb") as runtime:  # a unix socket's path is short
        paths = Paths(state=tmp_path / "state", cache=tmp_path / "cache", runtime=Path(runtime))
        async with running(Config(registry_attempts=1), paths, {}) as [address]:
            async with open_channel(address) as channel:
                yield Imager(imager_pb2_grpc.ImagerServiceStub(channel), paths.cache, layout)


def test_every_rpc_has_a_test_here() -> None:
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["ImagerService"].methods}
    text = Path(__file__).read_text()
    assert {name for name in methods if f"stub.{name}(" not in text} == set()


async def test_pull_reports_progress_and_ends_with_the_image(imager: Imager) -> None:
    messages = await imager.all(imager.stub.PullImage(pb.PullImageRequest(reference=imager.reference)))
    assert [message.WhichOneof("result") for message in messages[:-1]] == ["progress"] * (len(messages) - 1)
    image = messages[-1].image
    assert image.reference == imager.reference
    config = image.config
    assert (list(config.entrypoint), list(config.cmd), list(config.env)) == (["/bin/x"], ["a", "b"], ["K=V"])
    assert (config.working_dir, config.user, dict(config.labels)) == ("/bin", "7:8", {"l": "v"})
    [layer] = image.layers
    assert layer.digest.size_bytes == image.size_bytes > 200_000
    downloads = [message.progress for message in messages if message.progress.action == "download"]
    assert (downloads[-1].subject, downloads[-1].done, downloads[-1].total) == (
        layer.digest.value, layer.digest.size_bytes, layer.digest.size_bytes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "error", "why"),
    [
        ({"reference": ""}, InvalidInput, "empty"),
        ({"reference": "No"}, InvalidInput, "lower case"),
        ({"reference": "oci:relative"}, InvalidInput, "absolute"),
        ({"reference": "oci:/absent/dir"}, NotFound, "No such file"),
        ({"reference": "localhost:1/x"}, Unavailable, "not reachable"),
        ({"reference": "x", "policy": pb.PULL_POLICY_NEVER}, NotFound, "never"),
        ({"reference": "x", "policy": 99}, InvalidInput, "no pull policy"),
        ({"reference": "dir:/x"}, NotBuilt, "skopeo"),
        ({"reference": "oci-archive:/x.tar"}, NotFound, "No such file"),
        ({"reference": "docker-archive:x.tar"}, InvalidInput, "absolute"),
    ],
)
async def test_pull_refuses_clearly(
    imager: Imager, request_: dict[str, Any], error: type[VoidboxError], why: str
) -> None:
    with pytest.raises(error, match=why):
        await imager.all(imager.stub.PullImage(pb.PullImageRequest(**request_)))


async def test_another_platform_is_not_there(imager: Imager) -> None:
    with pytest.raises(NotFound, match="not for linux/s390x"):
        await imager.pull(platform=pb.Platform(architecture="s390x"))


async def test_a_disk_is_built_once_and_found_the_second_time(imager: Imager) -> None:
    call = imager.stub.BuildDisk(pb.BuildDiskRequest(reference=imager.reference))
    messages = await imager.all(call)
    disk = messages[-1].disk
    path = Path(disk.path)
    assert path.is_absolute()
    assert path.stat().st_size == disk.size_bytes > 1024 << 20
    assert path.stat().st_mode & 0o777 == 0o644
    assert unpack_superblock(await asyncio.to_thread(head, path)).blocks == disk.size_bytes // 4096
    assert (disk.format, disk.image.config.user) == ("raw", "7:8")
    before = path.stat().st_ino
    again = await imager.all(imager.stub.BuildDisk(pb.BuildDiskRequest(reference=imager.reference)))
    assert again[-1].disk.path == disk.path
    assert path.stat().st_ino == before
    assert not [message for message in again if message.progress.action == "convert"]
    roomy = await imager.all(
        imager.stub.BuildDisk(pb.BuildDiskRequest(reference=imager.reference, free_mib=2048))
    )
    assert roomy[-1].disk.digest != disk.digest
    with pytest.raises(InvalidInput, match="negative"):
        await imager.all(imager.stub.BuildDisk(pb.BuildDiskRequest(reference=imager.reference, free_mib=-1)))


async def test_many_callers_for_one_disk_get_the_same(imager: Imager) -> None:
    calls = [
        imager.all(imager.stub.BuildDisk(pb.BuildDiskRequest(reference=imager.reference))) for _ in range(20)
    ]
    assert len({messages[-1].disk.path for messages in await asyncio.gather(*calls)}) == 1


async def test_a_malformed_layer_is_named_with_its_entry(imager: Imager, tmp_path: Path) -> None:
    bad = make_layout(tmp_path / "bad", [make_tar([Item(name=b"ok"), Item(name=b"a/../../etc/passwd")])])
    with pytest.raises(
        InvalidInput, match=r"layer sha256:[0-9a-f]{64}, entry 'a/../../etc/passwd'"
    ) as caught:
        await imager.all(imager.stub.BuildDisk(pb.BuildDiskRequest(reference=f"oci:{bad}:t")))
    assert caught.value.metadata["entry"] == "a/../../etc/passwd"
    assert list((imager.cache / "images/disks").iterdir()) == []
    assert list((imager.cache / "images/tmp").iterdir()) == []


async def test_get_list_and_delete(imager: Imager) -> None:
    with pytest.raises(NotFound, match="voidbox image ls"):
        await imager.one(imager.stub.GetImage(pb.GetImageRequest(reference="absent")))
    with pytest.raises(InvalidInput):
        await imager.one(imager.stub.GetImage(pb.GetImageRequest(reference="NO")))
    image = await imager.pull()
    for reference in (image.reference, image.digest.value):
        got = await imager.one(imager.stub.GetImage(pb.GetImageRequest(reference=reference)))
        assert got.image.digest == image.digest
    freed = await imager.one(imager.stub.DeleteImage(pb.DeleteImageRequest(reference=image.reference)))
    assert freed.freed_bytes >= image.size_bytes
    with pytest.raises(NotFound):
        await imager.one(imager.stub.DeleteImage(pb.DeleteImageRequest(reference=image.reference)))
    assert (await imager.one(imager.stub.ListImages(pb.ListImagesRequest()))).images == []
    assert list((imager.cache / "images/blobs/sha256").iterdir()) == []


async def test_images_are_listed_in_pages(imager: Imager, tmp_path: Path) -> None:
    for number in range(5):
        layout = make_layout(tmp_path / f"l{number}", [make_tar([Item(name=b"f%d" % number)])])
        await imager.pull(reference=f"oci:{layout}:t")
    seen, token = [], ""
    while True:
        page = await imager.one(imager.stub.ListImages(pb.ListImagesRequest(page_size=2, page_token=token)))
        assert len(page.images) <= 2
        seen += [image.reference for image in page.images]
        token = page.next_page_token
        if not token:
            break
    assert seen == sorted(f"oci:{tmp_path}/l{number}:t" for number in range(5))
    for bad in ({"page_size": -1}, {"page_token": "x"}):
        with pytest.raises(InvalidInput, match="page"):
            await imager.one(imager.stub.ListImages(pb.ListImagesRequest(**bad)))


async def test_a_disk_that_a_snapshot_holds_is_not_removed(imager: Imager, tmp_path: Path) -> None:
    messages = await imager.all(imager.stub.BuildDisk(pb.BuildDiskRequest(reference=imager.reference)))
    path = Path(messages[-1].disk.path)
    (tmp_path / "snapshot").hardlink_to(path)
    with pytest.raises(WrongState, match="snapshot"):
        await imager.one(imager.stub.DeleteImage(pb.DeleteImageRequest(reference=imager.reference)))
    assert (
        list((await imager.one(imager.stub.PruneImages(pb.PruneImagesRequest(max_size_bytes=1)))).references)
        == []
    )
    assert path.exists()
    (tmp_path / "snapshot").unlink()
    await imager.one(imager.stub.DeleteImage(pb.DeleteImageRequest(reference=imager.reference)))
    assert not path.exists()


async def test_prune_removes_what_is_old_or_too_much_and_keeps_shared_layers(
    imager: Imager, tmp_path: Path
) -> None:
    image = await imager.pull()
    shared = make_layout(tmp_path / "shared", [*TARS, make_tar([Item(name=b"more")])])
    other = await imager.pull(reference=f"oci:{shared}:t")
    nothing = await imager.one(imager.stub.PruneImages(pb.PruneImagesRequest()))
    assert nothing.references == []
    prune = imager.stub.PruneImages
    hour = pb.PruneImagesRequest(older_than=Duration(seconds=3600))
    assert (await imager.one(prune(hour))).references == []
    for record in (imager.cache / "images/refs").iterdir():
        if json.loads(record.read_text())["reference"] == image.reference:
            os.utime(record, (0, 0))
    assert list((await imager.one(prune(hour))).references) == [image.reference]
    blob = imager.cache / "images/blobs/sha256" / image.layers[0].digest.value.removeprefix("sha256:")
    assert blob.exists(), "the other image has this layer, too"
    small = await imager.one(prune(pb.PruneImagesRequest(max_size_bytes=1)))
    assert list(small.references) == [other.reference]
    assert small.freed_bytes > 200_000
    with pytest.raises(InvalidInput, match="negative"):
        await imager.one(prune(pb.PruneImagesRequest(max_size_bytes=-1)))


def flip(path: Path, at: int) -> None:
    """Damage one byte, as a bad disk does: the length stays."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


async def test_verify_reports_damage_and_with_repair_removes_it_for_the_next_pull(imager: Imager) -> None:
    image = await imager.pull()
    verify = pb.VerifyImageRequest(reference=image.reference)
    sound = await imager.one(imager.stub.VerifyImage(verify))
    assert (sound.checked, list(sound.damaged)) == (3, [])
    digest = image.layers[0].digest.value
    blob = imager.cache / "images/blobs/sha256" / digest.removeprefix("sha256:")
    flip(blob, 100)
    for _ in range(2):  # asking changes nothing
        found = await imager.one(imager.stub.VerifyImage(verify))
        assert list(found.damaged) == [digest]
        [problem] = found.problems
        assert (problem.kind, problem.digest, problem.path) == ("blob", digest, str(blob))
        assert not problem.removed
    repair = pb.VerifyImageRequest(reference=image.reference, repair=True)
    found = await imager.one(imager.stub.VerifyImage(repair))
    assert [problem.removed for problem in found.problems] == [True]
    with pytest.raises(NotFound):
        await imager.one(imager.stub.GetImage(pb.GetImageRequest(reference=image.reference)))
    assert (await imager.pull()).digest == image.digest
    assert list((await imager.one(imager.stub.VerifyImage(verify))).damaged) == []


async def test_verify_writes_disks_again_and_finds_one_changed_bit(imager: Imager) -> None:
    disk = (await imager.all(imager.stub.BuildDisk(pb.BuildDiskRequest(reference=imager.reference))))[-1].disk
    everything = pb.VerifyImageRequest(repair=True)
    sound = await imager.one(imager.stub.VerifyImage(everything))
    assert (sound.checked, list(sound.problems)) == (4, [])
    flip(Path(disk.path), disk.size_bytes - 5)
    found = await imager.one(imager.stub.VerifyImage(everything))
    assert [(one.kind, one.digest, one.removed) for one in found.problems] == [
        ("disk", disk.digest.value, True)
    ]
    assert list((imager.cache / "images/disks").iterdir()) == []
    assert list((imager.cache / "images/tmp").iterdir()) == []
    again = await imager.all(imager.stub.BuildDisk(pb.BuildDiskRequest(reference=imager.reference)))
    assert again[-1].disk.path == disk.path
    assert list((await imager.one(imager.stub.VerifyImage(everything))).problems) == []


async def test_verify_finds_a_damaged_guest_image(imager: Imager) -> None:
    directory = imager.cache / "guest" / ("ab" * 32)
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text("{}")
    found = await imager.one(imager.stub.VerifyImage(pb.VerifyImageRequest()))
    assert [(one.kind, one.removed) for one in found.problems] == [("guest image", False)]
    found = await imager.one(imager.stub.VerifyImage(pb.VerifyImageRequest(repair=True)))
    assert [(one.kind, one.removed) for one in found.problems] == [("guest image", True)]
    assert list((imager.cache / "guest").iterdir()) == []


def file_digest(path: Path) -> bytes:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


async def test_guest_images_are_listed_when_asked_for_and_removed_unless_default(imager: Imager) -> None:
    default, other = guest_at(imager.cache, default=True), guest_at(imager.cache)
    plain = await imager.one(imager.stub.ListImages(pb.ListImagesRequest()))
    assert list(plain.stored) == []
    listed = await imager.one(imager.stub.ListImages(pb.ListImagesRequest(include_stored=True)))
    assert {(item.kind, item.name, item.digest.value, item.is_default) for item in listed.stored} == {
        ("guest image", "kernel 6.1.0-test (debian)", default, True),
        ("guest image", "kernel 6.1.0-test (debian)", other, False),
    }
    with pytest.raises(WrongState, match="default guest image"):
        await imager.one(imager.stub.DeleteImage(pb.DeleteImageRequest(reference=default)))
    freed = await imager.one(imager.stub.DeleteImage(pb.DeleteImageRequest(reference=other)))
    assert freed.freed_bytes > 100_000
    left = {path.name for path in (imager.cache / "guest").iterdir()}
    assert left == {"default", "lock", default.removeprefix("sha256:")}
    with pytest.raises(NotFound, match="voidbox image ls"):
        await imager.one(imager.stub.DeleteImage(pb.DeleteImageRequest(reference=other)))


async def exported(imager: Imager, **more: Any) -> bytes:
    """All bytes of an export, holes as zeros."""
    data = bytearray()
    request = pb.ExportImageRequest(reference=imager.reference, **more)
    for message in await imager.all(imager.stub.ExportImage(request)):
        assert len(message.data) <= 64 << 10
        assert bool(message.data) != bool(message.zeros)
        data += message.data + bytes(message.zeros)
    return bytes(data)


async def test_export_streams_the_ext4_file_with_its_holes(imager: Imager) -> None:
    disk = (await imager.all(imager.stub.BuildDisk(pb.BuildDiskRequest(reference=imager.reference))))[-1].disk
    digest = hashlib.sha256()
    request = pb.ExportImageRequest(reference=imager.reference, format=pb.EXPORT_FORMAT_EXT4)
    async for message in imager.stub.ExportImage(request):
        digest.update(message.data + bytes(message.zeros))
    assert digest.digest() == await asyncio.to_thread(file_digest, Path(disk.path))


async def test_export_streams_archives_in_each_compression(imager: Imager) -> None:
    await imager.pull()
    tar = await exported(imager, format=pb.EXPORT_FORMAT_TAR)
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        assert [(info.name, info.size) for info in archive] == [(".", 0), ("bin", 0), ("bin/x", 200_000)]
    packed = await exported(imager, format=pb.EXPORT_FORMAT_TAR, compression="gzip")
    assert gzip.decompress(packed) == tar
    assert (await exported(imager, format=pb.EXPORT_FORMAT_INITRAMFS)).startswith(b"070701")
    lz4 = await exported(imager, format=pb.EXPORT_FORMAT_INITRAMFS, compression="lz4")
    assert lz4.startswith(b"\x02\x21\x4c\x18")


async def test_export_refuses_what_it_cannot_do(imager: Imager) -> None:
    await imager.pull()
    for bad, why in (
        ({}, "name a format"),
        ({"format": 99}, "name a format"),
        ({"format": pb.EXPORT_FORMAT_EXT4, "compression": "rar"}, "no compression"),
    ):
        with pytest.raises(InvalidInput, match=why):
            await exported(imager, **bad)
    with pytest.raises(NotFound, match="voidbox image ls"):
        await imager.all(
            imager.stub.ExportImage(pb.ExportImageRequest(reference="absent", format=pb.EXPORT_FORMAT_TAR))
        )


async def test_an_export_that_nobody_reads_to_its_end_leaves_nothing(imager: Imager) -> None:
    await imager.pull()
    call = imager.stub.ExportImage(
        pb.ExportImageRequest(reference=imager.reference, format=pb.EXPORT_FORMAT_TAR)
    )
    assert await call.read()
    call.cancel()
    # Deleting waits for the work to have ended: it holds the lock that exports share.
    await imager.one(imager.stub.DeleteImage(pb.DeleteImageRequest(reference=imager.reference)))
    assert list((imager.cache / "images/tmp").iterdir()) == []


async def test_push_refuses_clearly(imager: Imager) -> None:
    """Pushing itself is tested with registries."""
    await imager.pull()
    for request, error, why in (
        ({"source": "absent", "reference": "localhost:1/x"}, NotFound, "voidbox image ls"),
        ({"source": imager.reference, "reference": "oci:/x"}, InvalidInput, "image export"),
        ({"source": imager.reference, "reference": "localhost:1/x"}, Unavailable, "not reachable"),
        ({"source": "default", "reference": "localhost:1/x", "guest_image": True}, NotFound, "make guest"),
    ):
        with pytest.raises(error, match=why):
            await imager.all(imager.stub.PushImage(pb.PushImageRequest(**request)))


async def test_an_agents_disk_is_refused_clearly(imager: Imager, tmp_path: Path) -> None:
    """Building it has its own tests."""
    wrong = tmp_path / "wrong.tgz"
    wrong.write_bytes(b"not the package")
    for request, error, why in (
        ({"agent": ""}, NotFound, "there are: claude-code, codex"),
        ({"agent": "codex", "architecture": "s390x"}, NotFound, "there are: amd64, arm64"),
        ({"agent": "codex", "package_path": "relative"}, InvalidInput, "absolute"),
        ({"agent": "codex", "package_path": "/absent"}, NotFound, "/absent"),
        ({"agent": "codex", "package_path": str(wrong)}, Corrupt, "not the pinned one"),
    ):
        with pytest.raises(error, match=why):
            await imager.all(imager.stub.BuildAgentImage(pb.BuildAgentImageRequest(**request)))


async def test_a_guest_image_build_checks_its_request_and_can_be_cancelled(imager: Imager) -> None:
    """The build itself has its own tests."""
    with pytest.raises(InvalidInput, match="no kernel flavor"):
        unknown = pb.BuildGuestImageRequest(kernel=99)  # type: ignore[arg-type]
        await imager.all(imager.stub.BuildGuestImage(unknown))
    call = imager.stub.BuildGuestImage(pb.BuildGuestImageRequest())
    call.cancel()
    assert (await imager.one(imager.stub.ListImages(pb.ListImagesRequest()))).images == []


async def test_resolve_takes_the_paths_of_the_spec(imager: Imager, tmp_path: Path) -> None:
    kernel, initramfs = tmp_path / "vmlinux", tmp_path / "initramfs"
    kernel.write_bytes(KERNEL)
    initramfs.write_bytes(b"070701")
    request = pb.ResolveGuestImageRequest(kernel_path=str(kernel), initramfs_path=str(initramfs))
    found = (await imager.one(imager.stub.ResolveGuestImage(request))).guest_image
    assert (found.kernel_path, found.initramfs_path, found.origin) == (str(kernel), str(initramfs), "spec")
    assert not found.HasField("digest")


async def test_resolve_without_anything_says_how_to_get_a_guest_image(imager: Imager) -> None:
    with pytest.raises(NotFound, match="make guest"):
        await imager.one(imager.stub.ResolveGuestImage(pb.ResolveGuestImageRequest()))


async def test_a_cancelled_build_ends_and_leaves_nothing(imager: Imager, tmp_path: Path) -> None:
    items = [Item(name=b"f%06d" % number, data=bytes(20_000)) for number in range(4000)]
    layout = make_layout(tmp_path / "large", [make_tar(items)], compression="none")
    await imager.pull(reference=f"oci:{layout}:t")  # else the disk may be whole before it is told of
    call = imager.stub.BuildDisk(pb.BuildDiskRequest(reference=f"oci:{layout}:t"))
    async for message in call:
        if message.progress.action == "convert":
            break
    call.cancel()
    # Deleting waits for the work to have ended: it holds the lock that builds share.
    with pytest.raises(NotFound):
        await imager.one(imager.stub.DeleteImage(pb.DeleteImageRequest(reference="absent")))
    assert list((imager.cache / "images/tmp").iterdir()) == []
    assert list((imager.cache / "images/disks").iterdir()) == []
