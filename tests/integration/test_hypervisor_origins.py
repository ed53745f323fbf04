"""However a box came to be (booted, restored, pooled, forked, from a snapshot), it behaves the same."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.soak.waiting import all_wait
from tests.vm import BOX_KEY, Client, HypervisorProcess, host_directory
from voidbox.common.v1 import common_pb2
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

pytestmark = pytest.mark.vm

ORIGINS = ("boot", "template", "pool", "fork", "snapshot")
SERVER = """
import socketserver
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line[::-1])
socketserver.ThreadingTCPServer.allow_reuse_address = True
server = socketserver.ThreadingTCPServer(("127.0.0.1", 7001), Echo)
print("up", flush=True)
server.serve_forever()
"""


async def from_pool(service: HypervisorProcess, client: Client, name: str, **changes: Any) -> pb.Box:
    """A box that takes a machine from the pool, once one waits there."""
    await all_wait(client, service.layout.machines, service.log, {"pool"})
    box = await client.create(name, **changes)
    assert box.origin == "pool"
    return box


async def make(service: HypervisorProcess, client: Client, disk: Path) -> None:
    """One box of each origin, called by it, each with a layer of its own on one disk."""
    disks = [pb.Disk(base_path=str(disk), guest_path="/data", writable=True)]
    assert (await client.create("boot", cold_boot=True, disks=disks)).origin == "boot"
    assert (await client.create("template", disks=disks)).origin == "template"
    await from_pool(service, client, "pool", disks=disks)
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
    with (
        tempfile.TemporaryDirectory(prefix="voidbox-disk-") as scratch,
        HypervisorProcess(flags=["--pool-size", "1"]) as service,
    ):
        tree, disk = Path(scratch) / "tree", Path(scratch) / "disk.ext4"
        (tree / "open").mkdir(parents=True)
        (tree / "open").chmod(0o777)
        (tree / "base").write_text("of all\n")
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, disk, "32M"], check=True)

        async def start() -> None:
            async with service.connected() as client:
                await make(service, client, disk)

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


def there(box: str) -> tuple[tuple[str, str], ...]:
    """Metadata that names the box."""
    return ((BOX_KEY, box),)


async def test_its_files_are_written_read_listed_and_moved(client: Client, box: str) -> None:
    data = os.urandom(200_000)
    write = client.guest.WriteFile(metadata=there(box), timeout=60)
    header = guest_pb2.WriteFileHeader(path="/workspace/file", mode=0o640)
    await write.write(guest_pb2.WriteFileRequest(header=header))
    for at in range(0, len(data), 65536):
        await write.write(guest_pb2.WriteFileRequest(data=data[at : at + 65536]))
    await write.done_writing()
    assert (await write).size_bytes == len(data)
    move = guest_pb2.RenameFileRequest(from_path="/workspace/file", to_path="/workspace/moved")
    await client.guest.RenameFile(move, metadata=there(box), timeout=60)
    listing = guest_pb2.ListDirectoryRequest(path="/workspace")
    listed = (await client.guest.ListDirectory(listing, metadata=there(box), timeout=60)).files
    assert "moved" in {Path(each.path).name for each in listed}
    asked = guest_pb2.StatFileRequest(path="/workspace/moved")
    info = (await client.guest.StatFile(asked, metadata=there(box), timeout=60)).file
    assert (info.size_bytes, info.mode & 0o777) == (len(data), 0o640)
    read = client.guest.ReadFile(
        guest_pb2.ReadFileRequest(path="/workspace/moved"), metadata=there(box), timeout=60
    )
    assert b"".join([piece.data async for piece in read]) == data
    remove = guest_pb2.RemoveFileRequest(path="/workspace/moved")
    await client.guest.RemoveFile(remove, metadata=there(box), timeout=60)


async def test_its_disk_has_a_layer_of_its_own(client: Client, box: str) -> None:
    script = "cat /data/base; cd /data/open; test ! -e mine && echo $0 > mine && sync; cat mine"
    ended, out, error = await client.run(box, "sh", "-c", script, box)
    assert (ended.exit_code, out.decode()) == (0, f"of all\n{box}\n"), error
    stats = await client.hypervisor.GetBoxStats(pb.GetBoxStatsRequest(box_id=box))
    assert stats.disk_bytes > 0


async def test_its_programs_get_signals(client: Client, box: str) -> None:
    call = client.guest.Exec(metadata=there(box), timeout=60)
    script = "trap 'echo got it; exit 3' USR1; echo up; while :; do sleep 0.1; done"
    start = guest_pb2.ExecStart(exec_id="trap", program="sh", args=["-c", script])
    await call.write(guest_pb2.ExecRequest(start=start))
    said, code = b"", None
    async for message in call:
        said += message.event.output.data
        if said == b"up\n" and message.event.HasField("output"):
            request = guest_pb2.SignalExecRequest(exec_id="trap", signal=signal.SIGUSR1)
            await client.guest.SignalExec(request, metadata=there(box), timeout=60)
        if message.event.HasField("exit"):
            code = message.event.exit.exit_code
    # The whole process group gets it, and the shell may tell of its child's end.
    assert b"got it\n" in said
    assert code == 3


async def test_its_ports_are_reached_through_a_tunnel(client: Client, box: str) -> None:
    server = client.guest.Exec(metadata=there(box), timeout=60)
    begin = guest_pb2.ExecStart(exec_id="server", program="python3", args=["-c", SERVER])
    await server.write(guest_pb2.ExecRequest(start=begin))
    async for message in server:
        if message.event.output.data == b"up\n":
            break
    call = client.hypervisor.ForwardPort(timeout=60)
    await call.write(pb.ForwardPortRequest(open=pb.ForwardPortOpen(box_id=box, port=7001)))
    answers = aiter(call)
    assert (await anext(answers)).data == b""
    await call.write(pb.ForwardPortRequest(data=b"hello\n"))
    back = b""
    while len(back) < 6:
        back += (await anext(answers)).data
    assert back == b"\nolleh"
    call.cancel()
    kill = guest_pb2.SignalExecRequest(exec_id="server", signal=signal.SIGKILL)
    await client.guest.SignalExec(kill, metadata=there(box), timeout=60)
    server.cancel()


async def test_its_console_is_read(client: Client, box: str) -> None:
    whole = client.hypervisor.ReadConsole(pb.ReadConsoleRequest(box_id=box), timeout=60)
    async for piece in whole:
        assert piece.offset >= 0


@pytest.mark.parametrize("origin", ["boot", "template", "pool"])
async def test_mounts_and_volumes_are_the_same_for_every_box_that_can_have_them(
    boxes: HypervisorProcess, client: Client, origin: str
) -> None:
    """Boxes that were copied or saved cannot, and say so; a machine from the pool takes no mounts."""
    await client.hypervisor.CreateVolume(pb.CreateVolumeRequest(name="kept", size_mib=64), timeout=60)
    disks = [pb.Disk(volume="kept", guest_path="/volume", writable=True)]
    owner = 1234 if os.geteuid() == 0 else os.geteuid()
    with host_directory(owner) as shared:
        if origin == "pool":
            await from_pool(boxes, client, "attached", disks=disks)
            script = "echo v > /volume/v && cat /volume/v"
        else:
            mount = common_pb2.Mount(
                host_path=str(shared), guest_path="/mnt/shared", mode=common_pb2.MOUNT_MODE_READ_WRITE
            )
            box = await client.create("attached", disks=disks, mounts=[mount], cold_boot=origin == "boot")
            assert box.origin == origin
            script = "echo v > /volume/v && cat /volume/v && echo m > /mnt/shared/m"
        ended, out, error = await client.run("attached", "sh", "-c", script)
        assert (ended.exit_code, out) == (0, b"v\n"), error
        if origin != "pool":
            assert (shared / "m").read_text() == "m\n"
            assert (shared / "m").stat().st_uid == owner
        await client.delete("attached")
    await client.hypervisor.DeleteVolume(pb.DeleteVolumeRequest(name="kept"), timeout=60)


async def test_it_ends_in_order(boxes: HypervisorProcess, client: Client, box: str) -> None:
    """The last body, since it takes the box away."""
    stopped = (await client.hypervisor.StopBox(pb.StopBoxRequest(box_id=box), timeout=60)).box
    assert stopped.state == pb.BOX_STATE_STOPPED
    await client.delete(box)
    assert not boxes.layout.box(box).exists()
