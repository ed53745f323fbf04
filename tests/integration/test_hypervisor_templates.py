"""Boxes are restored from templates that nobody can spoil; each is somebody of its own."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from services.common.errors import NotFound, Unavailable
from services.hypervisor import saved
from services.hypervisor.inotify import FileWatch
from services.hypervisor.layout import Layout
from tests.vm import Client, HypervisorProcess, box_config, refused
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

pytestmark = pytest.mark.vm
BOOTS = "boots, to be saved"


@pytest.fixture(scope="module")
def service() -> Iterator[HypervisorProcess]:
    """A service whose templates this module may spoil."""
    with HypervisorProcess() as process:
        yield process


@pytest.fixture
async def clones(service: HypervisorProcess) -> AsyncIterator[Client]:
    async with service.connected() as client:
        yield client


def phases(box: pb.Box) -> list[str]:
    return [phase.name for phase in box.phases]


async def only_template(client: Client) -> pb.Template:
    (template,) = (await client.hypervisor.ListTemplates(pb.ListTemplatesRequest())).templates
    return template


async def test_boxes_that_start_together_share_one_build_and_nothing_else(
    service: HypervisorProcess, clones: Client
) -> None:
    names = [f"clone-{number}" for number in range(3)]
    boxes = await asyncio.gather(*map(clones.create, names))
    assert [box.origin for box in boxes] == ["template"] * 3
    assert sum("template-boot" in phases(box) for box in boxes) == 1
    script = "cat /proc/sys/kernel/random/uuid /etc/machine-id; uname -n; date +%s"
    outputs = await asyncio.gather(*(clones.run(name, "sh", "-c", script) for name in names))
    uuids, machine_ids, host_names, clocks = zip(
        *(out.decode().split() for _, out, _ in outputs), strict=True
    )
    assert len(set(uuids)) == len(set(machine_ids)) == len({box.boot_id for box in boxes}) == 3
    assert list(host_names) == names
    assert all(abs(int(clock) - time.time()) < 5 for clock in clocks)
    secrets = {(service.layout.box(name) / "secret").read_bytes() for name in names}
    assert len(secrets) == 3
    assert len({os.stat(f"/proc/{box.vmm_pid}").st_uid for box in boxes}) == (3 if os.geteuid() == 0 else 1)
    for name in names:
        await clones.delete(name)
    assert list(service.layout.machines.iterdir()) == []


async def test_what_one_clone_writes_no_other_sees(service: HypervisorProcess, clones: Client) -> None:
    await clones.create("first")
    await clones.run("first", "sh", "-c", "echo mine > /tmp/file; echo mine > /workspace/file")
    await clones.create("second")
    exit_, _, _ = await clones.run("second", "sh", "-c", "test ! -e /tmp/file && test ! -e /workspace/file")
    assert exit_.exit_code == 0
    for name in ("first", "second"):
        await clones.delete(name)


async def test_a_machine_has_no_way_to_write_to_its_template(
    service: HypervisorProcess, clones: Client
) -> None:
    box = await clones.create("prisoner")
    links = [
        link for link in os.scandir(f"/proc/{box.vmm_pid}/fd") if "voidbox-ram" in os.readlink(link.path)
    ]
    assert links
    for link in links:
        fd = os.open(link.path, os.O_RDWR)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"spoilt", 0)
        os.close(fd)
    await clones.delete("prisoner")


async def test_a_cold_boot_stays_possible(clones: Client) -> None:
    box = await clones.create("cold", cold_boot=True)
    assert (box.origin, phases(box)[-1]) == ("boot", "boot")
    exit_, _, _ = await clones.run("cold", "true")
    assert exit_.exit_code == 0
    await clones.delete("cold")


async def test_templates_are_built_listed_and_removed_by_name(clones: Client) -> None:
    before = await only_template(clones)
    request = pb.BuildTemplateRequest(config=box_config())
    again = (await clones.hypervisor.BuildTemplate(request, timeout=120)).template
    assert (again.id, again.create_time) == (before.id, before.create_time)
    await clones.hypervisor.DeleteTemplate(pb.DeleteTemplateRequest(template_id=before.id))
    assert not (await clones.hypervisor.ListTemplates(pb.ListTemplatesRequest())).templates
    missing = clones.hypervisor.DeleteTemplate(pb.DeleteTemplateRequest(template_id=before.id))
    assert isinstance(await refused(missing), NotFound)
    built = (await clones.hypervisor.BuildTemplate(request, timeout=120)).template
    assert built.id == before.id
    assert built.create_time.ToNanoseconds() > before.create_time.ToNanoseconds()
    box = await clones.create("after")
    assert "template-boot" not in phases(box)
    await clones.delete("after")


def damage_ram(layout: Layout, template_id: str) -> None:
    path = layout.template(template_id) / saved.RAM
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


async def test_a_damaged_template_is_built_again(service: HypervisorProcess) -> None:
    async with service.connected() as client:
        template = await only_template(client)
    service.stop()
    damage_ram(service.layout, template.id)
    service.restart()
    async with service.connected() as client:
        box = await client.create("healed")
        assert "template-boot" in phases(box)
        exit_, _, _ = await client.run("healed", "true")
        assert exit_.exit_code == 0
        await client.delete("healed")
        assert (
            await only_template(client)
        ).create_time.ToNanoseconds() > template.create_time.ToNanoseconds()
        await client.create("next")
        await client.delete("next")


async def test_a_template_outlives_the_service_that_built_it(service: HypervisorProcess) -> None:
    service.kill()
    service.restart()
    async with service.connected() as client:
        box = await client.create("later")
        assert "template-boot" not in phases(box)
        await client.delete("later")


async def test_the_death_of_the_service_while_it_builds_leaves_nothing(service: HypervisorProcess) -> None:
    async with service.connected() as client:
        request = pb.BuildTemplateRequest(config=box_config(resources={"memory_mib": 384}))
        call = client.hypervisor.BuildTemplate(request, timeout=120)
        task = asyncio.ensure_future(refused(call))
        before = service.log.read_text().count(BOOTS)
        with FileWatch(service.log) as written:
            while service.log.read_text().count(BOOTS) == before:
                await written.wait()
                written.clear()
        assert any(service.layout.machines.iterdir())
        service.kill()
        assert isinstance(await task, Unavailable)
    service.restart()
    assert list(service.layout.machines.iterdir()) == []
    assert service.box_processes() == []
