"""The exit codes of `voidbox`: what a script can tell apart. Documented in docs/cli.md."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.common.errors import VoidboxError
    from voidbox.orchestrator.v1 import orchestrator_pb2


class ExitCode(enum.IntEnum):
    """How a command ended. `exec` exits with its program's code instead, see `exec_code`."""

    OK = 0
    WORKLOAD = 1
    USAGE = 2
    INPUT = 3
    INFRASTRUCTURE = 4
    TIMEOUT = 5
    CANCELLED = 6
    EXHAUSTED = 7
    # Of `exec`, as docker and timeout(1) have them.
    EXEC_TIMEOUT = 124
    EXEC_FAILED = 125
    EXEC_NOT_EXECUTABLE = 126
    EXEC_NOT_FOUND = 127
    # 128 + the signal that ended us.
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143


def of_error(error: VoidboxError) -> ExitCode:
    """The code for a failed call."""
    from services.common import errors

    codes: tuple[tuple[ExitCode, tuple[type[VoidboxError], ...]], ...] = (
        (
            ExitCode.INPUT,
            (
                errors.InvalidInput,
                errors.NotFound,
                errors.AlreadyExists,
                errors.OffsetLost,
                errors.Unauthenticated,
                errors.Denied,
                errors.NotBuilt,
            ),
        ),
        (ExitCode.TIMEOUT, (errors.TimedOut,)),
        (ExitCode.CANCELLED, (errors.Cancelled,)),
        (ExitCode.EXHAUSTED, (errors.Exhausted,)),
    )
    for code, kinds in codes:
        if isinstance(error, kinds):
            return code
    return ExitCode.INFRASTRUCTURE


def of_run(run: orchestrator_pb2.Run) -> ExitCode:
    """The code for an ended run: 0 only if every stage succeeded."""
    from voidbox.orchestrator.v1 import orchestrator_pb2 as pb

    by_class = {
        pb.FAILURE_CLASS_WORKLOAD: ExitCode.WORKLOAD,
        pb.FAILURE_CLASS_INPUT: ExitCode.INPUT,
        pb.FAILURE_CLASS_INFRASTRUCTURE: ExitCode.INFRASTRUCTURE,
        pb.FAILURE_CLASS_TIMEOUT: ExitCode.TIMEOUT,
        pb.FAILURE_CLASS_CANCELLED: ExitCode.CANCELLED,
        pb.FAILURE_CLASS_EXHAUSTED: ExitCode.EXHAUSTED,
    }
    by_state = {
        pb.RUN_STATE_CANCELLED: ExitCode.CANCELLED,
        pb.RUN_STATE_TIMED_OUT: ExitCode.TIMEOUT,
        pb.RUN_STATE_FAILED: by_class.get(run.failure_class, ExitCode.WORKLOAD),
    }
    if run.state == pb.RUN_STATE_SUCCEEDED:
        bad = [stage for stage in run.stages if stage.state != pb.STAGE_STATE_SUCCEEDED]
        return by_class.get(bad[0].failure_class, ExitCode.WORKLOAD) if bad else ExitCode.OK
    return by_state.get(run.state, ExitCode.INFRASTRUCTURE)
