"""Programs under the real filter, the real Landlock and real limits, on this host's own kernel.

Everything that needs a guest (its devices, its PID 1, memory limits) is in
`tests/integration/test_confinement.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from grpc import aio

from tests.attacks import SOURCE
from tests.contract.guest_process import AgentProcess, Client, reason, wait_gone
from voidbox.common.v1 import common_pb2

# What only the filter refuses even to root; the rest of the attacks needs a guest.
FILTERED = {
    "EPERM": (
        "mount", "umount", "remount", "open_tree", "fsopen", "mount_setattr", "pivot_root", "chroot",
        "load module", "init module", "kexec", "bpf", "perf", "userfaultfd", "keyring", "keyctl", "reboot",
        "kernel log", "set clock", "set host name", "handle", "user namespace", "network namespace",
        "clone user namespace", "setns", "terminal injection", "process memory", "raw socket",
    ),
    "ENOSYS": ("io_uring", "clone3"),
    "EAFNOSUPPORT": (
        "packet socket", "audit socket", "key socket", "crypto socket", "vsock loopback",
        "vsock host", "vsock other",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    """An agent without an allowlist."""
    with AgentProcess() as process:
        yield process


@pytest.fixture
async def listed() -> AsyncIterator[Client]:
    """A box where only a few programs may be executed."""
    with AgentProcess() as process:
        async with process.client(claim=False) as client:
            confinement = common_pb2.Confinement(allowed_programs=["sh", "env", "cat", "/usr/bin/printf"])
            assert (await client.claim(confinement=confinement)).confined
            yield client


async def test_the_filter_refuses_each_attack_and_kills_nobody(agent: AgentProcess) -> None:
    async with agent.client() as client:
        names = [name for group in FILTERED.values() for name in group]
        result = await client.run(sys.executable, "-c", SOURCE, *names)
        assert result.code == 0, result.stderr.decode()
        found = json.loads(result.stdout)
        assert found == {name: code for code, group in FILTERED.items() for name in group}


async def test_what_usual_programs_do_still_works(agent: AgentProcess) -> None:
    script = """
import ctypes, os, socket, subprocess, tempfile, threading, asyncio
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    socket.socket(socket.AF_INET, kind).close(); socket.socket(socket.AF_INET6, kind).close()
socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC).close()
socket.socketpair()[0].close(); socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()
assert socket.getaddrinfo("localhost", 80)
t = threading.Thread(target=print, args=("thread",)); t.start(); t.join()
assert subprocess.run(["sh", "-c", "echo child"]).returncode == 0
async def more():
    p = await asyncio.create_subprocess_exec("true"); await p.wait()
asyncio.run(more())
with tempfile.TemporaryDirectory() as d:
    os.mkdir(d + "/a"); os.mkdir(d + "/b"); open(d + "/a/x", "w").close()
    os.rename(d + "/a/x", d + "/b/x"); os.link(d + "/b/x", d + "/a/y"); os.symlink("x", d + "/b/z")
    assert os.stat(d + "/a/y").st_nlink == 2
f = os.memfd_create("m"); os.close(f)
libc = ctypes.CDLL(None)
pid = os.fork()
if pid == 0:
    libc.ptrace(0, 0, 0, 0); os.kill(os.getpid(), 19); os._exit(7)
_, status = os.waitpid(pid, 0); assert os.WIFSTOPPED(status)  # a debugger's child
assert libc.ptrace(7, pid, 0, 0) == 0
_, status = os.waitpid(pid, 0); assert os.WEXITSTATUS(status) == 7
print("fine")
"""
    async with agent.client() as client:
        result = await client.run(sys.executable, "-c", script)
        assert result.stderr == b""
        assert {*map(bytes, result.stdout.split())} == {b"thread", b"child", b"fine"}


async def test_privileges_are_gone_for_good(agent: AgentProcess) -> None:
    async with agent.client() as client:
        status = (await client.sh("cat /proc/self/status")).stdout.decode()
        fields = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
        assert fields["NoNewPrivs"] == "1"
        assert fields["Seccomp"] == "2"
        assert all(int(fields[name], 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"))


async def test_only_listed_programs_are_executed_however_they_are_started(listed: Client) -> None:
    assert (await listed.sh("printf ok | cat")).stdout == b"ok"
    assert (await listed.run("/usr/bin/printf", "ok")).stdout == b"ok"
    for script in (
        "ls /",
        "env ls /",
        "exec ls /",
        "sh -c 'sh -c \"ls /\"'",
        "cd /usr/bin && ./ls /",
        "cat /usr/bin/ls > /dev/shm/$$; chmod +x /dev/shm/$$; /dev/shm/$$; c=$?; cat < /dev/null; exit $c",
    ):
        result = await listed.sh(script)
        assert result.code == 126, (script, result)
        assert b"ermission denied" in result.stderr, script
    await listed.sh("exit 0")
    for name in ("ls", shutil.which("ls") or "", sys.executable):
        with pytest.raises(aio.AioRpcError) as caught:
            await listed.run(name)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert reason(caught.value).reason == "NOT_ALLOWED"
        assert "allowed programs (sh, env, cat, /usr/bin/printf)" in str(caught.value.details())
    for path in Path("/dev/shm").glob("[0-9]*"):  # what the attack has copied
        if path.stat().st_size == os.stat("/usr/bin/ls").st_size:
            path.unlink()


async def test_a_script_needs_its_interpreter_on_the_list() -> None:
    with AgentProcess() as process:
        script = process.files / "script"
        script.write_text("#!/usr/bin/env -S cat /etc/hostname\n")
        script.chmod(0o755)
        async with process.client(claim=False) as client:
            await client.claim(confinement=common_pb2.Confinement(allowed_programs=[str(process.files)]))
            with pytest.raises(aio.AioRpcError, match="interpreter that it names"):
                await client.run(str(script))
    with AgentProcess() as process:
        script = process.files / "script"
        script.write_text("#!/bin/cat\nthe text\n")
        script.chmod(0o755)
        async with process.client(claim=False) as client:
            allowed = [str(process.files), "cat"]
            await client.claim(confinement=common_pb2.Confinement(allowed_programs=allowed))
            assert b"the text" in (await client.run(str(script))).stdout


async def test_files_in_memory_cannot_be_executed_under_a_list() -> None:
    """Landlock does not see memfds, so the filter refuses to make them."""
    with AgentProcess() as process:
        async with process.client(claim=False) as client:
            allowed = [os.path.dirname(os.path.realpath(sys.executable)), sys.executable]
            await client.claim(confinement=common_pb2.Confinement(allowed_programs=allowed))
            result = await client.run(sys.executable, "-c", SOURCE, "memfd")
            assert json.loads(result.stdout) == {"memfd": "EPERM"}


async def test_limits_of_each_process_are_in_force_and_visible() -> None:
    with AgentProcess() as process:
        async with process.client(claim=False) as client:
            limits = common_pb2.Limits(open_files=64, file_size_bytes=4096)
            await client.claim(confinement=common_pb2.Confinement(limits=limits))
            assert (await client.sh("ulimit -n; ulimit -Hn; ulimit -c")).stdout.split() == [
                b"64",
                b"64",
                b"0",
            ]
            result = await client.sh(
                "head -c 9000 /dev/zero > big; stat -c %s big; rm big", working_directory=str(process.files)
            )
            assert result.stdout.split()[-1] == b"4096"


@pytest.mark.parametrize(
    ("confinement", "said"),
    [
        (common_pb2.Confinement(allowed_programs=[""]), "neither a name"),
        (common_pb2.Confinement(allowed_programs=["a/b"]), "neither a name"),
        (common_pb2.Confinement(allowed_programs=["x"] * 513), "more than 512"),
        (common_pb2.Confinement(limits=common_pb2.Limits(memory_bytes=-1)), "memory"),
        (common_pb2.Confinement(limits=common_pb2.Limits(memory_bytes=100)), "memory limit"),
        (common_pb2.Confinement(limits=common_pb2.Limits(open_files=3)), "open files"),
    ],
)
async def test_a_confinement_that_cannot_be_meant_is_refused(
    confinement: common_pb2.Confinement, said: str
) -> None:
    with AgentProcess() as process:
        async with process.client(claim=False) as client:
            with pytest.raises(aio.AioRpcError, match=said) as caught:
                await client.claim(confinement=confinement)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_limits_that_the_kernel_cannot_enforce_fail_the_claim() -> None:
    """On a host whose cgroup v2 has no memory controller, or none at all."""
    with AgentProcess() as process:
        controllers = Path(process.cgroup, "cgroup.controllers")
        if process.cgroup and "memory" in controllers.read_text():
            pytest.skip("this host's cgroup v2 limits memory")
        async with process.client(claim=False) as client:
            limits = common_pb2.Limits(memory_bytes=64 << 20)
            with pytest.raises(aio.AioRpcError) as caught:
                await client.claim(confinement=common_pb2.Confinement(limits=limits))
            assert reason(caught.value).reason == "NO_LIMITS"
            await client.claim()
            assert (await client.sh("echo still unclaimed")).code == 0


async def test_the_confinement_outlives_the_agent() -> None:
    with AgentProcess() as process:
        async with process.client(claim=False) as client:
            await client.claim(confinement=common_pb2.Confinement(allowed_programs=["sh", "env"]))
        agent = process.agent_pid()
        os.kill(agent, 9)
        wait_gone(agent)
        async with process.client(claim=False) as client:
            assert (await client.sh("env ls /")).code == 126
