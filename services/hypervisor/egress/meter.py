"""Counts what a box's requests cost, and stops before a budget is passed by more than one request.

What a request may cost at most is set aside before it is sent: its body's length in tokens and the most
that it asks for. A request that does not fit beside those under way waits for them; one that begins when
anything is left may run over, alone. So it holds however many are sent at once.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

from services.common.egress.names import matches
from services.hypervisor.egress.audit import AuditLog, Event
from services.hypervisor.egress.budget import Budget
from services.hypervisor.egress.intercept import KEPT_BODY, collect, joined
from services.hypervisor.egress.message import Headers, HttpError, Request, get
from services.hypervisor.egress.prices import Prices
from services.hypervisor.egress.usage import Usage, UsageReader

# Requests that make a model work; others of the same host (lists of models, counts) cost nothing.
_METERED: Final = ("/messages", "/chat/completions", "/responses", "/completions", "/embeddings", "/api/chat",
                   "/api/generate")  # fmt: skip
_OUTPUT_LIMITS: Final = ("max_tokens", "max_output_tokens", "max_completion_tokens")
# What a model writes at most if a request does not say: the largest that any has.
_DEFAULT_OUTPUT: Final = 128_000


class Totals:
    """What a box has used. It lies in memory that forks share, so it survives its gateway."""

    _FORMAT: Final = struct.Struct("=qqd")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self._FORMAT.size)

    def read(self) -> tuple[int, int, float]:
        """Requests, tokens, USD."""
        requests, tokens, usd = self._FORMAT.unpack(self._memory[:])
        return requests, tokens, usd

    def add(self, requests: int = 0, tokens: int = 0, usd: float = 0.0) -> None:
        """Count more."""
        before = self.read()
        self._memory[:] = self._FORMAT.pack(before[0] + requests, before[1] + tokens, before[2] + usd)


class Meter:
    """Follows a box's exchanges with some hosts.

    Args:
        hosts: Names, or `*.` and a suffix.
        budget: What it may use.
        prices: What tokens cost.
        audit: Told of what was used.
        free: Hosts whose tokens cost nothing, such as the host's own models.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        budget: Budget,
        prices: Prices,
        audit: AuditLog,
        *,
        free: Sequence[str] = (),
        totals: Totals | None = None,
    ) -> None:
        self._hosts = tuple(hosts)
        self._free = tuple(free)
        self.budget = budget
        self._prices = prices
        self._audit = audit
        self.totals = totals or Totals()
        self._set_aside: dict[object, tuple[int, float]] = {}
        self._changed = asyncio.Event()

    def wants(self, host: str) -> bool:
        """Whether connections to `host` are metered."""
        return any(matches(pattern, host) for pattern in self._hosts)

    def raise_budget(self, budget: Budget) -> None:
        """Allow more (or less); requests that wait go on if it is enough."""
        self.budget = budget
        self._wake()

    async def begin(self, request: Request, host: str, port: int) -> _Metered | None:
        """Admit a request, when it fits.

        Raises:
            HttpError: the budget is used up, or cannot be kept for this request.
        """
        path = request.target.partition("?")[0].rstrip("/")
        if not self.wants(host) or not path.endswith(_METERED):
            return None
        asked: dict[str, Any] = {}
        size = 0
        if request.has_body:
            body, rest = await collect(request.body, KEPT_BODY)
            request.body = joined(body, rest)
            size = len(body)
            asked = _fields(body) if rest is None else {}
            if rest is not None and (self.budget.tokens or self.budget.usd):
                raise HttpError(413, "a request under a budget may have 8 MiB", reason="BUDGET")
        model = str(asked.get("model", ""))
        free = any(matches(pattern, host) for pattern in self._free)
        if self.budget.usd and not free and not self._prices.known(model):
            raise HttpError(
                403,
                f"model {model[:100]!r} has no price, so a budget in USD cannot be kept; give one",
                reason="NO_PRICE",
            )
        most = Usage(input=size, output=_most_output(asked))
        ticket = _Metered(self, host, model, free, size // 3)
        await self._admit(ticket, most.total, 0.0 if free else self._prices.cost(model, most))
        self.totals.add(requests=1)
        return ticket

    async def _admit(self, ticket: object, tokens: int, usd: float) -> None:
        told = False
        while True:
            spent, why = self._spent()
            if spent:
                if self.budget.action == "stop":
                    self._audit.record(Event(kind="meter", allowed=False, reason=why))
                    raise HttpError(403, why, reason="BUDGET")
                if not told:
                    told = True
                    paused = f"{why}; requests wait until it is raised"
                    self._audit.record(
                        Event(kind="meter", allowed=False, reason=paused, detail={"action": "pause"})
                    )
            elif self._fits(tokens, usd):
                self._set_aside[ticket] = (tokens, usd)
                return
            changed = self._changed
            await changed.wait()

    def _spent(self) -> tuple[bool, str]:
        requests, tokens, usd = self.totals.read()
        budget = self.budget
        if budget.requests and requests >= budget.requests:
            return True, f"the budget of {budget.requests} requests is used up"
        if budget.tokens and tokens >= budget.tokens:
            return True, f"the budget of {budget.tokens} tokens is used up ({tokens})"
        if budget.usd and usd >= budget.usd:
            return True, f"the budget of {budget.usd:g} USD is used up ({usd:.4f})"
        return False, ""

    def _fits(self, tokens: int, usd: float) -> bool:
        """Whether nothing is under way, or all of it and this are within the budget."""
        if not self._set_aside:
            return True
        _, used_tokens, used_usd = self.totals.read()
        tokens += used_tokens + sum(one for one, _ in self._set_aside.values())
        usd += used_usd + sum(one for _, one in self._set_aside.values())
        budget = self.budget
        return not (budget.tokens and tokens > budget.tokens) and not (budget.usd and usd > budget.usd)

    def settle(
        self, ticket: object, event: Callable[[tuple[int, int, float]], Event], tokens: int, usd: float
    ) -> None:
        """A request is over and has cost this."""
        self._set_aside.pop(ticket, None)
        self.totals.add(tokens=tokens, usd=usd)
        self._audit.record(event(self.totals.read()))
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def price(self, model: str, usage: Usage) -> float:
        """USD."""
        return self._prices.cost(model, usage)


class _Metered:
    """One exchange."""

    def __init__(self, meter: Meter, host: str, model: str, free: bool, estimate: int) -> None:
        self._meter = meter
        self._host = host
        self._model = model
        self._free = free
        self._estimate = estimate
        self._status = 0
        self._reader: UsageReader | None = None

    def response(self, status: int, headers: Headers) -> None:
        """The response's head."""
        self._status = status
        self._reader = UsageReader(get(headers, b"content-type") or b"")

    def data(self, chunk: bytes) -> None:
        """Some of its body."""
        if self._reader is not None and self._status == 101:
            self._reader.message(chunk)
        elif self._reader is not None:
            self._reader.feed(chunk)

    def end(self, complete: bool) -> None:
        """It is over: count it."""
        usage, estimated, cost = Usage(), False, None
        reader = self._reader
        if reader is not None and (self._status == 101 or 200 <= self._status < 300):
            reader.close()
            said, cost = reader.usage(), reader.cost
            usage = said or Usage()
            if (not complete and not reader.final) or said is None:
                # A client that hangs up before the numbers come does not get the tokens for nothing.
                estimated = True
                usage = Usage(
                    input=usage.input or (0 if usage.total else self._estimate),
                    output=max(usage.output, reader.estimate_output()),
                    cache_read=usage.cache_read,
                    cache_write=usage.cache_write,
                )
        model = (reader.model if reader is not None else "") or self._model
        usd = (
            0.0 if self._free else max(self._meter.price(model, usage), self._meter.price(self._model, usage))
        )
        if cost is not None and not self._free:
            usd = cost

        def event(totals: tuple[int, int, float]) -> Event:
            return Event(
                kind="meter",
                name=self._host,
                detail={
                    "model": model,
                    "status": self._status,
                    "input_tokens": usage.input,
                    "output_tokens": usage.output,
                    "cache_read_tokens": usage.cache_read,
                    "cache_write_tokens": usage.cache_write,
                    "usd": round(usd, 6),
                    **({"estimated": True} if estimated else {}),
                    "total_requests": totals[0],
                    "total_tokens": totals[1],
                    "total_usd": round(totals[2], 6),
                },
            )

        self._meter.settle(self, event, usage.total, usd)


def _fields(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _most_output(asked: dict[str, Any]) -> int:
    given = [asked[key] for key in _OUTPUT_LIMITS if isinstance(asked.get(key), int)]
    return max(0, *given) if given else _DEFAULT_OUTPUT
