"""Names in pipelines and workflows lead somewhere, and the order makes sense, before anything runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from voidbox.spec import Spec, SpecError, parse_spec


def pipeline(boxes: list[dict[str, Any]], stages: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    block: dict[str, Any] = {"boxes": [{"run": {"program": "true"}} | box for box in boxes]}
    return {"kind": "pipeline", "name": "p", "pipeline": block | ({"stages": stages} if stages else {})}


def workflow(steps: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    steps = [{"run": {"program": "true"}} | step for step in steps]
    return {"kind": "workflow", "name": "w", "workflow": {"steps": steps, **more}}


def parse(tree: dict[str, Any]) -> Spec:
    return parse_spec(json.dumps(tree), "s.json", "/")


def fault(tree: dict[str, Any]) -> str:
    with pytest.raises(SpecError) as caught:
        parse(tree)
    assert len(caught.value.problems) == 1, caught.value
    return str(caught.value)


A, B, C = {"name": "a"}, {"name": "b"}, {"name": "c"}
OUT = {"name": "a", "outputs": [{"name": "o"}]}


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (pipeline([]), "pipeline.boxes: cannot be empty"),
        (pipeline([A, {"name": "a"}]), "pipeline.boxes[1].name: there is already a box named 'a'"),
        (pipeline([{"name": "alpha"}], [{"type": "box", "name": "alfa"}, {"type": "box", "name": "alpha"}]),
         "pipeline.stages[0].name: unknown box 'alfa'; did you mean 'alpha'?"),
        (pipeline([A], [{"type": "box", "name": "a"}, {"type": "box", "name": "a"}]), "a box runs once"),
        (pipeline([A, B], [{"type": "fan_out", "boxes": ["a", "b"]}]), "first stage cannot be fan_out"),
        (pipeline([A, B], [{"type": "box", "name": "a"}]), "box 'b' is in no stage"),
        (pipeline([A], [{"type": "box", "name": "a"}, {"type": "fan_out", "boxes": []}]), "cannot be empty"),
        (pipeline([A], [{"type": "boxx", "name": "a"}]), "expected one of box, fan_out"),
        (pipeline([OUT, {"name": "b", "inputs": [{"from": "x"}]}]),
         "box 'b' input 'x' references unknown output (available: [o])"),
        (pipeline([{"name": "b", "inputs": [{"from": "o"}]}, OUT]), "an output of a later stage"),
        (pipeline([A | {"inputs": [{"from": "o"}], "outputs": [{"name": "o"}]}]), "an output of itself"),
        (pipeline([C, OUT, {"name": "b", "inputs": [{"from": "o"}]}],
                  [{"type": "box", "name": "c"}, {"type": "fan_out", "boxes": ["a", "b"]}]),
         "of the same stage"),
        (pipeline([OUT, {"name": "b", "outputs": [{"name": "o"}]}, {"name": "c", "inputs": [{"from": "o"}]}]),
         "an output of several boxes; write one of a.o, b.o"),
        (pipeline([OUT, {"name": "b", "inputs": [{"from": "o"}, {"from": "a.o"}]}]), "two inputs go to"),
        (pipeline([{"name": "a", "outputs": [{"name": "o"}, {"name": "o"}, ]}, ]), "2 outputs of this name"),
        (pipeline([A | {"outputs": [{"name": "stderr"}]}]), "name of what the box prints"),
        (pipeline([A | {"prompt": "x"}]), "has both"),
        (pipeline([A | {"llm": {"provider": "mock"}}]), "llm is for agents"),
        (pipeline([A | {"retry": {"max_attempts": 0}}]), "too small"),
        (pipeline([A | {"retry": {"initial_delay_ms": 40000}}]), "greater than max_delay_ms"),
        (pipeline([A | {"on_failure": "stopp"}]), "did you mean 'stop'?"),
        (workflow([]), "workflow.steps: cannot be empty"),
        (workflow([A, A]), "already a step"),
        (workflow([{"name": "first"}, {"name": "b", "depends_on": ["frist"]}]), "did you mean 'first'?"),
        (workflow([A | {"depends_on": ["b"]}, B | {"depends_on": ["c"]}, C | {"depends_on": ["b"]}]),
         "circular dependency: b -> c -> b"),
        (workflow([A | {"depends_on": ["a"]}]), "circular dependency: a -> a"),
        (workflow([A | {"run": {"program": "x", "stdin_from": "a"}}]), "circular dependency: a -> a"),
        (workflow([A | {"run": {"program": "x", "stdin_from": "q"}}]), "run.stdin_from: unknown step 'q'"),
        (workflow([A], output_step="z"), "workflow.output_step: unknown step 'z'"),
        (workflow([A | {"mode": "service", "timeout_secs": 1}]), "mutually exclusive"),
        (workflow([A, B | {"depends_on": ["a", "a"]}]), "named twice"),
    ],
)  # fmt: skip
def test_fault_is_named(tree: dict[str, Any], expected: str) -> None:
    if expected == "2 outputs of this name":
        with pytest.raises(SpecError, match=expected):
            parse(tree)
    else:
        assert expected in fault(tree)


def test_an_ambiguous_output_is_settled_by_its_box() -> None:
    boxes = [OUT, {"name": "b", "outputs": [{"name": "o"}]}, {"name": "c", "inputs": [{"from": "b.o"}]}]
    assert parse(pipeline(boxes)).pipeline is not None


def test_a_chain_longer_than_the_stack_is_checked() -> None:
    steps = [{"name": "s0"}] + [{"name": f"s{n}", "depends_on": [f"s{n - 1}"]} for n in range(1, 3000)]
    assert parse(workflow(list(reversed(steps)))).workflow is not None
