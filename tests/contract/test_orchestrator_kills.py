"""The orchestrator is killed again and again, at any moment; no stage runs twice, no byte is lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.common.address import Address
from services.common.channel import open_channel
from tests.contract.orchestrator_fakes import Fakes, Process
from voidbox.orchestrator.v1 import orchestrator_pb2 as pb
from voidbox.orchestrator.v1 import orchestrator_pb2_grpc

KILLS = 12
LINES = 150


@pytest.fixture
async def fakes(tmp_path: Path) -> AsyncIterator[Fakes]:
    made = Fakes(tmp_path)
    await made.start()
    yield made
    await made.close()


class Killable:
    """`python -m services.orchestrator` in a directory of its own."""

    def __init__(self, directory: Path, fakes: Fakes) -> None:
        self._env = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "VOIDBOX_STATE_DIR": str(directory / "state"),
            "VOIDBOX_RUNTIME_DIR": str(directory / "rt"),
            "VOIDBOX_ORCHESTRATOR_HYPERVISOR": f"unix:{fakes.hypervisor_socket}",
            "VOIDBOX_ORCHESTRATOR_IMAGER": f"unix:{fakes.imager_socket}",
            "VOIDBOX_ORCHESTRATOR_MAX_PARALLEL_BOXES": "2",
        }
        self.address = Address(path=directory / "rt/orchestrator.sock")
        self._log = directory / "log"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "services.orchestrator",
                env=self._env, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        finally:
            os.close(log)

    async def kill(self) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


async def test_kills_at_any_moment_lose_nothing(tmp_path: Path, fakes: Fakes) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    starts: list[str] = []

    async def talk(process: Process) -> int:
        starts.append(process.box.config.labels["voidbox-stage"])
        for number in range(LINES):
            await process.print(f"{number} ☃\n")
            await asyncio.sleep(0.01)
        await process.print(await process.read_stdin())
        return 0

    fakes.programs["talk"] = talk
    boxes = [{"name": name, "run": {"program": "talk"}} for name in "abcd"]
    stages = [
        {"type": "box", "name": "a"},
        {"type": "fan_out", "boxes": ["b", "c"]},
        {"type": "box", "name": "d"},
    ]
    spec = {"kind": "pipeline", "name": "p", "pipeline": {"boxes": boxes, "stages": stages}}
    document = pb.SpecDocument(content=json.dumps(spec).encode(), filename="s.json")
    events: list[pb.Event] = []
    service = Killable(tmp_path, fakes)
    kills = 0
    try:
        await service.start()
        while True:
            async with asyncio.timeout(60), open_channel(service.address) as channel:
                stub: Any = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
                request = pb.CreateRunRequest(run_id="r", spec=document)
                await stub.CreateRun(request, wait_for_ready=True)
                patience = chance.randrange(1, 25) if kills < KILLS else 1 << 30
                stream = stub.WatchRun(pb.WatchRunRequest(run_id="r", from_offset=len(events)))
                try:
                    async for response in stream:
                        events.append(response.event)
                        patience -= 1
                        if not patience:
                            await service.kill()
                    if patience > 0:
                        run = (await stub.GetRun(pb.GetRunRequest(run_id="r"))).run
                        break
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.UNAVAILABLE, error  # noqa: PT017
            kills += 1
            await service.start()
            if chance.random() < 0.3:
                # Also while it is still starting and taking up its runs.
                await asyncio.sleep(chance.random())
                await service.kill()
                kills += 1
                await service.start()
    finally:
        await service.kill()
    assert kills >= KILLS // 2
    assert run.state == pb.RUN_STATE_SUCCEEDED, run.reason
    assert sorted(starts) == ["a", "b", "c", "d"], "no stage runs twice"
    assert [event.offset for event in events] == list(range(len(events)))
    own = "".join(f"{number} ☃\n" for number in range(LINES))
    for name in "abc":
        printed = b"".join(e.output.data for e in events if e.HasField("output") and e.stage == name).decode()
        assert printed == (own if name == "a" else own + own)
    final = json.loads(run.output.decode().removeprefix(own))
    assert [entry["name"] for entry in final] == ["b", "c"]
    assert all(stage.attempts == 1 for stage in run.stages)
    assert not fakes.boxes
