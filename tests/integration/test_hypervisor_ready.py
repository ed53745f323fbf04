"""Boxes are restored into machines that were started ahead, and those make way and end in order."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.hypervisor import record
from services.hypervisor.inotify import FileWatch
from tests.vm import Client, HypervisorProcess, box_config
from voidbox.common.v1 import common_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def service() -> Iterator[HypervisorProcess]:
    with HypervisorProcess(flags=["--ready-size", "1", "--pool-size", "0"]) as process_:
        yield process_


async def waiting(service: HypervisorProcess, client: Client) -> Path:
    """The directory of the machine that waits, once one does."""
    await client.hypervisor.BuildTemplate(pb.BuildTemplateRequest(config=box_config()), timeout=120)
    with FileWatch(service.log) as written:
        while True:
            written.clear()
            said = service.log.read_text()
            for directory in service.layout.machines.iterdir():
                if f"machine {directory.name} waits" in said:
                    return directory
            async with asyncio.timeout(120):
                await written.wait()


async def test_a_box_is_restored_into_a_machine_that_was_started_ahead(
    service: HypervisorProcess, tmp_path: Path
) -> None:
    async with service.connected() as client:
        outputs = []
        for name in ("first", "second"):
            ahead = record.load(await waiting(service, client))
            box = await client.create(name)
            assert (box.origin, box.vmm_pid) == ("template", ahead.vmm_pid)
            assert "load" in {phase.name for phase in box.phases}
            assert "spawn" not in {phase.name for phase in box.phases}
            script = (
                "cat /etc/machine-id /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; uname -n"
            )
            outputs.append((await client.run(name, "sh", "-c", script))[1].decode().split())
        for mine, other in zip(*outputs, strict=True):
            assert mine != other
        for name in ("first", "second"):
            await client.delete(name)


async def test_a_machine_that_died_while_it_waited_is_not_given_out(service: HypervisorProcess) -> None:
    async with service.connected() as client:
        os.kill(record.load(await waiting(service, client)).shim_pid, 9)
        box = await client.create("replacement")
        assert box.origin == "template"
        ended, _, _ = await client.run("replacement", "true")
        assert ended.exit_code == 0
        await client.delete("replacement")


async def test_a_box_with_mounts_gets_a_machine_of_its_own(
    service: HypervisorProcess, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("shared")
    tmp_path.chmod(0o755)
    async with service.connected() as client:
        ahead = record.load(await waiting(service, client))
        mount = common_pb2.Mount(host_path=str(tmp_path), guest_path="/workspace/here")
        box = await client.create("mounted", mounts=[mount])
        assert box.vmm_pid != ahead.vmm_pid
        _, out, _ = await client.run("mounted", "cat", "/workspace/here/file")
        assert out == b"shared"
        await client.delete("mounted")


async def test_machines_that_wait_end_with_their_template_and_with_the_service(
    service: HypervisorProcess,
) -> None:
    async with service.connected() as client:
        directory = await waiting(service, client)
        pidfd = os.pidfd_open(record.load(directory).vmm_pid)
        (template,) = (await client.hypervisor.ListTemplates(pb.ListTemplatesRequest())).templates
        await client.hypervisor.DeleteTemplate(pb.DeleteTemplateRequest(template_id=template.id))
        assert select.select([pidfd], [], [], 60)[0], "it outlived its template"
        os.close(pidfd)
        pidfd = os.pidfd_open(record.load(await waiting(service, client)).vmm_pid)
    service.stop()
    assert select.select([pidfd], [], [], 60)[0], "it outlived the service"
    os.close(pidfd)
    assert list(service.layout.machines.iterdir()) == []
    service.restart()
