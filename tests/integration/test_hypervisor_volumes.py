"""A volume's files pass from box to box, one at a time, and stay when machines and service are killed."""

from __future__ import annotations

import os
import signal

import pytest

from services.common.errors import WrongState
from services.hypervisor.volumes import Volumes
from tests.vm import Client, HypervisorProcess, refused
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

pytestmark = pytest.mark.vm


def disk(name: str) -> pb.Disk:
    return pb.Disk(volume=name, guest_path="/data", writable=True)


async def shell(client: Client, box: str, script: str) -> bytes:
    exit_, out, error = await client.run(box, "sh", "-c", script)
    assert exit_.exit_code == 0, error
    return out


async def test_files_pass_from_box_to_box(client: Client, hypervisor: HypervisorProcess) -> None:
    await client.hypervisor.CreateVolume(pb.CreateVolumeRequest(name="passed", size_mib=256))
    try:
        await client.create("writer", disks=[disk("passed")])
        # As the box's user, to whom an empty volume belongs.
        assert b"/data" in await shell(client, "writer", "echo first > /data/a && sync && df /data")
        error = await refused(client.create("other", disks=[disk("passed")]))
        assert isinstance(error, WrongState)
        assert "writer" in error.message
        # The machine dies without a goodbye: the volume is free at once, its journal is replayed.
        box = await client.get("writer")
        os.kill(box.vmm_pid, signal.SIGKILL)
        await client.until("writer", pb.BOX_STATE_FAILED)
        await client.create("reader", disks=[disk("passed")])
        assert await shell(client, "reader", "cat /data/a; echo second > /data/b") == b"first\n"
        await client.hypervisor.StopBox(pb.StopBoxRequest(box_id="reader"))
        await client.create("last", disks=[disk("passed")])
        assert await shell(client, "last", "cat /data/a /data/b") == b"first\nsecond\n"
    finally:
        for name in ("writer", "reader", "last"):
            await client.delete(name)
    await client.hypervisor.DeleteVolume(pb.DeleteVolumeRequest(name="passed"))
    assert list(hypervisor.layout.volumes.iterdir()) == []


async def test_a_volume_stays_in_use_when_the_service_is_killed(
    client: Client, hypervisor: HypervisorProcess
) -> None:
    await client.hypervisor.CreateVolume(pb.CreateVolumeRequest(name="held", size_mib=64))
    await client.create("holder", disks=[disk("held")])
    hypervisor.kill()
    with pytest.raises(WrongState, match="held"):
        Volumes(hypervisor.layout.volumes).open("held")
    hypervisor.restart()
    async with hypervisor.connected() as again:
        (volume,) = (await again.hypervisor.ListVolumes(pb.ListVolumesRequest())).volumes
        assert volume.box_id == "holder"
        await again.delete("holder")
        await again.hypervisor.DeleteVolume(pb.DeleteVolumeRequest(name="held"))


async def test_a_full_volume_is_the_programs_error_alone(client: Client) -> None:
    await client.hypervisor.CreateVolume(pb.CreateVolumeRequest(name="full", size_mib=64))
    await client.create("filler", disks=[disk("full")])
    try:
        exit_, _, error = await client.run(
            "filler", "sh", "-c", "dd if=/dev/zero of=/data/fill bs=1M count=100"
        )
        assert exit_.exit_code != 0
        assert b"No space left" in error
        assert await shell(client, "filler", "rm /data/fill; echo x > /data/y; cat /data/y") == b"x\n"
    finally:
        await client.delete("filler")
        await client.hypervisor.DeleteVolume(pb.DeleteVolumeRequest(name="full"))
