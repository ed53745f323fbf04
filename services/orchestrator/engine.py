"""The life of a run as a pure state machine: status and event in, status and effects out.

It does no I/O and keeps no clock. Whoever drives it commits the new status before it
performs the effects, so that after a crash the stored status says what may have been
begun. Invariants, tested with random event orders:

- a stage ends exactly once, and no effect names it afterwards but stopping;
- a stage starts only after all it depends on has ended, and never more than
  `max_parallel` boxes are open at once;
- a run ends only when all its stages have ended and all its boxes are closed;
- after `Cancel` no stage starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from services.orchestrator.plan import MAX_PARALLEL_STEPS, Plan, PlannedStage, StageOutput
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
from voidbox.spec.models import OnFailure


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """Where one stage is.

    Attributes:
        attempts: Attempts begun, over the whole life of the run.
        first_attempt: Attempts that lie before the last `voidbox retry`.
        open: A box, or a program in the shared box, may exist for it.
        due: RETRYING: its delay is over.
    """

    state: StageState = StageState.PENDING
    attempts: int = 0
    first_attempt: int = 0
    reason: str = ""
    failure_class: FailureClass = FailureClass.NONE
    exit_code: int | None = None
    open: bool = False
    due: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """Where a run is.

    Attributes:
        stopping: What the run will be once all is closed: CANCELLED or TIMED_OUT; None if it
            has not been asked to stop.
        closing: `CloseRun` has been asked for.
    """

    state: RunState = RunState.PENDING
    reason: str = ""
    failure_class: FailureClass = FailureClass.NONE
    stopping: RunState | None = None
    closing: bool = False
    stages: Mapping[str, StageStatus]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        retry: Whether another attempt may help.
    """

    state: StageState
    reason: str = ""
    failure_class: FailureClass = FailureClass.NONE
    exit_code: int | None = None
    retry: bool = True


# Events


@dataclass(frozen=True, slots=True)
class Begin:
    """The run was accepted, or is taken up again after a restart."""


@dataclass(frozen=True, slots=True)
class StageRunning:
    """The box is there with its inputs; the program starts now."""

    stage: str
    attempt: int


@dataclass(frozen=True, slots=True)
class StageDone:
    """An attempt has ended and its results are stored."""

    stage: str
    attempt: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class StageClosed:
    """Nothing of an attempt is left in any box."""

    stage: str
    attempt: int


@dataclass(frozen=True, slots=True)
class RetryDue:
    """The delay before the next attempt is over."""

    stage: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Somebody wants the run to stop."""

    reason: str


@dataclass(frozen=True, slots=True)
class RunTimeout:
    """The limit of the whole run has passed."""

    seconds: float


@dataclass(frozen=True, slots=True)
class RunClosed:
    """All boxes of the run are gone."""


Event = Begin | StageRunning | StageDone | StageClosed | RetryDue | Cancel | RunTimeout | RunClosed


# Effects


@dataclass(frozen=True, slots=True)
class StartStage:
    """Make the box, put the inputs in, run the program."""

    stage: str
    attempt: int


@dataclass(frozen=True, slots=True)
class StopStage:
    """End the attempt under way, then report `StageDone` and `StageClosed`."""

    stage: str


@dataclass(frozen=True, slots=True)
class WaitRetry:
    """Report `RetryDue` after the delay."""

    stage: str
    attempt: int
    delay: float


@dataclass(frozen=True, slots=True)
class CloseRun:
    """Remove every box of the run, then report `RunClosed`."""


Effect = StartStage | StopStage | WaitRetry | CloseRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What an event led to."""

    status: RunStatus
    effects: tuple[Effect, ...]


def initial(plan: Plan) -> RunStatus:
    """The status of a run that has been accepted."""
    return RunStatus(stages={stage.name: StageStatus() for stage in plan.stages})


def again(plan: Plan, status: RunStatus) -> RunStatus:
    """The status of an ended run whose unsuccessful stages are to run again.

    In a shared box nothing of the earlier stages is left, so there all of them run again.
    """
    stages: dict[str, StageStatus] = {}
    for name, stage in status.stages.items():
        keep = stage.state is StageState.SUCCEEDED and not plan.shared
        stages[name] = stage if keep else StageStatus(attempts=stage.attempts, first_attempt=stage.attempts)
    return RunStatus(stages=stages)


def advance(plan: Plan, status: RunStatus, event: Event, *, max_parallel: int) -> Step:
    """What `event` makes of `status`. Events that come too late change nothing."""
    if status.state in RUN_ENDED:
        return Step(status=status, effects=())
    return _Advance(plan, status, MAX_PARALLEL_STEPS if plan.shared else max_parallel).step(event)


class _Advance:
    """One step: a mutable copy of the status, and the effects so far."""

    def __init__(self, plan: Plan, status: RunStatus, max_parallel: int) -> None:
        self._plan = plan
        self._run = status
        self._stages = dict(status.stages)
        self._effects: list[Effect] = []
        self._max_parallel = max_parallel

    def step(self, event: Event) -> Step:
        match event:
            case Begin():
                if self._run.state is RunState.PENDING:
                    self._move_run(RunState.RUNNING)
            case StageRunning(name, attempt):
                if self._current(name, attempt) and self._stages[name].state is StageState.STARTING:
                    self._move(name, StageState.RUNNING)
            case StageDone(name, attempt, outcome):
                if self._current(name, attempt) and self._stages[name].state in STAGE_ACTIVE:
                    self._done(self._plan.stage(name), outcome)
            case StageClosed(name, attempt):
                stage = self._stages[name]
                if stage.attempts == attempt and stage.state not in STAGE_ACTIVE:
                    self._stages[name] = dataclasses.replace(stage, open=False)
            case RetryDue(name, attempt):
                if self._current(name, attempt) and self._stages[name].state is StageState.RETRYING:
                    self._stages[name] = dataclasses.replace(self._stages[name], due=True)
            case Cancel(reason):
                self._stop(RunState.CANCELLED, reason or "cancelled", FailureClass.CANCELLED)
            case RunTimeout(seconds):
                reason = f"the run's time limit of {seconds:g} s has passed"
                self._stop(RunState.TIMED_OUT, reason, FailureClass.TIMEOUT)
            case RunClosed():
                if self._run.closing:
                    self._end()
        if self._run.state is RunState.RUNNING:
            self._skip_blocked()
            self._start_ready()
        self._close_if_over()
        status = dataclasses.replace(self._run, stages=self._stages)
        return Step(status=status, effects=tuple(self._effects))

    def _current(self, name: str, attempt: int) -> bool:
        return self._stages[name].attempts == attempt

    def _move(self, name: str, state: StageState, **changes: object) -> None:
        stage = self._stages[name]
        assert state in STAGE_MOVES[stage.state], f"stage {name}: {stage.state} -> {state}"
        self._stages[name] = dataclasses.replace(stage, state=state, **changes)  # type: ignore[arg-type]

    def _move_run(self, state: RunState, **changes: object) -> None:
        assert state in RUN_MOVES[self._run.state], f"run: {self._run.state} -> {state}"
        self._run = dataclasses.replace(self._run, state=state, **changes)  # type: ignore[arg-type]

    def _done(self, planned: PlannedStage, outcome: Outcome) -> None:
        stage = self._stages[planned.name]
        said = {
            "reason": outcome.reason,
            "failure_class": outcome.failure_class,
            "exit_code": outcome.exit_code,
        }
        tries = stage.attempts - stage.first_attempt
        failed = outcome.state in (StageState.FAILED, StageState.TIMED_OUT)
        if self._run.stopping is not None and failed:
            # The box was taken from under it; what it then said is not why it ended.
            said |= {"reason": self._run.reason, "failure_class": FailureClass.CANCELLED}
            self._move(planned.name, StageState.CANCELLED, **said)
        elif failed and outcome.retry and tries < planned.retry.max_attempts:
            delay = min(planned.retry.initial_delay_ms * 2 ** (tries - 1), planned.retry.max_delay_ms)
            self._move(planned.name, StageState.RETRYING, due=False, **said)
            self._effects.append(WaitRetry(planned.name, stage.attempts, delay / 1000))
        else:
            # A program may end so fast that its start is reported together with its end.
            if outcome.state is StageState.SUCCEEDED and stage.state is StageState.STARTING:
                self._move(planned.name, StageState.RUNNING)
            self._move(planned.name, outcome.state, **said)

    def _stop(self, final: RunState, reason: str, failure: FailureClass) -> None:
        if self._run.stopping is not None or self._run.closing:
            return
        self._move_run(RunState.CANCELLING, reason=reason, failure_class=failure, stopping=final)
        for name, stage in self._stages.items():
            if stage.state in (StageState.PENDING, StageState.RETRYING):
                self._move(name, StageState.CANCELLED, reason=reason, failure_class=FailureClass.CANCELLED)
            elif stage.state in STAGE_ACTIVE:
                self._effects.append(StopStage(name))

    def _skip_blocked(self) -> None:
        """Skip what can no longer run; one pass per group, as a skip may block others."""
        for planned in sorted(self._plan.stages, key=lambda stage: stage.group):
            if self._stages[planned.name].state is StageState.PENDING:
                reason = self._blocked(planned)
                if reason:
                    self._move(planned.name, StageState.SKIPPED, reason=reason)

    def _blocked(self, planned: PlannedStage) -> str:
        if not self._plan.shared:
            for other in self._plan.stages:
                status = self._stages[other.name]
                if (
                    other.group < planned.group
                    and self._failed(status)
                    and other.on_failure is OnFailure.STOP
                ):
                    return f"stage {other.name!r} {_ended_as(status)}"
        for name in planned.depends_on:
            if self._plan.shared and self._failed(self._stages[name]):
                return f"step {name!r}, which it depends on, {_ended_as(self._stages[name])}"
        for entry in planned.inputs:
            if isinstance(entry, StageOutput) and self._failed(self._stages[entry.stage]):
                verb = _ended_as(self._stages[entry.stage])
                return f"its input {entry.name!r} is missing: stage {entry.stage!r} {verb}"
        return ""

    @staticmethod
    def _failed(status: StageStatus) -> bool:
        return status.state in STAGE_ENDED and status.state is not StageState.SUCCEEDED

    def _start_ready(self) -> None:
        free = self._max_parallel - sum(stage.open for stage in self._stages.values())
        for planned in self._plan.stages:
            if free <= 0:
                return
            stage = self._stages[planned.name]
            waiting = stage.state is StageState.PENDING and all(
                self._stages[name].state in STAGE_ENDED for name in planned.depends_on
            )
            again = stage.state is StageState.RETRYING and stage.due and not stage.open
            if waiting or again:
                attempt = stage.attempts + 1
                self._move(
                    planned.name,
                    StageState.STARTING,
                    attempts=attempt,
                    open=True,
                    due=False,
                    reason="",
                    failure_class=FailureClass.NONE,
                    exit_code=None,
                )
                self._effects.append(StartStage(planned.name, attempt))
                free -= 1

    def _close_if_over(self) -> None:
        if self._run.closing or self._run.state in (RunState.PENDING, *RUN_ENDED):
            return
        if all(stage.state in STAGE_ENDED and not stage.open for stage in self._stages.values()):
            self._run = dataclasses.replace(self._run, closing=True)
            self._effects.append(CloseRun())

    def _end(self) -> None:
        if self._run.stopping is not None:
            self._move_run(self._run.stopping)
            return
        worst = next((p for p in self._plan.stages if self._failed(self._stages[p.name])), None)
        if worst is None:
            self._move_run(RunState.SUCCEEDED)
            return
        # A skipped stage is never first: what blocked it is earlier in the plan or in the graph.
        culprits = [p for p in self._plan.stages if self._stages[p.name].state in _BLAMED]
        worst = culprits[0] if culprits else worst
        stage = self._stages[worst.name]
        timed_out = stage.state is StageState.TIMED_OUT
        self._move_run(
            RunState.TIMED_OUT if timed_out else RunState.FAILED,
            reason=f"stage {worst.name!r} {_ended_as(stage)}" + (f": {stage.reason}" if stage.reason else ""),
            failure_class=stage.failure_class,
        )


_BLAMED = frozenset({StageState.FAILED, StageState.TIMED_OUT, StageState.CANCELLED})


def _ended_as(status: StageStatus) -> str:
    return {
        StageState.FAILED: "failed",
        StageState.TIMED_OUT: "timed out",
        StageState.CANCELLED: "was cancelled",
        StageState.SKIPPED: "was skipped",
    }[status.state]
