"""Some of the kills of `make soak`, at points that are the same each time; see `tests.soak.faults`."""

from __future__ import annotations

import pytest

from tests.soak import faults

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

SEED = 20260101


async def test_a_kill_at_any_point_is_noticed_by_its_box_alone_and_leaves_nothing() -> None:
    outcome = await faults.measure(SEED, 3, print, pool=False)
    assert len(outcome.rows) == 3 * len(faults.VICTIMS)
