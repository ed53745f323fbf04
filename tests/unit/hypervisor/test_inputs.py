"""Host files are checked before anything starts, and the machine's user follows from the mounts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.common.errors import InvalidInput, WrongState
from services.hypervisor import inputs
from services.hypervisor.disks import EXTRA_MIB, make_overlay, overlay_bytes
from services.hypervisor.inputs import Identity
from services.hypervisor.model import Disk, Mount, MountMode
from services.hypervisor.programs import find

ELF = b"\x7fELF\x02\x01".ljust(18, b"\0") + b"\x3e\0".ljust(1000, b"\0")
NOBODY = Identity(65534, 65534)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")


@pytest.mark.parametrize(
    ("content", "good"),
    [
        (ELF, True),
        (bytes(0x1FE) + b"\x55\xaa" + bytes(2) + b"HdrS" + bytes(500), True),
        (b"", False),
        (b"#!/bin/sh\n" * 100, False),
        (ELF.replace(b"\x3e", b"\xb7"), False),
        (b"\x7fELF\x01\x01" + ELF[6:], False),
    ],
)
def test_a_kernel_is_known_by_its_first_bytes(tmp_path: Path, content: bytes, good: bool) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(content)
    if good:
        os.close(inputs.open_kernel(str(path)))
    else:
        with pytest.raises(InvalidInput, match="neither a vmlinux"):
            inputs.open_kernel(str(path))


def test_pipes_and_directories_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/null")):
        with pytest.raises(InvalidInput, match="not a regular file"):
            inputs.open_initramfs(str(path))


@pytest.mark.parametrize(("memory", "fits"), [(17, False), (18, True), (4096, True)])
def test_an_initramfs_must_fit_twice(tmp_path: Path, memory: int, fits: bool) -> None:
    path = tmp_path / "initramfs"
    path.write_bytes(b"070701" + bytes((1 << 20) - 6))
    fd = inputs.open_initramfs(str(path))
    try:
        if fits:
            inputs.check_guest_memory(memory, fd)
        else:
            with pytest.raises(InvalidInput, match=r"needs 18 MiB.*sandbox\.memory_mb"):
                inputs.check_guest_memory(memory, fd)
    finally:
        os.close(fd)


def test_a_private_file_is_copied_for_another_user(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(ELF)
    path.chmod(0o600)
    copy = inputs.reopenable(inputs.open_kernel(str(path)), Identity(os.geteuid() + 1, 1))
    assert os.pread(copy, 2000, 0) == ELF
    assert os.fstat(copy).st_ino != path.stat().st_ino
    os.close(copy)
    path.chmod(0o644)
    kept = inputs.reopenable(inputs.open_kernel(str(path)), Identity(os.geteuid() + 1, 1))
    assert os.fstat(kept).st_ino == path.stat().st_ino
    os.close(kept)


@pytest.mark.parametrize(
    ("disk", "words"),
    [
        (Disk(base_path="", base_size=0), "absolute"),
        (Disk(base_path="{}", base_size=1024), "its digest is of 1024"),
        (Disk(base_path="{}", format="qcow2"), "no qcow2"),
    ],
)
def test_a_disk_must_be_what_it_is_said_to_be(tmp_path: Path, disk: Disk, words: str) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(512))
    named = Disk(base_path=disk.base_path.format(path), base_size=disk.base_size, format=disk.format)
    with pytest.raises(InvalidInput, match=words):
        inputs.open_disk_base(named)


def mounted(path: Path, mode: MountMode = MountMode.READ_ONLY) -> tuple[Mount, int]:
    mount = Mount(host_path=str(path), guest_path="/mnt", mode=mode)
    return mount, inputs.open_mount(mount)


@as_root
def test_the_machine_becomes_the_owner_of_what_it_shares(tmp_path: Path) -> None:
    theirs, root = tmp_path / "theirs", tmp_path / "root"
    theirs.mkdir(mode=0o700)
    root.mkdir(mode=0o755)
    os.chown(theirs, 1234, 4321)
    pairs = [mounted(theirs, MountMode.READ_WRITE), mounted(root)]
    assert inputs.machine_identity(pairs, NOBODY) == (Identity(1234, 4321), True)
    assert inputs.machine_identity(pairs[1:], NOBODY) == (NOBODY, False)
    for _, fd in pairs:
        os.close(fd)


@as_root
@pytest.mark.parametrize(
    ("owners", "mode", "bits", "words"),
    [
        ((0,), MountMode.READ_WRITE, 0o755, "no machine runs as root.*chown"),
        ((1234, 1235), MountMode.READ_ONLY, 0o755, "different users"),
        ((0,), MountMode.READ_ONLY, 0o700, "may not read.*chmod"),
    ],
)
def test_mounts_that_no_one_user_can_serve_are_refused(
    tmp_path: Path, owners: tuple[int, ...], mode: MountMode, bits: int, words: str
) -> None:
    pairs = []
    for owner in owners:
        path = tmp_path / str(owner)
        path.mkdir(mode=bits)
        os.chown(path, owner, owner)
        pairs.append(mounted(path, mode))
    with pytest.raises(InvalidInput, match=f"(?s){words}"):
        inputs.machine_identity(pairs, NOBODY)
    for _, fd in pairs:
        os.close(fd)


def test_a_device_that_the_machines_user_cannot_open_names_the_cure(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    with pytest.raises(WrongState, match="No such file"):
        inputs.check_device_access(str(device), NOBODY)
    device.touch(mode=0o600)
    with pytest.raises(WrongState, match=r"mode 0600.*chmod o\+rw"):
        inputs.check_device_access(str(device), Identity(os.geteuid() + 1, os.getegid() + 1))
    inputs.check_device_access(str(device), Identity(os.geteuid(), os.getegid()))


@pytest.mark.parametrize(
    ("base", "disk_mib", "length"),
    [(512, 0, EXTRA_MIB + 1), (10 << 20, 0, EXTRA_MIB + 10), (10 << 20, 5, 10), (10 << 20, 64, 64)],
)
def test_a_writable_disk_is_never_shorter_than_its_base(base: int, disk_mib: int, length: int) -> None:
    assert overlay_bytes(base, disk_mib) == length << 20


async def test_a_layer_is_private_and_names_no_backing_file(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(bytes(1 << 20))
    fd = os.open(base, os.O_RDONLY)
    layer = await make_overlay(await find(), Disk(base_path=str(base)), fd, 8, tmp_path / "layer.qcow2")
    header = os.pread(layer, 32, 0)
    assert header[:4] == b"QFI\xfb"
    assert int.from_bytes(header[8:16], "big") == 0  # offset of the backing file's name
    assert int.from_bytes(header[24:32], "big") == 8 << 20
    assert (tmp_path / "layer.qcow2").stat().st_mode & 0o777 == 0o600
    os.close(fd)
    os.close(layer)
