"""The life of a running box on real QEMU: idle, paused, woken, changed, ended. Other boxes are the clocks."""

from __future__ import annotations

import time
from typing import Any

import pytest

from services.common.errors import WrongState
from tests.vm import BOX_KEY, Client, refused
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

pytestmark = pytest.mark.vm

SECOND = {"seconds": 1}
BUSY = "while :; do :; done"


async def start(client: Client, box: str, exec_id: str, *argv: str) -> None:
    """Start a program that goes on with nobody attached."""
    call = client.guest.Exec(metadata=((BOX_KEY, box),), timeout=120)
    await call.write(
        guest_pb2.ExecRequest(
            start=guest_pb2.ExecStart(exec_id=exec_id, program=argv[0], args=argv[1:], detach=True)
        )
    )
    async for message in call:
        if message.event.HasField("started"):
            break
    call.cancel()


async def change(client: Client, box: str, **changes: Any) -> pb.Box:
    """Change a box."""
    return (await client.hypervisor.UpdateBox(pb.UpdateBoxRequest(box_id=box, **changes), timeout=120)).box


async def test_an_idle_box_is_paused_and_wakes_with_the_right_time(client: Client) -> None:
    await client.create("rests", auto_pause=SECOND)
    box = await client.until("rests", pb.BOX_STATE_PAUSED)
    assert box.auto_paused
    # Somebody else's idle second passes meanwhile: so much its clock would be late.
    await client.create("clock", auto_pause=SECOND)
    await client.until("clock", pb.BOX_STATE_PAUSED)
    before = time.time()
    exit_, out, _ = await client.run("rests", "date", "+%s")
    assert exit_.exit_code == 0
    assert int(before) <= int(out) <= time.time()
    await client.until("rests", pb.BOX_STATE_PAUSED)
    await client.delete("rests")  # as it is
    stopped = (await client.hypervisor.StopBox(pb.StopBoxRequest(box_id="clock"), timeout=120)).box
    assert stopped.state == pb.BOX_STATE_STOPPED
    await client.delete("clock")


async def test_a_box_that_computes_is_not_idle_though_nobody_is_attached(client: Client) -> None:
    await client.create("works", auto_pause={"seconds": 3600})
    await start(client, "works", "busy", "sh", "-c", BUSY)
    await change(client, "works", auto_pause=SECOND)
    await client.create("idles", auto_pause=SECOND)
    await client.until("idles", pb.BOX_STATE_PAUSED)
    assert (await client.get("works")).state == pb.BOX_STATE_RUNNING
    await client.guest.SignalExec(
        guest_pb2.SignalExecRequest(exec_id="busy", signal=9), metadata=((BOX_KEY, "works"),), timeout=120
    )
    await client.until("works", pb.BOX_STATE_PAUSED)
    # A copy of one that rests: both go on, both rest again.
    forked = await client.hypervisor.ForkBox(
        pb.ForkBoxRequest(box_id="works", fork_ids=["copy"]), timeout=120
    )
    assert forked.boxes[0].state == pb.BOX_STATE_RUNNING
    for name in ("works", "copy"):
        await client.until(name, pb.BOX_STATE_PAUSED)
    for name in ("works", "copy", "idles"):
        await client.delete(name)


async def test_limits_change_while_programs_run(client: Client) -> None:
    await client.create("limited")
    hold = "import signal; data = bytearray(80 << 20); print(len(data), flush=True); signal.pause()"
    await start(client, "limited", "hold", "python3", "-c", hold)
    attach = client.guest.Attach(metadata=((BOX_KEY, "limited"),), timeout=120)
    await attach.write(guest_pb2.AttachRequest(open=guest_pb2.AttachOpen(exec_id="hold")))
    events = aiter(attach)
    async for message in events:
        if message.event.HasField("output"):
            break
    error = await refused(change(client, "limited", limits={"memory_bytes": 40 << 20}))
    assert isinstance(error, WrongState)
    assert error.reason == "MEMORY_IN_USE"
    await client.guest.SignalExec(
        guest_pb2.SignalExecRequest(exec_id="hold", signal=9), metadata=((BOX_KEY, "limited"),), timeout=120
    )
    async for message in events:
        if message.event.HasField("exit"):
            break
    grab = "data = bytearray(80 << 20)"
    await change(client, "limited", limits={"memory_bytes": 60 << 20})
    exit_, _, _ = await client.run("limited", "python3", "-c", grab)
    assert exit_.kill_reason == guest_pb2.KILL_REASON_OUT_OF_MEMORY
    await change(client, "limited", limits={"memory_bytes": 160 << 20})
    exit_, _, _ = await client.run("limited", "python3", "-c", grab)
    assert exit_.exit_code == 0
    box = await change(client, "limited", limits={"cpu_millis": 300})
    assert (box.config.confinement.limits.cpu_millis, box.config.confinement.limits.memory_bytes) == (
        300,
        160 << 20,
    )
    share = (
        "import time; a, c = time.time(), time.process_time()\n"
        "while time.time() < a + 1: pass\n"
        "print((time.process_time() - c) / (time.time() - a))"
    )
    _, out, _ = await client.run("limited", "python3", "-c", share)
    assert float(out) < 0.5
    await client.delete("limited")


USE = """
import mmap, sys
memory = mmap.mmap(-1, 200 << 20)
for _ in range(200):
    memory.write(b"\\x55" * (1 << 20))
print("full", flush=True)
sys.stdin.readline()
memory.close()
print("free", flush=True)
sys.stdin.readline()
"""


async def test_memory_that_a_guest_has_freed_goes_back_to_the_host(client: Client) -> None:
    async def private(box: str) -> int:
        return (await client.hypervisor.GetBoxStats(pb.GetBoxStatsRequest(box_id=box))).private_bytes >> 20

    await client.create("eats", resources={"memory_mib": 512})
    before = await private("eats")
    call = client.guest.Exec(metadata=((BOX_KEY, "eats"),), timeout=250)
    await call.write(
        guest_pb2.ExecRequest(
            start=guest_pb2.ExecStart(program="python3", args=["-c", USE], stdin=True, exec_id="use")
        )
    )
    said = b""
    async for message in call:
        said += message.event.output.data
        if said == b"full\n":
            full = await private("eats")
            await call.write(
                guest_pb2.ExecRequest(input=guest_pb2.ExecInput(stdin=guest_pb2.StdinChunk(data=b"\n")))
            )
        if said == b"full\nfree\n":
            break
    assert full > before + 190
    for _ in range(60):
        left = await private("eats")
        if left < full - 180:
            break
        await client.run("eats", "sleep", "1")  # the guest reports what it has freed two seconds later
    assert left < full - 180
    # What others are restored from is as it was, and so is all that the box has: a copy goes on.
    await client.hypervisor.ForkBox(pb.ForkBoxRequest(box_id="eats", fork_ids=["copy"]), timeout=120)
    await client.create("other", resources={"memory_mib": 512})
    for name in ("eats", "copy", "other"):
        exit_, out, _ = await client.run(name, "python3", "-c", "print(sum(bytearray(b'1') * 1000000))")
        assert (exit_.exit_code, out) == (0, b"49000000\n")
    listed = await client.guest.ListExecs(
        guest_pb2.ListExecsRequest(), metadata=((BOX_KEY, "copy"),), timeout=120
    )
    assert [each.exec_id for each in listed.execs if each.pid] == ["use"]
    for name in ("eats", "copy", "other"):
        await client.delete(name)
