"""What `run` prints at the end."""

from __future__ import annotations

from typing import Any

from google.protobuf import timestamp_pb2
from google.protobuf.json_format import MessageToDict

from voidbox.cli.screen import Screen, duration, safe, table
from voidbox.cli.view import failure_class, kind_name, run_state, seconds_between, stage_state
from voidbox.orchestrator.v1 import orchestrator_pb2 as pb

PHASES = ("image", "boot", "inputs", "program", "outputs")
BOOT_ID_DIGITS = 8


def took(start: timestamp_pb2.Timestamp, end: timestamp_pb2.Timestamp) -> float:
    """Seconds between two moments."""
    return seconds_between(start.ToMicroseconds() / 1e6, end.ToMicroseconds() / 1e6)


def human(run: pb.Run, screen: Screen) -> str:
    """Table of the stages, totals, and why the run failed."""
    extra = [
        phase for phase in dict.fromkeys(p.name for s in run.stages for p in s.phases) if phase not in PHASES
    ]
    phases = [*PHASES, *extra]
    rows = []
    for stage in run.stages:
        times = {phase.name: phase.duration.ToMicroseconds() / 1e6 for phase in stage.phases}
        started = stage.HasField("start_time") and stage.HasField("end_time")
        rows.append(
            (
                stage.name,
                stage_state(stage.state),
                duration(took(stage.start_time, stage.end_time)) if started else "",
                *(f"{times[phase]:.1f}" if phase in times else "" for phase in phases),
                stage.exit_code if stage.HasField("exit_code") else "",
                stage.boot_id[:BOOT_ID_DIGITS],
                stage.kernel_release,
            )
        )
    header = ("stage", "state", "time", *phases, "exit", "boot id", "kernel")
    lines = ["", table(header, rows, right=range(2, 4 + len(phases))), ""]
    color = "green" if run.state == pb.RUN_STATE_SUCCEEDED else "red"
    boxes = len({stage.box_id for stage in run.stages if stage.box_id})
    total = f" in {duration(took(run.create_time, run.end_time))}" if run.HasField("end_time") else ""
    lines.append(
        f"run {run.id} ({kind_name(run.kind)}) {screen.paint(run_state(run.state), color)}{total}, "
        f"{len(run.stages)} stage{'s' * (len(run.stages) != 1)}, {boxes} box{'es' * (boxes != 1)}"
    )
    usage = run.usage
    if usage.turns or usage.input_tokens or usage.output_tokens:
        lines.append(
            f"tokens: {usage.input_tokens} in / {usage.output_tokens} out, {usage.tool_calls} tool calls, "
            f"cost: ${usage.cost_usd:.6f}"
        )
    lines += [
        f"{stage.name}: {stage_state(stage.state)}: {safe(stage.reason)}"
        for stage in run.stages
        if stage.reason and stage.state not in (pb.STAGE_STATE_SUCCEEDED, pb.STAGE_STATE_SKIPPED)
    ]
    if run.reason and run.state != pb.RUN_STATE_SUCCEEDED:
        kind = failure_class(run.failure_class)
        lines.append(f"{screen.paint('error:', 'red')} {safe(run.reason)}{f' ({kind})' if kind else ''}")
    return "\n".join(lines)


def data(run: pb.Run, exit_code: int) -> dict[str, Any]:
    """The result for programs; the first keys are those of other versions' reports too."""
    return {
        "type": "result",
        "name": run.name,
        "kind": kind_name(run.kind),
        "success": exit_code == 0,
        "output": run.output.decode(errors="replace"),
        "output_truncated": run.output_truncated,
        "stages": len(run.stages),
        "total_cost_usd": run.usage.cost_usd,
        "input_tokens": run.usage.input_tokens,
        "output_tokens": run.usage.output_tokens,
        "run_id": run.id,
        "state": run_state(run.state),
        "reason": run.reason,
        "failure_class": failure_class(run.failure_class),
        "seconds": took(run.create_time, run.end_time) if run.HasField("end_time") else None,
        "exit_code": exit_code,
        "stage_results": [stage_data(stage) for stage in run.stages],
    }


def stage_data(stage: pb.Stage) -> dict[str, Any]:
    """A stage for programs."""
    return {
        "name": stage.name,
        "state": stage_state(stage.state),
        "reason": stage.reason,
        "failure_class": failure_class(stage.failure_class),
        "box_id": stage.box_id,
        "boot_id": stage.boot_id,
        "kernel_release": stage.kernel_release,
        "attempts": stage.attempts,
        "exit_code": stage.exit_code if stage.HasField("exit_code") else None,
        "seconds": took(stage.start_time, stage.end_time) if stage.HasField("end_time") else None,
        "phases": {phase.name: phase.duration.ToMicroseconds() / 1e6 for phase in stage.phases},
        "usage": MessageToDict(stage.usage, preserving_proto_field_name=True),
    }
