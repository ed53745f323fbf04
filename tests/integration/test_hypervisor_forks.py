"""Running boxes are saved and copied: programs go on in every copy, and no copy is its parent."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from services.common import process
from services.common.errors import Corrupt, WrongState
from services.hypervisor import saved
from tests.vm import BOX_KEY, Client, HypervisorProcess, host_directory, refused
from voidbox.common.v1 import common_pb2
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

pytestmark = pytest.mark.vm

# Counts, and draws the first random numbers of each copy as soon as it goes on there.
COUNTER = """
import os, sys, time, uuid
held = os.urandom(8 << 20)
kept = open("/tmp/kept", "w+")
kept.write("in an open file")
kept.flush()
os.unlink("/tmp/kept")
number = 0
print("up", flush=True)
while True:
    number += 1
    kept.seek(0)
    text = f"{number} {held[:8].hex()} {held[-8:].hex()} {os.environ['MARK']} {uuid.uuid4()} {kept.read()}"
    with open("/tmp/n.new", "w") as file:
        file.write(text)
    os.rename("/tmp/n.new", "/tmp/n")
    with open("/tmp/log", "a") as file:
        file.write(text + "\\n")
    time.sleep(0.02)
"""


@pytest.fixture(scope="module")
def service() -> Iterator[HypervisorProcess]:
    with HypervisorProcess() as process_:
        yield process_


@pytest.fixture
async def forks(service: HypervisorProcess) -> AsyncIterator[Client]:
    async with service.connected() as client:
        yield client


async def start_counter(client: Client, box: str) -> None:
    call = client.guest.Exec(metadata=((BOX_KEY, box),), timeout=60)
    start = guest_pb2.ExecStart(
        program="python3", args=["-c", COUNTER], env={"MARK": "mark"}, exec_id="counter", detach=True
    )
    await call.write(guest_pb2.ExecRequest(start=start))
    await call.done_writing()
    async for message in call:
        if message.event.output.data == b"up\n":
            return
    raise AssertionError("the counter did not start")


async def look(client: Client, box: str) -> tuple[int, str, list[str]]:
    """The counter's number now, what it holds in memory, and all lines of its log."""
    # Its next number, so that it is seen to run.
    script = "a=$(cut -d' ' -f1 /tmp/n); while [ $(cut -d' ' -f1 /tmp/n) = $a ]; do :; done; cat /tmp/log"
    ended, out, error = await client.run(box, "sh", "-c", script)
    assert ended.exit_code == 0, error
    lines = out.decode().splitlines()
    number, first, last, mark, _, *kept = lines[-1].split(" ")
    assert (mark, " ".join(kept)) == ("mark", "in an open file")
    return int(number), first + last, lines


async def fork(client: Client, box: str, ids: list[str], **more: bool) -> pb.ForkBoxResponse:
    request = pb.ForkBoxRequest(box_id=box, fork_ids=ids, **more)
    return await client.hypervisor.ForkBox(request, timeout=120)


async def test_programs_go_on_in_every_copy_from_one_point_as_somebody_else(
    service: HypervisorProcess, forks: Client
) -> None:
    await forks.create("parent")
    await start_counter(forks, "parent")
    ids = ["child-0", "child-1"]
    answer = await fork(forks, "parent", ids)
    assert [box.origin for box in answer.boxes] == ["fork", "fork"]
    assert 0 < answer.pause.ToTimedelta().total_seconds() < 20
    seen = {box: await look(forks, box) for box in ("parent", *ids)}
    assert len({held for _, held, _ in seen.values()}) == 1
    logs = [lines for _, _, lines in seen.values()]
    common = 0
    while len({log[common] for log in logs}) == 1:
        common += 1
    # One line is common up to the fork; from then on no random number is drawn twice.
    assert common > 0
    later = [{line.split(" ")[4] for line in log[common:]} for log in logs]
    for one in range(3):
        for other in range(one):
            assert not later[one] & later[other]
    script = "cat /etc/machine-id /proc/sys/kernel/random/uuid; uname -n; date +%s"
    identities = [(await forks.run(box, "sh", "-c", script))[1].decode().split() for box in ("parent", *ids)]
    for column in range(3):
        assert len({identity[column] for identity in identities}) == 3
    assert [identity[2] for identity in identities] == ["parent", *ids]
    assert all(abs(int(identity[3]) - time.time()) < 5 for identity in identities)
    tokens = {(service.layout.box(box) / "secret").read_bytes() for box in ("parent", *ids)}
    assert len(tokens) == 3
    assert list(service.layout.machines.iterdir()) == []
    # A copy is a box like any other: it can be copied too.
    await fork(forks, "child-0", ["grandchild"])
    number, held, _ = await look(forks, "grandchild")
    assert (number > common, held) == (True, seen["parent"][1])
    for box in ("grandchild", "parent", *ids):
        await forks.delete(box)


async def test_a_child_knows_nothing_of_what_its_parent_does_later(forks: Client) -> None:
    await forks.create("parent")
    await fork(forks, "parent", ["child"])
    await forks.run("parent", "sh", "-c", "echo parent > /tmp/file")
    ended, _, _ = await forks.run("child", "test", "-e", "/tmp/file")
    assert ended.exit_code == 1
    await forks.delete("parent")
    ended, out, _ = await forks.run("child", "echo", "alone")
    assert out == b"alone\n"
    await forks.delete("child")


async def make_root(path: Path) -> None:
    tree = path.with_suffix(".tree")
    (tree / "bin").mkdir(parents=True)
    (tree / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (tree / "bin/busybox").chmod(0o755)
    (tree / "bin/sh").symlink_to("busybox")
    await process.run(["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(path), "32M"])


async def test_disks_are_saved_in_the_same_moment_and_are_the_copys_own(
    forks: Client, tmp_path: Path
) -> None:
    base = tmp_path / "root.ext4"
    await make_root(base)
    before = base.read_bytes()
    disks = [pb.Disk(base_path=str(base), guest_path="/skill")]
    await forks.create("parent", root_disk=pb.Disk(base_path=str(base), writable=True), disks=disks)
    # In the page cache of the guest, not on the disk: it has to come along as well.
    await forks.run("parent", "sh", "-c", "echo before > /tmp/file")
    request = pb.CreateSnapshotRequest(box_id="parent", name="disks")
    await forks.hypervisor.CreateSnapshot(request, timeout=60)
    await forks.run("parent", "sh", "-c", "echo after > /tmp/file; busybox sync")
    await forks.delete("parent")
    for name in ("one", "two"):
        created = pb.CreateBoxRequest(box_id=name, config=pb.BoxConfig(snapshot="disks"))
        box = (await forks.hypervisor.CreateBox(created, timeout=60)).box
        assert box.origin == "snapshot"
        script = (
            "busybox cat /tmp/file; busybox test -x /skill/bin/busybox && echo skill; echo $0 > /tmp/file"
        )
        _, out, error = await forks.run(name, "sh", "-c", script, name)
        assert out == b"before\nskill\n", error
    script = "busybox cat /tmp/file; busybox sync"
    assert [(await forks.run(name, "sh", "-c", script))[1] for name in ("one", "two")] == [b"one\n", b"two\n"]
    assert base.read_bytes() == before
    for name in ("one", "two"):
        await forks.delete(name)
    await forks.hypervisor.DeleteSnapshot(pb.DeleteSnapshotRequest(name="disks"))


async def test_what_cannot_be_saved_is_refused_and_goes_on(forks: Client) -> None:
    owner = 1234 if os.geteuid() == 0 else os.geteuid()
    with host_directory(owner) as shared:
        mount = common_pb2.Mount(host_path=str(shared), guest_path="/mnt/shared")
        await forks.create("mounted", mounts=[mount])
    await forks.create("cold", cold_boot=True)
    await forks.create("keeper", env={"API_TOKEN": "value"})
    for box, reason in (
        ("mounted", "BOX_HAS_MOUNTS"), ("cold", "BOX_BOOTED_COLD"), ("keeper", "HOLDS_SECRETS"),
    ):  # fmt: skip
        request = pb.ForkBoxRequest(box_id=box, fork_ids=["copy"])
        error = await refused(forks.hypervisor.ForkBox(request, timeout=60))
        assert (type(error), error.reason) == (WrongState, reason)
        ended, _, _ = await forks.run(box, "true")
        assert ended.exit_code == 0
    copies = await fork(forks, "keeper", ["copy"], allow_secrets=True)
    assert len(copies.boxes) == 1
    _, out, _ = await forks.run("copy", "sh", "-c", "echo $API_TOKEN")
    assert out == b"value\n"
    for box in ("mounted", "cold", "keeper", "copy"):
        await forks.delete(box)


async def test_a_box_is_forked_after_its_service_has_started_again(service: HypervisorProcess) -> None:
    async with service.connected() as client:
        await client.create("survivor")
        await start_counter(client, "survivor")
        await fork(client, "survivor", ["before"])
    service.kill()
    service.restart()
    async with service.connected() as client:
        await fork(client, "survivor", ["after"])
        seen = [await look(client, box) for box in ("survivor", "before", "after")]
        assert len({held for _, held, _ in seen}) == 1
        for box in ("survivor", "before", "after"):
            await client.delete(box)


async def test_a_damaged_or_foreign_snapshot_is_refused(service: HypervisorProcess, forks: Client) -> None:
    await forks.create("parent")
    await forks.hypervisor.CreateSnapshot(pb.CreateSnapshotRequest(box_id="parent", name="s"), timeout=60)
    await forks.delete("parent")
    directory = service.layout.snapshots / "s"
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    ram = directory / saved.RAM
    data = bytearray(ram.read_bytes())
    data[len(data) // 3] ^= 1
    ram.write_bytes(data)
    request = pb.CreateBoxRequest(box_id="b", config=pb.BoxConfig(snapshot="s"))
    assert isinstance(await refused(forks.hypervisor.CreateBox(request, timeout=60)), Corrupt)
    assert not service.layout.box("b").exists()
    data[len(data) // 3] ^= 1
    ram.write_bytes(data)
    manifest = saved.read_manifest(directory)
    for fact in ("qemu", "accelerator", "processor"):
        machine = saved.read(directory)
        host = manifest.facts["host"] | {fact: "another"}
        saved.write(
            saved.Saved(
                memory_fd=machine.memory_fd,
                devices_fd=machine.devices_fd,
                facts=machine.facts | {"host": host},
            ),
            service.layout.snapshots / f"foreign-{fact}",
        )
        machine.close()
        foreign = pb.CreateBoxRequest(box_id="b", config=pb.BoxConfig(snapshot=f"foreign-{fact}"))
        error = await refused(forks.hypervisor.CreateBox(foreign, timeout=60))
        assert (type(error), error.reason) == (WrongState, "SNAPSHOT_INCOMPATIBLE")
        assert fact in error.message
    box = (await forks.hypervisor.CreateBox(request, timeout=60)).box
    assert box.state == pb.BOX_STATE_RUNNING
    await forks.delete("b")


async def test_calls_that_a_fork_cuts_off_can_be_taken_up_again(forks: Client) -> None:
    await forks.create("parent")
    await start_counter(forks, "parent")
    await asyncio.gather(*(fork(forks, "parent", [f"copy-{number}"]) for number in range(2)))
    for box in ("parent", "copy-0", "copy-1"):
        listed = await forks.guest.ListExecs(guest_pb2.ListExecsRequest(), metadata=((BOX_KEY, box),))
        assert [each.exec_id for each in listed.execs] == ["counter"]
        attach = forks.guest.Attach(metadata=((BOX_KEY, box),), timeout=30)
        await attach.write(guest_pb2.AttachRequest(open=guest_pb2.AttachOpen(exec_id="counter")))
        async for message in attach:
            if message.event.output.data == b"up\n":
                break
        attach.cancel()
        await forks.delete(box)
