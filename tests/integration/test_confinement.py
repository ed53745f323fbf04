"""Programs in a real guest attack their machine; what must be refused is refused.

One box without an allowlist for the attacks, one with limits and a list. The same attacks on the
host's own kernel, without a machine, are in `tests/contract/test_guest_confinement.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator

import pytest

from tests.attacks import SOURCE
from tests.vm import Client, HypervisorProcess
from voidbox.common.v1 import common_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

pytestmark = pytest.mark.vm

# What succeeds without harm: a file in memory where no list forbids it.
ALLOWED = {"memfd"}
# uid 0 without capabilities may ask for uid 0 again, and owns nothing by it.
ALLOWED_TO_ROOT = {"become root"}


@pytest.fixture
async def limited(hypervisor: HypervisorProcess) -> AsyncIterator[tuple[Client, str]]:
    """A box with every limit and a list."""
    limits = common_pb2.Limits(
        memory_bytes=48 << 20, processes=20, cpu_millis=500, open_files=100, file_size_bytes=1 << 20
    )
    confinement = common_pb2.Confinement(
        limits=limits, allowed_programs=["sh", "cat", "head", "python3", "sleep"]
    )
    async with hypervisor.connected() as client:
        await client.create("limited", confinement=confinement)
        yield client, "limited"
        await client.delete("limited")


@pytest.mark.parametrize("user", ["", "0"])
async def test_every_attack_from_inside_is_refused(client: Client, shared_box: str, user: str) -> None:
    exit_, out, error = await client.run(shared_box, "python3", "-c", SOURCE, user=user)
    assert exit_.exit_code == 0, error.decode()
    done = {name for name, code in json.loads(out).items() if code == "done"}
    assert done == ALLOWED | (ALLOWED_TO_ROOT if user == "0" else set())


async def test_programs_see_no_processes_but_their_user_s(client: Client, shared_box: str) -> None:
    script = (
        "import os; print(*sorted({os.stat('/proc/'+n).st_uid for n in os.listdir('/proc') if n.isdigit()}))"
    )
    _, out, _ = await client.run(shared_box, "python3", "-c", script)
    assert out.split() == [b"1000"]


async def test_programs_of_one_user_cannot_trace_each_other(client: Client, shared_box: str) -> None:
    script = """
import ctypes, os, subprocess, time
libc = ctypes.CDLL(None, use_errno=True)
child = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; exec sleep 60"], stdout=subprocess.PIPE)
own = int(child.stdout.readline())
print(libc.ptrace(16, own, None, None), flush=True)
sibling = subprocess.Popen(["python3", "-c", f"import ctypes; l = ctypes.CDLL(None, use_errno=True); \
print(l.ptrace(16, {child.pid}, None, None), ctypes.get_errno())"])
sibling.wait(); os.kill(own, 9); child.kill()
"""
    _, out, error = await client.run(shared_box, "python3", "-c", script)
    assert out.split() == [b"0", b"-1", b"1"], error.decode()


async def test_limits_are_in_force_and_visible_inside(limited: tuple[Client, str]) -> None:
    client, box = limited
    base = "/sys/fs/cgroup/programs"
    _, out, _ = await client.run(
        box, "cat", f"{base}/memory.max", f"{base}/pids.max", f"{base}/cpu.max", "/proc/self/limits"
    )
    lines = out.decode().splitlines()
    assert lines[:3] == [str(48 << 20), "20", "50000 100000"]
    found = {line[:25].strip(): line[25:].split()[:2] for line in lines[3:]}
    assert found["Max open files"] == ["100", "100"]
    assert found["Max file size"] == [str(1 << 20), str(1 << 20)]
    assert found["Max core file size"] == ["0", "0"]

    exit_, _, _ = await client.run(box, "python3", "-c", "b = bytearray(80 << 20); print(len(b))")
    assert (exit_.signal, exit_.kill_reason) == (9, 4), exit_  # KILL_REASON_OUT_OF_MEMORY
    script = "echo '#!/bin/cat' > /tmp/own && chmod +x /tmp/own && exec /tmp/own"
    exit_, _, error = await client.run(box, "sh", "-c", script)
    assert (exit_.exit_code, b"ermission denied" in error) == (126, True), error.decode()
    read = await client.get(box)
    assert read.config.confinement.limits.processes == 20
    assert list(read.config.confinement.allowed_programs) == ["sh", "cat", "head", "python3", "sleep"]
    _, _, error = await client.run(
        box, "sh", "-c", "for i in 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2; do sleep 9 & done"
    )
    assert b"ork" in error  # Cannot fork


async def test_the_box_goes_on_after_its_programs_hit_the_limits(limited: tuple[Client, str]) -> None:
    client, box = limited
    for _ in range(2):
        exit_, _, _ = await client.run(box, "python3", "-c", "b = bytearray(80 << 20)")
        assert exit_.signal == 9
        _, out, _ = await client.run(box, "sh", "-c", "echo fine")
        assert out == b"fine\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="a plain user's service has no privilege to lose")
async def test_a_host_that_allows_no_namespaces_runs_boxes_by_landlock_and_says_so() -> None:
    """As in a container: root without CAP_SYS_ADMIN."""
    command = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "--"]
    with HypervisorProcess(command=command) as service:
        async with service.connected() as client:
            box = await client.create("landlocked", cold_boot=True)
            assert os.readlink(f"/proc/{box.vmm_pid}/ns/net") == os.readlink("/proc/self/ns/net")
            _, out, _ = await client.run("landlocked", "echo", "hello")
            assert out == b"hello\n"
            told = await client.hypervisor.GetCapabilities(pb.GetCapabilitiesRequest())
            [probe] = [probe for probe in told.probes if probe.name == "confinement"]
            assert not probe.usable
            assert probe.detail.startswith("Landlock (version "), probe.detail
            assert "missing" in probe.detail
            await client.delete("landlocked")
        assert "not wholly confined" in service.log.read_text()
