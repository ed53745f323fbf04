"""Boxes on real QEMU through the real service: boot, exec, console, mounts, disks, pause, end."""

from __future__ import annotations

import asyncio
import os
import platform
import random
import shutil
import uuid
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.common import process
from services.common.errors import (
    AlreadyExists,
    Denied,
    Exhausted,
    InvalidInput,
    NotFound,
    Unavailable,
    VoidboxError,
    WrongState,
)
from services.hypervisor.identities import FIRST_MACHINE_UID
from tests.vm import (
    BOX_KEY,
    Client,
    HypervisorProcess,
    box_config,
    guest_image,
    host_directory,
    init_archive,
    refused,
)
from voidbox.common.v1 import common_pb2
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

pytestmark = pytest.mark.vm


async def test_a_box_has_a_kernel_of_its_own(client: Client, shared_box: str) -> None:
    box = await client.get(shared_box)
    exit_, out, _ = await client.run(shared_box, "cat", "/proc/sys/kernel/random/boot_id")
    assert exit_.exit_code == 0
    assert out.decode().strip() == box.boot_id
    assert uuid.UUID(box.boot_id)
    assert box.boot_id != Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    _, release, _ = await client.run(shared_box, "uname", "-r")
    assert release.decode().strip() != platform.release()
    _, name, _ = await client.run(shared_box, "uname", "-n")
    assert name.decode().strip() == shared_box


async def test_nothing_secret_is_on_the_kernel_command_line(client: Client, shared_box: str) -> None:
    _, out, _ = await client.run(shared_box, "cat", "/proc/cmdline")
    assert "console=ttyS0" in out.decode()
    assert "secret" not in out.decode()
    assert shared_box not in out.decode()


async def test_the_machine_runs_without_privileges(client: Client, shared_box: str) -> None:
    box = await client.get(shared_box)
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{box.vmm_pid}/status").read_text().splitlines()
        if ":\t" in line
    )
    (uid,) = set(map(int, status["Uid"].split()))
    assert uid >= FIRST_MACHINE_UID if os.geteuid() == 0 else uid == os.geteuid()
    assert Path(f"/proc/{box.vmm_pid}").stat().st_uid == uid
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) == 0
    assert status["Seccomp"] == "2"
    assert int(status["CapBnd"], 16) == 0


async def test_the_machine_sees_a_host_of_its_own(client: Client, shared_box: str) -> None:
    box = await client.get(shared_box)
    told = await client.hypervisor.GetCapabilities(pb.GetCapabilitiesRequest())
    [probe] = [probe for probe in told.probes if probe.name == "confinement"]
    assert probe.usable, probe.detail
    for kind in ("net", "mnt", "pid", "ipc", "uts"):
        assert os.readlink(f"/proc/{box.vmm_pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    seen = {entry.name for entry in Path(f"/proc/{box.vmm_pid}/root").iterdir()}
    assert seen <= {"usr", "lib", "lib32", "lib64", "bin", "nix", "etc", "dev", "proc"}
    devices = {entry.name for entry in Path(f"/proc/{box.vmm_pid}/root/dev").iterdir()}
    assert devices <= {"null", "zero", "random", "urandom", "fd", "kvm"}
    lines = Path(f"/proc/{box.vmm_pid}/net/dev").read_text().splitlines()
    assert [line.split(":")[0].strip() for line in lines[2:]] == ["lo"]


async def test_calls_without_a_box_or_with_an_unknown_one_are_refused(client: Client) -> None:
    request = guest_pb2.GetGuestRequest()
    missing = await refused(client.guest.GetGuest(request))
    assert isinstance(missing, InvalidInput)
    assert BOX_KEY in missing.message
    unknown = await refused(client.guest.GetGuest(request, metadata=((BOX_KEY, "nobody"),)))
    assert isinstance(unknown, NotFound)
    bad = await refused(client.guest.GetGuest(request, metadata=((BOX_KEY, "../x"),)))
    assert isinstance(bad, InvalidInput)


async def test_only_the_hypervisor_claims_and_mounts(client: Client, shared_box: str) -> None:
    metadata = ((BOX_KEY, shared_box),)
    for call in (
        client.guest.Claim(guest_pb2.ClaimRequest(secret=b"x" * 32), metadata=metadata),
        client.guest.Mount(guest_pb2.MountRequest(source="m0", path="/x"), metadata=metadata),
        client.guest.ConfigureNetwork(guest_pb2.ConfigureNetworkRequest(), metadata=metadata),
        client.guest.GetGuest(
            guest_pb2.GetGuestRequest(), metadata=(*metadata, ("voidbox-secret-bin", b"x" * 32))
        ),
    ):
        assert isinstance(await refused(call), Denied)


async def test_an_error_of_the_guest_arrives_as_the_guest_raised_it(client: Client, shared_box: str) -> None:
    call = client.guest.StatFile(
        guest_pb2.StatFileRequest(path="/no/such/file"), metadata=((BOX_KEY, shared_box),)
    )
    assert isinstance(await refused(call), NotFound)


async def test_many_calls_run_at_once_in_one_box(client: Client, shared_box: str) -> None:
    results = await asyncio.gather(*(client.run(shared_box, "echo", str(n)) for n in range(20)))
    assert [out for _, out, _ in results] == [f"{n}\n".encode() for n in range(20)]


async def test_the_same_request_returns_the_same_box_and_another_is_refused(
    client: Client, shared_box: str
) -> None:
    before = await client.get(shared_box)
    assert await client.create(shared_box) == before
    other = await refused(client.create(shared_box, labels={"other": "yes"}))
    assert isinstance(other, AlreadyExists)
    assert await client.get(shared_box) == before


async def test_stats_and_capabilities_are_measured(client: Client, shared_box: str) -> None:
    stats = await client.hypervisor.GetBoxStats(pb.GetBoxStatsRequest(box_id=shared_box))
    assert stats.cpu_time.ToTimedelta().total_seconds() > 0.5
    assert 0 < stats.vsock_sent_bytes < stats.vsock_received_bytes * 100
    assert 100 << 20 < stats.private_bytes <= stats.resident_bytes < 2 << 30
    told = await client.hypervisor.GetCapabilities(
        pb.GetCapabilitiesRequest(kernel_path=str(guest_image().kernel))
    )
    assert told.qemu_version.count(".") == 2
    assert told.accelerator in (pb.ACCELERATOR_TCG, pb.ACCELERATOR_KVM)
    assert told.security_boundary == (told.accelerator == pb.ACCELERATOR_KVM)
    assert 0 < told.available_memory_mib < told.host_memory_mib
    assert {"qemu", "kvm", "tcg", "vhost-vsock", "confinement", "network"} == {
        probe.name for probe in told.probes
    }
    assert all(probe.detail for probe in told.probes)


MIB = 1 << 20
RANDOM_BYTES = "import random, sys; sys.stdout.buffer.write(random.Random(3).randbytes(int(sys.argv[1])))"


async def test_a_connection_cut_at_200_random_offsets_costs_no_byte_of_output(
    hypervisor: HypervisorProcess, shared_box: str
) -> None:
    size = 20 * MIB
    cuts = sorted(random.Random(4).sample(range(1, size), 200))
    expected = await asyncio.to_thread(random.Random(3).randbytes, size)
    received = bytearray()
    for number, cut in enumerate([*cuts, size + 1]):
        # A client of its own each time; leaving the block cuts its connection off in mid-stream.
        async with hypervisor.connected() as client:
            metadata = ((BOX_KEY, shared_box),)
            call: Any
            kind: Any
            if number == 0:
                call, kind = client.guest.Exec(metadata=metadata, timeout=120), guest_pb2.ExecRequest
                start = guest_pb2.ExecStart(exec_id="cut", program="python3", acks=True)
                start.args.extend(["-c", RANDOM_BYTES, str(size)])
                await call.write(guest_pb2.ExecRequest(start=start))
            else:
                call, kind = client.guest.Attach(metadata=metadata, timeout=60), guest_pb2.AttachRequest
                opening = guest_pb2.AttachOpen(exec_id="cut", stdout_offset=len(received), acks=True)
                await call.write(guest_pb2.AttachRequest(open=opening))
            while len(received) < cut:
                message = await call.read()
                assert message is not grpc.aio.EOF, await call.details()
                if message.event.HasField("exit"):
                    assert message.event.exit.exit_code == 0
                    break
                if message.event.HasField("output"):
                    assert message.event.output.offset == len(received)
                    # Of the message in which it dies the client has a part.
                    received += message.event.output.data[: max(cut - len(received), 1)]
                    request: Any = kind()
                    request.input.ack.stream = 1  # standard output
                    request.input.ack.offset = len(received)
                    await call.write(request)
    assert len(received) == size
    assert received == expected


async def test_pause_stops_the_guest_and_resume_lets_it_go_on(client: Client, shared_box: str) -> None:
    paused = (await client.hypervisor.PauseBox(pb.PauseBoxRequest(box_id=shared_box))).box
    assert paused.state == pb.BOX_STATE_PAUSED
    again = (await client.hypervisor.PauseBox(pb.PauseBoxRequest(box_id=shared_box))).box
    assert again.state == pb.BOX_STATE_PAUSED
    error = await refused(client.run(shared_box, "true"))
    assert isinstance(error, WrongState)
    assert "paused" in error.message
    resumed = (await client.hypervisor.ResumeBox(pb.ResumeBoxRequest(box_id=shared_box))).box
    assert resumed.state == pb.BOX_STATE_RUNNING
    exit_, _, _ = await client.run(shared_box, "true")
    assert exit_.exit_code == 0


ECHO_REVERSED = """
import socket
server = socket.create_server(("127.0.0.1", 8099))
print("up", flush=True)
peer, _ = server.accept()
data = b""
while piece := peer.recv(65536):
    data += piece
peer.sendall(data[::-1])
peer.close()
"""


async def test_a_port_of_the_guest_is_reached_through_a_tunnel(client: Client, shared_box: str) -> None:
    data = bytes(range(256)) * 512
    server = client.guest.Exec(metadata=((BOX_KEY, shared_box),), timeout=60)
    start = guest_pb2.ExecStart(program="python3", args=["-c", ECHO_REVERSED])
    await server.write(guest_pb2.ExecRequest(start=start))
    events = aiter(server)
    assert (await anext(events)).event.HasField("started")
    assert (await anext(events)).event.output.data == b"up\n"
    call = client.hypervisor.ForwardPort(timeout=60)
    await call.write(pb.ForwardPortRequest(open=pb.ForwardPortOpen(box_id=shared_box, port=8099)))
    answers = aiter(call)
    assert (await anext(answers)).data == b""
    for at in range(0, len(data), 65536):
        await call.write(pb.ForwardPortRequest(data=data[at : at + 65536]))
    await call.done_writing()
    assert b"".join([message.data async for message in answers]) == data[::-1]
    assert (await anext(events)).event.exit.exit_code == 0


async def test_the_tunnel_refuses_bad_beginnings(client: Client, shared_box: str) -> None:
    async def first(message: pb.ForwardPortRequest) -> None:
        call = client.hypervisor.ForwardPort(timeout=20)
        await call.write(message)
        await call.done_writing()
        async for _ in call:
            pass

    assert isinstance(await refused(first(pb.ForwardPortRequest(data=b"x"))), InvalidInput)
    port = pb.ForwardPortRequest(open=pb.ForwardPortOpen(box_id=shared_box, port=70000))
    assert isinstance(await refused(first(port)), InvalidInput)
    closed = pb.ForwardPortRequest(open=pb.ForwardPortOpen(box_id=shared_box, port=9))
    assert isinstance(await refused(first(closed)), Unavailable)


FLOOD = b"#!/bin/busybox sh\nyes 0123456789012345678901234567890123456789012345678901234567890123456789\n"


async def test_a_flood_on_the_console_costs_constant_disk_and_is_read_by_offset(
    hypervisor: HypervisorProcess, client: Client, tmp_path: Path
) -> None:
    hostile = tmp_path / "initramfs.cpio"
    hostile.write_bytes(guest_image().initramfs.read_bytes() + init_archive(FLOOD))
    request = pb.CreateBoxRequest(box_id="flood", config=box_config(initramfs_path=str(hostile)))
    creation = client.hypervisor.CreateBox(request, timeout=120)
    async for change in client.hypervisor.WatchBoxes(pb.WatchBoxesRequest(), timeout=60):
        if change.box.id == "flood" and change.box.vmm_pid:
            break
    reached = 0
    follow = client.hypervisor.ReadConsole(pb.ReadConsoleRequest(box_id="flood", follow=True), timeout=100)
    async for piece in follow:
        assert piece.offset >= reached
        reached = piece.offset + len(piece.data)
        if reached > 3 << 20:
            break
    log = hypervisor.layout.box("flood") / "console.log"
    assert log.stat().st_size < 2 << 20
    first = await anext(
        aiter(client.hypervisor.ReadConsole(pb.ReadConsoleRequest(box_id="flood"), timeout=20))
    )
    assert first.offset > 1 << 20
    assert b"0123456789" in first.data
    creation.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creation
    await client.delete("flood")
    assert not hypervisor.layout.box("flood").exists()


async def test_mounts_are_read_only_or_writable_as_asked(client: Client) -> None:
    owner = 1234 if os.geteuid() == 0 else os.geteuid()
    with host_directory(owner) as writable, host_directory(owner) as fixed, host_directory(owner) as layered:
        for directory in (fixed, layered):
            (directory / "a, b.txt").write_text("from the host")
            (directory / "a, b.txt").chmod(0o644)
            if os.geteuid() == 0:
                os.chown(directory / "a, b.txt", owner, owner)
        mounts = [
            common_pb2.Mount(
                host_path=str(writable), guest_path="/mnt/rw", mode=common_pb2.MOUNT_MODE_READ_WRITE
            ),
            common_pb2.Mount(host_path=str(fixed), guest_path="/mnt/ro"),
            common_pb2.Mount(
                host_path=str(layered), guest_path="/mnt/over", mode=common_pb2.MOUNT_MODE_OVERLAY
            ),
        ]
        await client.create("mounts", mounts=mounts)
        try:
            exit_, out, error = await client.run("mounts", "cat", "/mnt/ro/a, b.txt")
            assert (exit_.exit_code, out) == (0, b"from the host"), error
            exit_, _, error = await client.run("mounts", "sh", "-c", "echo x > /mnt/ro/new")
            assert exit_.exit_code != 0
            assert b"Read-only" in error
            exit_, _, error = await client.run(
                "mounts", "sh", "-c", "echo new > /mnt/rw/file && ln -s file /mnt/rw/link"
            )
            assert exit_.exit_code == 0, error
            assert (writable / "file").read_text() == "new\n"
            assert (writable / "file").stat().st_uid == owner
            assert (writable / "link").readlink() == Path("file")
            exit_, _, error = await client.run(
                "mounts", "sh", "-c", "echo changed > '/mnt/over/a, b.txt' && cat '/mnt/over/a, b.txt'"
            )
            assert exit_.exit_code == 0, error
            assert (layered / "a, b.txt").read_text() == "from the host"
        finally:
            await client.delete("mounts")


async def make_disk(path: Path, content: str, size: str = "16M") -> None:
    """An ext4 image with one file."""
    tree = path.with_suffix(".tree")
    (tree / "data").mkdir(parents=True)
    (tree / "data/file").write_text(content)
    await process.run(["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(path), size])


async def test_disks_are_attached_read_only_or_with_a_private_layer(
    client: Client, hypervisor: HypervisorProcess, tmp_path: Path
) -> None:
    base = tmp_path / "base.ext4"
    await make_disk(base, "on the disk")
    before = base.read_bytes()
    disks = [
        pb.Disk(base_path=str(base), guest_path="/skills/one"),
        pb.Disk(base_path=str(base), guest_path="/skills/two", writable=True),
    ]
    await client.create("disks", disks=disks)
    try:
        _, out, error = await client.run("disks", "cat", "/skills/one/data/file", "/skills/two/data/file")
        assert out == b"on the diskon the disk", error
        exit_, _, error = await client.run("disks", "sh", "-c", "echo x > /skills/one/new", user="root")
        assert exit_.exit_code != 0
        exit_, _, error = await client.run(
            "disks", "sh", "-c", "echo x > /skills/two/new && sync", user="root"
        )
        assert exit_.exit_code == 0, error
        stats = await client.hypervisor.GetBoxStats(pb.GetBoxStatsRequest(box_id="disks"))
        assert stats.disk_bytes > 0
        assert base.read_bytes() == before
        assert (hypervisor.layout.box("disks") / "disk1.qcow2").exists()
    finally:
        await client.delete("disks")


async def test_programs_run_in_the_root_disk_and_write_to_their_own_layer_only(
    client: Client, tmp_path: Path
) -> None:
    base = tmp_path / "root.ext4"
    tree = tmp_path / "root"
    (tree / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    (tree / "bin/sh").symlink_to("busybox")
    (tree / "marker").write_text("the image's root")
    argv = ["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(base), "32M"]
    await process.run(argv)
    before = base.read_bytes()
    await client.create("rooted", root_disk=pb.Disk(base_path=str(base), writable=True))
    try:
        script = "busybox cat /marker; echo new > /written; busybox cat /written"
        exit_, out, error = await client.run("rooted", "sh", "-c", script, user="0:0")
        assert exit_.exit_code == 0, error
        assert out == b"the image's rootnew\n"
        assert base.read_bytes() == before
    finally:
        await client.delete("rooted")


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"kernel_path": "/no/such/kernel"}, InvalidInput, "/no/such/kernel"),
        ({"kernel_path": "relative/vmlinux"}, InvalidInput, "absolute"),
        ({"kernel_path": "/etc/passwd"}, InvalidInput, "neither a vmlinux"),
        ({"kernel_path": "/dev/zero"}, InvalidInput, "regular file"),
        ({"initramfs_path": "/etc/passwd"}, InvalidInput, "cpio"),
        ({"resources": {"memory_mib": 8}}, InvalidInput, "at least 16"),
        ({"resources": {"memory_mib": 1 << 30}}, InvalidInput, "sandbox.memory_mb"),
        ({"resources": {"memory_mib": 256, "vcpus": 1000}}, InvalidInput, "vcpus"),
        ({"mounts": [{"host_path": "/no/such/dir", "guest_path": "/x"}]}, InvalidInput, "/no/such/dir"),
        ({"mounts": [{"host_path": "/dev/null", "guest_path": "/x"}]}, InvalidInput, "regular file"),
        ({"mounts": [{"host_path": "/usr", "guest_path": "/x/../.."}]}, InvalidInput, ".."),
        ({"root_disk": {"base_path": "/no/such/disk"}}, InvalidInput, "/no/such/disk"),
        ({"root_disk": {"base_path": "/etc/passwd"}}, InvalidInput, "512"),
    ],
)
async def test_bad_input_is_refused_and_leaves_nothing(
    hypervisor: HypervisorProcess,
    client: Client,
    changes: dict[str, object],
    kind: type[VoidboxError],
    words: str,
) -> None:
    error = await refused(client.create("bad", **changes))
    assert isinstance(error, kind), error
    assert words in error.message
    assert isinstance(await refused(client.get("bad")), NotFound)
    assert not hypervisor.layout.box("bad").exists()


async def test_memory_that_other_boxes_were_promised_is_not_given_twice(
    client: Client, shared_box: str
) -> None:
    told = await client.hypervisor.GetCapabilities(pb.GetCapabilitiesRequest())
    error = await refused(client.create("greedy", resources={"memory_mib": told.available_memory_mib + 1}))
    assert isinstance(error, Exhausted)
    assert str(told.host_memory_mib) in error.message
    assert "VOIDBOX_HYPERVISOR_MEMORY_OVERCOMMIT" in error.message


@pytest.mark.parametrize("memory", [32, 64, 128])
async def test_a_guest_with_too_little_memory_fails_at_once_and_says_so(
    hypervisor: HypervisorProcess, client: Client, memory: int
) -> None:
    error = await refused(client.create("small", resources={"memory_mib": memory}))
    assert isinstance(error, InvalidInput), error
    assert error.reason == "MEMORY_TOO_SMALL"
    assert "sandbox.memory_mb" in error.message
    assert not hypervisor.layout.box("small").exists()


async def test_a_kernel_without_an_initramfs_it_can_use_fails_with_the_panic(
    client: Client, tmp_path: Path
) -> None:
    broken = tmp_path / "initramfs.cpio"
    broken.write_bytes(b"070701" + b"junk" * 100)
    error = await refused(client.create("panic", initramfs_path=str(broken)))
    assert isinstance(error, WrongState), error
    assert error.reason == "BOOT_FAILED"
    assert "Kernel panic" in error.message


async def test_a_start_that_takes_too_long_ends_with_the_console(
    hypervisor: HypervisorProcess, client: Client
) -> None:
    request = pb.CreateBoxRequest(box_id="slow", config=box_config())
    request.start_timeout.FromMilliseconds(500)
    error = await refused(client.hypervisor.CreateBox(request))
    assert error.reason == "START_TIMEOUT"
    assert not hypervisor.layout.box("slow").exists()


async def test_a_caller_that_goes_away_undoes_the_start(
    hypervisor: HypervisorProcess, client: Client
) -> None:
    watch = client.hypervisor.WatchBoxes(pb.WatchBoxesRequest(), timeout=60)
    call = client.hypervisor.CreateBox(pb.CreateBoxRequest(box_id="left", config=box_config()))
    async for change in watch:
        if change.box.id == "left" and change.box.vmm_pid:
            call.cancel()
        if change.box.id == "left" and change.deleted:
            break
    watch.cancel()
    assert not hypervisor.layout.box("left").exists()
    assert isinstance(await refused(client.get("left")), NotFound)


async def test_stop_asks_the_guest_and_delete_leaves_nothing(
    hypervisor: HypervisorProcess, client: Client
) -> None:
    boxes = await asyncio.gather(client.create("one", labels={"n": "1"}), client.create("two"))
    assert boxes[0].boot_id != boxes[1].boot_id
    owners = {Path(f"/proc/{box.vmm_pid}").stat().st_uid for box in boxes}
    assert len(owners) == (2 if os.geteuid() == 0 else 1)
    listed = await client.hypervisor.ListBoxes(pb.ListBoxesRequest(labels={"n": "1"}))
    assert [box.id for box in listed.boxes] == ["one"]
    call = client.guest.Exec(metadata=((BOX_KEY, "two"),))
    await call.write(guest_pb2.ExecRequest(start=guest_pb2.ExecStart(program="sleep", args=["1000"])))
    events = aiter(call)
    assert (await anext(events)).event.HasField("started")
    stopped = (await client.hypervisor.StopBox(pb.StopBoxRequest(box_id="one"))).box
    assert (stopped.state, stopped.reason) == (pb.BOX_STATE_STOPPED, "stopped on request")
    assert stopped.vmm_pid == 0
    error = await refused(client.run("one", "true"))
    assert isinstance(error, WrongState)
    assert "stopped on request" in error.message
    os.kill(boxes[1].vmm_pid, 9)

    async def rest() -> None:
        async for _ in events:
            pass

    died = await refused(rest())
    assert isinstance(died, Unavailable)
    assert died.reason == "BOX_DIED"
    assert "SIGKILL" in died.message
    failed = await client.until("two", pb.BOX_STATE_FAILED)
    assert "SIGKILL" in failed.reason
    for box_id in ("one", "two", "two"):
        await client.delete(box_id)
        assert not hypervisor.layout.box(box_id).exists()


async def test_idle_and_old_boxes_are_stopped(client: Client) -> None:
    box = await client.create("brief", idle_timeout={"seconds": 1})
    stopped = await client.until("brief", pb.BOX_STATE_STOPPED)
    assert "idle_timeout" in stopped.reason
    assert stopped.end_time.ToNanoseconds() - box.ready_time.ToNanoseconds() > 0.9e9
    await client.delete("brief")


async def test_a_guest_that_powers_off_as_asked_has_stopped(client: Client) -> None:
    await client.create("off")
    await client.guest.Shutdown(guest_pb2.ShutdownRequest(), metadata=((BOX_KEY, "off"),))
    box = await client.until("off", pb.BOX_STATE_STOPPED)
    assert "as asked" in box.reason
    await client.delete("off")
