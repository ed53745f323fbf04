"""One hypervisor and one box for all tests that do not harm them; what tells why a test failed is printed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterator

import pytest

from tests.vm import Client, HypervisorProcess

SHARED_BOX = "shared"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what the hypervisors that a failed test was given have to say: they outlive it."""
    report = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, HypervisorProcess):
                report.sections.append((f"evidence of {name}", value.evidence()))
    return report


@pytest.fixture(scope="session")
def hypervisor() -> Iterator[HypervisorProcess]:
    """The service, for the whole session; what tests make on it they remove."""
    with HypervisorProcess() as service:
        yield service


@pytest.fixture(scope="session")
def shared_box(hypervisor: HypervisorProcess) -> str:
    """The id of a box that runs for the whole session."""

    async def create() -> None:
        async with hypervisor.connected() as client:
            await client.create(SHARED_BOX)

    asyncio.run(create())
    return SHARED_BOX


@pytest.fixture
async def client(hypervisor: HypervisorProcess) -> AsyncIterator[Client]:
    """A client of the session's hypervisor."""
    async with hypervisor.connected() as connected:
        yield connected
