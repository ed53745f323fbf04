"""What counts as use of a box: an open call, and processor time. Time passes by the limits themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from services.hypervisor.activity import Activity

SHORT = 0.01


def idle() -> float:
    """A machine that does nothing."""
    return 0.0


async def expiry(activity: Activity) -> None:
    """Return when the activity's next limit has passed."""
    passed = asyncio.Event()
    activity.limit(SHORT, passed.set)
    activity.rest()
    await passed.wait()


async def test_an_idle_box_is_told_of_once_per_rest() -> None:
    told: list[int] = []
    activity = Activity(idle)
    activity.limit(SHORT, lambda: told.append(1))
    await expiry(activity)
    assert told == [1]
    await expiry(Activity(idle))
    assert told == [1]


async def test_a_box_with_an_open_call_is_not_idle_until_the_last_has_ended() -> None:
    told = asyncio.Event()
    activity = Activity(idle)
    activity.begin()
    activity.begin()
    activity.limit(SHORT, told.set)
    activity.rest()
    activity.end()
    for _ in range(3):
        await expiry(Activity(idle))
    assert not told.is_set()
    activity.end()
    await told.wait()


async def test_a_call_that_comes_in_time_keeps_the_box_from_being_idle() -> None:
    told: list[int] = []
    activity = Activity(idle)
    activity.limit(SHORT, lambda: told.append(1))
    activity.rest()
    activity.begin()
    for _ in range(3):
        await expiry(Activity(idle))
    assert told == []


async def test_a_machine_that_computes_is_not_idle_until_it_has_ceased() -> None:
    used: Iterator[float] = iter([0.0, 5.0, 9.0, 9.0])
    seen: list[float] = []
    told = asyncio.Event()

    def measure() -> float:
        seen.append(next(used))
        return seen[-1]

    activity = Activity(measure)
    activity.limit(SHORT, told.set)
    activity.rest()
    await told.wait()
    # Begin and end of a window that computes; of the next one, whose begin is measured anew; it rests then.
    assert seen == [0.0, 5.0, 9.0, 9.0]


async def test_no_limit_and_cleared_limits_never_pass() -> None:
    told: list[int] = []
    activity = Activity(idle)
    activity.limit(0, lambda: told.append(1))
    activity.limit(SHORT, lambda: told.append(2))
    activity.rest()
    activity.clear()
    for _ in range(3):
        await expiry(Activity(idle))
    assert told == []
