"""One attempt of one stage: image, box, inputs, program, outputs; and its outcome.

Every step can be repeated: ids are determined by run, stage and attempt, so after a
restart the same calls find what was made before.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from services.common.errors import (
    Denied,
    Exhausted,
    InvalidInput,
    NotBuilt,
    NotFound,
    TimedOut,
    VoidboxError,
)
from services.orchestrator import agents
from services.orchestrator import records as r
from services.orchestrator.carry import (
    MAX_PROMPT_BYTES,
    Carried,
    compose_prompt,
    input_json,
    text_for_prompt,
)
from services.orchestrator.context import ERRORS, LABEL_INSTANCE, RESULT, RunContext
from services.orchestrator.egress_log import EgressLog
from services.orchestrator.engine import Outcome
from services.orchestrator.execution import (
    KILLED_ABANDONED,
    KILLED_BY_TIMEOUT,
    KILLED_CANCELLED,
    KILLED_OUT_OF_MEMORY,
    Execution,
    Exit,
    Program,
    ProgramNotFound,
)
from services.orchestrator.peers import BoxInfo, GuestImage, GuestPeer, RootDisk, lost
from services.orchestrator.plan import (
    AgentWork,
    ClientFile,
    Machine,
    PlannedStage,
    ProgramWork,
    Resident,
    StageOutput,
)
from services.orchestrator.spool import Spool
from services.orchestrator.states import FailureClass, StageState
from services.orchestrator.stream_json import StreamJson

_T = TypeVar("_T")

# A box that is being stopped; longer, and it is left to be swept.
_KILL_SECONDS: Final = 10.0
# Between two questions whether the host has room again, at most.
_ROOM_SECONDS: Final = 2.0
# The hypervisor's reason when boxes have all the memory.
NO_MEMORY: Final = "HOST_MEMORY"


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A box that runs."""

    id: str
    boot_id: str
    kernel_release: str


async def make_box(
    context: RunContext, stage: str, box_id: str, machine: Machine, phase: Callable[[str], Any]
) -> Box:
    """Find or start the box of a stage, or of the run if `stage` is empty."""
    async with phase("image"):
        disk = image = None
        if not machine.snapshot:  # which has all of that in it
            image = await context.peers.resolve_guest_image(machine)
        if machine.image:

            async def tell(progress: r.Progress) -> None:
                await context.log(stage, progress)

            disk = await context.peers.build_disk(machine, tell)
    async with phase("boot"):
        await context.log(stage, r.Progress(subject=box_id, action="boot"))
        info = await context.peers.find_box(box_id)
        if info is None or not (info.running or info.ended):
            info = await _create(context, stage, box_id, machine, image, disk)
        if not info.running:
            raise lost(box_id, info)
        release = await context.peers.guest(box_id).kernel_release()
    return Box(id=box_id, boot_id=info.boot_id, kernel_release=release)


async def _create(
    context: RunContext,
    stage: str,
    box_id: str,
    machine: Machine,
    image: GuestImage | None,
    disk: RootDisk | None,
) -> BoxInfo:
    """Start a box; while other boxes of ours have the host's memory, wait for them to end."""
    delay, told = 0.25, False
    while True:
        try:
            return await context.peers.create_box(box_id, machine, image, disk, context.labels(stage))
        except Exhausted as error:
            mine = {LABEL_INSTANCE: context.instance}
            others = [other for other, _ in await context.peers.list_boxes(mine) if other != box_id]
            if error.reason != NO_MEMORY or not others:
                raise
            if not told:
                told = True
                text = f"waiting for another box to end: {error.message}"
                await context.log(stage, r.Notice(text=text, warning=True))
        await asyncio.sleep(delay)
        delay = min(2 * delay, _ROOM_SECONDS)


async def put_inputs(context: RunContext, guest: GuestPeer, planned: PlannedStage) -> None:
    """Put the files in the box that the stage's `inputs` name, and make its output directories."""
    for entry in planned.inputs:
        if isinstance(entry, ClientFile):
            file = context.uploaded(entry.path)
            source = context.blobs.find(file.digest.value)
            await (guest.write_tree if file.tree else guest.write_file)(entry.guest, source)
        else:
            assert isinstance(entry, StageOutput)
            await guest.write_tree(entry.guest, await context.artifact(entry.stage, entry.name))
    for output in planned.outputs:
        directory = output.guest.rpartition("/")[0] if output.is_file else output.guest
        if directory:
            await guest.make_directory(directory)


class Attempt:
    """One attempt.

    Args:
        context: The run.
        planned: The stage.
        number: Which attempt, from 1.
        errors: Why stages that this one carries data from have no result.
        shared: Gives the box that all stages share; None if the stage has its own.
        running: Commits that the program starts now.
    """

    def __init__(
        self,
        context: RunContext,
        planned: PlannedStage,
        number: int,
        *,
        errors: dict[str, str],
        shared: Callable[[], Awaitable[Box]] | None,
        running: Callable[[], Awaitable[None]],
    ) -> None:
        self._context = context
        self._planned = planned
        self._number = number
        self._errors = errors
        self._shared = shared
        self._running = running
        self._phases: list[tuple[str, float]] = []
        self._agent = StreamJson() if isinstance(planned.work, AgentWork) else None
        self._spool = Spool(context, planned, number, self._agent)
        self._exec_id = f"s{planned.position}.{number}"
        self._box_id = context.facts[planned.name].box_id if shared else context.box_id(planned.name, number)

    async def run(self, *, resume: bool) -> Outcome:
        """Run the stage to its end.

        Args:
            resume: The program may run already, as it was stored that it starts.
        """
        try:
            return await self._run(resume)
        except VoidboxError as error:
            return outcome_of(error, can_retry=self._shared is None)
        finally:
            self._spool.close()
            with contextlib.suppress(VoidboxError):
                await self._context.learn(
                    self._planned,
                    phases=tuple(self._phases),
                    **({"usage": self._agent.result.usage} if self._agent and self._agent.result else {}),
                )

    async def _run(self, resume: bool) -> Outcome:
        context, planned = self._context, self._planned
        if resume:
            self._phases += context.facts[planned.name].phases
            box = await self._find_box()
        elif self._shared is not None:
            async with self._phase("boot"):
                box = await self._shared()
        else:
            await context.learn(
                planned,
                box_id=self._box_id,
                exec_id="",
                boot_id="",
                kernel_release="",
                phases=(),
                egress_offset=0,
            )
            box = await make_box(context, planned.name, self._box_id, planned.machine, self._phase)
        self._box_id = box.id
        has_program = not isinstance(planned.work, Resident)
        await context.learn(
            planned,
            box_id=box.id,
            boot_id=box.boot_id,
            kernel_release=box.kernel_release,
            exec_id=self._exec_id if has_program else "",
        )
        return await self._while_alive(box.id, self._in_box(resume))

    async def _find_box(self) -> Box:
        facts = self._context.facts[self._planned.name]
        self._box_id = facts.box_id
        info = await self._context.peers.find_box(facts.box_id)
        if info is None or not info.running:
            raise lost(facts.box_id, info)
        return Box(id=facts.box_id, boot_id=facts.boot_id, kernel_release=facts.kernel_release)

    async def _while_alive(self, box_id: str, work: Coroutine[Any, Any, _T]) -> _T:
        """`work`, ended when the box dies; then the error says what died, not what that led to."""
        if self._planned.machine.egress is not None:
            async with EgressLog(self._context, self._planned, box_id):
                return await self._unless_lost(box_id, work)
        return await self._unless_lost(box_id, work)

    async def _unless_lost(self, box_id: str, work: Coroutine[Any, Any, _T]) -> _T:
        peers = self._context.peers
        watcher = asyncio.create_task(peers.watch_box(box_id))
        worker = asyncio.create_task(work)
        try:
            await asyncio.wait((watcher, worker), return_when=asyncio.FIRST_COMPLETED)
            if worker.done() and (
                worker.exception() is None or not isinstance(worker.exception(), VoidboxError)
            ):
                return worker.result()
            if watcher.done():
                raise watcher.result()
            info = await peers.find_box(box_id)
            if info is None or info.ended:
                raise lost(box_id, info) from worker.exception()
            return worker.result()
        finally:
            for task in (watcher, worker):
                task.cancel()
            await asyncio.gather(watcher, worker, return_exceptions=True)

    async def _in_box(self, resume: bool) -> Outcome:
        context, planned = self._context, self._planned
        guest = context.peers.guest(self._box_id)
        carried = await context.carried(planned, self._errors)
        directory = agents.own_directory((*planned.machine.mounts, *planned.machine.volumes))
        if not resume:
            async with self._phase("inputs"):
                if self._shared is None:
                    await put_inputs(context, guest, planned)
                    await self._put_carried(guest, carried, directory)
                await self._put_skills(guest, directory)
            await context.learn(planned, phases=tuple(self._phases))
            await self._running()
        if isinstance(planned.work, Resident):
            await asyncio.Event().wait()
        offsets = await self._spool.open(resume=resume)
        async with self._phase("program"):
            program = await self._program(carried, directory)
            execution = Execution(guest, program, self._spool.store, offsets, begun=resume)
            end = await execution.run()
        if self._agent is not None:
            entries = self._agent.finish()
            if entries:
                await context.log(planned.name, *entries)
        outcome = self._judge(end)
        async with self._phase("outputs"):
            return await self._collect(guest, outcome)

    async def _put_carried(self, guest: GuestPeer, carried: list[Carried], directory: str) -> None:
        if carried:
            blobs = self._context.blobs
            digest = await asyncio.to_thread(lambda: blobs.put(input_json(carried)))
            await guest.write_file(f"{directory}/input.json", blobs.find(digest.value))

    async def _put_skills(self, guest: GuestPeer, directory: str) -> None:
        if not isinstance(self._planned.work, AgentWork):
            return
        blobs = self._context.blobs
        for skill in agents.skill_files(self._planned.work, directory):
            if skill.text:
                digest = await asyncio.to_thread(blobs.put, skill.text.encode())
                await guest.write_file(f"{skill.guest}/SKILL.md", blobs.find(digest.value))
                continue
            file = self._context.uploaded(skill.path)
            source = blobs.find(file.digest.value)
            if file.tree:
                await guest.write_tree(skill.guest, source)
            else:
                await guest.write_file(f"{skill.guest}/SKILL.md", source)

    async def _program(self, carried: list[Carried], directory: str) -> Program:
        planned, context = self._planned, self._context
        if isinstance(planned.work, AgentWork):
            text = await asyncio.to_thread(text_for_prompt, carried) if carried else ""
            prompt = compose_prompt(planned.work.prompt, text, planned.output_file, f"{directory}/input.json")
            if len(prompt.encode()) > MAX_PROMPT_BYTES:
                message = f"the prompt is longer than {MAX_PROMPT_BYTES} bytes; move text into an input file"
                raise InvalidInput(message, reason="PROMPT_TOO_LONG", stage=planned.name)
            started = agents.command(planned.work, prompt)
            return Program(
                exec_id=self._exec_id,
                program=started.program,
                args=started.args,
                env=started.env,
                timeout=planned.timeout,
            )
        assert isinstance(planned.work, ProgramWork)
        stdin = None
        if planned.stdin_from:
            stdin = await context.artifact(planned.stdin_from, RESULT)
        elif len(carried) == 1:
            stdin = carried[0].path
        elif carried:
            stdin = context.blobs.find(
                (await asyncio.to_thread(lambda: context.blobs.put(input_json(carried)))).value
            )
        return Program(
            exec_id=self._exec_id,
            program=planned.work.program,
            args=planned.work.args,
            stdin=stdin,
            timeout=planned.timeout,
        )

    def _judge(self, end: Exit) -> Outcome:
        """How the program ended, before its outputs are looked at."""
        planned = self._planned
        if end.kill_reason == KILLED_BY_TIMEOUT:
            reason = f"its time limit of {planned.timeout:g} s has passed"
            return Outcome(state=StageState.TIMED_OUT, reason=reason, failure_class=FailureClass.TIMEOUT)
        if end.kill_reason == KILLED_OUT_OF_MEMORY:
            machine = planned.machine
            if machine.limits.memory_mb and machine.limits.memory_mb < machine.memory_mib:
                where, size = "limit of memory", machine.limits.memory_mb
                cure = "raise sandbox.limits.memory_mb"
            else:
                where, size, cure = "memory", machine.memory_mib, "raise sandbox.memory_mb"
            reason = f"the box's {where} of {size} MiB is used up; {cure}"
            return Outcome(state=StageState.FAILED, reason=reason, failure_class=FailureClass.EXHAUSTED)
        if end.kill_reason in (KILLED_CANCELLED, KILLED_ABANDONED):
            reason = "its program was stopped from outside the run"
            return Outcome(state=StageState.FAILED, reason=reason, failure_class=FailureClass.CANCELLED)
        tail = self._spool.tail()
        after = f": {tail}" if tail else ""
        if end.signal:
            return self._failed(f"killed by signal {end.signal}{after}")
        if self._agent is not None:
            return self._judge_agent(self._agent, end, after)
        if end.exit_code != 0:
            return self._failed(f"exit code {end.exit_code}{after}", end.exit_code)
        return Outcome(state=StageState.SUCCEEDED, exit_code=0)

    def _judge_agent(self, agent: StreamJson, end: Exit, after: str) -> Outcome:
        if agent.messages == 0:
            reason = f"the agent printed no stream-json messages (exit code {end.exit_code}){after}"
            return self._failed(reason, end.exit_code)
        if agent.result is None:
            return self._failed(
                f"the agent ended without a result (exit code {end.exit_code}){after}", end.exit_code
            )
        if agent.result.error:
            return self._failed(f"the agent reported an error: {agent.result.error[:1000]}", end.exit_code)
        if end.exit_code != 0:
            return self._failed(f"the agent's exit code is {end.exit_code}{after}", end.exit_code)
        return Outcome(state=StageState.SUCCEEDED, exit_code=0)

    @staticmethod
    def _failed(reason: str, exit_code: int | None = None) -> Outcome:
        return Outcome(
            state=StageState.FAILED, reason=reason, failure_class=FailureClass.WORKLOAD, exit_code=exit_code
        )

    async def _collect(self, guest: GuestPeer, outcome: Outcome) -> Outcome:
        """Store what the stage has produced; of a failed one, what it printed."""
        context, planned = self._context, self._planned
        await self._keep_stream(r.STDERR, ERRORS)
        if outcome.state is not StageState.SUCCEEDED:
            await self._keep_stream(r.STDOUT, RESULT)
            return outcome
        for output in planned.outputs:
            with context.blobs.writer(context.limits.artifact_bytes) as writer:
                try:
                    await guest.read_tree(output.guest, writer, context.limits.artifact_bytes)
                except NotFound:
                    reason = f"its output {output.name!r} is missing: there is no {output.guest} in the box"
                    return self._failed(reason, outcome.exit_code)
                digest = await asyncio.to_thread(writer.commit)
            await context.keep(planned.name, output.name, digest, tree=True)
        if not await self._keep_output_file(guest):
            if self._agent is not None and self._agent.result is not None:
                digest = await asyncio.to_thread(context.blobs.put, self._agent.result.text.encode())
                await context.keep(planned.name, RESULT, digest)
            else:
                await self._keep_stream(r.STDOUT, RESULT, always=True)
        return outcome

    async def _keep_output_file(self, guest: GuestPeer) -> bool:
        context, planned = self._context, self._planned
        if not planned.output_file:
            return False
        with context.blobs.writer(context.limits.stream_bytes) as writer:
            try:
                await guest.read_file(planned.output_file, writer)
            except NotFound:
                return False
            digest = await asyncio.to_thread(writer.commit)
        await context.keep(planned.name, RESULT, digest)
        return True

    async def _keep_stream(self, stream: int, name: str, *, always: bool = False) -> None:
        path = self._spool.path(stream)
        if always or path.stat().st_size:
            limit = self._context.limits.stream_bytes
            digest = await asyncio.to_thread(self._context.blobs.put_file, path, limit)
            await self._context.keep(self._planned.name, name, digest)

    @contextlib.asynccontextmanager
    async def _phase(self, name: str) -> AsyncIterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self._phases.append((name, round(time.monotonic() - begin, 6)))

    async def close(self) -> None:
        """Leave nothing of this attempt in any box.

        Raises:
            VoidboxError: the hypervisor could not be reached; the box may be left.
        """
        try:
            if self._shared is None:
                await self._context.peers.delete_box(self._box_id)
            elif self._box_id:
                guest = self._context.peers.guest(self._box_id)
                with contextlib.suppress(VoidboxError, TimeoutError):
                    async with asyncio.timeout(_KILL_SECONDS):
                        await guest.kill(self._exec_id)
                        await guest.forget(self._exec_id)
        finally:
            self._spool.remove()


def outcome_of(error: VoidboxError, *, can_retry: bool) -> Outcome:
    """What an error of the machinery makes of a stage."""
    if isinstance(error, (InvalidInput, NotFound, NotBuilt, Denied)):
        failure, again = FailureClass.INPUT, False
    elif isinstance(error, Exhausted):
        failure, again = FailureClass.EXHAUSTED, can_retry
    else:
        failure, again = FailureClass.INFRASTRUCTURE, can_retry
    if isinstance(error, TimedOut) and error.reason == "PROGRAM_TIMEOUT":
        return Outcome(state=StageState.TIMED_OUT, reason=error.message, failure_class=FailureClass.TIMEOUT)
    again = again and not isinstance(error, ProgramNotFound)
    return Outcome(state=StageState.FAILED, reason=error.message, failure_class=failure, retry=again)
