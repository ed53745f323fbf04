"""Boxes that are paused when nothing uses them, on fake machines: what pauses them, what wakes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2

from services.common.errors import WrongState
from services.hypervisor.activity import Activity
from tests.contract.hypervisor_harness import Harness, harness
from tests.vm import BOX_KEY, refused
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

AT_ONCE = {"nanos": 1_000_000}
BOX = ((BOX_KEY, "b"),)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Harness]:
    async with harness(tmp_path) as made:
        yield made


async def paused(service: Harness, **changes: object) -> pb.Box:
    """A box `b` that has been paused for being idle."""
    await service.create("b", auto_pause=AT_ONCE, **changes)
    return await service.until("b", pb.BOX_STATE_PAUSED)


def update(**changes: Any) -> pb.UpdateBoxRequest:
    return pb.UpdateBoxRequest(box_id="b", **changes)


async def call(service: Harness) -> None:
    await service.guest.GetGuest(guest_pb2.GetGuestRequest(), metadata=BOX, timeout=60)


async def test_an_idle_box_is_paused_and_the_next_call_lets_it_go_on(service: Harness) -> None:
    box = await paused(service)
    assert box.auto_paused
    assert box.config.auto_pause.nanos == 1_000_000
    machine = service.driver.machines["b"]
    assert await machine.paused()
    for _ in range(3):
        clocks = len(machine.guest.clocks)
        await call(service)
        box = await service.until("b", pb.BOX_STATE_PAUSED)
        assert box.auto_paused
        assert len(machine.guest.clocks) == clocks + 1  # its clock had stood still


async def test_a_box_does_not_rest_while_a_call_is_open(service: Harness) -> None:
    await paused(service)
    attached = service.guest.Exec(metadata=BOX, timeout=60)
    await attached.write(guest_pb2.ExecRequest(start=guest_pb2.ExecStart(program="x")))
    assert (await anext(aiter(attached))).event.HasField("started")
    other = await service.create("other", auto_pause=AT_ONCE)
    await service.until(other.id, pb.BOX_STATE_PAUSED)
    assert (await service.get("b")).state == pb.BOX_STATE_RUNNING
    attached.cancel()
    await service.until("b", pb.BOX_STATE_PAUSED)


async def test_a_forwarded_connection_lets_it_go_on(service: Harness) -> None:
    await paused(service)
    tunnel = service.hypervisor.ForwardPort(timeout=60)
    await tunnel.write(pb.ForwardPortRequest(open=pb.ForwardPortOpen(box_id="b", port=80)))
    assert await tunnel.read() == pb.ForwardPortResponse()
    assert (await service.get("b")).state == pb.BOX_STATE_RUNNING
    tunnel.cancel()
    await service.until("b", pb.BOX_STATE_PAUSED)


async def test_a_call_that_comes_while_it_is_being_paused_is_answered(
    service: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.create("b", auto_pause={"seconds": 3600})
    machine = service.driver.machines["b"]
    pausing, come, go = asyncio.Event(), asyncio.Event(), asyncio.Event()
    real, begin = machine.pause, Activity.begin

    def note(activity: Activity) -> None:
        begin(activity)
        come.set()

    async def slowly() -> None:
        pausing.set()
        await go.wait()
        await real()

    machine.pause = slowly  # type: ignore[method-assign]
    await service.hypervisor.UpdateBox(update(auto_pause=AT_ONCE))
    await pausing.wait()
    monkeypatch.setattr(Activity, "begin", note)
    answer = asyncio.create_task(call(service))
    await come.wait()
    go.set()
    await answer
    await service.until("b", pb.BOX_STATE_PAUSED)


async def test_who_only_looks_on_does_not_wake_it(service: Harness) -> None:
    await paused(service)
    telemetry = service.guest.Telemetry(guest_pb2.TelemetryRequest(), metadata=BOX, timeout=60)
    with pytest.raises(grpc.aio.AioRpcError, match="paused"):
        await anext(aiter(telemetry))
    await service.hypervisor.GetBoxStats(pb.GetBoxStatsRequest(box_id="b"))
    box = await service.get("b")
    assert (box.state, box.auto_paused) == (pb.BOX_STATE_PAUSED, True)


async def test_one_that_was_paused_on_purpose_stays_so(service: Harness) -> None:
    await paused(service)
    box = (await service.hypervisor.PauseBox(pb.PauseBoxRequest(box_id="b"))).box
    assert (box.state, box.auto_paused) == (pb.BOX_STATE_PAUSED, False)
    error = await refused(call(service))
    assert isinstance(error, WrongState)
    assert "paused" in error.message
    await service.hypervisor.ResumeBox(pb.ResumeBoxRequest(box_id="b"))
    box = await service.until("b", pb.BOX_STATE_PAUSED)
    assert box.auto_paused  # and idle it is again


async def test_it_ends_in_order_although_it_is_paused(service: Harness) -> None:
    await paused(service)
    box = (
        await service.hypervisor.StopBox(
            pb.StopBoxRequest(box_id="b", grace=duration_pb2.Duration(seconds=60))
        )
    ).box
    assert box.state == pb.BOX_STATE_STOPPED
    assert service.driver.machines["b"].remains().shutdown == "guest-shutdown"  # it was asked, not killed
    await service.delete("b")


async def test_it_is_copied_and_saved_although_it_is_paused(service: Harness) -> None:
    await paused(service)
    forked = await service.hypervisor.ForkBox(pb.ForkBoxRequest(box_id="b", fork_ids=["f"]), timeout=60)
    assert [box.state for box in forked.boxes] == [pb.BOX_STATE_RUNNING]
    await service.until("b", pb.BOX_STATE_PAUSED)
    await service.hypervisor.CreateSnapshot(pb.CreateSnapshotRequest(box_id="b", name="s"), timeout=60)
    await service.until("b", pb.BOX_STATE_PAUSED)
    await service.until("f", pb.BOX_STATE_PAUSED)  # a copy rests as its original does


async def test_a_paused_box_still_ends_when_its_idle_timeout_has_passed(service: Harness) -> None:
    await service.create("b", auto_pause=AT_ONCE, idle_timeout={"nanos": 300_000_000})
    box = await service.until("b", pb.BOX_STATE_STOPPED)
    assert "idle_timeout" in box.reason


async def test_a_machine_that_computes_is_not_paused(service: Harness) -> None:
    used = iter(range(1, 4))
    rested = asyncio.Event()

    def measure() -> float:
        found = next(used, None)
        if found is None:
            rested.set()
        return float(found or 3)

    await service.create("b", auto_pause={"seconds": 3600})
    service.driver.machines["b"].cpu = measure
    await service.hypervisor.UpdateBox(update(auto_pause=AT_ONCE))
    await service.until("b", pb.BOX_STATE_PAUSED)
    assert rested.is_set()  # not before it had ceased
