"""The command line is a pure function of the machine; what it must hold is compared word by word."""

from __future__ import annotations

import dataclasses
import json

import pytest

from services.hypervisor.argv import (
    DiskDevice,
    MachineConfig,
    ShareDevice,
    VsockDevice,
    build_argv,
    kernel_command_line,
    quote,
)
from services.hypervisor.model import Accelerator, Transport

PLAIN = MachineConfig(
    program="/usr/bin/qemu-system-x86_64",
    name="box-1",
    accelerator=Accelerator.TCG,
    memory_mib=256,
    vcpus=2,
    kernel_fd=10,
    initramfs_fd=11,
    command_line="console=ttyS0 quiet",
    console_fd=12,
)

GOLDEN = """/usr/bin/qemu-system-x86_64
-name guest=box-1
-machine q35,memory-backend=ram,vmport=off,usb=off
-accel tcg,tb-size=256
-cpu max,la57=off,erms=off
-smp 2
-m 256M
-object memory-backend-memfd,id=ram,size=256M,share=on,seal=on
-nodefaults -no-user-config -no-reboot
-display none
-nic none
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-kernel /dev/fd/10
-initrd /dev/fd/11
-append|console=ttyS0 quiet
-add-fd fd=12,set=1
-chardev file,id=console,path=/dev/fdset/1,append=on
-serial chardev:console
-chardev socket,id=monitor,fd=13
-mon chardev=monitor,mode=control
-chardev socket,id=adopt,fd=14,server=on,wait=off
-mon chardev=adopt,mode=control
-device pcie-root-port,id=port0,chassis=1,slot=1
-object rng-builtin,id=entropy -device virtio-rng-pci,rng=entropy
-chardev socket,id=vsock0,path=/dev/fd/15/vhost.sock
-device vhost-user-vsock-pci,id=vsock0,bus=port0,chardev=vsock0
"""


def words(golden: str) -> list[str]:
    return [
        word for line in golden.splitlines() for word in (line.split("|") if "|" in line else line.split())
    ]


def values(argv: list[str], flag: str) -> list[str]:
    return [argv[n + 1] for n, word in enumerate(argv) if word == flag]


def test_a_plain_machine_has_the_known_command_line() -> None:
    machine = dataclasses.replace(
        PLAIN,
        monitor_fd=13,
        monitor_listen_fd=14,
        vsock=VsockDevice(transport=Transport.VHOST_USER, cid=70000, fd=15),
    )
    assert build_argv(machine) == words(GOLDEN)


def test_kvm_gets_the_hosts_processor() -> None:
    argv = build_argv(dataclasses.replace(PLAIN, accelerator=Accelerator.KVM))
    assert values(argv, "-cpu") == ["host"]
    assert values(argv, "-accel") == ["kvm"]


def test_the_kernels_vsock_is_passed_by_descriptor() -> None:
    device = VsockDevice(transport=Transport.VHOST, cid=70000, fd=9)
    argv = build_argv(dataclasses.replace(PLAIN, vsock=device))
    assert "vhost-vsock-pci,id=vsock0,bus=port0,guest-cid=70000,vhostfd=9" in values(argv, "-device")


def test_a_read_only_disk_has_no_writable_node() -> None:
    argv = build_argv(dataclasses.replace(PLAIN, disks=(DiskDevice(serial="root", base_fd=20),)))
    nodes = [json.loads(each) for each in values(argv, "-blockdev")]
    assert [node["driver"] for node in nodes] == ["file", "raw"]
    assert all(node["read-only"] for node in nodes)
    assert "fd=20,set=2" in values(argv, "-add-fd")
    device = next(each for each in values(argv, "-device") if each.startswith("virtio-blk"))
    assert device == "virtio-blk-pci,id=disk0,drive=base0,serial=root,werror=report,rerror=report"


def test_a_writable_disk_is_a_layer_above_a_read_only_base() -> None:
    disk = DiskDevice(serial="root", base_fd=20, overlay_fd=21)
    argv = build_argv(dataclasses.replace(PLAIN, disks=(disk,)))
    nodes = {node["node-name"]: node for node in map(json.loads, values(argv, "-blockdev"))}
    assert nodes["base0"]["read-only"]
    assert nodes["base0-file"]["read-only"]
    assert nodes["overlay0"]["backing"] == "base0"
    assert not nodes["overlay0"]["read-only"]
    assert nodes["overlay0-file"]["filename"] == "/dev/fdset/3"


def test_a_qcow2_base_never_opens_the_backing_file_that_its_header_names() -> None:
    disk = DiskDevice(serial="root", base_fd=20, base_format="qcow2")
    argv = build_argv(dataclasses.replace(PLAIN, disks=(disk,)))
    node = json.loads(values(argv, "-blockdev")[1])
    assert node["driver"] == "qcow2"
    assert node["backing"] is None


def test_a_share_is_named_by_descriptor_and_is_read_only_unless_told() -> None:
    shares = (
        ShareDevice(tag="m0", directory_fd=30),
        ShareDevice(tag="m1", directory_fd=31, read_only=False),
    )
    argv = build_argv(dataclasses.replace(PLAIN, shares=shares))
    assert values(argv, "-fsdev") == [
        "local,id=fs0,path=/dev/fd/30,security_model=none,multidevs=remap,readonly=on",
        "local,id=fs1,path=/dev/fd/31,security_model=none,multidevs=remap",
    ]


@pytest.mark.parametrize(("text", "quoted"), [("plain", "plain"), ("a,b", "a,,b"), (",", ",,")])
def test_commas_are_doubled(text: str, quoted: str) -> None:
    assert quote(text) == quoted


def test_no_network_exists() -> None:
    argv = build_argv(PLAIN)
    assert values(argv, "-nic") == ["none"]
    assert not any("net" in each for each in values(argv, "-device"))


def test_a_processor_of_the_host_keeps_its_guards_and_an_emulated_one_boots_without_them() -> None:
    real = kernel_command_line(Accelerator.KVM, 1).split()
    emulated = kernel_command_line(Accelerator.TCG, 1).split()
    costly = {"mitigations=off", "init_on_alloc=0", "noapictimer"}
    assert not costly & set(real)
    assert costly <= set(emulated)


def test_several_emulated_processors_keep_their_own_timers() -> None:
    assert "noapictimer" not in kernel_command_line(Accelerator.TCG, 2).split()


def test_machines_that_are_saved_or_restored_report_what_they_free_and_others_have_no_driver() -> None:
    balloon = "virtio-balloon-pci,id=balloon,free-page-reporting=on,page-poison=off"
    saved = dataclasses.replace(PLAIN, ports=7, memory_fd=9)
    assert balloon in build_argv(dataclasses.replace(saved, reclaims=True))
    assert balloon not in build_argv(saved)
    assert balloon not in build_argv(dataclasses.replace(PLAIN, reclaims=True))
