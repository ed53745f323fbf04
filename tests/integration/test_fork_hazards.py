"""What goes wrong when a running machine is copied, a test for each of eight hazards, fail-closed.

1 random numbers drawn twice · 2 a clock that stands · 3 secrets copied · 4 one identity for two ·
5 memory that is counted as free · 6 a machine restored where it does not fit · 7 machines without an
owner · 8 connections that two machines believe to have. One parent and two children serve most tests.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from services.common.errors import Corrupt, Denied, InvalidInput, Unauthenticated, VoidboxError, WrongState
from services.hypervisor import claim, layout, record, saved
from services.hypervisor.claim import SECRET_KEY
from services.hypervisor.pidfd import kill_now
from tests.vm import BOX_KEY, Client, HypervisorProcess, guest_image, refused
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

pytestmark = pytest.mark.vm

PARENT, CHILDREN = "parent", ("child-1", "child-2")
ALL = (PARENT, *CHILDREN)
MIB = 1 << 20
# Draws as fast as it can, so that the first numbers after the fork are among those of its first moments;
# and holds a connection that was open when it was copied.
PROGRAM = """
import os, socket, threading, uuid
def hold(connection):
    open("/tmp/opened", "w").close()
    try:
        while data := connection.recv(100):
            connection.sendall(data)
    except OSError:
        pass
    open("/tmp/closed", "w").close()
def serve():
    server = socket.create_server(("127.0.0.1", 7000))
    print("up", flush=True)
    while True:
        threading.Thread(target=hold, args=server.accept()[:1]).start()
threading.Thread(target=serve).start()
log = open("/tmp/drawn", "w", buffering=1)
while os.stat("/tmp/drawn").st_size < 4 << 20:
    with open("/proc/sys/kernel/random/uuid") as kernel:
        log.write(f"{uuid.uuid4()} {os.urandom(8).hex()} {kernel.read()}")
"""


class Family:
    """The parent, its children, and the open connection to the parent's program."""

    def __init__(self, service: HypervisorProcess) -> None:
        self.service = service
        self.tunnel_error: VoidboxError | None = None

    async def make(self, client: Client) -> None:
        """Start the parent's program, connect to it, and fork."""
        await client.create(PARENT)
        call = client.guest.Exec(metadata=((BOX_KEY, PARENT),), timeout=60)
        start = guest_pb2.ExecStart(program="python3", args=["-c", PROGRAM], detach=True)
        await call.write(guest_pb2.ExecRequest(start=start))
        async for message in call:
            if message.event.output.data == b"up\n":
                break
        call.cancel()
        tunnel = client.hypervisor.ForwardPort(timeout=120)
        await tunnel.write(pb.ForwardPortRequest(open=pb.ForwardPortOpen(box_id=PARENT, port=7000)))
        answers = aiter(tunnel)
        assert (await anext(answers)).data == b""
        await tunnel.write(pb.ForwardPortRequest(data=b"before"))
        assert (await anext(answers)).data == b"before"
        request = pb.CreateSnapshotRequest(box_id=PARENT, name="then")
        await client.hypervisor.CreateSnapshot(request, timeout=120)
        self.tunnel_error = await refused(anext(answers))
        self.snapshot_time = time.time()
        forks = pb.ForkBoxRequest(box_id=PARENT, fork_ids=CHILDREN)
        await client.hypervisor.ForkBox(forks, timeout=120)


@pytest.fixture(scope="module")
def family() -> Iterator[Family]:
    with HypervisorProcess() as service:
        made = Family(service)

        async def start() -> None:
            async with service.connected() as client:
                await made.make(client)

        asyncio.run(start())
        yield made


@pytest.fixture
async def client(family: Family) -> AsyncIterator[Client]:
    async with family.service.connected() as connected:
        yield connected


async def out(client: Client, box: str, script: str) -> str:
    """What a script prints in a box."""
    ended, output, error = await client.run(box, "sh", "-c", script)
    assert ended.exit_code == 0, error
    return output.decode()


async def test_1_no_random_number_is_drawn_twice(client: Client) -> None:
    # Of the program that was copied while it drew, and of each kernel afterwards.
    logs = [(await out(client, box, "sync; cat /tmp/drawn")).splitlines()[:-1] for box in ALL]
    common = 0
    while len({log[common] for log in logs}) == 1:
        common += 1
    assert common > 0
    # Of the line after that, some words may have been drawn before the fork and written after it.
    later = [{word for line in log[common + 1 :] for word in line.split()} for log in logs]
    assert all(len(words) > 30 for words in later)
    for one in range(len(ALL)):
        for other in range(one):
            assert not later[one] & later[other]
    draw = "head -c 16 /dev/urandom | od -An -tx1"
    assert len({await out(client, box, draw) for box in ALL}) == len(ALL)


async def test_2_the_clock_is_the_hosts(client: Client, family: Family) -> None:
    request = pb.CreateBoxRequest(box_id="later", config=pb.BoxConfig(snapshot="then"))
    await client.hypervisor.CreateBox(request, timeout=120)
    for box in (*ALL, "later"):
        before = time.time()
        told = float(await out(client, box, "python3 -c 'import time; print(time.time())'"))
        assert before - 2 < told < time.time() + 2, (box, time.time() - family.snapshot_time)
    await client.delete("later")


async def test_3_a_holder_of_secrets_is_copied_only_when_asked_and_obeys_nobody_elses_token(
    client: Client, family: Family
) -> None:
    await client.create("keeper", env={"API_TOKEN": "value"})
    request = pb.ForkBoxRequest(box_id="keeper", fork_ids=["copy"])
    error = await refused(client.hypervisor.ForkBox(request, timeout=120))
    assert (type(error), error.reason) == (WrongState, "HOLDS_SECRETS")
    await client.delete("keeper")
    boxes = family.service.layout.box
    tokens = {box: (boxes(box) / "secret").read_bytes() for box in ALL}
    assert len(set(tokens.values())) == len(ALL)
    for box in CHILDREN:
        directory = os.open(boxes(box), os.O_RDONLY | os.O_DIRECTORY)
        guest = direct(directory)
        for owner, token in tokens.items():
            call = guest.guest.ListExecs(
                guest_pb2.ListExecsRequest(), metadata=((SECRET_KEY, token),), timeout=60
            )
            if owner == box:
                await call
            else:
                assert isinstance(await refused(call), (Denied, Unauthenticated))
        await guest.channel.close()
        os.close(directory)


def direct(directory: int) -> Client:
    """The agent itself, past the hypervisor."""
    return Client(claim.guest_channel(directory, layout.GUEST_SOCKET))


async def test_4_each_copy_is_somebody_else(client: Client, family: Family) -> None:
    script = (
        "cat /etc/machine-id; uname -n; for n in /sys/class/net/*; do echo ${n##*/} $(cat $n/address); done"
    )
    identities = [(await out(client, box, script)).splitlines() for box in ALL]
    assert [identity[1] for identity in identities] == list(ALL)
    assert len({identity[0] for identity in identities}) == len(ALL)
    addresses = [line.split()[1] for identity in identities for line in identity[2:] if line[:3] != "lo "]
    assert len(set(addresses)) == len(addresses)
    records = [record.load(family.service.layout.box(box)) for box in ALL]
    assert len({each.cid for each in records}) == len(ALL)
    if os.geteuid() == 0:
        assert len({os.stat(f"/proc/{each.vmm_pid}").st_uid for each in records}) == len(ALL)


async def test_5_memory_that_a_copy_takes_for_itself_is_counted_as_its_own(client: Client) -> None:
    async def private() -> list[int]:
        asked = [client.hypervisor.GetBoxStats(pb.GetBoxStatsRequest(box_id=box)) for box in ALL]
        return [stats.private_bytes // MIB for stats in await asyncio.gather(*asked)]

    told = await client.hypervisor.GetCapabilities(pb.GetCapabilitiesRequest())
    before = await private()
    # Above what the program's log may still take.
    await out(client, "child-1", "head -c 33554432 /dev/zero > /tmp/own")
    after = await private()
    assert after[1] - before[1] >= 28
    assert after[2] - before[2] < 20
    assert told.available_memory_mib <= told.host_memory_mib - len(ALL) * 320


async def test_6_a_copy_is_not_brought_to_life_where_it_does_not_fit(client: Client, family: Family) -> None:
    directory = family.service.layout.snapshots / "then"
    manifest = directory / saved.MANIFEST
    untouched = manifest.read_bytes()

    async def restored(**config: object) -> VoidboxError:
        request = pb.CreateBoxRequest(box_id="misfit", config=pb.BoxConfig(snapshot="then", **config))  # type: ignore[arg-type]
        return await refused(client.hypervisor.CreateBox(request, timeout=120))

    image = guest_image()
    error = await restored(kernel_path=str(image.kernel), initramfs_path=str(image.kernel))
    assert (type(error), error.reason) == (InvalidInput, "SNAPSHOT_DIFFERS")
    same = {"kernel_path": str(image.kernel), "initramfs_path": str(image.initramfs)}
    for resources in ({"memory_mib": 384}, {"memory_mib": 320, "vcpus": 2}):
        error = await restored(**same, resources=resources)
        assert (type(error), error.reason) == (InvalidInput, "SNAPSHOT_DIFFERS")
    # What the manifest says of the machine cannot be changed without its digest.
    whole = json.loads(untouched)
    content = json.loads(whole["content"])
    for fact in content["facts"]["host"]:
        changed = json.loads(whole["content"])
        changed["facts"]["host"][fact] = "another"
        manifest.write_text(json.dumps(whole | {"content": json.dumps(changed, sort_keys=True)}))
        assert isinstance(await restored(), Corrupt), fact
    manifest.write_bytes(untouched)
    assert not family.service.layout.box("misfit").exists()


async def test_8_a_connection_of_the_parent_is_dead_in_every_copy(client: Client, family: Family) -> None:
    error = family.tunnel_error
    assert isinstance(error, VoidboxError)
    assert error.message
    for box in CHILDREN:
        # The program sees its end, in place of a peer that is silent for ever.
        await out(client, box, "test -e /tmp/opened && until test -e /tmp/closed; do sleep 0.1; done")
        # And can be reached anew, by a connection of its own.
        tunnel = client.hypervisor.ForwardPort(timeout=60)
        await tunnel.write(pb.ForwardPortRequest(open=pb.ForwardPortOpen(box_id=box, port=7000)))
        answers = aiter(tunnel)
        await anext(answers)
        await tunnel.write(pb.ForwardPortRequest(data=box.encode()))
        assert (await anext(answers)).data == box.encode()
        tunnel.cancel()


async def test_9_machines_find_their_owner_again_and_no_stranger_is_taken_for_one(family: Family) -> None:
    """Hazard 7, and the last test, since it takes the family apart."""
    service = family.service
    pids = {}
    async with service.connected() as client:
        for box in ALL:
            pids[box] = (await client.get(box)).vmm_pid
    service.kill()
    # One has died, and its pid is somebody else's by now, as its record cannot know.
    directory = service.layout.box("child-2")
    dead = record.load(directory)
    assert await asyncio.to_thread(kill_now, dead.shim_pid, dead.shim_start, 60)
    stranger = await asyncio.create_subprocess_exec("sleep", "1000")
    try:
        text = (directory / record.FILE_NAME).read_text()
        (directory / record.FILE_NAME).write_text(
            text.replace(f'"shim_pid":{dead.shim_pid}', f'"shim_pid":{stranger.pid}')
        )
        service.restart()
        async with service.connected() as client:
            for box in (PARENT, "child-1"):
                found = await client.get(box)
                assert (found.state, found.vmm_pid) == (pb.BOX_STATE_RUNNING, pids[box])
                await out(client, box, "true")
            assert (await client.get("child-2")).state == pb.BOX_STATE_FAILED
            for box in ALL:
                await client.delete(box)
        assert stranger.returncode is None
    finally:
        stranger.send_signal(signal.SIGTERM)
        ended = await stranger.wait()
    assert ended == -signal.SIGTERM
    service.assert_nothing_runs()
