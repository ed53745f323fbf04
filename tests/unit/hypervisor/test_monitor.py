"""A device counts as taken out when QEMU does not list it any more, or says that it has freed it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.common.errors import Unavailable
from services.hypervisor import qmp
from services.hypervisor.monitor import Monitor

GONE = qmp.Event(name="DEVICE_DELETED", data={"device": "vsock0"})


class Client:
    """A QMP session whose device is listed `looks` times; then `then` happens at each further look."""

    def __init__(self, monitor: Monitor, looks: int, then: Any) -> None:
        self.closed = asyncio.Event()
        self.asked: list[str] = []
        self._monitor, self._looks, self._then = monitor, looks, then

    async def execute(self, name: str, *_: object, **__: object) -> Any:
        self.asked.append(name)
        if name != "qom-list":
            return {}
        if self.asked.count(name) > self._looks:
            if isinstance(self._then, BaseException):
                raise self._then
            if isinstance(self._then, qmp.Event):
                self._monitor.on_event(self._then)
                self._then = None
            elif self._then == "unlisted":
                return [{"name": "other"}]
        return [{"name": "vsock0"}, {"name": "other"}]


async def detach(looks: int, then: Any) -> list[str]:
    monitor = Monitor()
    client = Client(monitor, looks, then)
    monitor.client = client  # type: ignore[assignment]
    async with asyncio.timeout(60):
        await monitor.detach_vsock(0)
    return client.asked


@pytest.mark.parametrize("then", ["unlisted", GONE])
@pytest.mark.parametrize("looks", [0, 3])
async def test_it_is_looked_at_until_it_has_gone(looks: int, then: Any) -> None:
    assert await detach(looks, then) == ["device_del", *["qom-list"] * (looks + 1)]


async def test_a_machine_that_ends_meanwhile_is_an_error() -> None:
    with pytest.raises(Unavailable):
        await detach(2, Unavailable("QEMU has ended", reason="QMP_CLOSED"))
