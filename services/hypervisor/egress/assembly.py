"""A box's interceptor from what the hypervisor tells its gateway: plain data, and descriptors.

Everything that needs a file, a thread or a program is done here, before the gateway gives those up.
"""

from __future__ import annotations

import socket
import ssl

from services.hypervisor.egress.audit import AuditLog
from services.hypervisor.egress.broker import BrokerClient
from services.hypervisor.egress.ca import BoxAuthority
from services.hypervisor.egress.intercept import Answering, EgressInterceptor, Watching
from services.hypervisor.egress.interception import Interception
from services.hypervisor.egress.meter import Meter
from services.hypervisor.egress.prices import Prices
from services.hypervisor.egress.recording import Recorder, Replayer
from services.hypervisor.egress.serverside import trust
from services.hypervisor.egress.token_endpoint import TokenEndpoints


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
