"""The service is killed at random points of creating, saving, copying and restoring boxes.

Whatever the point: after a restart the box that ran still runs and answers, its program has gone on,
what was under way is there whole or not at all, and in the end nothing is left.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import grpc
import pytest

from tests.vm import BOX_KEY, Client, HypervisorProcess
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

pytestmark = pytest.mark.vm

SEED = 20260101
COUNT = "n=0; while :; do n=$((n+1)); echo $n > /tmp/n.new; mv /tmp/n.new /tmp/n; sleep 0.05; done"
# What each takes under emulation on an idle machine; a kill comes at a random point of it.
ACTIONS: dict[str, tuple[float, Callable[[Client, int], Awaitable[object]]]] = {
    "create": (1.5, lambda client, number: client.create(f"created-{number}")),
    "fork": (
        1.5,
        lambda client, number: client.hypervisor.ForkBox(
            pb.ForkBoxRequest(box_id="steady", fork_ids=[f"forked-{number}"]), timeout=60
        ),
    ),
    "snapshot": (
        1.2,
        lambda client, number: client.hypervisor.CreateSnapshot(
            pb.CreateSnapshotRequest(box_id="steady", name=f"taken-{number}"), timeout=60
        ),
    ),
    "restore": (
        2.0,
        lambda client, number: client.hypervisor.CreateBox(
            pb.CreateBoxRequest(box_id=f"restored-{number}", config=pb.BoxConfig(snapshot="base")), timeout=60
        ),
    ),
}


async def counted(client: Client) -> int:
    """The steady box's counter, once it has moved."""
    script = "a=$(cat /tmp/n); while [ $(cat /tmp/n) = $a ]; do :; done; cat /tmp/n"
    ended, out, error = await client.run("steady", "sh", "-c", script)
    assert ended.exit_code == 0, error
    return int(out)


async def test_a_kill_at_any_point_leaves_boxes_whole_and_running() -> None:
    chance = random.Random(SEED)
    with HypervisorProcess() as service:
        async with service.connected() as client:
            box = await client.create("steady")
            call = client.guest.Exec(metadata=((BOX_KEY, "steady"),), timeout=60)
            start = guest_pb2.ExecStart(program="sh", args=["-c", COUNT], detach=True)
            await call.write(guest_pb2.ExecRequest(start=start))
            assert (await anext(aiter(call))).event.HasField("started")
            call.cancel()
            await client.hypervisor.CreateSnapshot(
                pb.CreateSnapshotRequest(box_id="steady", name="base"), timeout=60
            )
            number = await counted(client)
        for turn, name in enumerate([*ACTIONS] * 2):
            seconds, action = ACTIONS[name]
            async with service.connected() as client:
                task = asyncio.ensure_future(action(client, turn))
                await asyncio.wait({task}, timeout=chance.uniform(0, seconds))
                service.kill()
                with_error = (await asyncio.gather(task, return_exceptions=True))[0]
                if isinstance(with_error, BaseException):
                    assert isinstance(with_error, grpc.aio.AioRpcError), (turn, name)
                    assert with_error.code() is grpc.StatusCode.UNAVAILABLE, (turn, name)
            service.restart()
            async with service.connected() as client:
                assert (await client.get("steady")).vmm_pid == box.vmm_pid, (turn, name)
                later = await counted(client)
                assert later > number, (turn, name)
                number = later
                assert list(service.layout.machines.iterdir()) == []
                boxes = (await client.hypervisor.ListBoxes(pb.ListBoxesRequest())).boxes
                for each in boxes:
                    assert each.state == pb.BOX_STATE_RUNNING, (turn, name, each)
                    if each.id != "steady":
                        ended, _, _ = await client.run(each.id, "true")
                        assert ended.exit_code == 0
                        await client.delete(each.id)
                for snapshot in (await client.hypervisor.ListSnapshots(pb.ListSnapshotsRequest())).snapshots:
                    if snapshot.name != "base":
                        request = pb.CreateBoxRequest(
                            box_id="check", config=pb.BoxConfig(snapshot=snapshot.name)
                        )
                        await client.hypervisor.CreateBox(request, timeout=60)
                        await client.delete("check")
                        await client.hypervisor.DeleteSnapshot(pb.DeleteSnapshotRequest(name=snapshot.name))
                names = {path.name for path in service.layout.snapshots.iterdir()}
                assert names == {"base"}, (turn, name)
        async with service.connected() as client:
            await client.delete("steady")
