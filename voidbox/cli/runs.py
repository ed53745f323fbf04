"""`voidbox ps`, `logs`, `stop` and `rm`: the runs that are there."""

from __future__ import annotations

import asyncio
import time

from services.common.errors import NotFound
from voidbox.cli.connection import Context, Stack
from voidbox.cli.exitcode import ExitCode
from voidbox.cli.interrupts import until_interrupted
from voidbox.cli.progress import JsonDisplay
from voidbox.cli.report import stage_data, took
from voidbox.cli.screen import duration, safe, table
from voidbox.cli.view import ENDED, RUN_ENDED, RunView, kind_name, run_state, seconds_between
from voidbox.client import Client
from voidbox.orchestrator.v1 import orchestrator_pb2 as pb


def ps_command(context: Context) -> int:
    """List runs."""
    runs = asyncio.run(_list(context.stack(), active=not context.args.all))
    if context.screen.json:
        context.screen.data(
            [
                {
                    "run_id": run.id,
                    "name": run.name,
                    "kind": kind_name(run.kind),
                    "state": run_state(run.state),
                    "reason": run.reason,
                    "create_time": run.create_time.ToJsonString(),
                    "stages": [stage_data(stage) for stage in run.stages],
                }
                for run in runs
            ]
        )
        return ExitCode.OK
    print(runs_table(runs))
    return ExitCode.OK


def runs_table(runs: list[pb.Run]) -> str:
    """Runs for people."""
    now = time.time()
    rows = [
        (
            run.id,
            kind_name(run.kind),
            run_state(run.state),
            f"{sum(stage.state in ENDED for stage in run.stages)}/{len(run.stages)}",
            ",".join(sorted({s.box_id for s in run.stages if s.box_id and s.state not in ENDED})) or "-",
            duration(seconds_between(run.create_time.ToMicroseconds() / 1e6, now)) + " ago",
            duration(took(run.create_time, run.end_time)) if run.HasField("end_time") else "",
        )
        for run in runs
    ]
    return table(("RUN", "KIND", "STATE", "STAGES", "BOXES", "CREATED", "TOOK"), rows)


async def _list(stack: Stack, *, active: bool) -> list[pb.Run]:
    async with stack.connect() as client:
        return [run async for run in client.list_runs(active=active)]


async def run_with_stage(client: Client, run_id: str, stage: str | None) -> pb.Run:
    """The run, which has that stage, if one is named.

    Raises:
        NotFound: there is no such run, or it has no such stage.
    """
    run = await client.get_run(run_id)
    names = [one.name for one in run.stages]
    if stage is not None and stage not in names:
        raise NotFound(
            f"run {run.id} has no stage {stage!r}; it has: {', '.join(names)}",
            reason="STAGE_NOT_FOUND",
            run=run.id,
        )
    return run


def logs_command(context: Context) -> int:
    """Print the output of a run's programs, as text or all its events as JSON."""
    return asyncio.run(_logs(context, context.stack()))


async def _logs(context: Context, stack: Stack) -> int:
    args = context.args

    async def show() -> None:
        async with stack.connect() as client:
            run = await run_with_stage(client, args.run, args.stage)
            view = RunView(run)
            width = max((len(stage.name) for stage in run.stages), default=0)
            async for event in client.watch_run(run.id, args.from_offset, follow=args.follow):
                if args.stage is not None and event.stage != args.stage:
                    continue
                if context.screen.json:
                    JsonDisplay(context.screen).event(event)
                    continue
                for line in view.apply(event):
                    if line.kind in ("output", "agent"):
                        prefix = "" if args.stage else f"{line.stage.ljust(width)} | "
                        print(f"{prefix}{safe(line.text)}", flush=True)
            for stage in view.stages.values():
                for lines in stage.lines.values():
                    for text in lines.rest():
                        prefix = "" if args.stage else f"{stage.name.ljust(width)} | "
                        print(f"{prefix}{safe(text)}", flush=True)

    return await until_interrupted(show())


def stop_command(context: Context) -> int:
    """Cancel runs and wait until their boxes have ended."""
    runs = asyncio.run(_stop(context, context.stack(), context.args.runs))
    context.screen.result(
        "\n".join(f"{run.id} {run_state(run.state)}" for run in runs),
        [{"run_id": run.id, "state": run_state(run.state), "reason": run.reason} for run in runs],
    )
    return ExitCode.OK


async def _stop(context: Context, stack: Stack, ids: list[str]) -> list[pb.Run]:
    async with stack.connect() as client:
        # All are asked before any is waited for.
        for run_id in ids:
            await client.cancel_run(run_id, "stopped by its user")
        return [await client.wait_run(run_id) for run_id in ids]


def rm_command(context: Context) -> int:
    """Remove runs."""
    removed = asyncio.run(_remove(context.stack(), context.args.runs, force=context.args.force))
    context.screen.result("\n".join(removed), {"removed": removed})
    return ExitCode.OK


async def _remove(stack: Stack, ids: list[str], *, force: bool) -> list[str]:
    removed = []
    async with stack.connect() as client:
        for run_id in ids:
            try:
                if force and (await client.get_run(run_id)).state not in RUN_ENDED:
                    await client.cancel_run(run_id, "removed by its user")
                    await client.wait_run(run_id)
                await client.delete_run(run_id)
            except NotFound:
                if not force:
                    raise
            else:
                removed.append(run_id)
    return removed
