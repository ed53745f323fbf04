"""All runs of one orchestrator: accepted, taken up after a restart, watched, stopped, removed."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from services.common.errors import AlreadyExists, InvalidInput, NotFound, OffsetLost, VoidboxError, WrongState
from services.orchestrator import records as r
from services.orchestrator.blobs import Blobs
from services.orchestrator.context import (
    LABEL_INSTANCE,
    LABEL_RUN,
    Limits,
    RunContext,
)
from services.orchestrator.convert import entry_to_bytes
from services.orchestrator.engine import RunStatus, again, initial
from services.orchestrator.peers import Peers
from services.orchestrator.plan import Plan, make_plan
from services.orchestrator.runner import Runner
from services.orchestrator.states import RUN_ENDED, FailureClass, RunState
from services.orchestrator.store import Database, Store
from services.orchestrator.support import check_supported
from voidbox.spec import Spec, input_files, parse_spec, resolve_env

log = logging.getLogger(__name__)

RUN_ID = re.compile(r"[a-z][a-z0-9-]{0,62}")

_PAGE_EVENTS: Final = 256
# Until a hypervisor that did not answer is asked again about boxes that were left.
_SWEEP_SECONDS: Final = 15.0
# Until a store that could not be written is tried again.
_STORE_SECONDS: Final = 5.0


@dataclass(slots=True)
class _Active:
    """A run that has not ended, in this process."""

    context: RunContext
    runner: Runner
    task: asyncio.Task[None]
    watchers: int = 0
    orphan: asyncio.TimerHandle | None = None


class Orchestrator:
    """The runs in one state directory.

    Use as an async context manager: entering takes up the runs that had not ended;
    leaving stops this process's part in them and leaves their boxes alone.
    """

    def __init__(
        self, store: Store, blobs: Blobs, peers: Peers, limits: Limits, scratch: Path, max_parallel: int = 0
    ) -> None:
        self._database = Database(store)
        self.blobs = blobs
        self.peers = peers
        self.limits = limits
        self._scratch = scratch
        self._max_parallel = max_parallel or min(4, os.cpu_count() or 1)
        self._active: dict[str, _Active] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._sweeping: asyncio.Task[None] | None = None
        self._sweep_again = False
        self._leaving = False

    async def __aenter__(self) -> Orchestrator:
        for _, run in await self._database(Store.runs, 1 << 30, None, True):
            try:
                self._start(run)
            except VoidboxError:
                log.exception("run %s cannot be taken up", run.id)
                await self._give_up(run, "its stored spec is not valid for this version of voidbox")
        used = await self._database(Store.used_digests)
        await asyncio.to_thread(self.blobs.sweep, used)
        self._sweep()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._leaving = True
        tasks = [active.task for active in self._active.values()] + list(self._background)
        for active in self._active.values():
            if active.orphan:
                active.orphan.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._database.close()

    async def _give_up(self, run: r.Run, reason: str) -> None:
        """End a run that cannot be driven any more."""
        ended = dataclasses.replace(run, state=RunState.FAILED, reason=reason, end_time=time.time())
        event = entry_to_bytes(time.time(), "", r.RunMoved(state=RunState.FAILED, reason=reason))
        await self._database(Store.save, ended, (), [event])

    async def _give_up_at_last(self, run_id: str, reason: str) -> None:
        """End a run as soon as the store can say so; a full disk may be why it could not go on."""
        while True:
            try:
                return await self._give_up(await self._database(Store.run, run_id), reason)
            except NotFound:
                return None
            except Exception:
                log.exception("run %s cannot be ended yet", run_id)
            await asyncio.sleep(_STORE_SECONDS)

    async def create(self, run_id: str, request: r.Request, digest: str) -> r.Run:
        """Accept a run. The same request under the same id gives the same run.

        Raises:
            SpecError, InvalidInput: the spec or an input is wrong.
            NotBuilt: the spec asks for what this version does not do.
            AlreadyExists: the id belongs to another request.
        """
        if run_id and not RUN_ID.fullmatch(run_id):
            raise InvalidInput(
                f"run id {run_id[:80]!r} is not 1 to 63 of a-z, 0-9 and '-', starting with a letter",
                reason="BAD_RUN_ID",
            )
        found = await self._find(run_id, digest)
        if found is not None:
            return found
        spec = await asyncio.to_thread(self._check, request)
        plan = make_plan(spec, request.mounts)
        status, now = initial(plan), time.time()
        run = r.Run(
            id=run_id or _new_id(spec.name),
            name=spec.name,
            kind=spec.kind,
            state=status.state,
            create_time=now,
            begin_time=now,
            stages=stages_of(plan, status),
            request=request,
            request_digest=digest,
        )
        event = entry_to_bytes(run.create_time, "", r.RunMoved(state=status.state))
        try:
            await self._database(Store.create_run, run, [event])
        except AlreadyExists:
            # Another call with this id was faster.
            found = await self._find(run_id, digest)
            if found is None:
                raise
            return found
        self._start(run)
        return await self._database(Store.run, run.id)

    async def _find(self, run_id: str, digest: str) -> r.Run | None:
        """The run that the same request has started before, if any."""
        try:
            found = await self._database(Store.run, run_id)
        except NotFound:
            return None
        if found.request_digest != digest:
            message = f"there is already a run {run_id!r} of another request; choose another id"
            raise AlreadyExists(message, reason="RUN_EXISTS", run_id=run_id)
        return found

    def _check(self, request: r.Request) -> Spec:
        base = request.base_directory or None
        spec = resolve_env(parse_spec(request.spec, request.filename, base), request.env)
        check_supported(spec)
        for planned in make_plan(spec, request.mounts, cold_boot=request.options.cold_boot).stages:
            machine = planned.machine
            guests = [mount.guest for mount in machine.mounts] + [one.guest for one in machine.volumes]
            twice = sorted({guest for guest in guests if guests.count(guest) > 1})
            if twice:
                message = f"stage {planned.name!r}: {', '.join(twice)} is mounted twice, by spec and request"
                raise InvalidInput(message, reason="MOUNTED_TWICE")
        given = {file.path: file for file in request.files}
        for path in input_files(spec):
            if path not in given:
                message = f"{path}, which the spec names, was not uploaded; send it and name it in `files`"
                raise InvalidInput(message, reason="NOT_UPLOADED", path=path)
            self.blobs.find(given[path].digest.value)
        return spec

    def plan(self, run: r.Run) -> Plan:
        """The plan of a stored run."""
        assert run.request is not None
        request = run.request
        spec = parse_spec(request.spec, request.filename, request.base_directory or None)
        spec = resolve_env(spec, request.env)
        return make_plan(spec, request.mounts, cold_boot=request.options.cold_boot)

    def _start(self, run: r.Run) -> None:
        context = RunContext(
            run, self.plan(run), self._database, self.blobs, self.peers, self.limits, self._scratch
        )
        assert run.request is not None
        parallel = run.request.options.max_parallel or self._max_parallel
        runner = Runner(context, run, parallel, self._sweep)
        task = asyncio.create_task(self._drive(run.id, runner), name=f"run {run.id}")
        self._active[run.id] = _Active(context=context, runner=runner, task=task)
        self._arm(run.id)

    async def _drive(self, run_id: str, runner: Runner) -> None:
        try:
            await runner.run()
        except Exception as error:
            log.exception("run %s", run_id)
            await self._give_up_at_last(run_id, f"the orchestrator could not go on: {error}")
        finally:
            active = self._active.pop(run_id, None)
            if active is not None:
                if active.orphan:
                    active.orphan.cancel()
                active.context.bell.ring()
            if not self._leaving:
                self._sweep()

    # Watching

    async def watch(self, run_id: str, start: int, *, follow: bool) -> AsyncIterator[tuple[int, bytes]]:
        """The run's events from offset `start` on; with `follow`, until it has ended.

        Raises:
            NotFound: there is no such run.
            OffsetLost: the run has fewer events.
        """
        if start < 0:
            raise InvalidInput("from_offset must not be negative", reason="BAD_OFFSET")
        count = (await self._database(Store.run, run_id)).event_count
        if start > count:
            raise OffsetLost(f"run {run_id!r} has {count} events", run_id=run_id, event_count=count)
        active = self._active.get(run_id)
        if active is not None:
            active.watchers += 1
            self._disarm(active)
        try:
            while True:
                bell = active.context.bell.listen() if active else None
                events, state = await self._database(Store.events, run_id, start, _PAGE_EVENTS)
                for offset, payload in events:
                    yield offset, payload
                    start = offset + 1
                if events:
                    continue
                if not follow or state in RUN_ENDED or bell is None or run_id not in self._active:
                    return
                await bell.wait()
        finally:
            if active is not None:
                active.watchers -= 1
                self._arm(run_id)

    def _arm(self, run_id: str) -> None:
        """Start the countdown of a run that nobody watches, if it wants that."""
        active = self._active.get(run_id)
        if active is None or active.watchers:
            return
        seconds = active.context.request.options.orphan_seconds
        if seconds:
            self._disarm(active)
            loop = asyncio.get_running_loop()
            active.orphan = loop.call_later(seconds, self._orphaned, run_id, seconds)

    @staticmethod
    def _disarm(active: _Active) -> None:
        if active.orphan is not None:
            active.orphan.cancel()
            active.orphan = None

    def _orphaned(self, run_id: str, seconds: float) -> None:
        active = self._active.get(run_id)
        if active is not None and not active.watchers:
            reason = f"nobody has watched it for {seconds:g} s"
            self._run_in_background(self._cancel(active, reason))

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    # Everything else

    async def get(self, run_id: str) -> r.Run:
        """A run."""
        return await self._database(Store.run, run_id)

    async def list_runs(self, limit: int, before: int | None, active: bool) -> list[tuple[int, r.Run]]:
        """Up to `limit` runs with their numbers, newest first."""
        return await self._database(Store.runs, limit, before, active)

    async def cancel(self, run_id: str, reason: str) -> r.Run:
        """Ask a run to stop; one that has ended is left as it is."""
        await self._database(Store.run, run_id)
        active = self._active.get(run_id)
        if active is not None:
            await self._cancel(active, reason or "cancelled by the user")
        return await self._database(Store.run, run_id)

    @staticmethod
    async def _cancel(active: _Active, reason: str) -> None:
        # The run may end, and nobody answer, while this is under way.
        asked = asyncio.create_task(active.runner.cancel(reason))
        await asyncio.wait((asked, active.task), return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()

    async def retry(self, run_id: str) -> r.Run:
        """Run the stages of an ended run again that did not succeed.

        Raises:
            WrongState: it has not ended, or has succeeded.
        """
        run = await self._ended(run_id)
        if run.state is RunState.SUCCEEDED:
            raise WrongState(
                f"run {run_id!r} has succeeded; there is nothing to retry", reason="RUN_SUCCEEDED"
            )
        plan = self.plan(run)
        status = again(plan, RunStatus(stages={stage.name: stage.status for stage in run.stages}))
        facts = {stage.name: stage.facts for stage in run.stages}
        stages = tuple(
            dataclasses.replace(
                stage, facts=facts[stage.name] if stage.status == status.stages[stage.name] else r.Facts()
            )
            for stage in stages_of(plan, status)
        )
        run = dataclasses.replace(
            run,
            state=RunState.PENDING,
            reason="",
            failure_class=FailureClass.NONE,
            stopping=None,
            end_time=0.0,
            output=b"",
            output_truncated=False,
            generation=run.generation + 1,
            begin_time=time.time(),
            stages=stages,
        )
        event = entry_to_bytes(time.time(), "", r.RunMoved(state=RunState.PENDING, reason="retried"))
        await self._database(Store.save, run, stages, [event])
        self._start(run)
        return await self._database(Store.run, run_id)

    async def delete(self, run_id: str) -> None:
        """Remove an ended run with all that belongs to it.

        Raises:
            WrongState: it has not ended.
        """
        await self._ended(run_id)
        unused = await self._database(Store.delete_run, run_id)
        await asyncio.to_thread(self.blobs.remove, unused)
        await asyncio.to_thread(self.blobs.sweep, await self._database(Store.used_digests))
        try:
            mine = {LABEL_INSTANCE: self._database.store.instance, LABEL_RUN: run_id}
            await self.peers.delete_changes(mine)
        except VoidboxError as error:
            # They give way to newer ones in time.
            log.warning("what the boxes of run %s have changed is not removed: %s", run_id, error)

    async def _ended(self, run_id: str) -> r.Run:
        run = await self._database(Store.run, run_id)
        active = self._active.get(run_id)
        if run.state not in RUN_ENDED:
            message = f"run {run_id!r} is {run.state.lower()}; stop it first: voidbox stop {run_id}"
            raise WrongState(message, reason="RUN_ACTIVE", run_id=run_id)
        if active is not None:
            await asyncio.wait((active.task,))
        return run

    async def artifacts(
        self, run_id: str, stage: str, after: tuple[str, str], limit: int
    ) -> list[r.Artifact]:
        """Up to `limit` artifacts of a run, after (stage, name)."""
        await self._database(Store.run, run_id)
        return await self._database(Store.artifacts, run_id, stage, after, limit)

    async def artifact(self, run_id: str, stage: str, name: str) -> r.Artifact | None:
        """One artifact; None if it is not there."""
        await self._database(Store.run, run_id)
        return await self._database(Store.artifact, run_id, stage, name)

    @property
    def active_runs(self) -> int:
        """How many runs have not ended."""
        return len(self._active)

    # Boxes that were left

    def _sweep(self) -> None:
        """Remove boxes of ours whose run has ended, as soon as the hypervisor answers."""
        self._sweep_again = True
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = self._run_in_background(self._sweep_boxes())

    async def _sweep_boxes(self) -> None:
        mine = {LABEL_INSTANCE: self._database.store.instance}
        while self._sweep_again:
            self._sweep_again = False
            try:
                for box_id, labels in await self.peers.list_boxes(mine):
                    if labels.get(LABEL_RUN) not in self._active:
                        log.warning("removing box %s, which was left", box_id)
                        await self.peers.delete_box(box_id)
            except VoidboxError as error:
                log.debug("boxes cannot be swept now: %s", error)
                self._sweep_again = True
                await asyncio.sleep(_SWEEP_SECONDS)


def stages_of(plan: Plan, status: RunStatus) -> tuple[r.Stage, ...]:
    """The stages of a plan as records."""
    return tuple(
        r.Stage(
            name=planned.name,
            position=planned.position,
            group=planned.group,
            depends_on=planned.depends_on,
            status=status.stages[planned.name],
        )
        for planned in plan.stages
    )


def _new_id(name: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    if not slug or not slug[0].isalpha():
        slug = f"run-{slug}".strip("-")
    return f"{slug}-{secrets.token_hex(3)}"
