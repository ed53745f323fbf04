"""Which requests of a box get which credential, and how the credential is put in.

A rule names its secret, it does not hold it; who holds it is told by name and host.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from services.common.egress.names import matches
from services.hypervisor.egress.message import HttpError, Request, without

# What carries credentials besides the header that a rule sets. A box that could send a key of its
# own to an allowed host could carry data out to an account of its own.
CREDENTIAL_HEADERS: Final = (
    b"authorization",
    b"proxy-authorization",
    b"x-api-key",
    b"api-key",
    b"x-goog-api-key",
    b"private-token",
    b"job-token",
    b"x-auth-token",
)
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class Placement(StrEnum):
    """Where a credential goes."""

    HEADER = "header"
    BASIC = "basic"
    QUERY = "query"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One credential and where it is used.

    Attributes:
        id: The credential's name.
        hosts: DNS names, or `*.` and a suffix, or addresses.
        ports: Ports; empty means 443, and 80 as well if `plain`.
        paths: Beginnings of paths, each ending at a `/` or the end; empty means all.
        placement: Where it goes.
        name: The header's or parameter's name, or the user of Basic.
        format: The header's value; `{}` is the secret.
        plain: Whether it may be sent without TLS.
        placeholder: What the box sees in its place.
    """

    id: str
    hosts: tuple[str, ...]
    ports: tuple[int, ...] = ()
    paths: tuple[str, ...] = ()
    placement: Placement = Placement.HEADER
    name: str = "authorization"
    format: str = "Bearer {}"
    plain: bool = False
    placeholder: str = ""

    def __post_init__(self) -> None:
        if not self.hosts:
            raise ValueError(f"credential {self.id!r} names no host")
        if self.placement is Placement.HEADER and not _TOKEN.fullmatch(self.name):
            raise ValueError(f"credential {self.id!r}: {self.name!r} is no header's name")
        if self.format.count("{}") != 1 and self.placement is Placement.HEADER:
            raise ValueError(f"credential {self.id!r}: the format needs one {{}} for the secret")
        if self.placement is Placement.BASIC and ":" in self.name:
            raise ValueError(f"credential {self.id!r}: a user of Basic has no ':'")

    def covers(self, host: str, port: int, secure: bool) -> bool:
        """Whether connections to this server are its business."""
        if not secure and not self.plain:
            return False
        ports = self.ports or ((443, 80) if self.plain else (443,))
        return port in ports and any(matches(pattern, host) for pattern in self.hosts)

    def covers_path(self, target: str) -> bool:
        """Whether a request for `target` gets it."""
        if not self.paths:
            return True
        path = target.partition("?")[0]
        return any(path == one or path.startswith(one.rstrip("/") + "/") for one in self.paths)

    def apply(self, request: Request, secret: str) -> None:
        """Put `secret` in, and take out whatever the box sent in its place."""
        for character in secret:
            if not " " < character < "\x7f":
                raise ValueError(f"credential {self.id!r} has characters that no header may have")
        headers = without(request.headers, *CREDENTIAL_HEADERS, self.name.lower().encode())
        if self.placement is Placement.HEADER:
            headers.append((self.name.lower().encode(), self.format.replace("{}", secret).encode()))
        elif self.placement is Placement.BASIC:
            pair = base64.b64encode(f"{self.name}:{secret}".encode())
            headers.append((b"authorization", b"Basic " + pair))
        else:
            request.target = _with_parameter(request.target, self.name, secret)
        request.headers = headers


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEndpoint:
    """Where a box would renew a rotating token by itself; the gateway answers instead.

    Attributes:
        host: The server.
        path: The endpoint's path.
        placeholder: The access token that the box sees.
        refresh_placeholder: The refresh token that it sees.
        id_placeholder: The OpenID token that it sees; empty if there is none.
    """

    host: str
    path: str
    placeholder: str
    refresh_placeholder: str
    id_placeholder: str = ""


def check_target(target: str) -> None:
    """Refuse a path that servers read in different ways.

    A rule for `/org/` must not be used for `/org/../other`, however that is spelled.

    Raises:
        HttpError: it has dot segments, backslashes or control characters, coded or not.
    """
    path = target.partition("?")[0]
    plain = unquote_to_bytes(path)
    twice = unquote_to_bytes(plain)
    if any(part in (b".", b"..") for form in (plain, twice) for part in re.split(rb"[/\\;]", form)):
        raise HttpError(400, "the path has dot segments; ask for the path that is meant", reason="PATH")
    if b"\\" in twice or min(twice, default=32) < 32:
        raise HttpError(400, "the path has characters that servers read differently", reason="PATH")


def find(rules: Iterable[Rule], request: Request, host: str, port: int) -> Rule | None:
    """The rule for a request; the most specific one if there are several."""
    secure = request.scheme == "https"
    found = [rule for rule in rules if rule.covers(host, port, secure) and rule.covers_path(request.target)]
    return max(found, key=lambda rule: max(map(len, rule.paths), default=0), default=None)


def _with_parameter(target: str, name: str, secret: str) -> str:
    path, _, query = target.partition("?")
    kept = [
        part
        for part in query.split("&")
        if part and unquote_to_bytes(part.partition("=")[0].replace("+", " ")).decode("latin-1") != name
    ]
    kept.append(f"{quote(name, safe='')}={quote(secret, safe='')}")
    return f"{path}?{'&'.join(kept)}"
