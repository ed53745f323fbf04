"""Boxes taken from the warm pool are as good as any, and the pool makes way, refills and ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from services.common import process
from services.hypervisor import adoption, layout, record
from services.hypervisor.inotify import FileWatch
from tests.vm import Client, HypervisorProcess, box_config
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def service() -> Iterator[HypervisorProcess]:
    with HypervisorProcess(flags=["--pool-size", "1"]) as process_:
        yield process_


@pytest.fixture
async def pooling(service: HypervisorProcess) -> AsyncIterator[Client]:
    """A client of the service, once a machine waits in its pool."""
    async with service.connected() as client:
        await filled(service, client)
        yield client


async def filled(service: HypervisorProcess, client: Client) -> None:
    """Return once a machine waits."""
    request = pb.BuildTemplateRequest(config=box_config())
    with FileWatch(service.log) as written:
        while True:
            written.clear()
            template = (await client.hypervisor.BuildTemplate(request, timeout=120)).template
            if template.pooled:
                return
            async with asyncio.timeout(60):
                await written.wait()


@contextlib.contextmanager
def waiting(service: HypervisorProcess) -> Iterator[Callable[[], None]]:
    """The machine in the pool: what is yielded returns once its QEMU has ended."""
    (directory,) = service.layout.machines.iterdir()
    pidfd = os.pidfd_open(record.load(directory).vmm_pid)

    def its_end() -> None:
        assert select.select([pidfd], [], [], 60)[0], "it still runs"

    assert not select.select([pidfd], [], [], 0)[0]
    yield its_end
    os.close(pidfd)


async def test_a_box_from_the_pool_is_somebody_of_its_own(
    service: HypervisorProcess, pooling: Client
) -> None:
    first = await pooling.create("first")
    await filled(service, pooling)
    second = await pooling.create("second")
    assert (first.origin, second.origin) == ("pool", "pool")
    script = "cat /etc/machine-id /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; uname -n"
    outputs = [await pooling.run(name, "sh", "-c", script) for name in ("first", "second")]
    for mine, other in zip(*(out.decode().split() for _, out, _ in outputs), strict=True):
        assert mine != other
    assert (service.layout.box("first") / "secret").read_bytes() != (
        service.layout.box("second") / "secret"
    ).read_bytes()
    if os.geteuid() == 0:
        assert len({os.stat(f"/proc/{box.vmm_pid}").st_uid for box in (first, second)}) == 2
    for name in ("first", "second"):
        await pooling.delete(name)


async def test_a_box_from_the_pool_gets_its_disks(
    service: HypervisorProcess, pooling: Client, tmp_path: Path
) -> None:
    base, skill, tree = tmp_path / "root.ext4", tmp_path / "skill.ext4", tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (tree / "bin/busybox").chmod(0o755)
    (tree / "bin/sh").symlink_to("busybox")
    (tree / "marker").write_text("here")
    for path in (base, skill):
        await process.run(["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(path), "32M"])
    disks = [pb.Disk(base_path=str(skill), guest_path=f"/skills/{number}") for number in range(9)]
    box = await pooling.create("disks", root_disk=pb.Disk(base_path=str(base), writable=True), disks=disks)
    assert box.origin == "pool"
    script = "busybox cat /marker /skills/*/marker && echo new > /tmp/new && busybox cat /tmp/new"
    ended, out, error = await pooling.run("disks", "sh", "-c", script)
    assert (ended.exit_code, out) == (0, b"here" * 10 + b"new\n"), error
    await pooling.delete("disks")


async def test_boxes_and_what_waits_outlive_a_service_that_is_killed(
    service: HypervisorProcess, pooling: Client
) -> None:
    box = await pooling.create("survivor")
    await filled(service, pooling)
    (directory,) = service.layout.machines.iterdir()
    waits = record.load(directory)
    service.kill()
    service.restart()
    async with service.connected() as client:
        assert (await client.get("survivor")).vmm_pid == box.vmm_pid
        taken = await client.create("next")
        assert (taken.origin, taken.vmm_pid) == ("pool", waits.vmm_pid)
        assert not (service.layout.box("next") / adoption.NOTE).exists()
        script = "cat /etc/machine-id /proc/sys/kernel/random/uuid; uname -n"
        outputs = [await client.run(name, "sh", "-c", script) for name in ("survivor", "next")]
        for mine, other in zip(*(out.decode().split() for _, out, _ in outputs), strict=True):
            assert mine != other
        for name in ("survivor", "next"):
            await client.delete(name)


@pytest.mark.parametrize("why", ["it has died", "it runs", "it was on its way", "nobody wants it"])
async def test_what_cannot_go_on_waiting_is_ended_when_the_service_is_back(
    service: HypervisorProcess, pooling: Client, why: str
) -> None:
    (directory,) = service.layout.machines.iterdir()
    found = record.load(directory)
    with waiting(service) as its_end:
        service.kill()
        if why == "it has died":
            os.kill(found.shim_pid, signal.SIGKILL)
        elif why == "it runs":
            monitor(directory, "cont")
        elif why == "it was on its way":
            adoption.take_note(directory)
        service.restart(["--pool-size", "0"] if why == "nobody wants it" else None)
        its_end()
    assert not directory.exists()
    async with service.connected() as client:
        # Its template is the same; the first box after it is restored, and the pool filled again.
        assert (await client.create("next")).origin == "template"
        await client.delete("next")
    if why == "nobody wants it":
        service.kill()
        service.restart()


def monitor(directory: Path, command: str) -> None:
    """Have the machine in `directory` do something behind the service's back."""
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as lines:
        connection.connect(str(directory / layout.QMP_SOCKET))
        connection.settimeout(60)
        assert "QMP" in lines.readline()
        for each in ("qmp_capabilities", command):
            lines.write(json.dumps({"execute": each}) + "\n")
            lines.flush()
            while "return" not in json.loads(lines.readline()):
                pass


async def test_a_machine_that_dies_in_the_pool_is_not_given_out(
    service: HypervisorProcess, pooling: Client
) -> None:
    (directory,) = service.layout.machines.iterdir()
    os.kill(record.load(directory).shim_pid, 9)
    box = await pooling.create("replacement")
    assert box.origin in ("pool", "template")
    ended, _, _ = await pooling.run("replacement", "true")
    assert ended.exit_code == 0
    await pooling.delete("replacement")


async def test_a_service_that_ends_in_order_ends_its_pool(
    service: HypervisorProcess, pooling: Client
) -> None:
    with waiting(service) as its_end:
        service.stop()
        its_end()
    assert list(service.layout.machines.iterdir()) == []
    service.restart()
    async with service.connected() as client:
        await client.create("again")
        await client.delete("again")
