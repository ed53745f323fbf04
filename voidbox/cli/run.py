"""`voidbox run`: start a spec, follow it to its end, report."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys

from services.common.errors import Unavailable, VoidboxError
from voidbox.cli import report
from voidbox.cli.changes import tell_kept
from voidbox.cli.connection import Context, Stack
from voidbox.cli.exitcode import ExitCode, of_run
from voidbox.cli.interrupts import Interrupted, Interrupts
from voidbox.cli.progress import Display, display_for
from voidbox.cli.submit import Submission, read, spec_path, submit
from voidbox.cli.view import RUN_ENDED
from voidbox.client import Client
from voidbox.orchestrator.v1 import orchestrator_pb2 as pb
from voidbox.spec import Kind, client_env
from voidbox.spec.models import MountMode, Spec


def run_command(context: Context) -> int:
    """Run a spec; the exit code says how it ended."""
    submission = read(spec_path(context.args))
    # What is missing here is said before a stack is started.
    client_env(submission.spec, os.environ)
    return asyncio.run(_run(context, context.stack(), submission))


async def _run(context: Context, stack: Stack, submission: Submission) -> int:
    with Interrupts() as interrupts:
        async with stack.connect() as client:
            try:
                run = await interrupts.guard(
                    submit(client, submission, context.args, os.environ, context.screen)
                )
            except Interrupted:
                context.screen.note("interrupted before the run started")
                return interrupts.exit_code
            if context.args.detach:
                context.screen.note(f"follow it: voidbox logs -f {run.id}; stop it: voidbox stop {run.id}")
                context.screen.result(run.id, {"type": "created", "run_id": run.id})
                return ExitCode.OK
            with display_for(context.screen, run) as display:
                display.note(f"run {run.id}: {len(run.stages)} stage{'s' * (len(run.stages) != 1)}")
                if submission.spec.kind is Kind.SANDBOX:
                    display.note(f"run programs in it: voidbox exec --in {run.id} -- PROGRAM; end it: Ctrl-C")
                ended = await follow(client, run, display, interrupts)
            if not ended:
                return interrupts.exit_code
            # The stack may have been stopped, and the run with it; then what was heard is all there is.
            with contextlib.suppress(Unavailable):
                run = await client.get_run(run.id, seconds=1)
            if _has_overlays(submission.spec):
                await tell_kept(context, client, run.id)
    code = interrupts.exit_code if interrupts.count else int(of_run(run))
    if context.screen.json:
        context.screen.data(report.data(run, code))
        return code
    context.screen.note(report.human(run, context.screen))
    _print_output(run, context)
    return code


def _has_overlays(spec: Spec) -> bool:
    boxes = spec.pipeline.boxes if spec.pipeline else ()
    mounts = [*spec.sandbox.mounts, *(mount for box in boxes for mount in box.sandbox.mounts)]
    return any(mount.mode is MountMode.OVERLAY for mount in mounts)


async def follow(client: Client, run: pb.Run, display: Display, interrupts: Interrupts) -> bool:
    """Show a run until it has ended; returns False if the user did not want to wait for that.

    The first signal cancels the run, and its boxes' end is waited for; the second leaves.
    `run` is kept up to date.
    """

    async def watch() -> None:
        async for event in client.watch_run(run.id):
            display.event(event)
            learn(run, event)

    watcher = asyncio.create_task(watch(), name="watch")
    canceller: asyncio.Task[pb.Run] | None = None
    arrival = asyncio.create_task(interrupts.next(), name="signals")
    try:
        while not watcher.done():
            await asyncio.wait((watcher, arrival), return_when=asyncio.FIRST_COMPLETED)
            if not arrival.done():
                break
            if canceller is not None:
                display.note("leaving at once; the run's boxes are still being ended")
                return False
            display.note("cancelling the run and waiting for its boxes to end; again to leave at once")
            canceller = asyncio.create_task(client.cancel_run(run.id, "cancelled by its user"), name="cancel")
            arrival = asyncio.create_task(interrupts.next(), name="signals")
        await watcher
        return True
    finally:
        tasks = [task for task in (watcher, arrival, canceller) if task is not None]
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, VoidboxError) and not watcher.done():
                display.note(str(result))


def learn(run: pb.Run, event: pb.Event) -> None:
    """Bring `run` up to date with an event."""
    kind = event.WhichOneof("event")
    if kind == "run_state":
        run.state, run.reason = event.run_state.state, event.run_state.reason
        bad = [stage.failure_class for stage in run.stages if stage.failure_class]
        run.failure_class = bad[0] if bad else pb.FAILURE_CLASS_UNSPECIFIED
        if run.state in RUN_ENDED:
            run.end_time.CopyFrom(event.time)
    elif kind == "stage_state":
        for stage in run.stages:
            if stage.name == event.stage:
                stage.CopyFrom(event.stage_state.stage)


def _print_output(run: pb.Run, context: Context) -> None:
    if not run.output:
        return
    sys.stdout.buffer.write(run.output)
    if sys.stdout.isatty() and not run.output.endswith(b"\n"):
        sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()
    if run.output_truncated:
        context.screen.note("the output is cut after 64 KiB; the whole is an artifact of the run")
