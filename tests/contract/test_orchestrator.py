"""Runs through the real service on a unix socket, with fake boxes behind it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.common.address import Address
from services.common.channel import open_channel
from services.common.errors import Exhausted, VoidboxError, from_rpc_error
from services.common.paths import Paths
from services.orchestrator.__main__ import running
from services.orchestrator.config import Config
from services.orchestrator.store import Store
from tests.contract.orchestrator_fakes import ERR, Fakes, Process, tar_of
from voidbox.common.v1 import common_pb2
from voidbox.imager.v1 import imager_pb2
from voidbox.orchestrator.v1 import orchestrator_pb2 as pb
from voidbox.orchestrator.v1 import orchestrator_pb2_grpc

ENDED = {pb.RUN_STATE_SUCCEEDED, pb.RUN_STATE_FAILED, pb.RUN_STATE_CANCELLED, pb.RUN_STATE_TIMED_OUT}


class Harness:
    """An orchestrator that can be stopped and started again, and a client of it."""

    def __init__(self, directory: Path, fakes: Fakes) -> None:
        self.paths = Paths(state=directory / "state", cache=directory / "cache", runtime=directory / "rt")
        self.fakes = fakes
        self.config: dict[str, Any] = {"max_parallel_boxes": 2}
        self._stack: contextlib.AsyncExitStack | None = None
        self.stub: Any = None

    async def start(self) -> None:
        config = Config(
            hypervisor=f"unix:{self.fakes.hypervisor_socket}",
            imager=f"unix:{self.fakes.imager_socket}",
            **self.config,
        )
        self._stack = contextlib.AsyncExitStack()
        addresses = await self._stack.enter_async_context(running(config, self.paths))
        self.channel = await self._stack.enter_async_context(open_channel(addresses[0]))
        self.stub = orchestrator_pb2_grpc.OrchestratorServiceStub(self.channel)

    async def stop(self) -> None:
        if self._stack is not None:
            stack, self._stack = self._stack, None
            await stack.aclose()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def create(self, spec: dict[str, Any], run_id: str = "r", **more: Any) -> pb.Run:
        document = pb.SpecDocument(content=json.dumps(spec).encode(), filename="s.json")
        request = pb.CreateRunRequest(run_id=run_id, spec=document, base_directory="/base", **more)
        try:
            run: pb.Run = (await self.stub.CreateRun(request)).run
            return run
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def upload(self, data: bytes, *, tree: bool = False) -> Any:
        async def requests() -> AsyncIterator[pb.UploadInputRequest]:
            yield pb.UploadInputRequest(header=pb.UploadInputHeader(tree=tree))
            for at in range(0, len(data), 65536):
                yield pb.UploadInputRequest(data=data[at : at + 65536])

        return (await self.stub.UploadInput(requests())).digest

    async def events(self, run_id: str = "r", start: int = 0) -> list[pb.Event]:
        async with asyncio.timeout(30):
            stream = self.stub.WatchRun(pb.WatchRunRequest(run_id=run_id, from_offset=start))
            return [response.event async for response in stream]

    async def get(self, run_id: str = "r") -> pb.Run:
        run: pb.Run = (await self.stub.GetRun(pb.GetRunRequest(run_id=run_id))).run
        return run

    async def finish(self, run_id: str = "r") -> pb.Run:
        events = await self.events(run_id)
        assert [event.offset for event in events] == list(range(len(events)))
        run = await self.get(run_id)
        assert run.state in ENDED
        assert run.event_count == len(events)
        return run

    async def run(self, spec: dict[str, Any], **more: Any) -> pb.Run:
        await self.create(spec, **more)
        return await self.finish()

    async def artifact(self, stage: str, name: str = "output", run_id: str = "r") -> bytes:
        stream = self.stub.ReadArtifact(pb.ReadArtifactRequest(run_id=run_id, stage=stage, name=name))
        return b"".join([response.data async for response in stream])


@pytest.fixture
async def fakes(tmp_path: Path) -> AsyncIterator[Fakes]:
    made = Fakes(tmp_path)
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def harness(tmp_path: Path, fakes: Fakes) -> AsyncIterator[Harness]:
    made = Harness(tmp_path, fakes)
    await made.start()
    yield made
    await made.stop()


def box(name: str, program: str = "true", **more: Any) -> dict[str, Any]:
    return {"name": name, "run": {"program": program}, **more}


def pipeline(boxes: list[dict[str, Any]], *stages: Any, **sandbox: Any) -> dict[str, Any]:
    tagged = [
        {"type": "box", "name": stage}
        if isinstance(stage, str)
        else {"type": "fan_out", "boxes": list(stage)}
        for stage in stages
    ]
    block = {"boxes": boxes} | ({"stages": tagged} if tagged else {})
    return {"kind": "pipeline", "name": "p", "sandbox": sandbox, "pipeline": block}


def agent(**more: Any) -> dict[str, Any]:
    return {"kind": "agent", "name": "a", "llm": {"provider": "mock"}, "agent": {"prompt": "hi", **more}}


def states(run: pb.Run) -> dict[str, str]:
    return {stage.name: pb.StageState.Name(stage.state).removeprefix("STAGE_STATE_") for stage in run.stages}


async def true(process: Process) -> int:
    await process.print(f"{process.start.program} ok\n")
    return 0


async def test_pipeline_carries_results_and_files_from_box_to_box(harness: Harness) -> None:
    async def collect(process: Process) -> int:
        assert process.box.files["/workspace/input/in.txt"] == b"a b c"
        process.box.files["/workspace/output/all.txt"] = process.box.files["/workspace/input/in.txt"]
        assert "/workspace/output" in process.box.directories
        await process.print("collected\n")
        return 0

    async def count(process: Process) -> int:
        assert await process.read_stdin() == b"collected\n"
        await process.print(f"{len(process.box.files['/workspace/input/all.txt'].split())}\n")
        return 0

    async def rank(process: Process) -> int:
        await process.print("snow ☃ \0\n")
        return 0

    async def report(process: Process) -> int:
        await process.print(await process.read_stdin())
        return 0

    harness.fakes.programs |= {"collect": collect, "count": count, "rank": rank, "report": report}
    digest = await harness.upload(b"a b c")
    spec = pipeline(
        [
            box("collect", "collect", inputs=[{"file": "in.txt"}], outputs=[{"name": "text"}]),
            box("count", "count", inputs=[{"from": "text"}]),
            box("rank", "rank"),
            box("report", "report"),
        ],
        "collect",
        ["count", "rank"],
        "report",
    )
    run = await harness.run(spec, files=[pb.InputFile(path="in.txt", digest=digest)])
    assert run.state == pb.RUN_STATE_SUCCEEDED, run
    expected = [{"name": "count", "output": "3\n"}, {"name": "rank", "output": "snow ☃ \0\n"}]
    assert json.loads(run.output) == expected
    assert len({stage.boot_id for stage in run.stages}) == 4
    assert [phase.name for phase in run.stages[0].phases] == ["image", "boot", "inputs", "program", "outputs"]
    assert {stage.kernel_release for stage in run.stages} == {"6.1.0-fake"}
    assert not harness.fakes.boxes
    with tarfile.open(fileobj=io.BytesIO(await harness.artifact("collect", "text"))) as tar:
        assert tar.getnames() == ["all.txt"]


async def test_input_reaches_the_first_stage(harness: Harness) -> None:
    async def show(process: Process) -> int:
        assert json.loads(process.box.files["/workspace/input.json"]) == [{"name": "input", "output": "käse"}]
        await process.print(await process.read_stdin())
        return 0

    harness.fakes.programs["show"] = show
    run = await harness.run(pipeline([box("a", "show")]), input="käse")
    assert run.output.decode() == "käse"


async def test_nothing_is_written_into_a_directory_of_the_user(harness: Harness) -> None:
    async def mock(process: Process) -> int:
        assert set(process.box.files) == {
            "/home/sandbox/input.json",
            "/home/sandbox/.claude/skills/s/SKILL.md",
        }
        assert "The full data is in /home/sandbox/input.json." in process.args[1]
        await process.print('{"type":"result","result":"done"}\n')
        return 0

    harness.fakes.programs["/usr/local/bin/voidbox-mock-agent"] = mock
    mounts = [{"host": "project", "guest": "/workspace", "mode": "rw"}]
    spec = agent(skills=[{"name": "s", "content": "x"}]) | {"sandbox": {"mounts": mounts}}
    run = await harness.run(spec, input="data")
    assert run.state == pb.RUN_STATE_SUCCEEDED, run.reason


async def test_a_store_that_fails_ends_the_run_and_leaves_no_box(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.fakes.programs["true"] = true
    save, failures = Store.save, [0]

    def full(store: Store, run: Any, changed: Any, events: Any) -> None:
        if failures[0] < 2 and any(stage.status.state == "RUNNING" for stage in changed):
            failures[0] += 1
            raise Exhausted("no room", reason="DISK_FULL")
        save(store, run, changed, events)

    monkeypatch.setattr(Store, "save", full)
    run = await harness.run(pipeline([box("a")]))
    assert run.state == pb.RUN_STATE_FAILED
    assert "could not go on: no room" in run.reason
    await harness.fakes.until(lambda: not harness.fakes.boxes)


async def test_uploaded_trees_and_skills_arrive(harness: Harness) -> None:
    async def mock(process: Process) -> int:
        files = process.box.files
        assert files["/workspace/input/dir/x"] == b"1"
        assert files["/workspace/.claude/skills/inline/SKILL.md"] == b"text"
        assert files["/workspace/.claude/skills/style/SKILL.md"] == b"style"
        assert process.args[0] == "-p"
        assert process.args[1] == "hi\n\nWrite your output to /workspace/output.json."
        await process.print('{"type":"system"}\n{"type":"result","result":"done","is_error":false}\n')
        return 0

    harness.fakes.programs["/usr/local/bin/voidbox-mock-agent"] = mock
    tree, skill = await harness.upload(tar_of({"x": b"1"}), tree=True), await harness.upload(b"style")
    spec = agent(
        skills=["file:style.md", {"name": "inline", "content": "text"}, "cli:jq"], inputs=[{"file": "dir"}]
    )
    files = [
        pb.InputFile(path="dir", digest=tree, tree=True),
        pb.InputFile(path="/base/style.md", digest=skill),
    ]
    run = await harness.run(spec, files=files)
    assert run.state == pb.RUN_STATE_SUCCEEDED, run
    assert run.output == b"done"


async def test_agent_events_and_usage_are_live_whatever_the_chunks(harness: Harness) -> None:
    said = {
        "content": [
            {"type": "text", "text": "Grüße ☃"},
            {"type": "tool_use", "name": "Bash", "input": {"command": "ls"}},
        ]
    }
    lines = [
        {"type": "assistant", "message": said | {"usage": {"input_tokens": 5, "output_tokens": 2}}},
        {"type": "result", "result": "r", "is_error": False, "total_cost_usd": 0.25, "num_turns": 2,
         "usage": {"input_tokens": 7, "cache_read_input_tokens": 3, "output_tokens": 4}},
    ]  # fmt: skip
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()

    async def mock(process: Process) -> int:
        for byte in data:
            await process.print(bytes([byte]))
            await asyncio.sleep(0)
        process.box.files["/workspace/output.json"] = b'{"answer": 1}'
        return 0

    harness.fakes.programs["/usr/local/bin/voidbox-mock-agent"] = mock
    run = await harness.run(agent())
    events = await harness.events()
    assert [event.agent_message.text for event in events if event.HasField("agent_message")] == ["Grüße ☃"]
    assert [event.tool_call.summary for event in events if event.HasField("tool_call")] == ["ls"]
    printed = b"".join(event.output.data for event in events if event.HasField("output"))
    assert printed == data
    assert run.output == b'{"answer": 1}'
    assert (run.usage.input_tokens, run.usage.output_tokens, run.usage.cost_usd) == (10, 4, 0.25)
    assert (run.usage.tool_calls, run.usage.turns) == (1, 2)


@pytest.mark.parametrize(
    ("output", "code", "reason"),
    [
        ("", 0, "no stream-json messages"),
        ('{"type":"assistant"}\n', 0, "ended without a result"),
        ('{"type":"result","is_error":true,"result":"bad"}\n', 0, "the agent reported an error: bad"),
        ('{"type":"result","subtype":"error_max_turns"}\n', 0, "error_max_turns"),
        ('{"type":"result","result":"x"}\n', 3, "exit code is 3"),
    ],
)
async def test_an_agent_without_a_good_result_has_failed(
    harness: Harness, output: str, code: int, reason: str
) -> None:
    async def mock(process: Process) -> int:
        await process.print(output)
        process.box.files["/workspace/output.json"] = b"old"
        return code

    harness.fakes.programs["/usr/local/bin/voidbox-mock-agent"] = mock
    run = await harness.run(agent())
    assert run.state == pb.RUN_STATE_FAILED
    assert run.failure_class == pb.FAILURE_CLASS_WORKLOAD
    assert reason in run.reason


async def test_fan_out_is_bounded_and_results_are_in_declared_order(harness: Harness) -> None:
    gate = asyncio.Event()
    inside = 0

    async def wait(process: Process) -> int:
        nonlocal inside
        inside += 1
        if inside == 2:
            gate.set()
        await gate.wait()
        await process.print(process.box.config.labels["voidbox-stage"])
        return 0

    harness.fakes.programs |= {"true": true, "wait": wait}
    names = [f"b{number}" for number in range(6)]
    run = await harness.run(pipeline([box("first"), *(box(name, "wait") for name in names)], "first", names))
    assert [entry["output"] for entry in json.loads(run.output)] == names
    assert harness.fakes.most_at_once == 2


async def test_a_failure_stops_the_pipeline_after_its_siblings(harness: Harness) -> None:
    async def fail(process: Process) -> int:
        await process.print("went wrong: ☃\n", ERR)
        return 3

    harness.fakes.programs |= {"true": true, "fail": fail}
    spec = pipeline([box("a"), box("b", "fail"), box("c"), box("d")], "a", ["b", "c"], "d")
    run = await harness.run(spec)
    assert states(run) == {"a": "SUCCEEDED", "b": "FAILED", "c": "SUCCEEDED", "d": "SKIPPED"}
    assert run.reason == "stage 'b' failed: exit code 3: went wrong: ☃"
    assert (run.stages[1].exit_code, run.stages[3].reason) == (3, "stage 'b' failed")
    assert await harness.artifact("b", "stderr") == "went wrong: ☃\n".encode()


async def test_continue_goes_on_but_the_run_has_failed(harness: Harness) -> None:
    async def fail(process: Process) -> int:
        return 1

    async def show(process: Process) -> int:
        await process.print(process.box.files["/workspace/input.json"])
        return 0

    harness.fakes.programs |= {"true": true, "fail": fail, "show": show}
    spec = pipeline(
        [box("a"), box("b", "fail", on_failure="continue"), box("c"), box("d", "show")], "a", ["b", "c"], "d"
    )
    run = await harness.run(spec)
    assert states(run)["d"] == "SUCCEEDED"
    assert run.state == pb.RUN_STATE_FAILED
    assert json.loads(run.output) == [
        {"name": "b", "error": "exit code 1"},
        {"name": "c", "output": "true ok\n"},
    ]


async def test_retry_runs_in_a_fresh_box(harness: Harness) -> None:
    async def second_time(process: Process) -> int:
        return 0 if len(harness.fakes.created) == 2 else 9

    harness.fakes.programs["second"] = second_time
    retry = {"max_attempts": 3, "initial_delay_ms": 1, "max_delay_ms": 1}
    run = await harness.run(pipeline([box("a", "second", retry=retry)]))
    assert run.state == pb.RUN_STATE_SUCCEEDED
    assert run.stages[0].attempts == 2
    assert len(set(harness.fakes.created)) == 2


async def test_time_limit_of_a_stage(harness: Harness) -> None:
    async def forever(process: Process) -> int:
        await asyncio.Event().wait()
        return 0

    harness.fakes.programs["forever"] = forever
    run = await harness.run(pipeline([box("a", "forever", timeout_secs=1)]))
    assert (run.state, run.failure_class) == (pb.RUN_STATE_TIMED_OUT, pb.FAILURE_CLASS_TIMEOUT)
    assert "time limit of 1 s" in run.reason


async def test_time_limit_of_the_run(harness: Harness) -> None:
    async def forever(process: Process) -> int:
        await asyncio.Event().wait()
        return 0

    harness.fakes.programs["forever"] = forever
    options = pb.RunOptions()
    options.timeout.FromMilliseconds(200)
    run = await harness.run(pipeline([box("a", "forever"), box("b")]), options=options)
    assert run.state == pb.RUN_STATE_TIMED_OUT
    assert states(run) == {"a": "CANCELLED", "b": "CANCELLED"}
    assert not harness.fakes.boxes


async def test_a_cold_run_asks_for_boxes_that_boot(harness: Harness) -> None:
    seen: list[bool] = []

    async def look(process: Process) -> int:
        seen.extend(each.config.cold_boot for each in harness.fakes.boxes.values())
        return 0

    harness.fakes.programs["look"] = look
    for run_id, cold in (("warm", False), ("cold", True)):
        options = pb.RunOptions(cold_boot=cold)
        await harness.create(pipeline([box("a", "look")]), run_id=run_id, options=options)
        run = await harness.finish(run_id)
        assert run.state == pb.RUN_STATE_SUCCEEDED
    assert seen == [False, True]


async def test_workflow_shares_a_box_and_any_failure_fails_the_run(harness: Harness) -> None:
    async def upper(process: Process) -> int:
        await process.print((await process.read_stdin()).upper())
        return 0

    async def fail(process: Process) -> int:
        return 1

    harness.fakes.programs |= {"upper": upper, "fail": fail, "true": true}
    steps = [
        {"name": "first", "run": {"program": "upper"}},
        {"name": "second", "run": {"program": "upper", "stdin_from": "first"}},
        {"name": "bad", "run": {"program": "fail"}},
        {"name": "never", "run": {"program": "true"}, "depends_on": ["bad"]},
    ]
    spec = {"kind": "workflow", "name": "w", "workflow": {"steps": steps, "output_step": "second"}}
    run = await harness.run(spec, input="ab")
    assert run.output == b"AB"
    assert run.state == pb.RUN_STATE_FAILED
    assert states(run) == {"first": "SUCCEEDED", "second": "SUCCEEDED", "bad": "FAILED", "never": "SKIPPED"}
    assert len(harness.fakes.created) == 1
    assert not harness.fakes.boxes


async def test_workflow_has_no_level_barrier(harness: Harness) -> None:
    slow = asyncio.Event()

    async def wait(process: Process) -> int:
        await slow.wait()
        return 0

    async def release(process: Process) -> int:
        slow.set()
        return 0

    harness.fakes.programs |= {"wait": wait, "true": true, "release": release}
    steps = [
        {"name": "slow", "run": {"program": "wait"}},
        {"name": "a", "run": {"program": "true"}},
        {"name": "b", "run": {"program": "release"}, "depends_on": ["a"]},
    ]
    run = await harness.run({"kind": "workflow", "name": "w", "workflow": {"steps": steps}})
    assert run.state == pb.RUN_STATE_SUCCEEDED


async def test_limits_and_the_list_of_programs_reach_the_hypervisor(harness: Harness) -> None:
    given: list[common_pb2.Confinement] = []

    async def eat(process: Process) -> int:
        given.append(process.box.config.confinement)
        raise MemoryError

    harness.fakes.programs |= {"eat": eat}
    limits = {"memory_mb": 64, "processes": 9, "cpu_percent": 50, "open_files": 99, "file_size_mb": 2}
    run = await harness.run(
        {
            "kind": "pipeline",
            "name": "p",
            "sandbox": {"limits": limits, "allowed_commands": ["eat", "/opt"]},
            "pipeline": {"boxes": [{"name": "eat", "run": {"program": "eat"}}]},
        }
    )
    assert list(given[0].allowed_programs) == ["eat", "/opt"]
    assert (given[0].limits.memory_bytes, given[0].limits.processes, given[0].limits.cpu_millis) == (
        64 << 20,
        9,
        500,
    )
    assert (given[0].limits.open_files, given[0].limits.file_size_bytes) == (99, 2 << 20)
    assert "raise sandbox.limits.memory_mb" in str(run)


async def test_sandbox_stays_until_it_is_stopped(harness: Harness) -> None:
    await harness.create(
        {"kind": "sandbox", "name": "s", "sandbox": {"image": "debian:12", "env": {"A": "b"}}}
    )
    await harness.fakes.until(lambda: bool(harness.fakes.boxes))
    made = harness.fakes.box_of("sandbox")
    assert made.config.root_disk.base_path == "/d/disk.ext4"
    assert dict(made.config.env) == {"A": "b"}
    await _until_state(harness, "sandbox", pb.STAGE_STATE_RUNNING)
    await harness.stub.CancelRun(pb.CancelRunRequest(run_id="r", reason="enough"))
    run = await harness.finish()
    assert (run.state, run.reason) == (pb.RUN_STATE_CANCELLED, "enough")
    assert not harness.fakes.boxes
    assert any(event.progress.action == "download" for event in await harness.events())


async def _until_state(harness: Harness, stage: str, state: int) -> None:
    stream = harness.stub.WatchRun(pb.WatchRunRequest(run_id="r"))
    async with asyncio.timeout(20):
        async for response in stream:
            moved = response.event.stage_state.stage
            if (moved.name, moved.state) == (stage, state):
                stream.cancel()
                return
    raise AssertionError(f"stage {stage} never came to state {state}")


async def test_cancel_ends_boxes_wherever_they_are(harness: Harness) -> None:
    async def forever(process: Process) -> int:
        await asyncio.Event().wait()
        return 0

    harness.fakes.programs |= {"true": true, "forever": forever}

    async def hang(box_id: str) -> None:
        if "slow" in box_id:
            await asyncio.Event().wait()

    harness.fakes.create_hook = hang
    spec = pipeline(
        [box("a"), box("run", "forever"), box("slow"), box("later")], "a", ["run", "slow"], "later"
    )
    await harness.create(spec)
    await harness.fakes.until(lambda: len(harness.fakes.created) == 3)
    await _until_state(harness, "run", pb.STAGE_STATE_RUNNING)
    await harness.stub.CancelRun(pb.CancelRunRequest(run_id="r"))
    run = await harness.finish()
    assert run.state == pb.RUN_STATE_CANCELLED
    assert states(run) == {"a": "SUCCEEDED", "run": "CANCELLED", "slow": "CANCELLED", "later": "CANCELLED"}
    assert not harness.fakes.boxes
    again = (await harness.stub.CancelRun(pb.CancelRunRequest(run_id="r"))).run
    assert again.state == pb.RUN_STATE_CANCELLED


async def test_a_dead_box_fails_its_stage_and_names_what_died(harness: Harness) -> None:
    async def forever(process: Process) -> int:
        await asyncio.Event().wait()
        return 0

    harness.fakes.programs["forever"] = forever
    await harness.create(pipeline([box("a", "forever")]))
    await _until_state(harness, "a", pb.STAGE_STATE_RUNNING)
    await harness.fakes.kill_box(harness.fakes.created[0], "QEMU was killed by signal 9")
    run = await harness.finish()
    assert (run.state, run.failure_class) == (pb.RUN_STATE_FAILED, pb.FAILURE_CLASS_INFRASTRUCTURE)
    assert "died: QEMU was killed by signal 9" in run.reason


async def test_a_dead_box_is_retried_when_the_spec_allows(harness: Harness) -> None:
    async def die_once(process: Process) -> int:
        if len(harness.fakes.created) == 1:
            await asyncio.Event().wait()
        return 0

    harness.fakes.programs["die"] = die_once
    await harness.create(pipeline([box("a", "die", retry={"max_attempts": 2, "initial_delay_ms": 0})]))
    await _until_state(harness, "a", pb.STAGE_STATE_RUNNING)
    await harness.fakes.kill_box(harness.fakes.created[0], "gone")
    assert (await harness.finish()).state == pb.RUN_STATE_SUCCEEDED


async def test_output_survives_a_restart_of_the_hypervisor(harness: Harness) -> None:
    go = asyncio.Event()
    block = bytes(range(256)) * 4096 + b"not yet acknowledged" * 10

    async def talk(process: Process) -> int:
        await process.print(block)
        await go.wait()
        await process.print(block)
        return 0

    harness.fakes.programs["talk"] = talk
    await harness.create(pipeline([box("a", "talk")]))
    async for response in harness.stub.WatchRun(pb.WatchRunRequest(run_id="r")):
        output = response.event.output
        if output.stream_offset + len(output.data) == len(block):
            break
    await harness.fakes.stop("hypervisor")
    go.set()
    await harness.fakes.start("hypervisor")
    run = await harness.finish()
    assert run.state == pb.RUN_STATE_SUCCEEDED, run.reason
    assert await harness.artifact("a") == block + block


async def test_an_unreachable_hypervisor_fails_the_run_after_a_bounded_time(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    await harness.stop()
    monkeypatch.setattr("services.orchestrator.__main__.PATIENCE_SECONDS", 0.3)
    await harness.start()
    await harness.fakes.stop("hypervisor")
    run = await harness.run(pipeline([box("a")]))
    assert run.failure_class == pb.FAILURE_CLASS_INFRASTRUCTURE
    assert "the hypervisor has not answered for 0.3 s" in run.reason
    await harness.fakes.start("hypervisor")


async def test_a_host_without_room_is_its_own_failure_class(harness: Harness) -> None:
    harness.fakes.create_error = Exhausted("the host has 100 MiB left", reason="NO_MEMORY")
    run = await harness.run(pipeline([box("a")]))
    assert (run.failure_class, run.state) == (pb.FAILURE_CLASS_EXHAUSTED, pb.RUN_STATE_FAILED)


async def test_a_box_waits_for_the_memory_that_others_of_ours_have(harness: Harness) -> None:
    async def wait(process: Process) -> int:
        await harness.fakes.until(lambda: harness.fakes.refused > 0 or len(harness.fakes.created) == 3)
        return 0

    harness.fakes.programs |= {"true": true, "wait": wait}
    harness.fakes.room = 1
    run = await harness.run(pipeline([box("a"), box("b", "wait"), box("c", "wait")], "a", ["b", "c"]))
    assert run.state == pb.RUN_STATE_SUCCEEDED, run.reason
    notices = [event.notice.text for event in await harness.events() if event.HasField("notice")]
    assert any("waiting for another box to end" in text for text in notices)


async def test_wrong_inputs_are_not_retried(harness: Harness) -> None:
    harness.fakes.programs["true"] = true
    retry = {"max_attempts": 5, "initial_delay_ms": 0}
    run = await harness.run(pipeline([box("a", "nothing", retry=retry)]))
    assert run.failure_class == pb.FAILURE_CLASS_INPUT
    assert run.stages[0].attempts == 1
    assert "there is no program 'nothing' in the box" in run.reason
    await harness.create(pipeline([box("a", retry=retry)], kernel="/missing"), "r2")
    run = await harness.finish("r2")
    assert "kernel /missing does not exist" in run.reason
    assert run.failure_class == pb.FAILURE_CLASS_INPUT


async def test_a_missing_output_fails_the_stage(harness: Harness) -> None:
    harness.fakes.programs["true"] = true
    run = await harness.run(pipeline([box("a", outputs=[{"name": "o", "guest": "/workspace/o.txt"}])]))
    assert "its output 'o' is missing: there is no /workspace/o.txt in the box" in run.reason


@pytest.mark.parametrize("what", ["cancelling", "retrying", "workflow"])
async def test_a_restarted_orchestrator_goes_on_in_every_state(harness: Harness, what: str) -> None:
    go, deleting = asyncio.Event(), asyncio.Event()

    async def work(process: Process) -> int:
        await process.print(f"{len(harness.fakes.created)}\n")
        if what == "retrying":
            return 0 if len(harness.fakes.created) > 1 else 1
        await go.wait()
        return 0

    async def hang() -> None:
        deleting.set()
        await asyncio.Event().wait()

    harness.fakes.programs |= {"work": work, "true": true}
    if what == "workflow":
        steps = [
            {"name": "a", "run": {"program": "work"}},
            {"name": "b", "run": {"program": "true"}, "depends_on": ["a"]},
        ]
        await harness.create({"kind": "workflow", "name": "w", "workflow": {"steps": steps}})
    else:
        retry = {"max_attempts": 2, "initial_delay_ms": 1500, "max_delay_ms": 1500}
        await harness.create(pipeline([box("a", "work", retry=retry)]))
    waited = pb.STAGE_STATE_RETRYING if what == "retrying" else pb.STAGE_STATE_RUNNING
    await _until_state(harness, "a", waited)
    if what == "cancelling":
        harness.fakes.delete_hook = hang
        await harness.stub.CancelRun(pb.CancelRunRequest(run_id="r"))
        await deleting.wait()
        harness.fakes.delete_hook = None
    await harness.restart()
    go.set()
    run = await harness.finish()
    wanted = pb.RUN_STATE_CANCELLED if what == "cancelling" else pb.RUN_STATE_SUCCEEDED
    assert run.state == wanted, run.reason
    assert len(harness.fakes.created) == (2 if what == "retrying" else 1)
    assert not harness.fakes.boxes


@pytest.mark.parametrize("when", ["starting", "running", "between"])
async def test_a_restarted_orchestrator_goes_on(harness: Harness, when: str) -> None:
    go, created = asyncio.Event(), asyncio.Event()
    starts: list[str] = []

    async def work(process: Process) -> int:
        stage = process.box.config.labels["voidbox-stage"]
        starts.append(stage)
        await process.print(f"{stage} begins\n")
        if stage == "b":
            await go.wait()
        await process.print(f"{stage} ends\n")
        return 0

    async def hook(box_id: str) -> None:
        if "-b-" in box_id and when == "starting" and not created.is_set():
            created.set()
            await asyncio.Event().wait()

    harness.fakes.programs["work"] = work
    harness.fakes.create_hook = hook
    await harness.create(pipeline([box("a", "work"), box("b", "work"), box("c", "work")]))
    seen: list[pb.Event] = []
    async for response in harness.stub.WatchRun(pb.WatchRunRequest(run_id="r")):
        seen.append(response.event)
        event = response.event
        if when == "between" and event.stage_state.stage.name == "a" and event.stage_state.stage.state == 5:
            break
        if when == "running" and event.stage == "b" and event.HasField("output"):
            break
        if when == "starting" and created.is_set():
            break
        if when == "starting" and event.stage == "b":
            await created.wait()
            break
    await harness.stop()
    for spool in (harness.paths.state / "orchestrator/scratch").rglob("*.std*"):
        # As if it had been killed between the file and the log.
        spool.write_bytes(spool.read_bytes() + b"not in the log")
    await harness.start()
    go.set()
    rest = await harness.events(start=len(seen))
    offsets = [event.offset for event in [*seen, *rest]]
    assert offsets == list(range(len(offsets)))
    run = await harness.get()
    assert run.state == pb.RUN_STATE_SUCCEEDED, run.reason
    assert starts == ["a", "b", "c"]
    assert await harness.artifact("b") == b"b begins\nb ends\n"
    printed = b"".join(event.output.data for event in [*seen, *rest] if event.stage == "b")
    assert printed == b"b begins\nb ends\n"
    assert not harness.fakes.boxes


async def test_a_box_that_died_while_the_orchestrator_was_away_is_noticed(harness: Harness) -> None:
    async def forever(process: Process) -> int:
        await asyncio.Event().wait()
        return 0

    harness.fakes.programs["forever"] = forever
    await harness.create(pipeline([box("a", "forever")]))
    await _until_state(harness, "a", pb.STAGE_STATE_RUNNING)
    await harness.stop()
    await harness.fakes.kill_box(harness.fakes.created[0], "the host was switched off")
    await harness.start()
    assert "the host was switched off" in (await harness.finish()).reason


async def test_boxes_that_were_left_are_swept(harness: Harness) -> None:
    async def forever(process: Process) -> int:
        await asyncio.Event().wait()
        return 0

    harness.fakes.programs["forever"] = forever
    await harness.create(pipeline([box("a", "forever")]))
    await _until_state(harness, "a", pb.STAGE_STATE_RUNNING)
    box_id = harness.fakes.created[0]
    left = harness.fakes.boxes[box_id]
    await harness.stub.CancelRun(pb.CancelRunRequest(run_id="r"))
    await harness.finish()
    await harness.stop()
    harness.fakes.boxes[box_id] = left
    await harness.start()
    await harness.fakes.until(lambda: not harness.fakes.boxes)


async def test_a_run_that_nobody_watches_is_cancelled_if_it_wants_that(harness: Harness) -> None:
    async def forever(process: Process) -> int:
        await asyncio.Event().wait()
        return 0

    harness.fakes.programs["forever"] = forever
    options = pb.RunOptions()
    options.orphan_timeout.FromMilliseconds(300)
    await harness.create(pipeline([box("a", "forever")]), options=options)
    await _until_state(harness, "a", pb.STAGE_STATE_RUNNING)
    await harness.fakes.until(lambda: not harness.fakes.boxes)
    run = await harness.finish()
    assert (run.state, run.reason) == (pb.RUN_STATE_CANCELLED, "nobody has watched it for 0.3 s")


async def test_output_beyond_the_limit_of_the_log_is_kept_as_artifact(harness: Harness) -> None:
    await harness.stop()
    harness.config["max_event_mib"] = 1
    await harness.start()
    data = b"0123456789abcdef" * (3 << 16)

    async def talk(process: Process) -> int:
        await process.print(data)
        return 0

    harness.fakes.programs["talk"] = talk
    run = await harness.run(pipeline([box("a", "talk")]))
    events = await harness.events()
    assert sum(len(event.output.data) for event in events) <= 1 << 20
    notices = [event.notice.text for event in events if event.HasField("notice")]
    assert len(notices) == 1
    assert "longer than" in notices[0]
    assert await harness.artifact("a") == data
    assert run.output_truncated
    assert run.output == data[: 64 << 10]


async def _code(call: Any) -> VoidboxError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_create_is_idempotent_by_run_id(harness: Harness) -> None:
    harness.fakes.programs["true"] = true
    runs = await asyncio.gather(*(harness.create(pipeline([box("a")]), "many") for _ in range(8)))
    assert len({run.create_time.ToNanoseconds() for run in runs}) == 1
    await harness.finish("many")
    harness.fakes.created.clear()
    first = await harness.create(pipeline([box("a")]))
    again = await harness.create(pipeline([box("a")]))
    assert first.create_time == again.create_time
    with pytest.raises(VoidboxError, match="already a run 'r'") as caught:
        await harness.create(pipeline([box("b")]))
    assert caught.value.reason == "RUN_EXISTS"
    await harness.finish()
    assert len(harness.fakes.created) == 1


@pytest.mark.parametrize(
    ("spec", "more", "reason", "text"),
    [
        ({"kind": "agent"}, {}, "INVALID_SPEC", "s.json:1:1: key 'name' is missing"),
        (agent() | {"llm": {"provider": "codex"}}, {}, "NOT_IN_THIS_VERSION", "codex is not in this version"),
        (agent() | {"llm": None}, {}, "NOT_IN_THIS_VERSION", "claude (the default) is not in this version"),
        (agent() | {"sandbox": {"network": {"allow": ["a b"]}}}, {}, "INVALID_SPEC", "network.allow[0]"),
        (
            agent() | {"sandbox": {"snapshot": "x", "image": "y"}},
            {},
            "NOT_IN_THIS_VERSION",
            "sandbox.snapshot",
        ),
        (agent() | {"sandbox": {"mode": "mock"}}, {}, "NOT_IN_THIS_VERSION", "sandbox.mode"),
        (agent() | {"observe": {"traces": True}}, {}, "NOT_IN_THIS_VERSION", "observe"),
        (agent(mode="interactive"), {}, "NOT_IN_THIS_VERSION", "agent.mode"),
        (agent(skills=["mcp:x"]), {}, "NOT_IN_THIS_VERSION", "agent.skills[0]"),
        (agent(skills=["remote:a/b"]), {}, "NOT_IN_THIS_VERSION", "remote skills"),
        (agent() | {"sandbox": {"env": {"TOKEN": ""}}}, {}, "INVALID_SPEC", "variable TOKEN"),
        (agent(inputs=[{"file": "x"}]), {}, "NOT_UPLOADED", "/base/x, which the spec names, was not"),
        (agent(), {"run_id": "../x"}, "BAD_RUN_ID", "run id"),
        (agent(), {"files": [pb.InputFile(path="x")]}, "BAD_DIGEST", "digest of 'x'"),
    ],
)  # fmt: skip
async def test_bad_requests_are_refused_and_leave_nothing(
    harness: Harness, spec: dict[str, Any], more: dict[str, Any], reason: str, text: str
) -> None:
    with pytest.raises(VoidboxError) as caught:
        await harness.create(spec, **more)
    assert caught.value.reason == reason
    assert text in caught.value.message
    assert not (await harness.stub.ListRuns(pb.ListRunsRequest())).runs


async def test_validate_spec(harness: Harness) -> None:
    async def validate(text: str, name: str = "s.yaml") -> pb.ValidateSpecResponse:
        document = pb.SpecDocument(content=text.encode(), filename=name)
        answer: pb.ValidateSpecResponse
        answer = await harness.stub.ValidateSpec(pb.ValidateSpecRequest(spec=document))
        return answer

    good = await validate(json.dumps(pipeline([box("a"), box("b")])), "s.json")
    assert not good.problems
    assert [(stage.name, list(stage.depends_on)) for stage in good.stages] == [("a", []), ("b", ["a"])]
    bad = await validate("kind: agent\nname: a\nagent: {promt: x}\n")
    assert [(item.line, item.path) for item in bad.problems] == [
        (3, "agent"),
        (3, "agent.promt"),
    ] or bad.problems
    wish = await validate("kind: agent\nname: a\nagent: {prompt: x}\n")
    assert wish.problems[0].path == "llm.provider"


async def test_upload_checks_its_stream(harness: Harness) -> None:
    async def send(*requests: pb.UploadInputRequest) -> VoidboxError:
        async def stream() -> AsyncIterator[pb.UploadInputRequest]:
            for request in requests:
                yield request

        return await _code(harness.stub.UploadInput(stream()))

    header = pb.UploadInputRequest(header=pb.UploadInputHeader())
    assert (await send()).reason == "BAD_STREAM"
    assert (await send(pb.UploadInputRequest(data=b"x"))).reason == "BAD_STREAM"
    assert (await send(header, header)).reason == "BAD_STREAM"
    empty = await harness.upload(b"")
    assert empty.value.startswith("sha256:e3b0c442")


async def test_list_runs_in_pages_newest_first(harness: Harness) -> None:
    harness.fakes.programs["true"] = true
    for number in range(5):
        await harness.create(pipeline([box("a")]), f"r{number}")
        await harness.finish(f"r{number}")
    names: list[str] = []
    token = ""
    while True:
        page = await harness.stub.ListRuns(pb.ListRunsRequest(page_size=2, page_token=token))
        names += [run.id for run in page.runs]
        assert all(not run.spec.content for run in page.runs)
        token = page.next_page_token
        if not token:
            break
    assert names == ["r4", "r3", "r2", "r1", "r0"]
    assert not (await harness.stub.ListRuns(pb.ListRunsRequest(active=True))).runs
    assert (await _code(harness.stub.ListRuns(pb.ListRunsRequest(page_token="x")))).reason == "BAD_PAGE_TOKEN"


async def test_watch_from_an_offset_never_misses_or_repeats(harness: Harness) -> None:
    harness.fakes.programs["true"] = true
    await harness.run(pipeline([box("a"), box("b")]))
    everything = await harness.events()
    for start in range(len(everything) + 1):
        assert await harness.events(start=start) == everything[start:]
    stream = harness.stub.WatchRun(pb.WatchRunRequest(run_id="r", from_offset=len(everything) + 1))
    assert (await _code(stream.read())).reason == "OFFSET_LOST"


async def test_artifacts_are_listed_in_pages(harness: Harness) -> None:
    async def make(process: Process) -> int:
        process.box.files["/workspace/x/f"] = b"1"
        return 0

    harness.fakes.programs["make"] = make
    outputs = [{"name": f"o{n}", "guest": "/workspace/x"} for n in range(3)]
    await harness.run(pipeline([box("a", "make", outputs=outputs)]))
    names: list[str] = []
    token = ""
    while True:
        request = pb.ListArtifactsRequest(run_id="r", page_size=2, page_token=token)
        page = await harness.stub.ListArtifacts(request)
        names += [artifact.name for artifact in page.artifacts]
        token = page.next_page_token
        if not token:
            break
    assert names == ["o0", "o1", "o2", "output"]
    wrong = harness.stub.ReadArtifact(pb.ReadArtifactRequest(run_id="r", stage="a", name="zz"))
    assert (await _code(wrong.read())).reason == "NO_ARTIFACT"
    bad = harness.stub.ListArtifacts(pb.ListArtifactsRequest(run_id="r", page_token="?"))
    assert (await _code(bad)).reason == "BAD_PAGE_TOKEN"


async def test_retry_run_keeps_what_has_succeeded(harness: Harness) -> None:
    tries: list[str] = []

    async def work(process: Process) -> int:
        stage = process.box.config.labels["voidbox-stage"]
        tries.append(stage)
        await process.print(stage)
        return 1 if stage == "b" and tries.count("b") == 1 else 0

    harness.fakes.programs["work"] = work
    run = await harness.run(pipeline([box("a", "work"), box("b", "work"), box("c", "work")]))
    assert run.state == pb.RUN_STATE_FAILED
    await harness.stub.RetryRun(pb.RetryRunRequest(run_id="r"))
    run = await harness.finish()
    assert run.state == pb.RUN_STATE_SUCCEEDED
    assert tries == ["a", "b", "b", "c"]
    assert (await _code(harness.stub.RetryRun(pb.RetryRunRequest(run_id="r")))).reason == "RUN_SUCCEEDED"


async def test_delete_run_removes_everything_of_it(harness: Harness) -> None:
    async def forever(process: Process) -> int:
        await asyncio.Event().wait()
        return 0

    harness.fakes.programs |= {"true": true, "forever": forever}
    digest = await harness.upload(b"only here")
    spec = pipeline([box("a", "forever", inputs=[{"file": "x"}])])
    await harness.create(spec, files=[pb.InputFile(path="x", digest=digest)])
    assert (await _code(harness.stub.DeleteRun(pb.DeleteRunRequest(run_id="r")))).reason == "RUN_ACTIVE"
    await harness.stub.CancelRun(pb.CancelRunRequest(run_id="r"))
    await harness.finish()
    await harness.stub.DeleteRun(pb.DeleteRunRequest(run_id="r"))
    assert (await _code(harness.stub.GetRun(pb.GetRunRequest(run_id="r")))).reason == "NO_RUN"
    assert (await _code(harness.stub.DeleteRun(pb.DeleteRunRequest(run_id="r")))).reason == "NO_RUN"
    blobs = list((harness.paths.state / "orchestrator/blobs").rglob("*"))
    assert not [path for path in blobs if path.is_file() and path.read_bytes() == b"only here"]


async def test_status_tells_who_answers(harness: Harness) -> None:
    status = await harness.stub.GetStatus(pb.GetStatusRequest())
    assert {service.name: service.reachable for service in status.services} == {
        "imager": True,
        "hypervisor": True,
    }
    await harness.fakes.stop("imager")
    status = await harness.stub.GetStatus(pb.GetStatusRequest())
    assert {service.name: service.reachable for service in status.services} == {
        "imager": False,
        "hypervisor": True,
    }
    await harness.fakes.start("imager")


def _rpcs() -> list[str]:
    return [method.name for method in pb.DESCRIPTOR.services_by_name["OrchestratorService"].methods]


@pytest.mark.parametrize("name", _rpcs())
def test_every_rpc_is_called_by_a_test(name: str) -> None:
    text = Path(__file__).read_text()
    assert f".stub.{name}(" in text


def _about_a_run() -> list[str]:
    methods = pb.DESCRIPTOR.services_by_name["OrchestratorService"].methods
    named = [method.name for method in methods if "run_id" in method.input_type.fields_by_name]
    return [name for name in named if name != "CreateRun"]


@pytest.mark.parametrize("name", _about_a_run())
async def test_an_unknown_run_is_not_found(harness: Harness, name: str) -> None:
    call = getattr(harness.stub, name)(getattr(pb, f"{name}Request")(run_id="nope"))
    error = await _code(call.read() if hasattr(call, "read") else call)
    assert error.reason == "NO_RUN"


async def test_guest_hypervisor_and_imager_calls_are_forwarded(harness: Harness) -> None:
    from voidbox.guest.v1 import guest_pb2, guest_pb2_grpc
    from voidbox.hypervisor.v1 import hypervisor_pb2, hypervisor_pb2_grpc
    from voidbox.imager.v1 import imager_pb2, imager_pb2_grpc

    await harness.create({"kind": "sandbox", "name": "s"})
    await _until_state(harness, "sandbox", pb.STAGE_STATE_RUNNING)
    box_id = (await harness.get()).stages[0].box_id
    hypervisor: Any = hypervisor_pb2_grpc.HypervisorServiceStub(harness.channel)
    assert (await hypervisor.GetBox(hypervisor_pb2.GetBoxRequest(box_id=box_id))).box.id == box_id
    guest: Any = guest_pb2_grpc.GuestServiceStub(harness.channel)
    metadata = (("voidbox-box-id", box_id),)
    assert (
        await guest.GetGuest(guest_pb2.GetGuestRequest(), metadata=metadata)
    ).kernel_release == "6.1.0-fake"
    imager: Any = imager_pb2_grpc.ImagerServiceStub(harness.channel)
    image = (await imager.ResolveGuestImage(imager_pb2.ResolveGuestImageRequest())).guest_image
    assert image.kernel_path == "/k/vmlinux"
    error = await _code(imager.ResolveGuestImage(imager_pb2.ResolveGuestImageRequest(kernel_path="/missing")))
    assert error.reason == "NO_KERNEL"
    await harness.stub.CancelRun(pb.CancelRunRequest(run_id="r"))
    await harness.finish()


async def test_two_orchestrators_cannot_share_a_state_directory(harness: Harness) -> None:
    other = Harness(harness.paths.state.parent, harness.fakes)
    other.paths = Paths(
        state=harness.paths.state, cache=harness.paths.cache, runtime=harness.paths.runtime / "two"
    )
    with pytest.raises(VoidboxError) as caught:
        await other.start()
    assert caught.value.reason == "STATE_IN_USE"
    assert Address.parse(f"unix:{harness.paths.runtime}/orchestrator.sock").path


async def test_the_pull_policy_of_a_box_reaches_the_imager(harness: Harness, fakes: Fakes) -> None:
    boxes = [{"name": name, "run": {"program": "true"}, "sandbox": more} for name, more in
             (("a", {"pull_policy": "always"}), ("b", {"image": "other:1"}))]  # fmt: skip
    fakes.programs["true"] = true
    sandbox = {"image": "oci:layout", "pull_policy": "never"}
    run = await harness.run(
        {"kind": "pipeline", "name": "p", "sandbox": sandbox, "pipeline": {"boxes": boxes}}
    )
    assert run.state == pb.RUN_STATE_SUCCEEDED
    asked = {(request.reference, request.policy) for request in fakes.image_requests if _is_disk(request)}
    assert asked == {
        ("oci:/base/layout", imager_pb2.PULL_POLICY_ALWAYS),
        ("other:1", imager_pb2.PULL_POLICY_NEVER),
    }
    guests = {request.policy for request in fakes.image_requests if not _is_disk(request)}
    assert guests == {imager_pb2.PULL_POLICY_ALWAYS, imager_pb2.PULL_POLICY_NEVER}


def _is_disk(request: Any) -> bool:
    return isinstance(request, imager_pb2.BuildDiskRequest)
