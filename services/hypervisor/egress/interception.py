"""What is intercepted of a box, as plain data, and who does it: nobody if the data is empty."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.hypervisor.egress.audit import AuditLog
from services.hypervisor.egress.budget import Budget
from services.hypervisor.egress.flow import Interceptor
from services.hypervisor.egress.rules import Placement, Rule, TokenEndpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Interception:
    """What is intercepted of a box, and how.

    Attributes:
        authority: `BoxAuthority.dump`.
        rules: Its credentials.
        endpoints: Token endpoints that are answered here.
        token: What proves to the broker which box this is.
        broker_fd: Connected to the broker; -1 if there are no credentials.
        metered: Hosts whose models are counted.
        free: Those of them that cost nothing.
        budget: What may be used.
        prices: As `Prices.to_json` gives it; empty: the table that comes with voidbox.
        record_fd: Where exchanges are recorded; -1: nowhere.
        replay_fd: A recording to answer from; -1: none.
        extra_ca: PEM certificates that the host trusts besides its own.
        trace: The trace that the box belongs to.
    """

    authority: str = field(repr=False)
    rules: tuple[Rule, ...] = ()
    endpoints: tuple[TokenEndpoint, ...] = ()
    token: str = field(default="", repr=False)
    broker_fd: int = -1
    metered: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    budget: Budget = field(default_factory=Budget)
    prices: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    record_fd: int = -1
    replay_fd: int = -1
    extra_ca: str = ""
    trace: str = ""

    @property
    def hosts(self) -> tuple[str, ...]:
        """What the box's authority vouches for."""
        if self.record_fd >= 0 or self.replay_fd >= 0:
            return ("*",)
        names = [*(host for rule in self.rules for host in rule.hosts), *self.metered]
        return tuple(dict.fromkeys([*names, *(endpoint.host for endpoint in self.endpoints)]))

    @property
    def fds(self) -> tuple[int, ...]:
        """Descriptors that the gateway must inherit."""
        return tuple(fd for fd in (self.broker_fd, self.record_fd, self.replay_fd) if fd >= 0)

    def to_json(self) -> dict[str, Any]:
        """As plain data, with secrets in it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Interception:
        """What `to_json` gave.

        Raises:
            ValueError, TypeError: it is not that.
        """
        fields = dict(data)
        fields["rules"] = tuple(_rule(one) for one in fields.get("rules", ()))
        fields["endpoints"] = tuple(TokenEndpoint(**one) for one in fields.get("endpoints", ()))
        fields["budget"] = Budget(**fields.get("budget", {}))
        for name in ("metered", "free"):
            fields[name] = tuple(fields.get(name, ()))
        return cls(**fields)


def load(settings: Mapping[str, Any], audit: AuditLog) -> Interceptor | None:
    """The interceptor of a box, made before the gateway gives up its rights: files are read here.

    Args:
        settings: `GatewayConfig.interception`, as `Interception.to_json` gives it.
        audit: Hears of what it does.

    Raises:
        ValueError: there is none for these settings.
    """
    if not settings:
        return None
    # Only here: TLS, HTTP and gRPC's statuses are what a gateway without interception does without.
    from services.common.errors import VoidboxError
    from services.hypervisor.egress.assembly import build

    try:
        return build(Interception.from_json(settings), audit)
    except (TypeError, VoidboxError) as error:
        raise ValueError(f"interception: {error}") from error


def _rule(data: Mapping[str, Any]) -> Rule:
    lists = {name: tuple(data.get(name, ())) for name in ("hosts", "ports", "paths")}
    return Rule(**{**data, **lists, "placement": Placement(data["placement"])})
