"""Which addresses the box's name server has given for which names; bounded, the oldest are forgotten."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network

from services.common.egress.addresses import Address

MAX_PAIRS = 8192
MAX_SYNTHETIC = 4096
KEEP_SECONDS = 3600.0
"""At least this long, whatever the answer's own time is: programs keep addresses longer than they should."""
# RFC 2544's benchmark range, which no host is in: stands for names whose address the box cannot use itself.
SYNTHETIC = IPv4Network("198.18.0.0/15")


class NameMemory:
    """Pairs of name and address, each with a time after which it does not count any more."""

    def __init__(self) -> None:
        self._pairs: OrderedDict[tuple[Address, str], float] = OrderedDict()
        self._names: dict[Address, set[str]] = {}
        self._synthetic: dict[Address, tuple[str, tuple[Address, ...]]] = {}

    def add(self, name: str, addresses: Iterable[Address], seconds: float) -> None:
        """Note an answer that the box is given, which itself says that it is good for `seconds`."""
        until = time.monotonic() + max(seconds, KEEP_SECONDS)
        for address in addresses:
            self._pairs[address, name] = until
            self._pairs.move_to_end((address, name))
            self._names.setdefault(address, set()).add(name)
        while len(self._pairs) > MAX_PAIRS:
            self._forget(*next(iter(self._pairs)))

    def names(self, address: Address) -> frozenset[str]:
        """The names that `address` has been given for."""
        now = time.monotonic()
        for name in list(self._names.get(address, ())):
            if self._pairs[address, name] < now:
                self._forget(address, name)
        return frozenset(self._names.get(address, ()))

    def addresses(self, name: str) -> list[Address]:
        """The addresses that have been given for `name`."""
        now = time.monotonic()
        return [address for (address, other), until in self._pairs.items() if other == name and until >= now]

    def synthetic(self, name: str, real: Iterable[Address] = ()) -> IPv4Address:
        """An address that stands for `name`: always the same one, if two names do not happen to share it.

        Args:
            name: A normal name.
            real: Where it really is; nothing if only a proxy knows.

        Raises:
            OverflowError: there are too many such names.
        """
        size = SYNTHETIC.num_addresses - 2
        start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        for step in range(MAX_SYNTHETIC):
            address = SYNTHETIC[1 + (start + step) % size]
            holder = self._synthetic.get(address)
            if holder is None and len(self._synthetic) >= MAX_SYNTHETIC:
                break
            if holder is None or holder[0] == name:
                self._synthetic[address] = (name, tuple(real))
                return address
        raise OverflowError("too many names that stand for another address")

    def real(self, address: Address) -> tuple[Address, ...] | None:
        """Where a synthetic address really is; None if it is not one that is in use."""
        found = self._synthetic.get(address)
        return found[1] if found else None

    def _forget(self, address: Address, name: str) -> None:
        del self._pairs[address, name]
        names = self._names[address]
        names.discard(name)
        if not names:
            del self._names[address]
