"""Drives one run: events into the engine, its new status into the store, its effects into the world.

The order is always: advance, commit, tell, act. A run whose process died is taken up
again with `Runner(...).run()`: what the stored status says may have been begun is begun
again (or joined), what it says has ended is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from services.common.errors import VoidboxError
from services.common.logging import log_context
from services.orchestrator import agents
from services.orchestrator import records as r
from services.orchestrator.attempt import Attempt, Box, make_box, put_inputs
from services.orchestrator.carry import input_json
from services.orchestrator.context import RESULT, RunContext
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
    StageStatus,
    StartStage,
    StopStage,
    WaitRetry,
    advance,
)
from services.orchestrator.peers import lost
from services.orchestrator.plan import PlannedStage
from services.orchestrator.states import (
    RUN_ENDED,
    STAGE_ACTIVE,
    STAGE_ENDED,
    FailureClass,
    StageState,
)
from services.orchestrator.store import Store

log = logging.getLogger(__name__)

# As much of a run's output as its description holds.
MAX_OUTPUT: Final = 64 * 1024


class Runner:
    """One run, from where it is to its end.

    Args:
        context: What its parts share.
        run: The run as it is stored.
        max_parallel: Boxes at once.
        leftover: Called when a box may be left that could not be removed.
    """

    def __init__(
        self, context: RunContext, run: r.Run, max_parallel: int, leftover: Callable[[], None]
    ) -> None:
        self._context = context
        self._run = run
        self._status = RunStatus(
            state=run.state,
            reason=run.reason,
            failure_class=run.failure_class,
            stopping=run.stopping,
            stages={stage.name: stage.status for stage in run.stages},
        )
        self._max_parallel = max_parallel
        self._leftover = leftover
        self._events: asyncio.Queue[tuple[Event, asyncio.Future[None]]] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stages: dict[str, asyncio.Task[None]] = {}
        self._stopped: set[str] = set()
        self._shared: asyncio.Task[Box] | None = None

    @property
    def state(self) -> RunStatus:
        """Where the run is."""
        return self._status

    async def run(self) -> None:
        """Drive the run until it has ended. Cancelled (the service stops), it leaves all as it is."""
        with log_context(run=self._context.run_id):
            try:
                self._take_up()
                while self._status.state not in RUN_ENDED:
                    event, done = await self._events.get()
                    effects = await self._advance(event)
                    if not done.done():
                        done.set_result(None)
                    for effect in effects:
                        self._perform(effect)
            finally:
                tasks = [*self._tasks, *([self._shared] if self._shared else [])]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(shutil.rmtree, self._context.scratch, ignore_errors=True)

    async def cancel(self, reason: str) -> None:
        """Ask the run to stop; returns once that is stored."""
        await self._post(Cancel(reason))

    async def _post(self, event: Event) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._events.put_nowait((event, done))
        await done

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _take_up(self) -> None:
        """Begin, or go on where the stored status says that the run was."""
        timeout = self._context.request.options.timeout_seconds
        if timeout:
            left = self._run.begin_time + timeout - time.time()
            self._spawn(self._after(max(0.0, left), RunTimeout(timeout)))
        for planned in self._context.plan.stages:
            stage = self._status.stages[planned.name]
            if stage.state in STAGE_ACTIVE and self._status.stopping is None:
                resume = stage.state is StageState.RUNNING
                self._begin_stage(planned, stage.attempts, resume=resume)
            elif stage.open:
                self._spawn(self._end_left(planned, stage))
            if stage.state is StageState.RETRYING and not stage.due:
                delay = planned.retry.max_delay_ms / 1000
                self._spawn(self._after(delay, RetryDue(planned.name, stage.attempts)))
        self._spawn(self._post(Begin()))

    async def _after(self, delay: float, event: Event) -> None:
        await asyncio.sleep(delay)
        await self._post(event)

    async def _end_left(self, planned: PlannedStage, stage: StageStatus) -> None:
        """Close what an attempt has left open when the service died."""
        attempt = self._attempt(planned, stage.attempts)
        if stage.state in STAGE_ACTIVE:
            outcome = Outcome(
                state=StageState.CANCELLED,
                reason=self._status.reason,
                failure_class=FailureClass.CANCELLED,
            )
            await self._post(StageDone(planned.name, stage.attempts, outcome))
        await self._close(planned, stage.attempts, attempt)

    async def _advance(self, event: Event) -> tuple[Effect, ...]:
        before = self._status
        step = advance(self._context.plan, before, event, max_parallel=self._max_parallel)
        if step.status != before:
            await self._commit(before, step.status)
            self._status = step.status
        return step.effects

    async def _commit(self, before: RunStatus, after: RunStatus) -> None:
        context, now = self._context, time.time()
        changed: list[r.Stage] = []
        events: list[bytes] = []
        for stage in self._run.stages:
            status = after.stages[stage.name]
            if status == before.stages[stage.name]:
                continue
            facts = context.facts[stage.name]
            if status.state is StageState.STARTING and not facts.start_time:
                facts = dataclasses.replace(facts, start_time=now)
            if status.state in STAGE_ENDED and not facts.end_time:
                facts = dataclasses.replace(facts, end_time=now)
            context.facts[stage.name] = facts
            current = dataclasses.replace(stage, status=status, facts=facts)
            changed.append(current)
            if status.state is not before.stages[stage.name].state:
                events += context.encode(stage.name, [r.StageMoved(stage=current)])
        run = dataclasses.replace(
            self._run,
            state=after.state,
            reason=after.reason,
            failure_class=after.failure_class,
            stopping=after.stopping,
        )
        if after.state is not before.state:
            events += context.encode("", [r.RunMoved(state=after.state, reason=after.reason)])
            if after.state in RUN_ENDED:
                output, truncated = await self._output()
                run = dataclasses.replace(run, end_time=now, output=output, output_truncated=truncated)
        await context.database(Store.save, run, changed, events)
        self._run = run
        context.bell.ring()
        for stage in changed:
            if (
                stage.status.state in STAGE_ENDED
                and stage.status.state is not before.stages[stage.name].state
            ):
                log.info("stage %s: %s %s", stage.name, stage.status.state, stage.status.reason)

    async def _output(self) -> tuple[bytes, bool]:
        """The run's output: a lone stage's result as it is, several as the array of `input.json`."""
        context = self._context
        names = context.plan.output_from
        if context.plan.shared or len(names) == 1:
            artifact = await context.database(Store.artifact, context.run_id, names[0], RESULT)
            if artifact is None:
                return b"", False
            path = context.blobs.find(artifact.digest.value)
            data = await asyncio.to_thread(_head, path, MAX_OUTPUT + 1)
        else:
            last = dataclasses.replace(context.plan.stage(names[0]), carry_from=names)
            carried = await context.carried(last, self._errors(last))
            data = await asyncio.to_thread(input_json, carried)
        return data[:MAX_OUTPUT], len(data) > MAX_OUTPUT

    def _errors(self, planned: PlannedStage) -> dict[str, str]:
        """Why stages that `planned` carries data from have no result."""
        found: dict[str, str] = {}
        for name in planned.carry_from:
            stage = self._status.stages[name]
            if stage.state is not StageState.SUCCEEDED:
                found[name] = stage.reason or stage.state.lower().replace("_", " ")
        return found

    def _perform(self, effect: Effect) -> None:
        match effect:
            case StartStage(name, attempt):
                self._begin_stage(self._context.plan.stage(name), attempt, resume=False)
            case StopStage(name):
                self._stopped.add(name)
                self._stages[name].cancel()
            case WaitRetry(name, attempt, delay):
                self._spawn(self._after(delay, RetryDue(name, attempt)))
            case CloseRun():
                self._spawn(self._close_run())

    def _attempt(self, planned: PlannedStage, number: int) -> Attempt:
        async def running() -> None:
            await self._post(StageRunning(planned.name, number))

        shared: Callable[[], Awaitable[Box]] | None = self._shared_box if self._context.plan.shared else None
        return Attempt(
            self._context, planned, number, errors=self._errors(planned), shared=shared, running=running
        )

    def _begin_stage(self, planned: PlannedStage, number: int, *, resume: bool) -> None:
        self._stages[planned.name] = self._spawn(self._stage(planned, number, resume))

    async def _stage(self, planned: PlannedStage, number: int, resume: bool) -> None:
        with log_context(stage=planned.name):
            attempt = self._attempt(planned, number)
            try:
                outcome = await attempt.run(resume=resume)
            except asyncio.CancelledError:
                if planned.name not in self._stopped:
                    raise
                outcome = Outcome(
                    state=StageState.CANCELLED,
                    reason=self._status.reason,
                    failure_class=FailureClass.CANCELLED,
                )
            except Exception as error:
                log.exception("stage %s", planned.name)
                reason = f"a defect of the orchestrator: {type(error).__name__}: {error}"
                outcome = Outcome(
                    state=StageState.FAILED, reason=reason, failure_class=FailureClass.INFRASTRUCTURE
                )
            await self._post(StageDone(planned.name, number, outcome))
            await self._close(planned, number, attempt)

    async def _close(self, planned: PlannedStage, number: int, attempt: Attempt) -> None:
        try:
            await attempt.close()
        except VoidboxError as error:
            await self._left(planned.name, error)
        await self._post(StageClosed(planned.name, number))

    async def _left(self, stage: str, error: VoidboxError) -> None:
        text = f"a box may be left, and will be removed once the hypervisor answers: {error.message}"
        await self._context.log(stage, r.Notice(text=text, warning=True))
        self._leftover()

    async def _shared_box(self) -> Box:
        """The box of all stages, started by the first that asks; its failure is everybody's."""
        if self._shared is None:
            self._shared = asyncio.create_task(self._make_shared())
        return await asyncio.shield(self._shared)

    async def _make_shared(self) -> Box:
        context = self._context
        first = context.plan.stages[0]
        box_id = context.box_id("", 0)

        @contextlib.asynccontextmanager
        async def phase(_name: str) -> Any:
            yield

        begun = any(
            stage.state in STAGE_ENDED - {StageState.SKIPPED} or stage.state is StageState.RUNNING
            for stage in self._status.stages.values()
        )
        if begun:
            # Taken up after a restart: another box would have nothing of what the steps have made.
            info = await context.peers.find_box(box_id)
            if info is None or not info.running:
                raise lost(box_id, info)
        box = await make_box(context, "", box_id, first.machine, phase)
        if not begun:
            guest = context.peers.guest(box_id)
            await put_inputs(context, guest, first)
            carried = await context.carried(dataclasses.replace(first, carry_from=()), {})
            if carried:
                digest = await asyncio.to_thread(lambda: context.blobs.put(input_json(carried)))
                directory = agents.own_directory((*first.machine.mounts, *first.machine.volumes))
                await guest.write_file(f"{directory}/input.json", context.blobs.find(digest.value))
        return box

    async def _close_run(self) -> None:
        context = self._context
        if context.plan.shared:
            if self._shared is not None:
                self._shared.cancel()
                await asyncio.gather(self._shared, return_exceptions=True)
            try:
                await context.peers.delete_box(context.box_id("", 0))
            except VoidboxError as error:
                await self._left("", error)
        await self._post(RunClosed())


def _head(path: Any, length: int) -> bytes:
    with open(path, "rb") as file:
        return bytes(file.read(length))
