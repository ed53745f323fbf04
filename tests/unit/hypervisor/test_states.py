"""The table of a box's states."""

from __future__ import annotations

import pytest

from services.common.errors import Internal
from services.hypervisor.states import TRANSITIONS, BoxState, move


def test_every_state_has_a_row() -> None:
    assert set(TRANSITIONS) == set(BoxState)


@pytest.mark.parametrize("state", list(BoxState))
def test_what_lives_can_fail_and_what_has_ended_stays(state: BoxState) -> None:
    assert (BoxState.FAILED in TRANSITIONS[state]) == state.alive
    assert bool(TRANSITIONS[state]) == state.alive


def test_only_moves_of_the_table_are_made() -> None:
    for present in BoxState:
        for new in BoxState:
            if new in TRANSITIONS[present]:
                assert move(present, new) is new
            else:
                with pytest.raises(Internal):
                    move(present, new)
