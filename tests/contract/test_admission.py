"""Many callers ask for more than the host has: exactly what fits is given, to whoever asked first."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest

from services.common.channel import open_channel
from services.common.errors import Exhausted, from_rpc_error
from services.common.paths import Paths
from services.hypervisor.__main__ import running
from services.hypervisor.admission import OVERHEAD_MIB, Host
from services.hypervisor.config import Config
from tests.contract.hypervisor_fakes import FakeDriver
from tests.contract.hypervisor_harness import Harness
from tests.vm import refused
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

BOX_MIB = 340
NEED_MIB = BOX_MIB + OVERHEAD_MIB
HOST = Host(memory_mib=8 * NEED_MIB, available_mib=5 * NEED_MIB + 1, cpus=2)


Serve = Callable[[Config], contextlib.AbstractAsyncContextManager[Harness]]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """The service on a host of that size, with fake machines, which take no memory."""
    monkeypatch.setattr(Host, "measure", classmethod(lambda _: HOST))
    monkeypatch.setattr("services.hypervisor.stats.resident_bytes", lambda _: 0)

    @contextlib.asynccontextmanager
    async def start(config: Config) -> AsyncIterator[Harness]:
        driver = FakeDriver()
        paths = Paths(state=tmp_path / "state", cache=tmp_path / "cache", runtime=tmp_path / "rt")
        async with contextlib.AsyncExitStack() as stack:
            addresses = await stack.enter_async_context(running(config, paths, driver=driver))
            channel = await stack.enter_async_context(open_channel(addresses[0]))
            yield Harness(channel, driver, tmp_path)
            for machine in driver.machines.values():
                await machine.close()

    return start


def filling() -> list[asyncio.Task[object]]:
    """The service's tasks that fill its pool."""
    return [task for task in asyncio.all_tasks() if task.get_name().startswith("pool ")]


async def asked(service: Harness, count: int) -> list[Exhausted | None]:
    """What so many callers get who all ask at once: a box, or why not."""

    async def one(number: int) -> Exhausted | None:
        try:
            await service.create(f"box-{number}", resources={"memory_mib": BOX_MIB, "vcpus": 1})
        except grpc.aio.AioRpcError as error:
            found = from_rpc_error(error)
            assert isinstance(found, Exhausted), found
            return found
        return None

    return await asyncio.gather(*(one(number) for number in range(count)))


@pytest.mark.parametrize(("overcommit", "fit"), [(0.5, 4), (1.0, 5), (1.5, 7)])
async def test_exactly_what_fits_is_given_however_many_ask_at_once(
    serve: Serve, overcommit: float, fit: int
) -> None:
    """By promise 8 boxes, as many times as they may be promised; by what is free 5, as many times."""
    config = Config(ready_size=0, pool_size=0, memory_overcommit=overcommit)
    async with serve(config) as service:
        answers = await asked(service, 20)
        assert answers.count(None) == fit
        for error in answers:
            if error is not None:
                assert error.reason == "HOST_MEMORY"
                assert error.metadata["needed_mib"] == str(NEED_MIB)
                assert int(error.metadata["available_mib"]) < NEED_MIB
                assert f"(now {overcommit:g})" in error.message
        boxes = (await service.hypervisor.ListBoxes(pb.ListBoxesRequest())).boxes
        assert len(boxes) == fit
        # What a box had is there again once it is gone, once.
        await service.delete(boxes[0].id)
        assert (await asked(service, 20)).count(None) == fit
        told = await service.hypervisor.GetCapabilities(pb.GetCapabilitiesRequest())
        assert 0 <= told.available_memory_mib < NEED_MIB


async def test_copies_of_a_box_count_and_are_made_all_or_none(serve: Serve) -> None:
    async with serve(Config(ready_size=0, pool_size=0)) as service:
        await service.create("parent", resources={"memory_mib": BOX_MIB, "vcpus": 1})
        six = pb.ForkBoxRequest(box_id="parent", fork_ids=[f"copy-{number}" for number in range(6)])
        assert isinstance(await refused(service.hypervisor.ForkBox(six, timeout=60)), Exhausted)
        listed = (await service.hypervisor.ListBoxes(pb.ListBoxesRequest())).boxes
        assert [box.id for box in listed] == ["parent"]
        four = pb.ForkBoxRequest(box_id="parent", fork_ids=[f"copy-{number}" for number in range(4)])
        await service.hypervisor.ForkBox(four, timeout=60)
        assert (await asked(service, 1))[0] is not None


async def test_what_waits_in_the_pool_counts_and_makes_way(serve: Serve) -> None:
    async with serve(Config(ready_size=0, pool_size=3, pool_memory_mib=1 << 20)) as service:
        request = pb.BuildTemplateRequest(
            config=service.config(resources={"memory_mib": BOX_MIB, "vcpus": 1})
        )
        free = HOST.available_mib
        async with asyncio.timeout(120):
            while (await service.hypervisor.BuildTemplate(request, timeout=60)).template.pooled < 3:
                await asyncio.wait(filling(), return_when=asyncio.FIRST_COMPLETED)
        told = await service.hypervisor.GetCapabilities(pb.GetCapabilitiesRequest())
        assert told.available_memory_mib == free - 3 * NEED_MIB
        # As many boxes as if there were no pool, whose machines they take or which ends for them.
        assert (await asked(service, 5)).count(None) == 5
        assert isinstance((await asked(service, 6))[5], Exhausted)


async def test_a_host_that_has_shrunk_gives_nothing_new_and_keeps_what_it_gave(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve(Config(ready_size=0, pool_size=0)) as service:
        assert (await asked(service, 2)).count(None) == 2
        small = dataclasses.replace(HOST, available_mib=NEED_MIB)
        monkeypatch.setattr(Host, "measure", classmethod(lambda _: small))
        assert isinstance((await asked(service, 3))[2], Exhausted)
        told = await service.hypervisor.GetCapabilities(pb.GetCapabilitiesRequest())
        assert told.available_memory_mib == 0
        assert (await service.get("box-1")).state == pb.BOX_STATE_RUNNING
