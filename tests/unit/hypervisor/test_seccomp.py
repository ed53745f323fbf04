"""The seccomp list: interpreted for every architecture, and tried for real on this one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from services.hypervisor import seccomp
from services.hypervisor.seccomp import INSTRUCTION, Profile, SeccompUnavailable, program
from tests.unit.hypervisor.vsock_rig import repository

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
MMAP = {"x86_64": 9, "aarch64": 222}
IOCTL = {"x86_64": 16, "aarch64": 29}
SOCKET = {"x86_64": 41, "aarch64": 198}
CONNECT = {"x86_64": 42, "aarch64": 203}
# open, openat, execve, execveat, clone, clone3, fork, ptrace, kill, tkill, bpf, mount, unshare, setns,
# process_vm_readv, process_vm_writev, memfd_create, io_uring_setup, socketpair, bind, listen, unlink, rename,
# getpid, prctl, setuid, keyctl, userfaultfd, pidfd_getfd, name_to_handle_at, perf_event_open
FORBIDDEN = {
    "x86_64": (
        *(
            2,
            257,
            59,
            322,
            56,
            435,
            57,
            101,
            62,
            200,
            321,
            165,
            272,
            308,
            310,
            311,
            319,
            425,
            53,
            49,
            50,
            87,
            82,
        ),
        *(39, 157, 105, 250, 323, 438, 303, 298),
    ),
    "aarch64": (
        *(56, 221, 281, 220, 435, 117, 129, 130, 280, 40, 97, 268, 270, 271, 279, 425, 199, 200, 201, 35, 38),
        *(172, 167, 146, 219, 282, 438, 264, 241),
    ),
}
KILL, ALLOW = seccomp.RET_KILL_PROCESS, seccomp.RET_ALLOW


def verdict(code: bytes, arch: int, number: int, *arguments: int) -> int:
    """What the kernel would decide: a small interpreter of classic BPF."""
    data = number.to_bytes(4, "little") + arch.to_bytes(4, "little") + bytes(8)
    data += b"".join(value.to_bytes(8, "little") for value in (*arguments, 0, 0, 0, 0, 0, 0)[:6])
    instructions = list(INSTRUCTION.iter_unpack(code))
    accumulator, at = 0, 0
    while True:
        operation, true, false, constant = instructions[at]
        at += 1
        if operation == seccomp.BPF_LD_W_ABS:
            accumulator = int.from_bytes(data[constant : constant + 4], "little")
        elif operation == seccomp.BPF_JEQ_K:
            at += true if accumulator == constant else false
        elif operation == seccomp.BPF_JSET_K:
            at += true if accumulator & constant else false
        else:
            assert operation == seccomp.BPF_RET_K
            return int(constant)


@pytest.mark.parametrize("machine", ARCH)
@pytest.mark.parametrize("profile", Profile)
def test_only_the_listed_calls_are_allowed(machine: str, profile: Profile) -> None:
    code, arch = program(machine, profile), ARCH[machine]
    allowed = {number for number in range(600) if verdict(code, arch, number) == ALLOW}
    column = list(ARCH).index(machine)
    listed = {seccomp._NUMBERS[name][column] for name in seccomp._PLAIN} - {-1}
    # With arguments of zero mprotect passes (no PROT_EXEC), mmap, ioctl and socket do not.
    mprotect = seccomp._NUMBERS["mprotect"][column]
    assert allowed == listed | {mprotect} | ({CONNECT[machine]} if profile is Profile.RELAY else set())
    assert not allowed & set(FORBIDDEN[machine])
    assert not allowed & {SOCKET[machine], MMAP[machine], IOCTL[machine]}


@pytest.mark.parametrize("machine", ARCH)
def test_arguments_are_checked_where_they_matter(machine: str) -> None:
    arch = ARCH[machine]
    device, relay = program(machine, Profile.DEVICE), program(machine, Profile.RELAY)
    anonymous, private, execute = 0x20, 0x02, 0x4
    assert verdict(device, arch, MMAP[machine], 0, 4096, 3, anonymous | private) == ALLOW
    assert verdict(device, arch, MMAP[machine], 0, 4096, 3 | execute, anonymous | private) == KILL
    assert verdict(device, arch, MMAP[machine], 0, 4096, 3, private) == KILL
    assert verdict(device, arch, IOCTL[machine], 3, seccomp.FIONBIO) == ALLOW
    assert verdict(device, arch, IOCTL[machine], 3, 0x5413) == KILL
    assert verdict(device, arch, SOCKET[machine], socket.AF_VSOCK, 1) == KILL
    assert verdict(relay, arch, SOCKET[machine], socket.AF_VSOCK, 1) == ALLOW
    for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET):
        assert verdict(relay, arch, SOCKET[machine], family, 1) == KILL


def test_another_architecture_is_killed() -> None:
    code = program("x86_64", Profile.DEVICE)
    assert verdict(code, ARCH["x86_64"], 0) == ALLOW
    assert verdict(code, ARCH["aarch64"], 0) == KILL
    assert verdict(code, 0x40000003, 0) == KILL, "32-bit calls have other numbers"
    assert verdict(code, ARCH["x86_64"], 0x40000000) == KILL, "so have x32's"


def test_an_unknown_processor_is_refused() -> None:
    with pytest.raises(SeccompUnavailable, match="riscv64"):
        program("riscv64", Profile.DEVICE)


def confined(statement: str, profile: str = "DEVICE") -> int:
    """The return code of a process that confines itself and then runs `statement`."""
    script = f"""
import ctypes, json, mmap, os, select, signal, socket, sys, time
from services.hypervisor import seccomp
libc = ctypes.CDLL(None, use_errno=True)
memory = os.open("/proc/self/mem", os.O_RDWR)
buffer = ctypes.create_string_buffer(16)
one, two = socket.socketpair()
one.setblocking(False)
listener = socket.socket(socket.AF_UNIX); listener.bind("\\0" + os.urandom(8).hex()); listener.listen()
client = socket.socket(socket.AF_UNIX); client.connect(listener.getsockname())
epoll = select.epoll()
seccomp.install(seccomp.Profile.{profile})
{statement}
os._exit(0)
"""
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=repository(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    ).returncode


ALLOWED_STATEMENTS = {
    "memory": "at = ctypes.addressof(buffer); os.pread(memory, 4, at); os.pwritev(memory, [b'a', b'b'], at); "
    "os.preadv(memory, [bytearray(4)], at); os.pwrite(memory, b'a', at)",
    "sockets": "two.send(b'x'); one.recv(1); one.recvmsg(1) if two.sendmsg([b'y']) else 0; "
    "one.shutdown(socket.SHUT_WR); two.setblocking(False)",
    "accept": "sock, _ = listener.accept(); "
    "sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12); sock.close()",
    "epoll": "epoll.register(one, select.EPOLLIN); epoll.modify(one, 0); epoll.poll(0); "
    "epoll.unregister(one)",
    "allocation": "[bytearray(1 << size) for size in range(27)]; "
    "x = bytearray(1 << 25); x += bytes(1 << 25); del x",
    "many objects": "x = [str(number) * 3 for number in range(300000)]; del x",
    "time and text": "time.time(); time.monotonic(); json.dumps({'a': [1.5, None, '\\u20ac']}); "
    "os.write(2, b'x'); str(OSError(2, os.strerror(2)))",
    "errors": "\ntry: os.pread(memory, 4, 0)\nexcept OSError as error: f'{type(error).__name__}: {error}'",
}
FORBIDDEN_STATEMENTS = {
    "open a file": "os.open('/etc/hostname', os.O_RDONLY)",
    "import a module": "import wave",
    "run a program": "os.execv('/bin/true', ['true'])",
    "fork": "os.fork()",
    "make a socket": "socket.socket(socket.AF_INET)",
    "make a vsock socket": "socket.socket(socket.AF_VSOCK)",
    "connect": "client.connect('/tmp/x')",
    "bind": "client.bind('/tmp/x')",
    "kill": "os.kill(os.getppid(), 0)",
    "map a file": "mmap.mmap(memory, 4096)",
    "map for execution": "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
    "duplicate a descriptor": "os.dup2(1, 2)",
    "trace": "libc.ptrace(0, 0, 0, 0)",
    "loosen": "libc.prctl(22, 0, 0, 0, 0)",
    "change user": "os.setuid(0)",
    "remove a file": "os.unlink('/tmp/nothing-of-this-name')",
    "reach into a process": "libc.process_vm_readv(os.getppid(), 0, 0, 0, 0, 0)",
}


@pytest.mark.parametrize("name", ALLOWED_STATEMENTS)
@pytest.mark.parametrize("profile", ["DEVICE", "RELAY"])
def test_what_the_loop_does_is_allowed(name: str, profile: str) -> None:
    assert confined(ALLOWED_STATEMENTS[name], profile) == 0


@pytest.mark.parametrize("name", FORBIDDEN_STATEMENTS)
def test_what_it_never_does_kills_it(name: str) -> None:
    assert confined(FORBIDDEN_STATEMENTS[name]) == -signal.SIGSYS


def test_the_relay_may_dial_vsock_and_nothing_else() -> None:
    dial = "\nsock = socket.socket(socket.AF_VSOCK); sock.setblocking(False)\ntry: sock.connect((3, 1))\n"
    assert confined(dial + "except OSError: pass", "RELAY") == 0
    assert confined("socket.socket(socket.AF_UNIX)", "RELAY") == -signal.SIGSYS
    assert confined("os.fork()", "RELAY") == -signal.SIGSYS


def test_this_machine_has_a_table() -> None:
    assert program(os.uname().machine, Profile.DEVICE)
