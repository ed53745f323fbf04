"""States of runs and stages, and every move between them that there is."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class RunState(StrEnum):
    """Where a run is."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    CANCELLING = "CANCELLING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"


class StageState(StrEnum):
    """Where a stage is."""

    PENDING = "PENDING"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    RETRYING = "RETRYING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"
    SKIPPED = "SKIPPED"


class FailureClass(StrEnum):
    """What kind of thing went wrong."""

    NONE = "UNSPECIFIED"
    WORKLOAD = "WORKLOAD"
    INPUT = "INPUT"
    INFRASTRUCTURE = "INFRASTRUCTURE"
    TIMEOUT = "TIMEOUT"
    CANCELLED = "CANCELLED"
    EXHAUSTED = "EXHAUSTED"


RUN_MOVES: Final[Mapping[RunState, frozenset[RunState]]] = {
    RunState.PENDING: frozenset({RunState.RUNNING, RunState.CANCELLING}),
    RunState.RUNNING: frozenset(
        {RunState.CANCELLING, RunState.SUCCEEDED, RunState.FAILED, RunState.TIMED_OUT}
    ),
    RunState.CANCELLING: frozenset({RunState.CANCELLED, RunState.TIMED_OUT}),
    RunState.SUCCEEDED: frozenset(),
    RunState.FAILED: frozenset(),
    RunState.CANCELLED: frozenset(),
    RunState.TIMED_OUT: frozenset(),
}

STAGE_MOVES: Final[Mapping[StageState, frozenset[StageState]]] = {
    StageState.PENDING: frozenset({StageState.STARTING, StageState.SKIPPED, StageState.CANCELLED}),
    StageState.STARTING: frozenset(
        {
            StageState.RUNNING,
            StageState.RETRYING,
            StageState.FAILED,
            StageState.CANCELLED,
            StageState.TIMED_OUT,
        }
    ),
    StageState.RUNNING: frozenset(
        {
            StageState.RETRYING,
            StageState.SUCCEEDED,
            StageState.FAILED,
            StageState.CANCELLED,
            StageState.TIMED_OUT,
        }
    ),
    StageState.RETRYING: frozenset({StageState.STARTING, StageState.CANCELLED}),
    StageState.SUCCEEDED: frozenset(),
    StageState.FAILED: frozenset(),
    StageState.CANCELLED: frozenset(),
    StageState.TIMED_OUT: frozenset(),
    StageState.SKIPPED: frozenset(),
}

RUN_ENDED: Final = frozenset(state for state, moves in RUN_MOVES.items() if not moves)
STAGE_ENDED: Final = frozenset(state for state, moves in STAGE_MOVES.items() if not moves)
STAGE_ACTIVE: Final = frozenset({StageState.STARTING, StageState.RUNNING})
