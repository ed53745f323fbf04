"""A box's gateway: takes each connection that the box makes, decides, and passes it on or refuses it.

It runs in the host's network namespace; the sockets that it listens on are in the box's. What a connection
says of itself (SNI, Host) is read before a byte of it is passed on; a server that speaks first is let do so
where the address alone is allowed. A refusal is said in the connection's own protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address, ip_address

from services.common.egress.addresses import Address, parse_address
from services.common.egress.policy import ALL_PORTS, Decision, Policy, Protocol, decide
from services.hypervisor.egress import link
from services.hypervisor.egress.audit import AuditLog, Event
from services.hypervisor.egress.clienthello import ACCESS_DENIED, BadHello, is_tls, parse_hello
from services.hypervisor.egress.dnsserver import NameServer
from services.hypervisor.egress.flow import Flow, Interceptor
from services.hypervisor.egress.httphead import BadHead, Head, Requests, is_http, refusal
from services.hypervisor.egress.limits import Meter, QuotaExhausted
from services.hypervisor.egress.name_memory import NameMemory
from services.hypervisor.egress.packets import Packets
from services.hypervisor.egress.relay import Count, Pipes, both, pump, pump_looked_at, reset
from services.hypervisor.egress.resolver import Resolver
from services.hypervisor.egress.upstream import NoProxy, Proxy, connect, connect_by

log = logging.getLogger(__name__)

FIRST_BYTES_SECONDS = 0.25
"""Then the server may speak first, if the address alone is allowed; what the box says is still looked at."""
HEAD_SECONDS = 60.0
_SO_ORIGINAL_DST = 80
_CHUNK = 16384
_MAX_FIRST = 128 << 10
_NO_PROXY_HERE = "CONNECT asks for a proxy, and none is here"


Serve = Callable[[socket.socket, tuple[str, int]], Awaitable[None]]


class Refused(Exception):
    """A connection that is not to be; the decision says why."""

    def __init__(self, decision: Decision) -> None:
        super().__init__(decision.reason)
        self.decision = decision


class _Late(Exception):
    """A connection is one to take over; nothing of it has been passed on."""

    def __init__(self, first: bytes) -> None:
        self.first = first


class Gateway:
    """One box's gateway.

    Args:
        box: The box's id.
        policy: What it may reach.
        audit: Hears of each decision.
        resolver: The host's name servers.
        host_address: Where the host's declared ports are.
        proxy: The host's proxy, if there is one.
        no_proxy: What goes directly.
        interceptor: Takes some connections over.
    """

    def __init__(
        self,
        box: str,
        policy: Policy,
        audit: AuditLog,
        resolver: Resolver,
        *,
        host_address: str = "127.0.0.1",
        proxy: Proxy | None = None,
        no_proxy: Sequence[str] = (),
        interceptor: Interceptor | None = None,
    ) -> None:
        self._box = box
        self._policy = policy
        self._audit = audit
        self._resolver = resolver
        self._host = host_address
        self._proxy = proxy
        self._no_proxy = NoProxy(no_proxy)
        self._interceptor = interceptor
        self._memory = NameMemory()
        self._meter = Meter(policy.limits)
        self._pipes = Pipes()
        self._tasks: set[asyncio.Task[None]] = set()
        by_proxy = (lambda name: not self._no_proxy.covers(name, None)) if proxy else (lambda _name: False)
        self.names = NameServer(policy, resolver, self._memory, audit, own=is_own, by_proxy=by_proxy)

    # Accepting

    async def serve(
        self,
        tcp: Sequence[socket.socket],
        dns: Sequence[socket.socket],
        dns_tcp: Sequence[socket.socket],
        packets: socket.socket,
    ) -> None:
        """Serve until cancelled; the sockets belong to the caller."""
        try:
            async with asyncio.TaskGroup() as group:
                for one in tcp:
                    group.create_task(self._accept(one, self._connection))
                for one in dns_tcp:
                    group.create_task(self._accept(one, self._questions))
                for one in dns:
                    group.create_task(self.names.serve_datagrams(one))
                group.create_task(Packets(packets, self._packet_verdict, self._audit).run())
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._pipes.close()

    async def _accept(self, listener: socket.socket, serve: Serve) -> None:
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            try:
                client, peer = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("accept: %s", error)
                await asyncio.sleep(0.05)  # out of descriptors: some connection has to end first
                continue
            task = loop.create_task(self._guarded(client, peer, serve))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _guarded(self, client: socket.socket, peer: tuple[str, int], serve: Serve) -> None:
        try:
            await serve(client, peer)
        except (OSError, TimeoutError, QuotaExhausted):
            reset(client)
        except Exception:
            log.exception("a connection of box %s", self._box)
            reset(client)
        finally:
            client.close()

    async def _questions(self, client: socket.socket, _peer: tuple[str, int]) -> None:
        await self.names.serve_stream(client)

    # Deciding

    def _packet_verdict(self, address: Address, port: int, protocol: Protocol) -> Decision:
        names = self._memory.names(address)
        if port:
            return decide(self._policy, address, port, names=names, own=is_own(address), protocol=protocol)
        # Echo has no port: whoever may be talked to on any may be asked whether he is there.
        ports = {
            each
            for rule in self._policy.allow
            for each in (rule.ports if rule.ports != ALL_PORTS else (443,))
        }
        found = Decision(allowed=False, rule="default", reason=f"no rule allows {address}")
        for each in sorted(ports) or (443,):
            found = decide(self._policy, address, each, names=names, own=is_own(address))
            if found.allowed:
                break
        return found

    def _judge(self, flow: Flow, claimed: str) -> Decision:
        address, port = ip_address(flow.destination[0]), flow.destination[1]
        if address in (link.GATEWAY.ip, link.GATEWAY6.ip):
            if port in self._policy.host_ports:
                return Decision(allowed=True, rule=f"host_ports {port}")
            return Decision(
                allowed=False,
                rule="default",
                reason=f"port {port} of the host is not declared; add {port} to sandbox.network.host_ports",
            )
        names = self._memory.names(address)
        flow.name = claimed or next(iter(sorted(names)), "")
        real = self._memory.real(address)
        if real is not None:
            # Stands for a name; where that is, only the proxy knows if nothing is noted.
            judged = real[0] if real else _PUBLIC
            own = is_own(judged)
            return decide(self._policy, judged, port, names=names, claimed=claimed, own=own)
        return decide(self._policy, address, port, names=names, claimed=claimed, own=is_own(address))

    async def _judge_claim(self, flow: Flow, claimed: str) -> Decision:
        """As `_judge`; a name that this gateway has not been asked for yet is looked up first.

        So a box that was restored, or whose gateway was, can go on with addresses it has kept.
        """
        address = parse_address(flow.destination[0])
        at_host = address in (link.GATEWAY.ip, link.GATEWAY6.ip)
        if (
            claimed
            and not at_host
            and not _is_address(claimed)
            and claimed not in self._memory.names(address)
        ):
            await self.names.lookup(claimed)
        return self._judge(flow, claimed)

    # One connection

    async def _connection(self, client: socket.socket, peer: tuple[str, int]) -> None:
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        flow = Flow(box=self._box, source=(peer[0], peer[1]), destination=original_destination(client))
        if refusal_reason := self._meter.refusal():
            self._say(flow, Decision(allowed=False, rule="limits", reason=refusal_reason))
            reset(client)
            return
        self._meter.open += 1
        try:
            await self._serve(client, flow)
        except Refused as refused:
            flow.decision = refused.decision
            self._say(flow, refused.decision)
            await self._refuse(client, flow, refused.decision.reason)
        finally:
            self._meter.open -= 1

    async def _serve(self, client: socket.socket, flow: Flow) -> None:
        early = self._judge(flow, "")
        first = await _first_bytes(client, FIRST_BYTES_SECONDS if early.allowed else HEAD_SECONDS)
        if first == b"":
            if not early.allowed:
                raise Refused(early)
            flow.decision = early
            await self._pass(client, flow, b"", None)
            return
        if first is None:  # the server speaks first, perhaps
            flow.decision = early
            try:
                await self._pass(client, flow, b"", None, unknown=True)
                return
            except _Late as late:  # a slow box: it was the one to speak first after all
                first = late.first
        else:
            first, requests = await self._identify(client, flow, first)
            if not self._wanted(flow):
                await self._pass(client, flow, first, requests)
                return
        assert self._interceptor is not None
        self._say(flow, flow.decision)
        try:
            await self._interceptor.intercept(client, first, flow, self.dial)
        finally:
            self._meter.bytes += flow.sent + flow.received
            self._closed(flow)

    def _wanted(self, flow: Flow) -> bool:
        return self._interceptor is not None and flow.kind != "other" and self._interceptor.wants(flow)

    async def _identify(
        self, client: socket.socket, flow: Flow, first: bytes
    ) -> tuple[bytes, Requests | None]:
        """Read on until it is known what the box wants, and decide; what has been read, all of it.

        Raises:
            Refused: it may not have it.
        """
        loop = asyncio.get_running_loop()
        if is_tls(first):
            flow.kind = "tls"
            try:
                async with asyncio.timeout(HEAD_SECONDS):
                    while (hello := parse_hello(first)) is None:
                        more = await loop.sock_recv(client, _CHUNK)
                        if not more or len(first) > _MAX_FIRST:
                            raise BadHello("it ends before its hello does")
                        first += more
            except (BadHello, TimeoutError) as error:
                raise Refused(Decision(allowed=False, rule="tls", reason=f"no TLS hello: {error}")) from error
            flow.sni, flow.alpn = hello.sni, hello.alpn
            decision = await self._judge_claim(flow, hello.sni)
            rule = decision.matched
            if decision.allowed and rule is not None and rule.host and rule.host != "*":
                if not hello.sni and rule.tls != "any":
                    decision = Decision(
                        allowed=False,
                        rule=decision.rule,
                        reason="the TLS hello names no server (SNI); `tls: any` in the rule allows that",
                    )
                elif hello.encrypted and rule.tls == "strict":
                    decision = Decision(
                        allowed=False,
                        rule=decision.rule,
                        reason="the TLS hello hides another (ECH), tls is strict",
                    )
            flow.decision = decision
            if not decision.allowed:
                raise Refused(decision)
            return first, None
        if is_http(first):
            requests = Requests()
            try:
                async with asyncio.timeout(HEAD_SECONDS):
                    heads = requests.feed(first)
                    while not heads:
                        if not is_http(first):
                            break
                        more = await loop.sock_recv(client, _CHUNK)
                        if not more:
                            break
                        first += more
                        heads = requests.feed(more)
            except BadHead as error:
                flow.kind = "http"
                raise Refused(Decision(allowed=False, rule="http", reason=str(error))) from error
            if heads:
                flow.kind = "http"
                for head in heads:
                    flow.decision = await self._judge_head(flow, head)
                    if not flow.decision.allowed:
                        raise Refused(flow.decision)
                return first, requests
        flow.decision = self._judge(flow, "")
        if not flow.decision.allowed:
            raise Refused(flow.decision)
        return first, None

    async def _judge_head(self, flow: Flow, head: Head) -> Decision:
        flow.host = head.host
        decision = await self._judge_claim(flow, head.host)
        if decision.allowed and head.method == "CONNECT" and not decision.rule.startswith("host_ports"):
            return Decision(allowed=False, rule="http", reason=_NO_PROXY_HERE)
        return decision

    async def _pass(
        self,
        client: socket.socket,
        flow: Flow,
        first: bytes,
        requests: Requests | None,
        *,
        unknown: bool = False,
    ) -> None:
        """Connect and move bytes until both sides have ended."""
        self._say(flow, flow.decision)
        try:
            upstream = await self.dial(flow)
        except OSError as error:
            flow.decision = Decision(allowed=True, rule=flow.decision.rule, reason=f"not reachable: {error}")
            self._closed(flow)
            await self._refuse(
                client, flow, f"{flow.name or flow.destination[0]}: {error}", status="502 Bad Gateway"
            )
            return
        try:
            outward = (
                self._late(client, upstream, flow)
                if unknown
                else self._outward(client, upstream, flow, first, requests)
            )
            await both(outward, pump(upstream, client, self._pipes, self._counter(flow, inward=True)))
        except Refused as refused:
            # Said in the connection's own protocol only if the other side has not spoken in it yet.
            self._say(flow, refused.decision)
            if flow.received:
                reset(client)
            else:
                await self._refuse(client, flow, refused.decision.reason)
        except QuotaExhausted:
            reason = self._meter.refusal()
            self._say(flow, Decision(allowed=False, rule="limits", reason=reason))
            reset(client)
        finally:
            # What the box sees of a connection that broke is a reset, as without a gateway.
            upstream.close()
            self._closed(flow)

    async def _late(self, client: socket.socket, upstream: socket.socket, flow: Flow) -> None:
        """The box's side of a connection in which it has said nothing so far; what it says is looked at."""
        first = await _first_bytes(client, None)
        requests = None
        if first:
            first, requests = await self._identify(client, flow, first)
            if self._wanted(flow):
                raise _Late(first)
        await self._outward(client, upstream, flow, first or b"", requests)

    async def _outward(
        self,
        client: socket.socket,
        upstream: socket.socket,
        flow: Flow,
        first: bytes,
        requests: Requests | None,
    ) -> None:
        count = self._counter(flow)
        if requests is not None and not requests.opaque:
            await pump_looked_at(client, upstream, first, self._looking(flow, requests), count)
            return
        if first:
            await asyncio.get_running_loop().sock_sendall(upstream, first)
            await count(len(first))
        await pump(client, upstream, self._pipes, count)

    def _looking(self, flow: Flow, requests: Requests) -> Callable[[bytes], None]:
        def look(data: bytes) -> None:
            try:
                heads = requests.feed(data)
            except BadHead as error:
                raise Refused(Decision(allowed=False, rule="http", reason=str(error))) from error
            for head in heads:
                if head.host and head.host == flow.host:
                    continue
                decision = self._judge(flow, head.host)
                if decision.allowed and head.method == "CONNECT":
                    decision = Decision(allowed=False, rule="http", reason=_NO_PROXY_HERE)
                if not decision.allowed:
                    raise Refused(decision)

        return look

    def _counter(self, flow: Flow, *, inward: bool = False) -> Count:
        async def count(number: int) -> None:
            if inward:
                flow.received += number
            else:
                flow.sent += number
            await self._meter.used(number)

        return count

    # Connecting

    async def dial(self, flow: Flow) -> socket.socket:
        """See `flow.Dial`: where the box wanted, else the other addresses of the same name."""
        address, port = ip_address(flow.destination[0]), flow.destination[1]
        if address in (link.GATEWAY.ip, link.GATEWAY6.ip):
            return await connect(self._host, port)
        # A name that the address was not given for is the box's own word; it decides nothing here.
        given = flow.name if flow.name in self._memory.names(address) else ""
        if self._proxy is not None and not self._no_proxy.covers(given, address):
            proxy = self._proxy
            where = [proxy.host] if _is_address(proxy.host) else await self._proxy_addresses(proxy.host)
            return await connect_by(proxy, where, given or str(address), port)
        candidates = [*(self._memory.real(address) or (address,))]
        if given and candidates == [address]:
            for other in self._memory.addresses(given):
                if other not in candidates and self._may(given, other, port):
                    candidates.append(other)
        problem: OSError | None = None
        for each in candidates:
            try:
                return await connect(str(each), port)
            except OSError as error:
                problem = problem or error
        assert problem is not None
        raise problem

    def _may(self, name: str, address: Address, port: int) -> bool:
        return decide(self._policy, address, port, names={name}, claimed=name, own=is_own(address)).allowed

    async def _proxy_addresses(self, host: str) -> list[str]:
        from services.hypervisor.egress.resolver import LookupFailed

        try:
            return [str(each) for each in (await self._resolver.lookup(host.lower())).addresses]
        except LookupFailed as error:
            raise OSError(f"proxy {host}: {error}") from error

    # Telling

    async def _refuse(
        self, client: socket.socket, flow: Flow, reason: str, *, status: str = "403 Forbidden"
    ) -> None:
        loop = asyncio.get_running_loop()
        if flow.kind == "other":
            reset(client)
            return
        answer = ACCESS_DENIED if flow.kind == "tls" else refusal(reason, status)
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(5):
                await loop.sock_sendall(client, answer)
                client.shutdown(socket.SHUT_WR)
                # Closing with unread bytes would be a reset, which takes the answer with it.
                while await loop.sock_recv(client, 65536):
                    pass

    def _say(self, flow: Flow, decision: Decision) -> None:
        self._audit.record(
            Event(
                kind="tcp",
                allowed=decision.allowed,
                name=flow.name or flow.sni or flow.host,
                address=flow.destination[0],
                port=flow.destination[1],
                rule=decision.rule,
                reason=decision.reason,
                detail={} if flow.kind == "other" else {"protocol": flow.kind},
            )
        )

    def _closed(self, flow: Flow) -> None:
        self._audit.record(
            Event(
                kind="closed",
                name=flow.name or flow.sni or flow.host,
                address=flow.destination[0],
                port=flow.destination[1],
                rule=flow.decision.rule,
                reason=flow.decision.reason,
                sent=flow.sent,
                received=flow.received,
                duration=round(time.monotonic() - flow.started, 6),
            )
        )


# Never connected to: what a synthetic address is decided as.
_PUBLIC = IPv4Address("1.0.0.0")


async def _first_bytes(client: socket.socket, seconds: float | None) -> bytes | None:
    """What the box says first; empty if it has ended, None if it says nothing in time."""
    try:
        async with asyncio.timeout(seconds):
            return await asyncio.get_running_loop().sock_recv(client, _CHUNK)
    except TimeoutError:
        return None


def original_destination(client: socket.socket) -> tuple[str, int]:
    """Where a redirected connection was to go (linux/netfilter_ipv4.h, netfilter_ipv6/ip6_tables.h)."""
    if client.family == socket.AF_INET:
        port, packed = struct.unpack("!2xH4s8x", client.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16))
        return socket.inet_ntop(socket.AF_INET, packed), port
    data = client.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, 28)
    port, packed = struct.unpack("!2xH4x16s4x", data)
    return str(parse_address(socket.inet_ntop(socket.AF_INET6, packed))), port


def is_own(address: Address) -> bool:
    """Whether an address is one of this host's: the kernel would then send from that very address."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 9))
            found: str = probe.getsockname()[0]
            return found == str(address)
    except OSError:
        return False


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
