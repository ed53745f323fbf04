"""What a box's models cost is counted on the host, whatever the box does, and a budget holds.

Real curl against a scripted model; the numbers are the ones that the model says.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from services.hypervisor.egress.audit import AuditLog
from services.hypervisor.egress.budget import Budget
from services.hypervisor.egress.meter import Meter, Totals
from services.hypervisor.egress.prices import Prices
from services.hypervisor.egress.rules import Rule
from services.hypervisor.egress.secret import Secret
from tests.egress_host import Gateway, HostAuthority, Vault
from tests.egress_servers.llm_stub import ModelStub

KEY = "sk-ant-the-real-key-0123456789"
MODEL = "claude-sonnet-4-5"
Make = Callable[[Budget], Awaitable[tuple[Gateway, Meter, ModelStub]]]


@pytest_asyncio.fixture
async def metered(tmp_path: Path) -> AsyncIterator[Make]:
    """Makes a gateway with a budget in front of a model."""
    host = HostAuthority(tmp_path)
    async with AsyncExitStack() as stack:

        async def make(budget: Budget) -> tuple[Gateway, Meter, ModelStub]:
            stub = stack.enter_context(ModelStub(host.issue("api.test"), key=KEY))
            log = os.open(tmp_path / "audit.jsonl", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
            stack.callback(os.close, log)
            meter = Meter(["api.test"], budget, Prices.load(), AuditLog(log, "box"))
            vault = Vault({"llm": Secret(value=KEY)})
            gateway = Gateway(
                {"api.test": stub.port}, host, [], vault, tmp_path, watching=[meter], constraints=["api.test"]
            )
            gateway.interceptor._rules = (
                Rule(id="llm", hosts=("api.test",), ports=(gateway.port,), name="x-api-key", format="{}"),
            )
            return await stack.enter_async_context(gateway), meter, stub

        yield make


async def ask(box: Gateway, path: str = "/v1/messages", *, wait: bool = True, **fields: object) -> str:
    body = {"model": MODEL, "max_tokens": 10, "messages": [{"role": "user", "content": "hi"}], **fields}
    return await box.curl(path, "-d", json.dumps(body), "-w", "%{http_code}")


@pytest.mark.parametrize(
    ("path", "fields", "tokens", "usd"),
    [
        ("/v1/messages", {}, 150, (100 * 3 + 50 * 15) / 1e6),
        ("/v1/messages", {"stream": True}, 150, (100 * 3 + 50 * 15) / 1e6),
        ("/v1/chat/completions", {"model": "gpt-5-mini-2025"}, 150, (50 * 0.25 + 50 * 0.025 + 50 * 2) / 1e6),
        ("/v1/responses", {"model": "openai/gpt-4o-2024", "stream": True}, 150, (100 * 2.5 + 50 * 10) / 1e6),
    ],
)
async def test_tokens_and_cost_are_those_that_the_provider_says(
    metered: Make, path: str, fields: dict[str, Any], tokens: int, usd: float
) -> None:
    box, meter, _ = await metered(Budget())
    assert (await ask(box, path, **fields)).endswith("200")
    assert meter.totals.read()[:2] == (1, tokens)
    assert meter.totals.read()[2] == pytest.approx(usd)
    (event,) = [event for event in box.events() if event["kind"] == "meter"]
    assert event["detail"]["total_tokens"] == tokens
    assert "estimated" not in event["detail"]


async def test_a_stream_without_numbers_is_estimated_rather_too_high(metered: Make) -> None:
    box, meter, _ = await metered(Budget())
    await ask(box, "/v1/chat/completions", stream=True, model="gpt-4o")
    (event,) = [event for event in box.events() if event["kind"] == "meter"]
    assert event["detail"]["estimated"] is True
    assert meter.totals.read()[1] >= 4  # the words of the answer


async def test_a_stream_that_breaks_off_is_charged(metered: Make) -> None:
    box, meter, stub = await metered(Budget())
    stub.cut.set()
    body = json.dumps({"model": MODEL, "max_tokens": 10, "messages": [], "stream": True})
    await box.curl_bytes("/v1/messages", "-d", body, ok=False)
    _, tokens, _ = meter.totals.read()
    assert tokens >= 100


async def test_a_budget_of_tokens_is_passed_by_one_request_at_most_however_many_are_sent(
    metered: Make,
) -> None:
    box, meter, stub = await metered(Budget(tokens=400))
    answers = await asyncio.gather(*(ask(box) for _ in range(12)))
    statuses = sorted(answer[-3:] for answer in answers)
    # 150 each: the third one passes 400, none after it is sent.
    assert statuses == ["200"] * 3 + ["403"] * 9
    assert len(stub.calls("/messages")) == 3
    assert meter.totals.read()[1] == 450
    assert "the budget of 400 tokens is used up" in next(one for one in answers if one.endswith("403"))


async def test_requests_that_fit_a_budget_together_run_together(metered: Make) -> None:
    box, _, stub = await metered(Budget(tokens=100_000))
    import threading

    stub.hold = threading.Event()
    asked = [asyncio.create_task(ask(box)) for _ in range(3)]
    for _ in asked:
        assert await asyncio.to_thread(stub.arrived.acquire, timeout=60)
    stub.hold.set()
    assert [(await one)[-3:] for one in asked] == ["200"] * 3


@pytest.mark.parametrize("budget", [Budget(requests=1), Budget(usd=0.0005)])
async def test_budgets_of_requests_and_money_hold(metered: Make, budget: Budget) -> None:
    box, _, stub = await metered(budget)
    assert [(await ask(box))[-3:] for _ in range(3)] == ["200", "403", "403"]
    assert len(stub.calls("/messages")) == 1


async def test_a_model_without_a_price_is_refused_under_a_budget_of_money(metered: Make) -> None:
    box, _, stub = await metered(Budget(usd=1))
    text = await ask(box, model="unheard-of-1")
    assert text.endswith("403")
    assert "has no price" in text
    assert not stub.seen


async def test_a_paused_box_goes_on_when_its_budget_is_raised(metered: Make) -> None:
    box, meter, _ = await metered(Budget(requests=1, action="pause"))
    assert (await ask(box)).endswith("200")
    waiting = asyncio.create_task(ask(box))
    paused = asyncio.Event()
    record = meter._audit.record

    def watch(event: Any) -> None:
        record(event)
        if event.detail.get("action") == "pause":
            paused.set()

    meter._audit.record = watch  # type: ignore[method-assign]
    async with asyncio.timeout(60):
        await paused.wait()
        assert not waiting.done()
        meter.raise_budget(Budget(requests=2))
        assert (await waiting).endswith("200")


async def test_what_does_not_ask_a_model_is_free(metered: Make) -> None:
    box, meter, _ = await metered(Budget(requests=1))
    for _ in range(3):
        await box.curl("/v1/models")
    assert meter.totals.read() == (0, 0, 0.0)


def test_totals_are_shared_with_forks() -> None:
    totals = Totals()
    child = os.fork()
    if child == 0:
        totals.add(requests=1, tokens=2, usd=0.5)
        os._exit(0)
    os.waitpid(child, 0)
    assert totals.read() == (1, 2, 0.5)
