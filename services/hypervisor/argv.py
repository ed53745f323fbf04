"""QEMU's command line, as a pure function of what the machine is made of.

Every file is named by a descriptor that the process inherits, so QEMU needs no permission
on any path: `/dev/fdset/N` where QEMU's own open takes it, `/dev/fd/N` where it calls open(2).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from services.hypervisor import ram_descriptor
from services.hypervisor.model import Accelerator, Transport

# Everything QEMU can emulate, but no fifth level of page tables: each walk of them is emulated too.
# Boot to the agent's answer takes 6.6 s of processor time without it, 8.4 s with it. Nor fast string
# instructions: with them the guest copies memory a byte at a time, as QEMU emulates `rep movsb`; without,
# eight bytes (unpacking a 46 MB initramfs: 0.5 s with them, 0.3 s without).
EMULATED_CPU = "max,la57=off,erms=off"

# Memory for translated code, thrown away when full. QEMU's default is 1 GiB, and a guest may fill it;
# boot takes 93 MiB, several Python programs later it is 109.
TRANSLATION_MIB = 256

VHOST_SOCKET = "vhost.sock"

# Root ports of a machine that is saved or restored. Vsock has the first two, since a port that lost a device
# does not always take the next one; the others hold up to eight devices each.
SAVED_PORTS = 7
_FIRST_SHARED_PORT = 2
# Ports of their own for the network device, which goes out and comes back on the other one as vsock does.
SAVED_NIC_PORTS = 2
_FUNCTIONS = 8

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

KERNEL_COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 reboot=t no_timer_check random.trust_cpu=on rootfstype=ramfs "
    # Debian's kernel tests its ciphers and patches in probes for tracing: 0.4 s of an emulated boot.
    "cryptomgr.notests initcall_blacklist=init_kprobe_trace "
    # Without AppArmor and TOMOYO, which have no policy in a guest and are asked at every file.
    "lsm=landlock,yama"
)
"""rootfstype=ramfs: as a tmpfs the guest image may only take half of the RAM, and a machine of
less than 200 MiB panics while it is unpacked. panic=-1 reboots at once and -no-reboot turns that
into QEMU's end; nothing here is secret, since every program in the guest can read /proc/cmdline."""


def kernel_command_line(accelerator: Accelerator, vcpus: int) -> str:
    """What the kernel of a machine is told, the same for all machines of a kind."""
    if accelerator is Accelerator.KVM:
        return KERNEL_COMMAND_LINE
    # Emulation is no security boundary, and what guards against speculation costs a boot 0.25 s there.
    line = f"{KERNEL_COMMAND_LINE} mitigations=off init_on_alloc=0"
    # Calibrating the local timer takes 0.3 s; one processor does as well with the HPET. Several need theirs.
    return f"{line} noapictimer" if vcpus == 1 else line


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskDevice:
    """A virtio block device; `overlay_fd` is a writable qcow2 layer above the base, or None."""

    serial: str
    base_fd: int
    base_format: str = "raw"
    overlay_fd: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareDevice:
    """A 9p share of the directory open at `directory_fd`."""

    tag: str
    directory_fd: int
    read_only: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class VsockDevice:
    """The vsock device.

    `fd` is /dev/vhost-vsock (vhost) or the directory that holds the backend's listening socket
    `VHOST_SOCKET` (vhost-user): the backend accepts only a connection that QEMU itself makes.
    """

    transport: Transport
    cid: int
    fd: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineConfig:
    """What a machine is made of; descriptors are numbers in the QEMU process.

    `memory_fd` is a memfd that becomes the RAM. An `incoming` machine has it for itself, copied
    as it is written, and waits for a saved state: its vsock device and its shares' devices are
    plugged in after that, while `disks` are those that the saved machine had.
    """

    program: str
    name: str
    accelerator: Accelerator
    memory_mib: int
    vcpus: int
    kernel_fd: int | None = None
    initramfs_fd: int | None = None
    command_line: str = ""
    console_fd: int
    vsock: VsockDevice | None = None
    monitor_fd: int | None = None
    monitor_listen_fd: int | None = None
    disks: tuple[DiskDevice, ...] = ()
    shares: tuple[ShareDevice, ...] = ()
    memory_fd: int | None = None
    incoming: bool = False
    ports: int = 1
    nic_ports: int = 0
    reclaims: bool = False


def build_argv(machine: MachineConfig) -> list[str]:
    """The words that start `machine`, the program first.

    RAM is a sealed memfd, shared: the vhost-user protocol hands out RAM by descriptor, and an
    anonymous backend has none; a file in the box directory would be written back to the disk.
    """
    # The state is saved by xen-save-devices-state, whose stream has neither of these sections.
    plain = ",suppress-vmdesc=on" if machine.ports > 1 else ""
    argv = [
        machine.program,
        *("-name", f"guest={quote(machine.name)}"),
        *("-machine", f"q35,memory-backend=ram,vmport=off,usb=off{plain}"),
        *("-accel", "kvm" if machine.accelerator is Accelerator.KVM else f"tcg,tb-size={TRANSLATION_MIB}"),
        *("-cpu", "host" if machine.accelerator is Accelerator.KVM else EMULATED_CPU),
        *("-smp", str(machine.vcpus)),
        *("-m", f"{machine.memory_mib}M"),
        *("-object", _memory(machine)),
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none"),
        *("-nic", "none"),
        *("-sandbox", SANDBOX),
    ]
    if machine.kernel_fd is not None:
        argv += ["-kernel", f"/dev/fd/{machine.kernel_fd}"]
        argv += ["-initrd", f"/dev/fd/{machine.initramfs_fd}"]
        argv += ["-append", machine.command_line]
    if machine.ports > 1:
        argv += ["-global", "migration.send-configuration=off"]
    if machine.incoming:
        argv += ["-incoming", "defer", "-S"]
    sets = _FdSets()
    argv += sets.add(machine.console_fd)
    argv += ["-chardev", f"file,id=console,path={sets.path(machine.console_fd)},append=on"]
    argv += ["-serial", "chardev:console"]
    if machine.monitor_fd is not None:
        argv += ["-chardev", f"socket,id=monitor,fd={machine.monitor_fd}"]
        argv += ["-mon", "chardev=monitor,mode=control"]
    if machine.monitor_listen_fd is not None:
        argv += ["-chardev", f"socket,id=adopt,fd={machine.monitor_listen_fd},server=on,wait=off"]
        argv += ["-mon", "chardev=adopt,mode=control"]
    # One slot, for the vsock device. A machine that boots for itself has all its devices from the start, and
    # each empty slot costs a boot under emulation some 60 ms: with six, the slim kernel is up after 1.04 s
    # instead of 0.76 s. A machine that is saved pays that once for all its clones.
    for number in range(machine.ports):
        argv += ["-device", f"pcie-root-port,id=port{number},chassis={number + 1},slot={number + 1}"]
    for number in range(machine.nic_ports):
        slot = machine.ports + number + 1
        argv += ["-device", f"pcie-root-port,id=nic{number},chassis={slot},slot={slot}"]
    argv += ["-object", "rng-builtin,id=entropy", "-device", "virtio-rng-pci,rng=entropy"]
    if machine.reclaims and machine.ports > 1:
        # The guest says what it has freed; the host has it back then. A kernel that counts on freed pages
        # being zero leaves that alone without page-poison: here they are what they were in the template.
        argv += ["-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on,page-poison=off"]
    if machine.ports > 1:
        # Tells each restored guest that it is another one: its kernel draws new random numbers.
        argv += ["-device", "vmgenid,guid=auto,id=generation"]
    if machine.vsock is not None and not machine.incoming:
        argv += _vsock(machine.vsock)
    for number, disk in enumerate(machine.disks):
        argv += _disk(number, disk, sets, place(number) if machine.incoming else {})
    for number, share in enumerate(machine.shares):
        argv += _share_backend(number, share)
        if not machine.incoming:
            argv += [
                "-device",
                f"virtio-9p-pci,id=share{number},fsdev=fs{number},mount_tag={quote(share.tag)}",
            ]
    return argv


def quote(text: str) -> str:
    """`text` as a value in a QEMU option list, where a comma is written twice."""
    return text.replace(",", ",,")


class _FdSets:
    """Numbers for `-add-fd`; each descriptor gets a set of its own."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}

    def add(self, fd: int) -> list[str]:
        number = self._numbers.setdefault(fd, len(self._numbers) + 1)
        return ["-add-fd", f"fd={fd},set={number}"]

    def path(self, fd: int) -> str:
        return f"/dev/fdset/{self._numbers[fd]}"


def _memory(machine: MachineConfig) -> str:
    size = f"id=ram,size={machine.memory_mib}M"
    if machine.memory_fd is None:
        return f"memory-backend-memfd,{size},share=on,seal=on"
    share = "off" if machine.incoming else "on"
    path = ram_descriptor.PATH if machine.incoming and machine.reclaims else f"/dev/fd/{machine.memory_fd}"
    return f"memory-backend-file,{size},mem-path={path},share={share}"


def _vsock(device: VsockDevice) -> list[str]:
    if device.transport is Transport.VHOST:
        return [
            "-device",
            f"vhost-vsock-pci,id=vsock0,bus=port0,guest-cid={device.cid},vhostfd={device.fd}",
        ]
    return [
        *("-chardev", f"socket,id=vsock0,path=/dev/fd/{device.fd}/{VHOST_SOCKET}"),
        *("-device", "vhost-user-vsock-pci,id=vsock0,bus=port0,chardev=vsock0"),
    ]


def _disk(number: int, disk: DiskDevice, sets: _FdSets, place: Mapping[str, object]) -> list[str]:
    argv = [*sets.add(disk.base_fd)]
    if disk.overlay_fd is not None:
        argv += sets.add(disk.overlay_fd)
    for node in disk_nodes(number, disk, sets.path):
        argv += ["-blockdev", _json(node)]
    if place:
        return [*argv, "-device", _json({**disk_device(number, disk), **place})]
    device = ",".join(f"{key}={value}" for key, value in disk_device(number, disk).items())
    return [*argv, "-device", device.removeprefix("driver=")]


def _json(options: Mapping[str, object]) -> str:
    return json.dumps(options, separators=(",", ":"))


def disk_nodes(number: int, disk: DiskDevice, path: Callable[[int], str]) -> list[dict[str, object]]:
    """The block nodes of a disk, from the file up, the last one being what its device shows.

    Args:
        number: The disk's place among the machine's.
        disk: The disk.
        path: Where QEMU opens a descriptor of `disk`.
    """
    base, overlay = f"base{number}", f"overlay{number}"
    nodes = [
        _file(f"{base}-file", path(disk.base_fd), writable=False),
        _format(base, disk.base_format, f"{base}-file", backing=None, writable=False),
    ]
    if disk.overlay_fd is not None:
        nodes.append(_file(f"{overlay}-file", path(disk.overlay_fd), writable=True))
        nodes.append(_format(overlay, "qcow2", f"{overlay}-file", backing=base, writable=True))
    return nodes


def disk_device(number: int, disk: DiskDevice) -> dict[str, object]:
    """A disk's virtio device. A full host disk is reported to the guest as an I/O error: QEMU's
    default would stop the whole machine instead."""
    return {
        "driver": "virtio-blk-pci",
        "id": f"disk{number}",
        "drive": f"base{number}" if disk.overlay_fd is None else f"overlay{number}",
        "serial": disk.serial,
        "werror": "report",
        "rerror": "report",
    }


def share_device(number: int, share: ShareDevice) -> dict[str, object]:
    """A share's virtio device; its backend is on the command line."""
    return {
        "driver": "virtio-9p-pci",
        "id": f"share{number}",
        "fsdev": f"fs{number}",
        "mount_tag": share.tag,
    }


def place(number: int) -> dict[str, object]:
    """Where the device `number` of a saved or restored machine is; the vsock device is not counted."""
    port, function = divmod(number, _FUNCTIONS)
    return {"bus": f"port{_FIRST_SHARED_PORT + port}", "addr": f"0.{function}", "multifunction": True}


def _file(node: str, path: str, *, writable: bool) -> dict[str, object]:
    options: dict[str, object] = {
        "driver": "file",
        "node-name": node,
        "filename": path,
        "read-only": not writable,
    }
    if writable:
        options["discard"] = "unmap"
    return options


def _format(node: str, driver: str, file: str, *, backing: str | None, writable: bool) -> dict[str, object]:
    options: dict[str, object] = {
        "driver": driver,
        "node-name": node,
        "file": file,
        "read-only": not writable,
    }
    if driver == "qcow2":
        # Never the path that the image's header names: it may be anybody's.
        options["backing"] = backing
    if writable:
        options["discard"] = "unmap"
    return options


def _share_backend(number: int, share: ShareDevice) -> list[str]:
    read_only = ",readonly=on" if share.read_only else ""
    return [
        "-fsdev",
        f"local,id=fs{number},path=/dev/fd/{share.directory_fd},security_model=none,multidevs=remap{read_only}",
    ]
