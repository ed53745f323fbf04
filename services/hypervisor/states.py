"""The stations of a box's life and the moves between them.

STARTING → RUNNING ⇄ PAUSED → STOPPING → STOPPED, or FAILED from any that lives.
"""

from __future__ import annotations

import enum

from services.common.errors import Internal


class BoxState(enum.Enum):
    """Where a box is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def alive(self) -> bool:
        """Whether the box has processes."""
        return self not in _ENDED


_ENDED = frozenset({BoxState.STOPPED, BoxState.FAILED})

TRANSITIONS: dict[BoxState, frozenset[BoxState]] = {
    BoxState.STARTING: frozenset({BoxState.RUNNING, BoxState.STOPPING, BoxState.FAILED}),
    BoxState.RUNNING: frozenset({BoxState.PAUSED, BoxState.STOPPING, BoxState.STOPPED, BoxState.FAILED}),
    BoxState.PAUSED: frozenset({BoxState.RUNNING, BoxState.STOPPING, BoxState.STOPPED, BoxState.FAILED}),
    BoxState.STOPPING: frozenset({BoxState.STOPPED, BoxState.FAILED}),
    BoxState.STOPPED: frozenset(),
    BoxState.FAILED: frozenset(),
}
"""RUNNING or PAUSED → STOPPED directly is a guest that was asked to power off through its own agent."""


def move(present: BoxState, new: BoxState) -> BoxState:
    """The state after a move from `present` to `new`.

    Raises:
        Internal: the table has no such move; the state is unchanged.
    """
    if new not in TRANSITIONS[present]:
        raise Internal(f"a box cannot go from {present.value} to {new.value}", reason="BAD_TRANSITION")
    return new
