"""However a box came to be (booted, restored, pooled, forked, from a snapshot), it behaves the same."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest

from services.hypervisor.inotify import FileWatch
from tests.vm import BOX_KEY, Client, HypervisorProcess, box_config
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

pytestmark = pytest.mark.vm

ORIGINS = ("boot", "template", "pool", "fork", "snapshot")


async def make(service: HypervisorProcess, client: Client) -> None:
    """One box of each origin, called by it."""
    assert (await client.create("boot", cold_boot=True)).origin == "boot"
    assert (await client.create("template")).origin == "template"
    request = pb.BuildTemplateRequest(config=box_config())
    with FileWatch(service.log) as written:
        while not (await client.hypervisor.BuildTemplate(request, timeout=120)).template.pooled:
            async with asyncio.timeout(60):
                await written.wait()
            written.clear()
    assert (await client.create("pool")).origin == "pool"
    forked = await client.hypervisor.ForkBox(
        pb.ForkBoxRequest(box_id="template", fork_ids=["fork"]), timeout=120
    )
    assert forked.boxes[0].origin == "fork"
    await client.hypervisor.CreateSnapshot(pb.CreateSnapshotRequest(box_id="pool", name="s"), timeout=120)
    restored = pb.CreateBoxRequest(box_id="snapshot", config=pb.BoxConfig(snapshot="s"))
    assert (await client.hypervisor.CreateBox(restored, timeout=120)).box.origin == "snapshot"


@pytest.fixture(scope="module")
def boxes() -> Iterator[HypervisorProcess]:
    """A service with a box of each origin."""
    with HypervisorProcess(flags=["--pool-size", "1"]) as service:

        async def start() -> None:
            async with service.connected() as client:
                await make(service, client)

        asyncio.run(start())
        yield service


@pytest.fixture
async def client(boxes: HypervisorProcess) -> AsyncIterator[Client]:
    async with boxes.connected() as connected:
        yield connected


@pytest.fixture(params=ORIGINS)
def box(request: pytest.FixtureRequest) -> str:
    """The id of a box, which is also its origin."""
    origin: str = request.param
    return origin


async def test_programs_run_as_the_user_with_their_streams_and_exit_codes(client: Client, box: str) -> None:
    ended, out, error = await client.run(
        box, "sh", "-c", "id -u; pwd; echo $HOME; echo $MARK; echo oops >&2; exit 7", env={"MARK": "here"}
    )
    assert (ended.exit_code, error) == (7, b"oops\n")
    assert out == b"1000\n/workspace\n/home/sandbox\nhere\n"


async def test_standard_input_arrives_whole(client: Client, box: str) -> None:
    data = bytes(range(256)) * 1024
    call = client.guest.Exec(metadata=((BOX_KEY, box),), timeout=60)
    await call.write(guest_pb2.ExecRequest(start=guest_pb2.ExecStart(program="cat", stdin=True)))
    sent = 0
    for at in range(0, len(data), 65536):
        chunk = guest_pb2.StdinChunk(data=data[at : at + 65536], offset=at, eof=at + 65536 >= len(data))
        await call.write(guest_pb2.ExecRequest(input=guest_pb2.ExecInput(stdin=chunk)))
        sent += len(chunk.data)
    await call.done_writing()
    back = b""
    async for message in call:
        back += message.event.output.data
    assert (sent, back) == (len(data), data)


async def test_it_is_somebody_and_knows_the_time(client: Client, box: str) -> None:
    script = "uname -n; cat /etc/machine-id; date +%s; cat /proc/sys/kernel/random/uuid"
    _, out, _ = await client.run(box, "sh", "-c", script)
    name, machine_id, clock, drawn = out.decode().split()
    assert name == box
    assert abs(int(clock) - time.time()) < 5
    others = []
    for other in ORIGINS:
        _, out, _ = await client.run(other, "cat", "/etc/machine-id")
        others.append(out.decode().strip())
    assert others.count(machine_id) == 1
    assert uuid.UUID(drawn)


async def test_it_is_paused_and_resumed_and_measured(client: Client, box: str) -> None:
    await client.hypervisor.PauseBox(pb.PauseBoxRequest(box_id=box))
    await client.hypervisor.ResumeBox(pb.ResumeBoxRequest(box_id=box))
    ended, _, _ = await client.run(box, "true")
    assert ended.exit_code == 0
    stats = await client.hypervisor.GetBoxStats(pb.GetBoxStatsRequest(box_id=box))
    assert 0 < stats.private_bytes <= stats.resident_bytes


async def test_its_programs_have_no_privileges(client: Client, box: str) -> None:
    _, out, _ = await client.run(
        box, "sh", "-c", "grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status"
    )
    fields = dict(line.split(":\t") for line in out.decode().splitlines())
    assert int(fields["CapEff"], 16) == 0
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    ended, _, _ = await client.run(box, "sh", "-c", "ls /usr/lib/voidbox/* 2>/dev/null | grep -q .")
    assert ended.exit_code != 0


async def test_many_programs_run_at_once_and_python_works(client: Client, box: str) -> None:
    results = await asyncio.gather(*(client.run(box, "echo", str(number)) for number in range(8)))
    assert [out for _, out, _ in results] == [f"{number}\n".encode() for number in range(8)]
    script = (
        "import hashlib, threading; print(hashlib.sha256(b'x').hexdigest()[:8], threading.active_count())"
    )
    _, out, error = await client.run(box, "python3", "-c", script)
    assert out == b"2d711642 1\n", error


async def test_it_ends_in_order(boxes: HypervisorProcess, client: Client, box: str) -> None:
    """The last body, since it takes the box away."""
    stopped = (await client.hypervisor.StopBox(pb.StopBoxRequest(box_id=box), timeout=60)).box
    assert stopped.state == pb.BOX_STATE_STOPPED
    await client.delete(box)
    assert not boxes.layout.box(box).exists()
