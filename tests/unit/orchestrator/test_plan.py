"""The same spec always gives the same stages, with who waits for whom and what each gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.common.errors import InvalidInput
from services.orchestrator.plan import (
    AgentWork,
    ClientFile,
    Collected,
    Plan,
    ProgramWork,
    StageOutput,
    make_plan,
)
from voidbox.spec import load_spec, parse_spec
from voidbox.spec.models import Mount

EXAMPLES = Path(__file__).parents[3] / "examples/specs"


def plan_of(text: str) -> Plan:
    return make_plan(parse_spec(text, "s.yaml", "/base"))


def test_pipeline_groups_data_and_machines() -> None:
    plan = make_plan(load_spec(EXAMPLES / "pipeline.yaml"))
    assert [(stage.name, stage.group, stage.depends_on) for stage in plan.stages] == [
        ("collect", 0, ()),
        ("count", 1, ("collect",)),
        ("longest", 1, ("collect",)),
        ("report", 2, ("count", "longest")),
    ]
    assert plan.stage("collect").inputs == (
        ClientFile(path=str(EXAMPLES / "data/poem.txt"), guest="/workspace/input/poem.txt"),
    )
    assert plan.stage("count").inputs == (
        StageOutput(stage="collect", name="text", guest="/workspace/input"),
    )
    assert plan.output_from == ("report",)
    assert (plan.stage("report").timeout, plan.stage("count").timeout) == (60.0, 1200.0)


def test_a_box_changes_the_sandbox_and_the_model() -> None:
    plan = plan_of(
        "kind: pipeline\nname: p\nllm: {provider: mock}\n"
        "sandbox: {memory_mb: 100, image: a, env: {A: '1', B: '1'}, mounts: [{host: m, guest: /m}]}\n"
        "pipeline:\n  boxes:\n  - name: x\n    prompt: hi\n    timeout_secs: 0\n"
        "    llm: {provider: mock, model: m}\n"
        "    sandbox: {memory_mb: 200, image: b, env: {B: '2'}, mounts: [{host: n, guest: /n, mode: rw}]}\n"
        "  - {name: y, run: {program: p}, output_file: /o}\n"
    )
    x, y = plan.stages
    assert (x.machine.memory_mib, x.machine.image, x.machine.env) == (200, "b", {"A": "1", "B": "2"})
    assert [mount.host for mount in x.machine.mounts] == ["/base/m", "/base/n"]
    assert isinstance(x.work, AgentWork)
    assert x.work.llm is not None
    assert x.work.llm.model == "m"
    assert (x.timeout, x.output_file) == (None, "/workspace/output.json")
    assert (y.machine.memory_mib, y.output_file) == (100, "/o")


def test_workflow_levels_and_default_input() -> None:
    plan = make_plan(load_spec(EXAMPLES / "workflow.yaml"))
    assert plan.shared
    assert {stage.name: (stage.group, stage.stdin_from) for stage in plan.stages} == {
        "split": (0, ""),
        "sort": (1, "split"),
        "unique": (1, "split"),
        "join": (2, "unique"),
    }
    assert isinstance(plan.stage("sort").work, ProgramWork)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("[{name: a, run: {program: x}}, {name: b, run: {program: x}}]", "b"),
        ("[{name: a, run: {program: x}, depends_on: [b]}, {name: b, run: {program: x}}]", "a"),
    ],
)
def test_the_output_step_is_the_last_declared_sink(steps: str, expected: str) -> None:
    assert plan_of(f"kind: workflow\nname: w\nworkflow: {{steps: {steps}}}\n").output_from == (expected,)


def test_mounts_of_the_request_are_added() -> None:
    spec = parse_spec("kind: sandbox\nname: s\n", "s.yaml", "/")
    plan = make_plan(spec, (Mount(host="/h", guest="/g"),))
    assert plan.stages[0].machine.mounts[0].host == "/h"


@pytest.mark.parametrize(
    ("guest", "is_file"), [("/w/o.txt", True), ("/w/out", False), ("/w/.cache", False), ("/w.d/out", False)]
)
def test_an_output_with_a_suffix_is_a_file(guest: str, is_file: bool) -> None:
    assert Collected(name="o", guest=guest).is_file is is_file


def test_a_cold_run_boots_all_its_boxes_and_takes_none_from_a_snapshot() -> None:
    plan = make_plan(load_spec(EXAMPLES / "pipeline.yaml"), cold_boot=True)
    assert {stage.machine.cold_boot for stage in plan.stages} == {True}
    text = "{kind: sandbox, name: s, sandbox: {snapshot: warm}}"
    assert not plan_of(text).stages[0].machine.cold_boot
    with pytest.raises(InvalidInput, match="cannot boot by itself"):
        make_plan(parse_spec(text, "s.yaml", "/base"), cold_boot=True)
