"""The small parts: checksums, hashes, extents, logins, guest choice, jobs, limits."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import struct
import threading
import zlib
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import (
    Cancelled,
    Corrupt,
    Exhausted,
    InvalidInput,
    NotFound,
    VoidboxError,
)
from services.imager.config import Config
from services.imager.crc32c import crc32c, crc32c_rows
from services.imager.credentials import Credentials, find_credentials
from services.imager.decompress import LayerReader
from services.imager.ext4_dirs import half_md4
from services.imager.ext4_extents import pack_extents
from services.imager.ext4_format import (
    Geometry,
    Group,
    pack_group,
    pack_superblock,
    unpack_group,
    unpack_superblock,
)
from services.imager.ext4_groups import count_bits, gaps, set_bits
from services.imager.guest_choice import Wish, choose_guest
from services.imager.guest_store import GuestImage, load_guest_image
from services.imager.jobs import Jobs
from services.imager.limits import Cancel
from services.imager.progress import Progress, Report
from services.imager.reference import RegistryReference, parse_reference
from services.imager.tree import Extent
from tests.imager_images import compress, need, run, sha256


def test_crc32c_of_the_known_vector() -> None:
    """RFC 3720, appendix B.4."""
    assert crc32c(0xFFFFFFFF, bytes(32)) ^ 0xFFFFFFFF == 0x8A9136AA
    assert crc32c(0xFFFFFFFF, b"123456789") ^ 0xFFFFFFFF == 0xE3069283


@given(
    st.integers(0, 2**32 - 1), st.lists(st.binary(min_size=16, max_size=16), max_size=20), st.integers(0, 16)
)
def test_many_checksums_at_once_are_the_single_ones(seed: int, rows: list[bytes], length: int) -> None:
    prefixes = b"".join(struct.pack("<I", number) for number in range(len(rows)))
    expected = [
        crc32c(crc32c(seed, struct.pack("<I", number)), row[:length]) for number, row in enumerate(rows)
    ]
    assert crc32c_rows(seed, b"".join(rows), 16, length, prefixes, 4) == expected


@pytest.mark.parametrize("name", ["a", "lost+found", "x" * 32, "y" * 33, "file-000123", "z" * 255])
def test_the_directory_hash_is_that_of_debugfs(name: str) -> None:
    """For ASCII signed and unsigned hash are the same; other names are left to e2fsck and the kernel."""
    seed = bytes(range(16))
    text = "00010203-0405-0607-0809-0a0b0c0d0e0f"
    out = run(need("debugfs", "e2fsprogs"), "-R", f"dx_hash -h half_md4 -s {text} {name}")
    found = re.search(r"is (0x[0-9a-f]+)", out)
    assert found is not None
    others = [b"x" * length for length in range(256)] * 5
    hashes = half_md4([*others, name.encode(), *others], struct.unpack("<4I", seed))
    assert hashes[len(others)] == int(found[1], 16)
    assert hashes[: len(others)] == hashes[len(others) + 1 :]
    assert half_md4([name.encode()], struct.unpack("<4I", seed)) == [int(found[1], 16)]


@pytest.mark.parametrize("count", [0, 1, 4, 5, 340, 341, 1360, 1361, 200_000])
def test_extent_trees_of_any_length_hold_every_extent(count: int) -> None:
    blocks: dict[int, bytes] = {}

    def allocate(block: bytearray) -> int:
        number = 1000 + len(blocks)
        blocks[number] = bytes(block)
        return number

    extents = [Extent(3 * number, 10**6 + 5 * number, 2) for number in range(count)]
    root, taken = pack_extents(extents, allocate)
    assert (len(root), taken) == (60, len(blocks))

    def leaves(node: bytes) -> list[tuple[int, int, int]]:
        magic, entries, limit, depth = struct.unpack_from("<HHHH", node)
        assert magic == 0xF30A
        assert entries <= limit
        found = []
        for at in range(12, 12 + 12 * entries, 12):
            if depth:
                _, low, high = struct.unpack_from("<IIH", node, at)
                found += leaves(blocks[low | high << 32])
            else:
                logical, length, high, low = struct.unpack_from("<IHHI", node, at)
                found.append((logical, low | high << 32, length))
        return found

    assert leaves(root) == [tuple(extent) for extent in extents]


def test_long_extents_are_split() -> None:
    root, _ = pack_extents([Extent(0, 7, 100_000)], lambda _: 0)
    found = [struct.unpack_from("<IHHI", root, at) for at in (12, 24, 36, 48)]
    assert [(logical, length, low) for logical, length, _, low in found] == [
        (0, 32768, 7), (32768, 32768, 32775), (65536, 32768, 65543), (98304, 1696, 98311),
    ]  # fmt: skip


def test_superblock_and_descriptors_are_read_back() -> None:
    geometry = Geometry(
        blocks=1 << 28,
        inodes_per_group=8192,
        free_blocks=(1 << 28) - 5,
        free_inodes=9,
        uuid=b"u" * 16,
        hash_seed=b"h" * 16,
    )
    block = pack_superblock(geometry)
    assert unpack_superblock(block) == geometry
    with pytest.raises(ValueError, match="damaged"):
        unpack_superblock(block[:-5] + b"x" + block[-4:])
    with pytest.raises(ValueError, match="no ext4"):
        unpack_superblock(bytes(1024))
    group = Group(
        block_bitmap=1 << 33,
        inode_bitmap=5,
        inode_table=1 << 32,
        free_blocks=70_000,
        free_inodes=9,
        directories=4,
        unused_inodes=3,
        block_bitmap_csum=0x12345678,
        inode_bitmap_csum=0x9ABCDEF0,
    )
    assert unpack_group(pack_group(group, 3, 0)) == group


@given(st.integers(0, 300), st.integers(0, 300))
def test_bits_are_set_one_by_one_or_at_once(first: int, count: int) -> None:
    bitmap = bytearray(4096)
    set_bits(bitmap, first, count)
    assert count_bits(bitmap, 0) == count
    assert all(bitmap[bit // 8] >> bit % 8 & 1 == (first <= bit < first + count) for bit in range(700))


def test_gaps_are_what_ranges_leave() -> None:
    assert gaps([], 5, 9) == [(5, 4)]
    assert gaps([(5, 2), (8, 1)], 5, 9) == [(7, 1)]
    assert gaps([(6, 1)], 5, 9) == [(5, 1), (7, 2)]


# --- decompression -------------------------------------------------------------------------------


def unpacked(
    blob: bytes, tar: bytes | None, *, limit: int = 1 << 30, digest: str = "", size: int = -1
) -> bytes:
    with LayerReader(
        io.BytesIO(blob),
        digest=digest or sha256(blob),
        size=len(blob) if size < 0 else size,
        diff_id=None if tar is None else sha256(tar),
        limit=limit,
    ) as reader:
        return b"".join(reader)


@pytest.mark.parametrize("how", ["none", "gzip", "zstd"])
@pytest.mark.parametrize("data", [b"", b"x", os.urandom(3 << 20), bytes(20 << 20)])
def test_every_compression_gives_the_tar_back(how: str, data: bytes) -> None:
    assert unpacked(compress(data, how), data) == data


def test_frames_and_members_may_follow_each_other() -> None:
    assert unpacked(compress(b"a", "zstd") + compress(b"b", "zstd"), b"ab") == b"ab"
    assert unpacked(b"\x50\x2a\x4d\x18\x04\0\0\0skip" + compress(b"b", "zstd"), b"b") == b"b"
    assert unpacked(compress(b"a", "gzip") + bytes(100) + compress(b"b", "gzip") + bytes(9), b"ab") == b"ab"


@pytest.mark.parametrize("how", ["gzip", "zstd"])
def test_every_cut_of_a_blob_is_noticed(how: str) -> None:
    data = os.urandom(50_000)
    blob = compress(data, how)
    for at in range(4, len(blob), 4999):
        with pytest.raises(Corrupt):
            unpacked(blob[:at], data)


def test_what_is_wrong_is_named() -> None:
    data = os.urandom(1000)
    blob = compress(data, "gzip")
    other = "sha256:" + "0" * 64
    for tar in (None, b"other"):  # the wrong blob is the deeper cause of a wrong tar
        with pytest.raises(Corrupt, match="has the digest"):
            unpacked(blob, tar, digest=other)
    with pytest.raises(Corrupt, match="has the digest"):
        unpacked(blob[:-9], data, digest=other, size=len(blob) - 9)
    assert unpacked(blob, data, digest=other) == data  # the right tar is what counts
    with pytest.raises(Corrupt, match="its descriptor says 5"):
        unpacked(blob, data, size=5)
    with pytest.raises(Corrupt, match="config says"):
        unpacked(blob, b"other")
    with pytest.raises(Corrupt, match="cannot be decompressed"):
        unpacked(blob + b"rubbish", data)


@pytest.mark.parametrize("how", ["gzip", "zstd"])
def test_a_bomb_stops_at_the_limit_with_little_memory(how: str) -> None:
    bomb = compress(bytes(200 << 20), how)
    assert len(bomb) < 1 << 20
    with pytest.raises(Exhausted, match="raise the limit"):
        unpacked(bomb, b"", limit=10 << 20)


def test_a_zstd_window_that_asks_for_gigabytes_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, strategy=1)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    blob = compressor.compress(os.urandom(100)) + compressor.flush()
    with pytest.raises(Corrupt, match="decompressed"):
        unpacked(blob, b"")


def test_a_damaged_layer_that_cannot_be_read_further_is_never_a_short_one() -> None:
    """The cause is looked for in the rest of the blob, and the disk fails while it is."""
    blob = zlib.compress(os.urandom(1 << 20), 1, wbits=31)
    damaged = blob[:600_000] + bytes(100_000)

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            if not data:
                raise OSError(5, "Input/output error")
            return data

    with (
        LayerReader(
            Failing(damaged), digest=sha256(blob), size=len(blob), diff_id=sha256(b""), limit=1 << 30
        ) as reader,
        pytest.raises(Corrupt, match=r"cannot be read: .*Input/output error"),
    ):
        for _ in reader:
            pass


def test_leaving_early_ends_the_thread() -> None:
    before = threading.active_count()
    blob = zlib.compress(bytes(50 << 20), 1, wbits=31)
    with LayerReader(
        io.BytesIO(blob), digest=sha256(blob), size=len(blob), diff_id=None, limit=1 << 30
    ) as reader:
        next(reader)
    assert threading.active_count() == before


# --- logins --------------------------------------------------------------------------------------


def reference(text: str) -> RegistryReference:
    parsed = parse_reference(text)
    assert isinstance(parsed, RegistryReference)
    return parsed


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


TEAM = {"r.example/team": {"auth": encoded("team:secret")}, "r.example": {"auth": encoded("u:p")}}


@pytest.mark.parametrize(
    ("auths", "image", "expected"),
    [
        ({"ghcr.io": {"auth": encoded("u:p")}}, "ghcr.io/a/b", ("u", "p")),
        ({"ghcr.io": {"auth": encoded("u:p:q")}}, "ghcr.io/a/b", ("u", "p:q")),
        ({"https://index.docker.io/v1/": {"auth": encoded("u:p")}}, "alpine", ("u", "p")),
        ({"docker.io": {"username": "u", "password": "p"}}, "alpine", ("u", "p")),
        ({"https://r.example:5000": {"auth": encoded("u:p")}}, "r.example:5000/x", ("u", "p")),
        (TEAM, "r.example/team/x", ("team", "secret")),
        (TEAM, "r.example/teams/x", ("u", "p")),
        ({"other.example": {"auth": encoded("u:p")}}, "r.example/x", None),
        ({"r.example": {"auth": "!!!"}}, "r.example/x", None),
        ({"r.example": {"auth": encoded("no colon")}}, "r.example/x", None),
        ({"r.example": 5}, "r.example/x", None),
        (5, "r.example/x", None),
    ],
)  # fmt: skip
def test_logins_are_found_as_docker_and_podman_find_them(
    tmp_path: Path, auths: object, image: str, expected: tuple[str, str] | None
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"auths": auths}))
    found = find_credentials([tmp_path / "absent", path], reference(image))
    assert found == (Credentials(*expected) if expected else None)
    assert "secret" not in repr(found)


def test_a_login_file_that_is_rubbish_is_logged_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "config.json"
    for text in ("{", "[]", "[" * 100_000):
        path.write_text(text)
        assert find_credentials([path], reference("x")) is None
    assert "cannot be read" in caplog.text


def test_login_files_are_looked_for_where_docker_and_podman_keep_them() -> None:
    env = {"HOME": "/h", "XDG_RUNTIME_DIR": "/r"}
    files = Config(auth_file=Path("/a")).registry(env).auth_files
    assert [str(path) for path in files] == [
        "/a", "/r/containers/auth.json", f"/run/containers/{os.getuid()}/auth.json",
        "/h/.config/containers/auth.json", "/h/.docker/config.json", "/h/.dockercfg",
    ]  # fmt: skip


# --- the guest image -----------------------------------------------------------------------------

NONE = Wish(kernel="", initramfs="")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A cache with a default guest image, and kernels beside it."""
    (tmp_path / "vmlinux").write_bytes(b"\x7fELF" + bytes(1000))
    (tmp_path / "bzImage").write_bytes(bytes(0x202) + b"HdrS" + bytes(600))
    (tmp_path / "text").write_text("no kernel")
    (tmp_path / "initramfs").write_bytes(b"070701")
    digest = "sha256:" + "ab" * 32
    image = tmp_path / "guest" / ("ab" * 32)
    image.mkdir(parents=True)
    (image / "vmlinux").write_bytes(b"\x7fELF")
    (image / "initramfs.cpio").write_bytes(b"0707")
    manifest = {
        "digest": digest,
        "kernel": {"release": "6.1", "flavor": "debian", "size": 4},
        "initramfs": {"size": 4},
    }
    (image / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "guest/default").symlink_to("ab" * 32)
    return tmp_path


def no_pull(reference: str) -> GuestImage:
    """For what needs no registry."""
    raise AssertionError(f"{reference} is not to be pulled")


def test_what_is_named_first_wins(files: Path) -> None:
    spec = Wish(kernel=str(files / "vmlinux"), initramfs=str(files / "initramfs"))
    environment = Wish(kernel=str(files / "bzImage"), initramfs=str(files / "initramfs"))
    digest = "sha256:" + "ab" * 32
    chosen = choose_guest(files, spec=spec, environment=environment, guest_image=digest, pull=no_pull)
    assert (chosen.origin, chosen.kernel, chosen.digest) == ("spec", files / "vmlinux", "")
    chosen = choose_guest(files, spec=NONE, environment=environment, guest_image=digest, pull=no_pull)
    assert (chosen.origin, chosen.kernel) == ("environment", files / "bzImage")
    chosen = choose_guest(files, spec=NONE, environment=NONE, guest_image=digest, pull=no_pull)
    assert (chosen.origin, chosen.digest, chosen.release) == ("image", digest, "6.1")
    chosen = choose_guest(files, spec=NONE, environment=NONE, guest_image="", pull=no_pull)
    assert (chosen.origin, chosen.digest) == ("default", digest)


def test_a_kernel_alone_gets_the_default_initramfs(files: Path) -> None:
    wish = Wish(kernel=str(files / "vmlinux"), initramfs="")
    chosen = choose_guest(files, spec=wish, environment=NONE, guest_image="", pull=no_pull)
    assert chosen.initramfs.name == "initramfs.cpio"


@pytest.mark.parametrize(
    ("kernel", "initramfs", "error", "why"),
    [
        ("absent", "initramfs", NotFound, r"sandbox.kernel: .*absent: No such file"),
        ("vmlinux", "absent", NotFound, r"sandbox.initramfs: .*absent: No such file"),
        ("", "initramfs", InvalidInput, "needs its kernel"),
        ("text", "initramfs", InvalidInput, "no Linux kernel"),
        ("guest", "initramfs", InvalidInput, "not a regular file"),
    ],
)
def test_what_is_named_and_wrong_is_an_error_never_passed_over(
    files: Path, kernel: str, initramfs: str, error: type[VoidboxError], why: str
) -> None:
    wish = Wish(kernel=kernel and str(files / kernel), initramfs=initramfs and str(files / initramfs))
    with pytest.raises(error, match=why):
        choose_guest(files, spec=wish, environment=NONE, guest_image="default", pull=no_pull)


def test_relative_paths_and_absent_digests_are_refused(files: Path) -> None:
    with pytest.raises(InvalidInput, match=r"VOID_BOX_KERNEL.*absolute"):
        choose_guest(
            files, spec=NONE, environment=Wish(kernel="vmlinux", initramfs=""), guest_image="", pull=no_pull
        )
    with pytest.raises(NotFound):
        choose_guest(files, spec=NONE, environment=NONE, guest_image="sha256:" + "0" * 64, pull=no_pull)
    with pytest.raises(NotFound, match="make guest"):
        choose_guest(files / "empty", spec=NONE, environment=NONE, guest_image="", pull=no_pull)


def test_a_reference_is_pulled(files: Path) -> None:
    asked = []

    def pull(reference: str) -> GuestImage:
        asked.append(reference)
        return load_guest_image(files)

    chosen = choose_guest(files, spec=NONE, environment=NONE, guest_image="host.example/guest:1", pull=pull)
    assert (asked, chosen.origin, chosen.release) == (["host.example/guest:1"], "image", "6.1")


# --- jobs ----------------------------------------------------------------------------------------


async def test_a_job_streams_its_progress_and_ends_with_its_result() -> None:
    def work(report: Report, cancel: Cancel) -> str:
        for done in range(1000):
            report(Progress(subject="s", action="a", done=done, total=1000))
        report(Progress(subject="s", action="a", done=1000, total=1000))
        return "result"

    async with Jobs() as jobs:
        items = [item async for item in jobs.stream(work)]
    assert items[-1] == "result"
    assert isinstance(items[-2], Progress)
    assert items[-2].done == 1000
    assert len(items) < 100, "what comes too fast is dropped"


async def test_leaving_a_stream_cancels_its_work() -> None:
    ended = threading.Event()

    def work(report: Report, cancel: Cancel) -> None:
        report(Progress(subject="s", action="a"))
        cancel.event.wait(60)
        ended.set()

    async with Jobs() as jobs:
        stream = jobs.stream(work)
        assert await anext(stream)
        await stream.aclose()
    assert ended.is_set(), "the jobs' end waits for it"


async def test_an_error_of_a_job_is_raised_to_its_caller() -> None:
    def work(cancel: Cancel) -> None:
        raise NotFound("absent")

    async with Jobs() as jobs:
        with pytest.raises(NotFound, match="absent"):
            await asyncio.wait_for(jobs.run(work), 10)


def test_cancel_calls_its_closers_once_and_at_once_when_late() -> None:
    cancel = Cancel()
    calls: list[str] = []
    cancel.on_cancel(lambda: calls.append("a"))
    forgotten = lambda: calls.append("b")  # noqa: E731
    cancel.on_cancel(forgotten)
    cancel.forget(forgotten)
    cancel.cancel()
    cancel.cancel()
    cancel.on_cancel(lambda: calls.append("late"))
    assert calls == ["a", "late"]
    with pytest.raises(Cancelled):
        cancel.check()
