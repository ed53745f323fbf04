"""Killed processes, missing programs, other users: boxes are found again or gone, never leaked.

Each test has a service of its own, which it harms.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common import process
from services.common.errors import Exhausted, NotFound, Unavailable, WrongState
from services.hypervisor.inputs import Identity
from services.hypervisor.pidfd import children, start_time
from services.hypervisor.probe import Prober
from services.hypervisor.registry import reap
from tests.other_user import needs_another_user
from tests.vm import BOX_KEY, HypervisorProcess, box_config, guest_image, host_directory, refused
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

pytestmark = pytest.mark.vm

COUNT = "i=0; while [ $i -lt 100 ]; do echo line $i; i=$((i+1)); sleep 0.05; done"


def parent(pid: int) -> int:
    """The parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def test_a_killed_hypervisor_finds_its_box_and_its_running_program_again() -> None:
    with HypervisorProcess() as service:
        async with service.connected() as client:
            before = await client.create("stays")
            await client.create("paused")
            await client.hypervisor.PauseBox(pb.PauseBoxRequest(box_id="paused"))
            call = client.guest.Exec(metadata=((BOX_KEY, "stays"),))
            start = guest_pb2.ExecStart(exec_id="count", program="sh", args=["-c", COUNT], detach=True)
            await call.write(guest_pb2.ExecRequest(start=start))
            seen = bytearray()
            async for message in call:
                seen += message.event.output.data
                if len(seen) > 100:
                    break
            service.kill()
        service.restart()
        async with service.connected() as client:
            assert await client.get("stays") == before
            assert (await client.get("paused")).state == pb.BOX_STATE_PAUSED
            attach = client.guest.Attach(metadata=((BOX_KEY, "stays"),), timeout=60)
            opening = guest_pb2.AttachOpen(exec_id="count", stdout_offset=len(seen))
            await attach.write(guest_pb2.AttachRequest(open=opening))
            async for event in attach:
                seen += event.event.output.data
            assert bytes(seen) == b"".join(b"line %d\n" % n for n in range(100))
            resumed = (await client.hypervisor.ResumeBox(pb.ResumeBoxRequest(box_id="paused"))).box
            assert resumed.state == pb.BOX_STATE_RUNNING
            exit_, _, _ = await client.run("paused", "true")
            assert exit_.exit_code == 0
            for box_id in ("stays", "paused"):
                await client.delete(box_id)
            service.assert_nothing_runs()


async def test_a_killed_shim_takes_its_machine_along_and_the_box_has_failed() -> None:
    with HypervisorProcess() as service:
        async with service.connected() as client:
            box = await client.create("shimless")
            shim = parent(box.vmm_pid)
            assert children(shim) == [box.vmm_pid]
            call = client.guest.Exec(metadata=((BOX_KEY, "shimless"),))
            start = guest_pb2.ExecStart(program="sleep", args=["1000"])
            await call.write(guest_pb2.ExecRequest(start=start))
            events = aiter(call)
            assert (await anext(events)).event.HasField("started")
            os.kill(shim, signal.SIGKILL)
            died = await refused(anext(events))
            assert isinstance(died, Unavailable)
            assert died.reason == "BOX_DIED"
            failed = await client.until("shimless", pb.BOX_STATE_FAILED)
            assert "device process was killed" in failed.reason
            assert start_time(box.vmm_pid) is None
            await client.delete("shimless")
            service.assert_nothing_runs()


async def test_boxes_that_ended_or_were_starting_while_the_service_was_down_are_settled() -> None:
    with HypervisorProcess() as service:
        async with service.connected() as client:
            box = await client.create("dies")
            starting = client.hypervisor.CreateBox(
                pb.CreateBoxRequest(box_id="starting", config=box_config())
            )
            async for change in client.hypervisor.WatchBoxes(pb.WatchBoxesRequest(), timeout=60):
                if change.box.id == "starting" and change.box.vmm_pid:
                    unborn = change.box.vmm_pid
                    break
            service.kill()
            await refused(starting)
        os.kill(box.vmm_pid, signal.SIGKILL)
        assert start_time(unborn) is not None
        service.restart()
        async with service.connected() as client:
            failed = await client.get("dies")
            assert failed.state == pb.BOX_STATE_FAILED
            assert "SIGKILL" in failed.reason
            assert isinstance(await refused(client.get("starting")), NotFound)
            assert start_time(unborn) is None
            await client.delete("dies")


async def test_reap_leaves_nothing_of_a_service_that_is_gone() -> None:
    service = HypervisorProcess()
    with service:
        async with service.connected() as client:
            box = await client.create("orphan")
            with pytest.raises(WrongState, match="another hypervisor owns"):
                reap(service.paths.state)
            service.kill()
        assert start_time(box.vmm_pid) is not None
        assert await asyncio.to_thread(service.reap) == ["orphan"]
        assert start_time(box.vmm_pid) is None
        service.assert_nothing_runs()


async def test_without_qemu_the_error_names_the_command_to_type(tmp_path: Path) -> None:
    with HypervisorProcess(env={"PATH": str(tmp_path)}) as service:
        async with service.connected() as client:
            error = await refused(client.create("nowhere"))
            assert isinstance(error, WrongState)
            assert error.reason == "PROGRAM_MISSING"
            assert "sudo apt-get install -y qemu-system-x86 qemu-utils" in error.message
            told = await client.hypervisor.GetCapabilities(pb.GetCapabilitiesRequest())
            assert told.qemu_version == ""
            qemu = next(probe for probe in told.probes if probe.name == "qemu")
            assert not qemu.usable
            assert "apt-get" in qemu.detail
            assert isinstance(await refused(client.get("nowhere")), NotFound)


@needs_another_user
async def test_an_unprivileged_user_runs_boxes_with_mounts_and_forks() -> None:
    with host_directory(65534) as home:
        await run_unprivileged(65534, home)


async def run_unprivileged(uid: int, home: Path) -> None:
    """Everything of the service belongs to `uid` and is in `home`."""
    share, layered = home / "share", home / "layered"
    for directory in (share, layered):
        directory.mkdir()
        os.chown(directory, uid, uid)
    image = home / "image"
    image.mkdir()
    for file in (guest_image().kernel, guest_image().initramfs):
        shutil.copy(file, image)
    command = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]
    service = HypervisorProcess(command=command, directory=home)
    service.log.touch()
    with service:
        async with service.connected() as client:
            files = {
                "kernel_path": str(image / guest_image().kernel.name),
                "initramfs_path": str(image / guest_image().initramfs.name),
            }
            box = await client.create(
                "plain",
                **files,
                mounts=[
                    {"host_path": str(share), "guest_path": "/mnt/share", "mode": "MOUNT_MODE_READ_WRITE"},
                    {"host_path": str(layered), "guest_path": "/mnt/over", "mode": "MOUNT_MODE_OVERLAY"},
                ],
            )
            assert Path(f"/proc/{box.vmm_pid}").stat().st_uid == uid
            exit_, _, error = await client.run("plain", "sh", "-c", "id -u > /mnt/share/who")
            assert exit_.exit_code == 0, error
            assert (share / "who").read_text() == f"{uid}\n"
            assert (share / "who").stat().st_uid == uid
            stats = await client.hypervisor.GetBoxStats(pb.GetBoxStatsRequest(box_id="plain"))
            assert stats.resident_bytes > 100 << 20
            script = "cd /mnt/over && mkdir -p d shut && echo x > d/x && echo x > shut/x && chmod 0 shut"
            exit_, _, error = await client.run("plain", "sh", "-c", script)
            assert exit_.exit_code == 0, error
            await client.delete("plain")
            assert os.listdir(layered) == []
            request = pb.ApplyChangesRequest(box_id="plain")
            done = [each async for each in client.hypervisor.ApplyChanges(request, timeout=60)]
            assert [each.applied for each in done] == [False, True, True, True, True], done
            assert (layered / "shut/x").stat().st_uid == uid
            assert not (service.layout.changes / "plain").exists()
            await client.create("parent", **files)
            await client.run("parent", "sh", "-c", "echo kept > /tmp/file")
            fork = pb.ForkBoxRequest(box_id="parent", fork_ids=["child"])
            await client.hypervisor.ForkBox(fork, timeout=60)
            _, out, error = await client.run("child", "cat", "/tmp/file")
            assert out == b"kept\n", error
            for name in ("parent", "child"):
                await client.delete(name)


@contextlib.contextmanager
def small_disk(mib: int) -> Iterator[Path]:
    """A file system of its own of that size."""
    with tempfile.TemporaryDirectory(prefix="voidbox-small-") as name:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", name], check=True)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", name], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
async def test_a_full_disk_is_said_to_be_full_and_leaves_nothing() -> None:
    with small_disk(32) as directory, HypervisorProcess(directory=directory) as service:
        async with service.connected() as client:
            error = await refused(client.create("full"))
            assert isinstance(error, Exhausted)
            assert error.reason == "DISK_FULL"
            assert "VOIDBOX_STATE_DIR" in error.message
            service.assert_nothing_runs()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
async def test_a_guest_that_fills_the_hosts_disk_gets_errors_and_lives(tmp_path: Path) -> None:
    base = tmp_path / "base.ext4"
    await process.run(["mke2fs", "-q", "-t", "ext4", str(base), "300M"])
    with small_disk(100) as directory, HypervisorProcess(directory=directory) as service:
        async with service.connected() as client:
            await client.create(
                "filler", disks=[{"base_path": str(base), "guest_path": "/big", "writable": True}]
            )
            # Each piece is flushed: an aborted journal may let a writer of unflushed data wait for ever.
            piece = "dd if=/dev/urandom of=/big/$n bs=1M count=1 conv=fsync || exit 3"
            exit_, _, error = await client.run("filler", "sh", "-c", f"for n in $(seq 200); do {piece}; done")
            assert exit_.exit_code == 3
            assert b"Input/output error" in error or b"Read-only file system" in error
            exit_, out, _ = await client.run("filler", "echo", "alive")
            assert out == b"alive\n"
            console = client.hypervisor.ReadConsole(pb.ReadConsoleRequest(box_id="filler"), timeout=60)
            said = b"".join([piece.data async for piece in console])
            assert b"I/O error" in said, "what the guest says about the full disk is kept in spite of it"
            stopped = (await client.hypervisor.StopBox(pb.StopBoxRequest(box_id="filler"))).box
            assert stopped.state == pb.BOX_STATE_STOPPED
            await client.delete("filler")
            service.assert_nothing_runs()


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="there is no /dev/kvm to open")
async def test_kvm_is_believed_only_after_the_guests_kernel_has_run_on_it(tmp_path: Path) -> None:
    cache = tmp_path / "probes.json"
    user = Identity(os.geteuid(), os.getegid())
    prober = Prober(cache, user, system="qemu-system-x86_64", image="qemu-img")
    kernel = str(guest_image().kernel)
    first = await prober.kvm(kernel)
    assert ("runs on /dev/kvm" in first.detail) == first.usable
    if not first.usable:
        assert "printed" in first.detail
    assert cache.exists()
    again = Prober(cache, user, system="qemu-system-x86_64", image="qemu-img")
    assert await again.kvm(kernel) == first
