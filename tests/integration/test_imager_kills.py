"""Processes killed by SIGKILL at random moments, over and over on one cache: nothing they leave is trusted.

Pulls of guest images, disks of agents, exports and removals; pulls of images and their disks are in
`test_imager_cache`.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.imager.agents import AgentStore
from services.imager.cache import ImageCache
from services.imager.disk import build_disk
from services.imager.guest_store import guest_directories, load_guest_image
from services.imager.images import Catalog
from services.imager.limits import Cancel, Limits
from services.imager.prune import Housekeeper
from services.imager.tree_disk import build_tree_disk
from services.imager.verify import Verifier
from tests.guest_images import guest_at
from tests.imager_images import Item, directory, make_layout, make_tar
from tests.integration.test_imager_agents import made_tarball, package_for
from tests.integration.test_imager_push import guests, store
from tests.registries import docker_registry

WORKER = """
import io, os, sys
from pathlib import Path
from services.imager.agent_packages import AgentPackage
from services.imager.agents import AgentStore
from services.imager.cache import ImageCache
from services.imager.export import Export, ExportFormat
from services.imager.guest_registry import GuestRegistry
from services.imager.limits import Cancel, Limits
from services.imager.prune import Housekeeper
from services.imager.pull import ImageStore, PullPolicy
from services.imager.registry import RegistrySettings
what, root, *words = sys.argv[1:]
cache = Path(root)
images = ImageStore(ImageCache(cache / "images"), RegistrySettings())
def report(progress):
    print(progress.action, flush=True)
if what == "guest":
    GuestRegistry(images, cache).pull(words[0], policy=PullPolicy.ALWAYS, report=report)
elif what == "agent":
    package = AgentPackage(agent="tiny", architecture="amd64", name="tiny", version="1.0.0",
        integrity=words[1], root="package", program="bin/tiny")
    AgentStore(images.cache, Limits(), {}).disk(package, tarball=Path(words[0]), report=report)
elif what == "export":
    image = images.pull(words[0], report=report)
    class Out(io.RawIOBase):
        def writable(self): return True
        def write(self, data): print("write", flush=True); return len(data)
    Export(store=images, image=image, format=ExportFormat.TAR, compression="gzip").write(Out(), Cancel())
elif what == "remove":
    image = images.pull(words[0], report=report)
    images.disk(image, free_mib=8, report=report)
    Housekeeper(images.catalog).delete(words[0])
print("done", flush=True)
"""


def killed(chance: random.Random, reports: int, what: str, cache: Path, *words: str) -> None:
    """Start a worker, and kill it soon after some of its reports."""
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, what, str(cache), *words],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert worker.stdout is not None
    with worker.stdout:
        for _ in range(reports):
            worker.stdout.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(chance.uniform(0, 0.03))
        worker.send_signal(signal.SIGKILL)
        worker.wait()


def assert_sound(cache: Path) -> None:
    """Everything that has a name is what the name says."""
    catalog = Catalog(ImageCache(cache / "images"))
    _, damage = Verifier(catalog, cache, Limits()).verify()
    assert damage == []
    for image in guest_directories(cache):
        load_guest_image(cache, image.name)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


def test_a_killed_pull_of_a_guest_image_leaves_nothing_that_is_trusted(registry: str, tmp_path: Path) -> None:
    digest = guest_at(tmp_path / "source", size=6 << 20, default=True)
    name = f"{registry}/killed:v1"
    guests(tmp_path / "source").push("default", name)
    chance = random.Random(2)
    for reports in (2, 3, 4, 5, 6, 7, 8):
        killed(chance, reports, "guest", tmp_path / "cache", name)
        assert_sound(tmp_path / "cache")
    assert guests(tmp_path / "cache").pull(name).digest == digest
    assert_sound(tmp_path / "cache")
    left = {path.name for path in (tmp_path / "cache/guest").iterdir()}
    assert left == {digest.removeprefix("sha256:"), "lock"}


def test_a_killed_build_of_an_agents_disk_leaves_nothing_that_is_trusted(tmp_path: Path) -> None:
    tarball = made_tarball(
        tmp_path, [directory(b"package/bin"), Item(name=b"package/bin/tiny", data=os.urandom(8 << 20))]
    )
    package = package_for(tarball)
    chance = random.Random(3)
    cache = tmp_path / "cache"
    for reports in (1, 2, 4, 8, 9, 9, 9):
        killed(chance, reports, "agent", cache, str(tarball), package.integrity)
        assert_sound(cache)
    images = ImageCache(cache / "images")
    made = AgentStore(images, Limits(), {}).disk(package, tarball=tarball)
    assert_sound(cache)
    assert list((cache / "images/tmp").iterdir()) == []
    fresh = AgentStore(ImageCache(tmp_path / "fresh"), Limits(), {}).disk(package, tarball=tarball)
    assert fresh.disk.path.read_bytes() == made.disk.path.read_bytes()


@pytest.mark.parametrize("what", ["export", "remove"])
def test_a_killed_export_or_removal_leaves_nothing_that_is_trusted(tmp_path: Path, what: str) -> None:
    items = [Item(name=b"f%d" % number, data=os.urandom(2 << 20)) for number in range(4)]
    reference = f"oci:{make_layout(tmp_path / 'layout', [make_tar(items)], compression='none')}:t"
    chance = random.Random(4)
    cache = tmp_path / "cache"
    for reports in (3, 6, 8, 10):
        killed(chance, reports, what, cache, reference)
        assert_sound(cache)
    images = store(cache)
    images.disk(images.pull(reference), free_mib=8)
    assert_sound(cache)
    assert list((cache / "images/tmp").iterdir()) == []


def test_disks_of_directories_and_for_reading_only_are_verified_and_age(tmp_path: Path) -> None:
    (tmp_path / "skill").mkdir()
    (tmp_path / "skill/file").write_text("text")
    images = store(tmp_path)
    image = images.pull(f"oci:{make_layout(tmp_path / 'layout', [make_tar([Item(name=b'a')])])}:t")
    limits, cancel = Limits(), Cancel()
    tree = build_tree_disk(images.cache, tmp_path / "skill", limits=limits, cancel=cancel)
    plain = build_disk(images.cache, image.layers, read_only=True, limits=limits, cancel=cancel)
    verifier = Verifier(images.catalog, tmp_path, limits)
    assert verifier.verify() == (5, [])
    for disk in (tree, plain):
        with disk.path.open("r+b") as file:
            file.seek(disk.size_bytes - 1)
            file.write(b"\xff")
    assert sorted(damage.path for damage in verifier.verify()[1]) == sorted([tree.path, plain.path])
    keeper = Housekeeper(images.catalog)
    assert keeper.prune()[0] == []
    assert tree.path.exists(), "nothing refers to it, and it may be wanted any moment"
    os.utime(tree.path, (0, 0))
    assert keeper.prune(older_than_seconds=3600)[0] == [f"directory disk - {tree.digest}"]
    assert not tree.path.exists()


def test_many_processes_pull_one_guest_image_and_build_one_agents_disk(registry: str, tmp_path: Path) -> None:
    digest = guest_at(tmp_path / "source", size=2 << 20, default=True)
    name = f"{registry}/many:v1"
    guests(tmp_path / "source").push("default", name)
    tarball = made_tarball(
        tmp_path, [directory(b"package/bin"), Item(name=b"package/bin/tiny", data=os.urandom(1 << 20))]
    )
    words = [("guest", name), ("agent", str(tarball), package_for(tarball).integrity)] * 3
    cache = tmp_path / "cache"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, what, str(cache), *rest],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        )
        for what, *rest in words
    ]  # fmt: skip
    outputs = [worker.communicate()[0].splitlines() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 6
    assert [lines[-1] for lines in outputs] == ["done"] * 6
    assert sum(lines.count("convert") for lines in outputs) == 2, "begun and ended once"
    assert_sound(cache)
    assert [path.name for path in guest_directories(cache)] == [digest.removeprefix("sha256:")]
    assert len(list((cache / "images/agents").glob("*.ext4"))) == 1
