"""The box's name server: it answers for names that the policy allows, and remembers what it has answered.

Only A and AAAA are answered, and with addresses alone: where a name is an alias, the box never hears of it.
So no HTTPS record gives it keys to hide names with, and no other record carries data out or in.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from ipaddress import IPv4Address

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from services.common.egress.addresses import Address
from services.common.egress.names import normalize
from services.common.egress.policy import Policy, allowed_address, decide_name
from services.hypervisor.egress import link
from services.hypervisor.egress.audit import AuditLog, Event
from services.hypervisor.egress.limits import Bucket
from services.hypervisor.egress.name_memory import NameMemory
from services.hypervisor.egress.resolver import Answer, LookupFailed, Resolver

MAX_QUESTION = 4096
QUESTIONS_PER_SECOND = 200
MAX_SECONDS = 300.0
MIN_SECONDS = 1.0
_PARALLEL = 64
_PLAIN_UDP = 512
_MOST_UDP = 1232
"""What fits into one packet everywhere (DNS flag day 2020)."""
_TCP_IDLE_SECONDS = 30.0


class NameServer:
    """Answers questions.

    Args:
        policy: The box's.
        resolver: Asks the host's name servers.
        memory: Notes the answers.
        audit: Hears of each question.
        own: Whether an address is one of the host's own.
        by_proxy: Whether a name is resolved by an upstream proxy only.
    """

    def __init__(
        self,
        policy: Policy,
        resolver: Resolver,
        memory: NameMemory,
        audit: AuditLog,
        *,
        own: Callable[[Address], bool],
        by_proxy: Callable[[str], bool] = lambda _name: False,
    ) -> None:
        self._policy = policy
        self._resolver = resolver
        self._memory = memory
        self._audit = audit
        self._own = own
        self._by_proxy = by_proxy
        self._rate = Bucket(QUESTIONS_PER_SECOND, 2 * QUESTIONS_PER_SECOND)
        self._slots = asyncio.Semaphore(_PARALLEL)
        self._tasks: set[asyncio.Task[None]] = set()

    async def answer(self, question: bytes, *, tcp: bool = False) -> bytes:
        """The answer to one message; empty if it deserves none."""
        try:
            query = dns.message.from_wire(question, ignore_trailing=True)
        except (dns.exception.DNSException, ValueError, struct.error):
            return b""
        if query.flags & dns.flags.QR:
            return b""
        response = dns.message.make_response(query, recursion_available=True)
        if query.opcode() != dns.opcode.QUERY or len(query.question) != 1:
            response.set_rcode(dns.rcode.NOTIMP)
        elif not self._rate.has(1):
            response.set_rcode(dns.rcode.REFUSED)
        else:
            async with self._slots:
                await self._fill(query.question[0], response)
        most = 65535
        if not tcp:
            most = min(max(query.payload, _PLAIN_UDP), _MOST_UDP) if query.edns >= 0 else _PLAIN_UDP
        try:
            return response.to_wire(max_size=most)
        except dns.exception.TooBig:
            for section in (response.answer, response.additional):
                section.clear()
            response.flags |= dns.flags.TC
            return response.to_wire(max_size=most)

    async def _fill(self, question: dns.rrset.RRset, response: dns.message.Message) -> None:
        try:
            name = normalize(question.name.to_text())
        except ValueError:
            response.set_rcode(dns.rcode.NXDOMAIN)
            return
        if question.rdclass != dns.rdataclass.IN:
            response.set_rcode(dns.rcode.REFUSED)
            return
        if name in link.HOST_NAMES and self._policy.host_ports:
            answer = Answer((link.GATEWAY.ip, link.GATEWAY6.ip), MAX_SECONDS)
        else:
            found = await self.lookup(name)
            if isinstance(found, str):
                response.set_rcode(dns.rcode.NXDOMAIN)
                if response.edns >= 0:
                    response.use_edns(options=[dns.edns.EDEOption(dns.edns.EDECode.BLOCKED, found[:200])])
                return
            if found is None:
                response.set_rcode(dns.rcode.SERVFAIL)
                return
            if not found.addresses:
                response.set_rcode(dns.rcode.NXDOMAIN)
                return
            answer = found
        wanted = {dns.rdatatype.A: 4, dns.rdatatype.AAAA: 6}.get(question.rdtype)
        texts = [str(each) for each in answer.addresses if each.version == wanted]
        if texts:
            seconds = int(min(max(answer.seconds, MIN_SECONDS), MAX_SECONDS))
            kind = dns.rdatatype.to_text(question.rdtype)
            response.answer.append(dns.rrset.from_text(question.name, seconds, "IN", kind, *texts))

    async def lookup(self, name: str) -> Answer | str | None:
        """The addresses that the box may have for a normal `name`, which are then remembered.

        Returns:
            The answer, or why there is none for this box, or None if no server answered.
        """
        decision = decide_name(self._policy, name)
        if not decision.allowed:
            self._audit.record(
                Event(kind="dns", allowed=False, name=name, rule=decision.rule, reason=decision.reason)
            )
            return decision.reason
        if self._by_proxy(name):
            answer = Answer((self._memory.synthetic(name),), MAX_SECONDS)
            self._memory.add(name, answer.addresses, MAX_SECONDS)
            return answer
        try:
            answer = await self._resolver.lookup(name)
        except LookupFailed as error:
            self._audit.record(Event(kind="dns", name=name, rule=decision.rule, reason=str(error)[:200]))
            return None
        good = []
        refused = ""
        for address in answer.addresses:
            one = allowed_address(self._policy, name, address, own=self._own(address))
            if one.allowed:
                good.append(address)
            else:
                refused = one.reason
        if refused:
            self._audit.record(
                Event(kind="dns", allowed=False, name=name, rule="special addresses", reason=refused)
            )
            if not good:
                return refused
        addresses = " ".join(map(str, good))
        if good and any(map(_unusable, good)):
            good = [self._memory.synthetic(name, good)]
        self._memory.add(name, good, answer.seconds)
        self._audit.record(
            Event(
                kind="dns",
                name=name,
                rule=decision.rule,
                address=addresses[:200],
                reason="" if good else "none",
            )
        )
        return Answer(tuple(good), answer.seconds)

    # Serving

    async def serve_datagrams(self, one: socket.socket) -> None:
        """Answer what comes to a UDP socket, until cancelled."""
        loop = asyncio.get_running_loop()
        one.setblocking(False)
        while True:
            try:
                data, peer = await loop.sock_recvfrom(one, MAX_QUESTION)
            except OSError:
                continue
            if len(self._tasks) < 4 * _PARALLEL:
                task = loop.create_task(self._reply(one, data, peer))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _reply(self, one: socket.socket, data: bytes, peer: object) -> None:
        answer = await self.answer(data)
        if answer:
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().sock_sendto(one, answer, peer)  # type: ignore[arg-type]

    async def serve_stream(self, one: socket.socket) -> None:
        """Answer what comes over one TCP connection, to its end."""
        loop = asyncio.get_running_loop()
        buffer = b""
        with contextlib.suppress(OSError, TimeoutError):
            while True:
                while len(buffer) < 2 or len(buffer) < 2 + int.from_bytes(buffer[:2], "big"):
                    async with asyncio.timeout(_TCP_IDLE_SECONDS):
                        data = await loop.sock_recv(one, MAX_QUESTION)
                    if not data:
                        return
                    buffer += data
                length = int.from_bytes(buffer[:2], "big")
                question, buffer = buffer[2 : 2 + length], buffer[2 + length :]
                answer = await self.answer(question, tcp=True)
                if not answer:
                    return
                await loop.sock_sendall(one, len(answer).to_bytes(2, "big") + answer)


def _unusable(address: Address) -> bool:
    """Whether the box would look for an address at itself, or next to itself, and not ask its gateway."""
    if address.is_loopback or address.is_unspecified or address.is_link_local or address.is_multicast:
        return True
    if isinstance(address, IPv4Address):
        return address in link.GATEWAY.network
    return address in link.GATEWAY6.network
