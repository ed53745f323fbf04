"""Secrets that a server sends back are made unreadable before a box sees them.

A match is overwritten at its own length, so no framing and no length changes. Found are the secret
itself and what the common encodings make of it: percent, base64 at each of its three alignments,
hex, JSON and HTML escapes.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import AsyncIterator, Iterable
from typing import Final
from urllib.parse import quote, quote_plus

# A shorter one is found by chance in other data, and guessed anyway.
MIN_SECRET: Final = 8


class Mask:
    """Knows what must not be seen; learns while it is in use."""

    def __init__(self) -> None:
        self._forms: tuple[bytes, ...] = ()
        self._longest = 0
        self._first = b""
        self._secrets: set[str] = set()

    def learn(self, secrets: Iterable[str]) -> None:
        """Add secrets; those that were known stay.

        Raises:
            ValueError: one is too short to be told from other data.
        """
        new = set(secrets) - self._secrets
        if not new:
            return
        if any(len(secret) < MIN_SECRET for secret in new):
            raise ValueError(f"a credential of less than {MIN_SECRET} characters cannot be kept secret")
        self._secrets |= new
        forms = {form for secret in self._secrets for form in forms_of(secret)}
        self._forms = tuple(sorted(forms, key=len, reverse=True))
        self._longest = max(map(len, self._forms), default=0)
        self._first = bytes({form[0] for form in self._forms})

    def seen(self, data: bytes) -> bool:
        """Whether there is a secret in `data`."""
        return any(form in data for form in self._forms)

    def cover(self, data: bytes) -> bytes:
        """`data` with every secret overwritten; as long as before."""
        for form in self._forms:
            if form in data:
                data = data.replace(form, b"*" * len(form))
        return data

    def open_end(self, data: bytes) -> int:
        """Where in `data` a secret may begin that has not ended; `len(data)` if nowhere."""
        forms, first = self._forms, self._first
        for at in range(max(0, len(data) - self._longest + 1), len(data)):
            if data[at] in first:
                tail = data[at:]
                if any(form.startswith(tail) for form in forms):
                    return at
        return len(data)

    async def stream(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """`body` covered, also across the borders of its pieces.

        Only bytes that may be the beginning of a secret are held back, so a stream of events flows.
        """
        held = b""
        async for chunk in body:
            data = self.cover(held + chunk)
            end = self.open_end(data)
            held = data[end:]
            if end:
                yield data[:end]
        if held:
            yield held


def forms_of(secret: str) -> set[bytes]:
    """All the ways that `secret` is looked for."""
    raw = secret.encode()
    forms = {raw, quote(secret, safe="").encode(), quote_plus(secret).encode()}
    forms |= {_lower_escapes(form) for form in list(forms)}
    forms |= {raw.hex().encode(), raw.hex().upper().encode()}
    forms |= {json.dumps(secret)[1:-1].encode(), json.dumps(secret)[1:-1].replace("/", "\\/").encode()}
    forms |= {html.escape(secret).encode(), html.escape(secret, quote=False).encode()}
    forms.add("".join(f"%{byte:02X}" for byte in raw).encode())
    for shift in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            coded = encode(bytes(shift) + raw)
            # Characters that also hold bits of the neighbours are not the secret's alone.
            begin, end = (0, 2, 3)[shift], (shift + len(raw)) * 8 // 6
            forms.add(coded[begin:end])
    return forms


def _lower_escapes(data: bytes) -> bytes:
    parts = data.split(b"%")
    return b"%".join([parts[0], *(part[:2].lower() + part[2:] for part in parts[1:])])
