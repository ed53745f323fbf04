"""A box's interceptor from what the hypervisor tells its gateway: plain data, and descriptors.

Everything that needs a file, a thread or a program is done here, before the gateway gives those up.
"""

from __future__ import annotations

import dataclasses
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.hypervisor.egress.audit import AuditLog
from services.hypervisor.egress.broker import BrokerClient
from services.hypervisor.egress.ca import BoxAuthority
from services.hypervisor.egress.intercept import Answering, EgressInterceptor, Watching
from services.hypervisor.egress.meter import Budget, Meter
from services.hypervisor.egress.prices import Prices
from services.hypervisor.egress.recording import Recorder, Replayer
from services.hypervisor.egress.rules import Placement, Rule, TokenEndpoint
from services.hypervisor.egress.serverside import trust
from services.hypervisor.egress.token_endpoint import TokenEndpoints


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


def build(interception: Interception, audit: AuditLog) -> EgressInterceptor:
    """The interceptor.

    Raises:
        ValueError: the authority or a certificate is none.
        Corrupt: the recording is none.
    """
    authority = BoxAuthority.load(interception.authority.encode())
    authority.prepare(interception.hosts)
    extra = interception.extra_ca.encode()
    upstream, upstream_http1 = trust(extra), trust(extra, http2=False)
    answering: list[Answering] = []
    if interception.replay_fd >= 0:
        answering.append(Replayer(interception.replay_fd))
    if interception.endpoints:
        answering.append(TokenEndpoints(interception.endpoints))
    watching: list[Watching] = []
    if interception.metered:
        prices = Prices.parse(interception.prices) if interception.prices else Prices.load()
        watching.append(
            Meter(interception.metered, interception.budget, prices, audit, free=interception.free)
        )
    if interception.record_fd >= 0:
        watching.append(Recorder(interception.record_fd))
    broker = socket.socket(fileno=interception.broker_fd) if interception.broker_fd >= 0 else socket.socket()
    _warm_up(authority)
    return EgressInterceptor(
        rules=interception.rules,
        authority=authority,
        source=BrokerClient(broker, interception.token),
        audit=audit,
        trust=upstream,
        trust_http1=upstream_http1,
        answering=answering,
        watching=watching,
        trace=interception.trace,
    )


def _rule(data: Mapping[str, Any]) -> Rule:
    lists = {name: tuple(data.get(name, ())) for name in ("hosts", "ports", "paths")}
    return Rule(**{**data, **lists, "placement": Placement(data["placement"])})


def _warm_up(authority: BoxAuthority) -> None:
    """Shake hands once in memory: OpenSSL and the codecs for names load what they need at their first use."""
    name = "warm-up.invalid"
    server, client = authority._make_context(name), ssl.create_default_context()
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    client.set_alpn_protocols(["h2"])
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(back, there, server_hostname=name),
        server.wrap_bio(there, back, server_side=True),
    )
    done = [False, False]
    while not all(done):
        for at, end in enumerate(ends):
            try:
                end.do_handshake()
                done[at] = True
            except ssl.SSLWantReadError:
                pass
