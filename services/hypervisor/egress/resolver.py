"""Names to addresses as the host's own configuration has it: its hosts file, then its name servers.

dnspython does the protocol: time-outs, several servers, truncation, and checks that an answer belongs to the
question.
"""

from __future__ import annotations

import asyncio
import io
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

import dns._asyncio_backend
import dns.asyncresolver
import dns.exception
import dns.nameserver
import dns.rdata
import dns.rdatatype
import dns.resolver

from services.common.egress.addresses import Address
from services.common.egress.names import normalize
from services.hypervisor.egress.nameservers import parse_server

# What dnspython would load when it is first needed: the gateway can open no file by then.
assert dns._asyncio_backend
dns.rdata.load_all_types()  # type: ignore[no-untyped-call]

LIFETIME_SECONDS = 8.0
"""For all attempts at one name; a program's own resolver gives up after 5 to 15."""
_CACHED = 2048
_MAX_ADDRESSES = 64


@dataclass(frozen=True, slots=True)
class Answer:
    """Addresses, empty if the name has none, and how long they are good for, in seconds."""

    addresses: tuple[Address, ...]
    seconds: float


class LookupFailed(Exception):
    """No name server gave an answer."""


class Resolver:
    """Resolves names.

    Args:
        resolv_conf: Content of resolv.conf(5).
        hosts: Content of hosts(5).
        servers: "ADDRESS" or "ADDRESS:PORT" to ask instead of those in `resolv_conf`.
    """

    def __init__(self, resolv_conf: str, hosts: str, servers: Sequence[str] = ()) -> None:
        self._hosts = parse_hosts(hosts)
        self._resolver: dns.asyncresolver.Resolver | None = dns.asyncresolver.Resolver(configure=False)
        self._resolver.cache = dns.resolver.LRUCache(_CACHED)
        self._resolver.lifetime = LIFETIME_SECONDS
        if servers:
            self._resolver.nameservers = [
                dns.nameserver.Do53Nameserver(*parse_server(server)) for server in servers
            ]
        else:
            try:
                self._resolver.read_resolv_conf(io.StringIO(resolv_conf))
            except dns.resolver.NoResolverConfiguration:
                self._resolver = None

    async def lookup(self, name: str) -> Answer:
        """The addresses of a normal `name`, IPv4 and IPv6.

        Raises:
            LookupFailed: no server answered.
        """
        if found := self._hosts.get(name):
            return Answer(found, 60.0)
        if self._resolver is None:
            raise LookupFailed("the host has no name servers in resolv.conf")
        both = await asyncio.gather(self._ask(name, "A"), self._ask(name, "AAAA"), return_exceptions=True)
        good = [each for each in both if isinstance(each, Answer)]
        if not good:
            raise LookupFailed(str(both[0]) or type(both[0]).__name__)
        addresses = tuple(address for each in good for address in each.addresses)
        return Answer(addresses, min((each.seconds for each in good if each.addresses), default=30.0))

    async def _ask(self, name: str, kind: str) -> Answer:
        assert self._resolver is not None
        try:
            # Its canonical name may be any; what counts is the name that was asked for.
            answer = await self._resolver.resolve(f"{name}.", kind, raise_on_no_answer=False, search=False)
        except dns.resolver.NXDOMAIN:
            return Answer((), 30.0)
        except (dns.exception.DNSException, OSError) as error:
            raise LookupFailed(f"{name}: {error}") from error
        rrset = answer.rrset
        if rrset is None:
            return Answer((), 30.0)
        found = tuple(ipaddress.ip_address(item.address) for item in rrset)[:_MAX_ADDRESSES]
        return Answer(found, float(rrset.ttl))


def parse_hosts(text: str) -> dict[str, tuple[Address, ...]]:
    """Names and addresses in hosts(5); what is malformed is passed over, as libc does."""
    found: dict[str, tuple[Address, ...]] = {}
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if len(words) < 2:
            continue
        try:
            address = ipaddress.ip_address(words[0])
        except ValueError:
            continue
        for word in words[1:]:
            try:
                name = normalize(word)
            except ValueError:
                continue
            found[name] = (*found.get(name, ()), address)
    return found
