"""Whatever the order of events, a run keeps its invariants and comes to an end."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from services.orchestrator.engine import (
    Begin,
    Cancel,
    CloseRun,
    Effect,
    Event,
    Outcome,
    RetryDue,
    RunClosed,
    RunStatus,
    RunTimeout,
    StageClosed,
    StageDone,
    StageRunning,
    StartStage,
    StopStage,
    WaitRetry,
    advance,
    again,
    initial,
)
from services.orchestrator.plan import Plan, make_plan
from services.orchestrator.states import (
    RUN_ENDED,
    RUN_MOVES,
    STAGE_ACTIVE,
    STAGE_ENDED,
    STAGE_MOVES,
    FailureClass,
    RunState,
    StageState,
)
from voidbox.spec import parse_spec

GOOD = Outcome(state=StageState.SUCCEEDED, exit_code=0)
BAD = Outcome(state=StageState.FAILED, reason="x", failure_class=FailureClass.WORKLOAD, exit_code=1)
LATE = Outcome(state=StageState.TIMED_OUT, reason="late", failure_class=FailureClass.TIMEOUT)
HOPELESS = Outcome(state=StageState.FAILED, reason="y", failure_class=FailureClass.INPUT, retry=False)
STOPPED = Outcome(state=StageState.CANCELLED, failure_class=FailureClass.CANCELLED)


def plan_of(spec: dict[str, Any]) -> Plan:
    return make_plan(parse_spec(json.dumps(spec), "s.json", "/"))


def pipeline(groups: list[list[dict[str, Any]]]) -> Plan:
    boxes = [{"run": {"program": "true"}} | box for group in groups for box in group]
    stages = [
        {"type": "box", "name": group[0]["name"]}
        if len(group) == 1
        else {"type": "fan_out", "boxes": [box["name"] for box in group]}
        for group in groups
    ]
    return plan_of({"kind": "pipeline", "name": "p", "pipeline": {"boxes": boxes, "stages": stages}})


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    counter = iter(range(100))
    options = st.fixed_dictionaries(
        {
            "retry": st.fixed_dictionaries(
                {"max_attempts": st.integers(1, 3), "initial_delay_ms": st.just(0)}
            ),
            "on_failure": st.sampled_from(["stop", "continue"]),
        }
    )
    if draw(st.booleans()):
        sizes = [1, *draw(st.lists(st.integers(1, 4), max_size=3))]
        return pipeline(
            [[draw(options) | {"name": f"s{next(counter)}"} for _ in range(size)] for size in sizes]
        )
    steps: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 7))):
        before = [step["name"] for step in steps]
        needs = draw(st.lists(st.sampled_from(before), unique=True, max_size=3)) if before else []
        retry = draw(options)["retry"]
        steps.append({"name": f"w{number}", "run": {"program": "true"}, "depends_on": needs, "retry": retry})
    return plan_of({"kind": "workflow", "name": "w", "workflow": {"steps": steps}})


class World:
    """What the effects have set going, from which the next event is drawn."""

    def __init__(self, plan: Plan, max_parallel: int) -> None:
        self.plan, self.max_parallel = plan, max_parallel
        self.status = initial(plan)
        self.pending: list[Event] = [Begin()]
        self.ended: dict[str, StageState] = {}
        self.stopping: set[str] = set()
        self.closed = 0
        self.left: set[tuple[str, int]] = set()

    def send(self, event: Event) -> None:
        before = self.status
        step = advance(self.plan, before, event, max_parallel=self.max_parallel)
        self.status = step.status
        if isinstance(event, StageClosed):
            self.left.discard((event.stage, event.attempt))
        self.check(before, step.status)
        check_stale(before, event, step.status)
        for effect in step.effects:
            self.act(effect)

    def check(self, before: RunStatus, after: RunStatus) -> None:
        if after.state is not before.state:
            assert after.state in RUN_MOVES[before.state]
        for name, stage in after.stages.items():
            old = before.stages[name]
            if name in self.ended:
                assert stage.state is self.ended[name], "a stage ends once"
            if stage.state in STAGE_ENDED:
                self.ended[name] = stage.state
            if stage.state is not old.state:
                middle = {StageState.RUNNING} if old.state is StageState.STARTING else set()
                assert any(stage.state in STAGE_MOVES[state] for state in {old.state} | middle)
            if stage.state in STAGE_ACTIVE:
                assert stage.open
                needs = self.plan.stage(name).depends_on
                assert all(after.stages[other].state in STAGE_ENDED for other in needs)
        if not self.plan.shared:
            assert sum(stage.open for stage in after.stages.values()) <= self.max_parallel
        if after.state in RUN_ENDED:
            assert all(stage.state in STAGE_ENDED and not stage.open for stage in after.stages.values())

    def act(self, effect: Effect) -> None:
        match effect:
            case StartStage(name, attempt):
                assert name not in self.ended
                assert self.status.stopping is None, "nothing starts after a cancel"
                assert (name, attempt - 1) not in self.left, (
                    "an attempt starts when nothing of the last is left"
                )
                self.left.add((name, attempt))
                self.pending.append(StageRunning(name, attempt))
            case StopStage(name):
                assert name not in self.stopping, "a stage is stopped once"
                self.stopping.add(name)
                self.pending = [
                    e for e in self.pending if not (isinstance(e, StageRunning) and e.stage == name)
                ]
                if not any(isinstance(e, StageDone) and e.stage == name for e in self.pending):
                    self.pending.append(StageDone(name, self.status.stages[name].attempts, STOPPED))
            case WaitRetry(name, attempt, delay):
                assert delay >= 0
                self.pending.append(RetryDue(name, attempt))
            case CloseRun():
                self.closed += 1
                assert self.closed == 1, "a run is closed once"
                self.pending.append(RunClosed())

    def follow(self, event: Event, outcome: Outcome) -> None:
        """What the world does after it has reported `event`."""
        if isinstance(event, StageRunning) and event.stage not in self.stopping:
            self.pending.append(StageDone(event.stage, event.attempt, outcome))
        if isinstance(event, StageDone):
            self.pending.append(StageClosed(event.stage, event.attempt))


def check_stale(before: RunStatus, event: Event, after: RunStatus) -> None:
    """Events about another attempt than the present one change nothing."""
    if not isinstance(event, (StageRunning, StageDone, StageClosed, RetryDue)):
        return
    old = before.stages[event.stage]
    assert event.attempt == old.attempts or after.stages[event.stage] == old


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(1, 4), st.data())
def test_every_order_of_events_keeps_the_invariants_and_ends(
    plan: Plan, max_parallel: int, data: st.DataObject
) -> None:
    world = World(plan, max_parallel)
    outcomes = st.sampled_from([GOOD, GOOD, BAD, LATE, HOPELESS])
    cancel_at = data.draw(st.none() | st.integers(0, 30))
    for turn in range(400):
        if turn == cancel_at:
            stop: Event = Cancel("enough") if data.draw(st.booleans()) else RunTimeout(5.0)
            world.send(stop)
        if not world.pending:
            break
        event = world.pending.pop(data.draw(st.integers(0, len(world.pending) - 1)))
        world.follow(event, data.draw(outcomes))
        world.send(event)
        if data.draw(st.integers(0, 9)) == 0:
            world.send(event)  # an event that comes twice changes nothing
    assert world.status.state in RUN_ENDED
    states = [stage.state for stage in world.status.stages.values()]
    if world.status.state is RunState.SUCCEEDED:
        assert set(states) == {StageState.SUCCEEDED}
    if all(state is StageState.SUCCEEDED for state in states):
        assert world.status.state is RunState.SUCCEEDED or world.status.stopping is not None
    if world.status.state in (RunState.FAILED, RunState.TIMED_OUT):
        assert world.status.reason
        assert world.status.failure_class is not FailureClass.NONE


@settings(max_examples=150, deadline=None)
@given(plans(), st.data())
def test_any_events_at_all_never_break_the_machine(plan: Plan, data: st.DataObject) -> None:
    names = st.sampled_from([stage.name for stage in plan.stages])
    attempts = st.integers(0, 3)
    events = st.one_of(
        st.just(Begin()),
        st.builds(StageRunning, names, attempts),
        st.builds(StageDone, names, attempts, st.sampled_from([GOOD, BAD, LATE, HOPELESS, STOPPED])),
        st.builds(StageClosed, names, attempts),
        st.builds(RetryDue, names, attempts),
        st.just(Cancel("x")),
        st.just(RunClosed()),
    )
    world = World(plan, 2)
    for event in data.draw(st.lists(events, max_size=40)):
        step = advance(plan, world.status, event, max_parallel=2)
        world.check(world.status, step.status)
        check_stale(world.status, event, step.status)
        world.status = step.status


def drive(plan: Plan, outcomes: dict[str, list[Outcome]]) -> tuple[RunStatus, list[Effect]]:
    """Run `plan` with the outcomes of each stage's attempts; unnamed ones succeed."""
    status, queue, effects = initial(plan), [Begin()], list[Effect]()
    pending: list[Event] = list(queue)
    while pending:
        step = advance(plan, status, pending.pop(0), max_parallel=9)
        status = step.status
        effects += step.effects
        for effect in step.effects:
            match effect:
                case StartStage(name, attempt):
                    outcome = outcomes.get(name, []).pop(0) if outcomes.get(name) else GOOD
                    pending += [
                        StageRunning(name, attempt),
                        StageDone(name, attempt, outcome),
                        StageClosed(name, attempt),
                    ]
                case WaitRetry(name, attempt, _):
                    pending.append(RetryDue(name, attempt))
                case CloseRun():
                    pending.append(RunClosed())
    return status, effects


def test_delays_double_up_to_the_greatest() -> None:
    retry = {"max_attempts": 5, "initial_delay_ms": 100, "max_delay_ms": 300}
    status, effects = drive(pipeline([[{"name": "a", "retry": retry}]]), {"a": [BAD] * 5})
    assert [effect.delay for effect in effects if isinstance(effect, WaitRetry)] == [0.1, 0.2, 0.3, 0.3]
    assert status.stages["a"].attempts == 5
    assert status.state is RunState.FAILED


def test_what_cannot_help_is_not_retried() -> None:
    status, _ = drive(pipeline([[{"name": "a", "retry": {"max_attempts": 5}}]]), {"a": [HOPELESS]})
    assert status.stages["a"].attempts == 1


def test_stop_skips_all_later_stages_even_after_one_that_continues() -> None:
    plan = pipeline([[{"name": "a"}], [{"name": "b", "on_failure": "continue"}], [{"name": "c"}]])
    status, _ = drive(plan, {"a": [BAD]})
    assert [status.stages[name].state for name in "abc"] == ["FAILED", "SKIPPED", "SKIPPED"]
    assert status.reason == "stage 'a' failed: x"


def test_a_missing_input_skips_and_says_which() -> None:
    plan = pipeline(
        [
            [{"name": "a"}],
            [{"name": "b", "on_failure": "continue", "outputs": [{"name": "o"}]}],
            [{"name": "c", "inputs": [{"from": "o"}], "on_failure": "continue"}],
            [{"name": "d"}],
        ]
    )
    status, _ = drive(plan, {"b": [BAD]})
    assert status.stages["c"].reason == "its input 'o' is missing: stage 'b' failed"
    assert status.stages["d"].state is StageState.SUCCEEDED
    assert status.state is RunState.FAILED


def test_again_keeps_what_has_succeeded_except_in_a_shared_box() -> None:
    plan = pipeline([[{"name": "a"}], [{"name": "b"}], [{"name": "c"}]])
    status, _ = drive(plan, {"b": [BAD]})
    retried = again(plan, status)
    assert [retried.stages[name].state for name in "abc"] == ["SUCCEEDED", "PENDING", "PENDING"]
    assert retried.stages["b"].first_attempt == 1
    steps = [
        {"name": "a", "run": {"program": "x"}},
        {"name": "b", "run": {"program": "x"}, "depends_on": ["a"]},
    ]
    shared = plan_of({"kind": "workflow", "name": "w", "workflow": {"steps": steps}})
    status, _ = drive(shared, {"b": [BAD]})
    assert {stage.state for stage in again(shared, status).stages.values()} == {StageState.PENDING}
