"""Disks of agents' programs: packages made by the real npm, hostile ones made by hand.

The real programs, 180 MB each to fetch, run in a box with `make test-agents`.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.common.errors import (
    Cancelled,
    Corrupt,
    InvalidInput,
    NotFound,
    Unavailable,
    VoidboxError,
    WrongState,
)
from services.imager.agent_packages import PINNED, AgentPackage, pinned_package
from services.imager.agents import AgentStore, absolute_package
from services.imager.cache import ImageCache
from services.imager.images import Catalog
from services.imager.limits import Cancel, Limits
from services.imager.prune import Housekeeper
from services.imager.stored import AGENT, stored_disks
from services.imager.terminal import network_env
from services.imager.verify import Verifier
from tests.imager_images import Item, check_ext4, directory, make_tar, need, run, symlink
from tests.vm import Client
from voidbox.hypervisor.v1 import hypervisor_pb2

REAL = pytest.mark.skipif(
    not os.environ.get("VOIDBOX_TEST_AGENTS"), reason="fetches 350 MB; `make test-agents` runs it"
)


def package_for(tarball: Path, **changes: str) -> AgentPackage:
    """A pin of `tarball`."""
    digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    pin = AgentPackage(
        agent="tiny", architecture="amd64", name="tiny", version="1.0.0", integrity=f"sha512-{digest}",
        root="package", program="bin/tiny",
    )  # fmt: skip
    return dataclasses.replace(pin, **changes)


@pytest.fixture
def tarball(tmp_path: Path) -> Path:
    """What `npm pack` makes of a package with one program."""
    source = tmp_path / "source"
    (source / "bin").mkdir(parents=True)
    (source / "bin/tiny").write_text("#!/bin/sh\necho tiny 1.0.0\n")
    (source / "bin/tiny").chmod(0o755)
    (source / "package.json").write_text('{"name": "tiny", "version": "1.0.0", "bin": "bin/tiny"}')
    run(need("npm", "npm"), "pack", "--silent", f"--pack-destination={tmp_path}",
        f"--cache={tmp_path / 'npm-cache'}", cwd=source)  # fmt: skip
    return tmp_path / "tiny-1.0.0.tgz"


def agents(tmp_path: Path, **env: str) -> AgentStore:
    """A store over an own cache; npm asks nobody unless told."""
    settings = {"npm_config_registry": "http://127.0.0.1:9/", "npm_config_fetch_retries": "0", **env}
    return AgentStore(ImageCache(tmp_path / "cache"), Limits(), settings)


def made_tarball(tmp_path: Path, items: list[Item]) -> Path:
    """A package by hand."""
    path = tmp_path / "made.tgz"
    path.write_bytes(gzip.compress(make_tar(items)))
    return path


def test_a_package_becomes_a_read_only_disk_with_its_program(tmp_path: Path, tarball: Path) -> None:
    store = agents(tmp_path)
    package = package_for(tarball)
    seen: set[str] = set()
    made = store.disk(package, tarball=tarball, report=lambda progress: seen.add(progress.action))
    assert seen == {"verify", "convert"}
    check_ext4(made.disk.path)
    listing = run(need("debugfs", "e2fsprogs"), "-R", "ls -l /bin", made.disk.path)
    assert re.search(r"100755 \(1\)\s+0\s+0\s+26 .* tiny", listing), listing
    assert "echo tiny" in run("debugfs", "-R", "cat /bin/tiny", made.disk.path)
    assert "read-only" in run("dumpe2fs", "-h", made.disk.path), "no kernel mounts it for writing"
    before = made.disk.path.stat().st_ino
    tarball.unlink()
    assert store.disk(package).disk.path.stat().st_ino == before, "found, not built again"


def test_the_same_package_gives_the_same_disk_everywhere(tmp_path: Path, tarball: Path) -> None:
    disks = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        disks.append(agents(tmp_path / place).disk(package_for(tarball), tarball=tarball).disk)
    assert disks[0].digest == disks[1].digest
    assert disks[0].path.read_bytes() == disks[1].path.read_bytes()


def test_a_package_with_another_hash_is_not_even_read(tmp_path: Path, tarball: Path) -> None:
    package = package_for(tarball)
    data = bytearray(tarball.read_bytes())
    data[len(data) // 2] ^= 1
    tarball.write_bytes(data)
    with pytest.raises(Corrupt, match="its hash is not the pinned one"):
        agents(tmp_path).disk(package, tarball=tarball)
    assert list((tmp_path / "cache/agents").iterdir()) == []
    with pytest.raises(Corrupt, match="no sha512 integrity hash"):
        agents(tmp_path).disk(package_for(tarball, integrity="sha1-AAAA"), tarball=tarball)


@pytest.mark.parametrize(
    ("items", "error", "why"),
    [
        ([Item(name=b"package/../../etc/passwd")], InvalidInput, "'..'"),
        ([Item(name=b"package/other")], Corrupt, "holds no bin/tiny"),
        ([Item(name=b"elsewhere/bin/tiny")], Corrupt, "holds no package"),
        ([directory(b"package/bin/tiny")], Corrupt, "is no file"),
        ([symlink(b"package/bin/tiny", b"/bin/sh")], Corrupt, "is no file"),
        ([symlink(b"package", b"/etc"), Item(name=b"package/bin/tiny")], Corrupt, "holds no bin/tiny"),
    ],
)
def test_a_pinned_package_of_the_wrong_shape_is_refused(
    tmp_path: Path, items: list[Item], error: type[VoidboxError], why: str
) -> None:
    made = made_tarball(tmp_path, items)
    with pytest.raises(error, match=re.escape(why)):
        agents(tmp_path).disk(package_for(made), tarball=made)
    assert list((tmp_path / "cache/agents").iterdir()) == []
    assert list((tmp_path / "cache/tmp").iterdir()) == []


def test_no_setuid_bit_or_foreign_owner_comes_with_a_package(tmp_path: Path) -> None:
    made = made_tarball(
        tmp_path,
        [
            Item(name=b"package/bin/tiny", data=b"x", mode=0o4777, uid=1000, gid=1000),
            Item(name=b"package/secret", mode=0o600),
        ],
    )
    disk = agents(tmp_path).disk(package_for(made), tarball=made).disk
    listing = run(need("debugfs", "e2fsprogs"), "-R", "ls -l /bin", disk.path)
    assert re.search(r"100755 \(1\)\s+0\s+0\s+1 .* tiny", listing), listing
    assert re.search(r"100644 \(1\) .* secret", run("debugfs", "-R", "ls -l /", disk.path))


def test_what_npm_cannot_do_is_told(tmp_path: Path, tarball: Path) -> None:
    package = package_for(tarball)
    with pytest.raises(Unavailable, match=r"npm cannot fetch tiny@1\.0\.0"):
        agents(tmp_path).disk(package)
    with pytest.raises(NotFound, match="cannot be read"):
        agents(tmp_path).disk(package, tarball=tmp_path / "absent.tgz")
    assert list((tmp_path / "cache/tmp").iterdir()) == []
    (tmp_path / "bin").mkdir()
    with pytest.raises(WrongState, match=r"npm is not installed.*--package"):
        agents(tmp_path, PATH=str(tmp_path / "bin")).disk(package)
    with pytest.raises(InvalidInput, match="absolute"):
        absolute_package("relative.tgz")


def test_cancelling_ends_npm_and_leaves_nothing(tmp_path: Path, tarball: Path) -> None:
    cancel = Cancel()
    program = tmp_path / "bin/npm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho $$ > $PIDFILE\nexec sleep 600\n")  # a registry that never answers
    program.chmod(0o755)
    pid_file = tmp_path / "pid"
    path = f"{program.parent}:{os.environ['PATH']}"

    def report(_: object) -> None:
        cancel.cancel()

    with pytest.raises(Cancelled):
        agents(tmp_path, PATH=path, PIDFILE=str(pid_file)).disk(
            package_for(tarball), cancel=cancel, report=report
        )
    assert list((tmp_path / "cache/tmp").iterdir()) == []
    if pid_file.exists() and (pid := pid_file.read_text().strip()):
        assert not Path(f"/proc/{pid}").exists()


def test_npm_that_was_killed_with_the_imager_leaves_nothing_behind(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from services.imager.cache import ImageCache\n"
        "with ImageCache(Path(sys.argv[1])).scratch_directory() as place:\n"
        "    (place / 'half.tgz').write_bytes(bytes(1000)); print('there', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert child.stdout is not None
    with child.stdout:
        child.stdout.readline()
        ImageCache(tmp_path)
        assert len(list((tmp_path / "tmp").iterdir())) == 1, "what is in use stays"
        child.kill()
        child.wait()
    ImageCache(tmp_path)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_damage_and_age_of_an_agents_disk_are_noticed(tmp_path: Path, tarball: Path) -> None:
    store = agents(tmp_path)
    package = package_for(tarball)
    disk = store.disk(package, tarball=tarball).disk
    catalog = Catalog(ImageCache(tmp_path / "cache"))
    verifier = Verifier(catalog, tmp_path, Limits())
    assert verifier.verify() == (1, [])
    with disk.path.open("r+b") as file:
        file.seek(disk.size_bytes - 10)
        file.write(b"damage")
    [damage] = verifier.verify()[1]
    assert (damage.kind, damage.path) == ("agent disk", disk.path)
    [damage] = verifier.verify(repair=True)[1]
    assert damage.removed
    assert list((tmp_path / "cache/agents").iterdir()) == []
    store.disk(package, tarball=tarball)
    keeper = Housekeeper(catalog)
    assert keeper.prune(older_than_seconds=3600)[0] == []
    os.utime(disk.path, (0, 0))
    removed, freed = keeper.prune(older_than_seconds=3600)
    assert removed == [f"agent disk tiny 1.0.0 {disk.digest}"]
    assert freed > 0
    assert list((tmp_path / "cache/agents").iterdir()) == []


def test_an_agents_disk_is_listed_and_removed_by_its_digest(tmp_path: Path, tarball: Path) -> None:
    disk = agents(tmp_path).disk(package_for(tarball), tarball=tarball).disk
    catalog = Catalog(ImageCache(tmp_path / "cache"))
    [item] = stored_disks(catalog.cache)
    assert (item.kind, item.name, item.digest, item.path) == (AGENT, "tiny 1.0.0", disk.digest, disk.path)
    keeper = Housekeeper(catalog)
    assert keeper.delete(disk.digest) == item.size_bytes > 0
    assert list((tmp_path / "cache/agents").iterdir()) == []
    with pytest.raises(NotFound, match="voidbox image ls"):
        keeper.delete(disk.digest)


def test_every_pin_is_whole_and_for_both_processors() -> None:
    for agent in json.loads(PINNED.read_bytes()):
        for architecture in ("amd64", "arm64"):
            package = pinned_package(agent, architecture)
            assert len(package.sha512) == 64
            assert package.version[0].isdigit()
    with pytest.raises(NotFound, match="there are: claude-code, codex"):
        pinned_package("cursor", "amd64")
    with pytest.raises(NotFound, match="there are: amd64, arm64"):
        pinned_package("codex", "s390x")


@REAL
@pytest.mark.vm
@pytest.mark.timeout(900)
async def test_the_real_agents_answer_in_a_box(client: Client, tmp_path: Path) -> None:
    """Fetched by the user's own npm, checked, written to disks, mounted, run."""
    store = AgentStore(ImageCache(tmp_path / "cache"), Limits(), network_env(os.environ))
    made = {
        agent: await asyncio.to_thread(store.disk, pinned_package(agent, "amd64"))
        for agent in ("claude-code", "codex")
    }
    disks = [
        hypervisor_pb2.Disk(base_path=str(one.disk.path), guest_path=f"/opt/agents/{agent}")
        for agent, one in made.items()
    ]
    await client.create("agents", disks=disks, resources={"memory_mib": 2048})
    try:
        for agent, one in made.items():
            started = time.monotonic()
            program = f"/opt/agents/{agent}/{one.package.program}"
            exit_, out, error = await client.run("agents", program, "--version")
            print(f"{agent}: {out.decode().strip()} in {time.monotonic() - started:.1f} s")
            assert exit_.exit_code == 0, error
            assert one.package.version.split("-")[0] in out.decode()
            exit_, _, _ = await client.run("agents", "sh", "-c", f"echo x > {program}", user="root")
            assert exit_.exit_code != 0
    finally:
        await client.delete("agents")
