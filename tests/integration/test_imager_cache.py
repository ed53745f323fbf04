"""The cache under kills, full disks and many processes: nothing partial is ever trusted or left."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.errors import Cancelled, Corrupt, Exhausted
from services.imager.cache import ImageCache
from services.imager.limits import Cancel
from services.imager.prune import Housekeeper
from services.imager.pull import ImageStore
from services.imager.registry import RegistrySettings
from tests.imager_images import Item, check_ext4, directory, make_layout, make_tar, missing, run, sha256

WORKER = """
import sys
from pathlib import Path
from services.imager.cache import ImageCache
from services.imager.pull import ImageStore
from services.imager.registry import RegistrySettings
images = ImageStore(ImageCache(Path(sys.argv[1])), RegistrySettings())
def report(progress):
    print(progress.action, flush=True)
image = images.pull(sys.argv[2], report=report)
print(images.disk(image, free_mib=8, report=report).path, flush=True)
"""


def store(path: Path) -> ImageStore:
    """A store over the cache at `path`."""
    return ImageStore(ImageCache(path), RegistrySettings())


def start(cache: Path, reference: str) -> subprocess.Popen[str]:
    """Another process that pulls and builds."""
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(cache), reference],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def assert_sound(images: ImageStore) -> None:
    """Everything with a final name is whole."""
    root = images.cache.root
    for blob in (root / "blobs/sha256").iterdir():
        assert sha256(blob.read_bytes()) == f"sha256:{blob.name}"
    for disk in (root / "disks").glob("*.ext4"):
        check_ext4(disk)


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """Two layers, 24 MB of which do not compress."""
    chunk = os.urandom(6 << 20)
    lower = [Item(name=b"a%d" % number, data=chunk) for number in range(3)]
    upper = [directory(b"d"), Item(name=b"d/b", data=chunk), Item(name=b".wh.a1")]
    return make_layout(tmp_path / "layout", [make_tar(lower), make_tar(upper)])


def test_a_killed_pull_or_build_leaves_nothing_that_is_trusted(layout: Path, tmp_path: Path) -> None:
    """Killed after each of its first reports, at random moments soon after."""
    chance = random.Random(1)
    cache = tmp_path / "cache"
    for reports in [1, 2, 3, 4, 5, 6, 8, 10, 12]:
        worker = start(cache, f"oci:{layout}:t")
        assert worker.stdout is not None
        with worker.stdout:
            for _ in range(reports):
                worker.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(chance.uniform(0, 0.05))
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        assert_sound(store(cache))
    images = store(cache)
    image = images.pull(f"oci:{layout}:t")
    disk = images.disk(image, free_mib=8)
    assert_sound(images)
    assert list((cache / "tmp").iterdir()) == []
    fresh = store(tmp_path / "fresh")
    same = fresh.disk(fresh.pull(f"oci:{layout}:t"), free_mib=8)
    assert same.path.read_bytes() == disk.path.read_bytes()


def test_a_sweep_spares_what_a_living_process_writes(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    with cache.writing(tmp_path / "final") as file:
        file.write(b"x")
        ImageCache(tmp_path)
    assert (tmp_path / "final").read_bytes() == b"x"
    (tmp_path / "tmp/left").write_bytes(b"of a killed process")
    ImageCache(tmp_path)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_many_processes_pull_and_build_the_same_image_once(layout: Path, tmp_path: Path) -> None:
    workers = [start(tmp_path / "cache", f"oci:{layout}:t") for _ in range(5)]
    outputs = [worker.communicate()[0].splitlines() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 5
    assert len({lines[-1] for lines in outputs}) == 1
    assert sum("convert" in lines for lines in outputs) == 1
    assert_sound(store(tmp_path / "cache"))


@contextlib.contextmanager
def small_disk(place: Path, mib: int) -> Iterator[Path]:
    """A file system of a few MiB."""
    if os.geteuid() != 0:
        missing("mounting a small tmpfs needs root")
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", place)
    try:
        yield place
    finally:
        run("umount", place)


@pytest.mark.parametrize("mib", [4, 22, 30])
def test_a_full_disk_is_a_clear_error_and_leaves_nothing_behind(
    layout: Path, tmp_path: Path, mib: int
) -> None:
    """4 MiB end the first layer, 22 the second or the disk, 30 the disk."""
    with small_disk(tmp_path / "small", mib) as place:
        images = store(place)
        with pytest.raises(Exhausted, match=r"disk is full.*image prune.*VOIDBOX_CACHE_DIR") as caught:
            images.disk(images.pull(f"oci:{layout}:t"), free_mib=8)
        assert caught.value.reason == "DISK_FULL"
        assert list((place / "tmp").iterdir()) == []
        assert list((place / "disks").iterdir()) == []
        assert_sound(images)
        Housekeeper(images.catalog).prune(max_size_bytes=1)
        assert list((place / "blobs/sha256").iterdir()) == []


def test_a_damaged_layer_in_the_cache_is_noticed_removed_and_pulled_again(
    layout: Path, tmp_path: Path
) -> None:
    images = store(tmp_path / "cache")
    image = images.pull(f"oci:{layout}:t")
    blob = images.cache.blob_path(image.layers[0].digest)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    with pytest.raises(Corrupt, match=image.layers[0].digest):
        images.disk(image, free_mib=8)
    assert not blob.exists()
    assert list((images.cache.root / "disks").iterdir()) == []
    check_ext4(images.disk(images.pull(f"oci:{layout}:t"), free_mib=8).path)


def test_a_disk_that_was_cut_short_is_built_again(layout: Path, tmp_path: Path) -> None:
    images = store(tmp_path / "cache")
    image = images.pull(f"oci:{layout}:t")
    disk = images.disk(image, free_mib=8)
    os.truncate(disk.path, 1000)
    check_ext4(images.disk(image, free_mib=8).path)


def test_waiting_for_a_lock_can_be_cancelled(tmp_path: Path) -> None:
    cache = ImageCache(tmp_path)
    cancel = Cancel()
    with cache.lock("x", Cancel()):
        threading.Timer(0.1, cancel.cancel).start()
        with pytest.raises(Cancelled), cache.lock("x", cancel):
            pass
    with cache.lock("x", Cancel(), shared=True), cache.lock("x", Cancel(), shared=True):
        pass


def test_a_record_that_is_rubbish_is_as_good_as_none(layout: Path, tmp_path: Path) -> None:
    images = store(tmp_path / "cache")
    image = images.pull(f"oci:{layout}:t")
    [record] = (images.cache.root / "refs").iterdir()
    for text in ("", "[]", "{}", '{"manifest": "../../etc/passwd"}', '{"manifest": 5}', "\udcff"):
        record.write_text(text, errors="surrogateescape")
        assert images.catalog.list_images() == []
    assert images.pull(f"oci:{layout}:t").digest == image.digest
