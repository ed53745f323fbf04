"""A box's credentials and budget as it is configured with them, and what each of its processes is told."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from services.hypervisor.egress.budget import Budget
from services.hypervisor.egress.interception import Interception
from services.hypervisor.egress.rules import Placement, Rule, TokenEndpoint

CERTIFICATE = "/etc/voidbox/ca.pem"
CERTIFICATES = "/etc/voidbox/ca-bundle.pem"
# Where programs look for certificates; the guest agent writes the files (guest/certificates.py). Node's and
# Deno's add to what the program trusts, the others replace it.
TRUST_ENV: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "SSL_CERT_FILE",  # OpenSSL, Go, Python, Ruby, rustls
            "CURL_CA_BUNDLE",
            "REQUESTS_CA_BUNDLE",
            "GIT_SSL_CAINFO",
            "PIP_CERT",
            "CARGO_HTTP_CAINFO",
            "AWS_CA_BUNDLE",
            "CODEX_CA_CERTIFICATE",
        ),
        CERTIFICATES,
    ),
    "NODE_EXTRA_CA_CERTS": CERTIFICATE,
    "DENO_CERT": CERTIFICATE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """See `voidbox.hypervisor.v1.Credential`; `source` is as `broker_process.make_source` takes it."""

    name: str
    hosts: tuple[str, ...]
    ports: tuple[int, ...] = ()
    paths: tuple[str, ...] = ()
    placement: Placement = Placement.HEADER
    key: str = "authorization"
    format: str = "Bearer {}"
    plain: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def rule(self) -> Rule:
        """How the gateway puts it in.

        Raises:
            ValueError: that cannot be.
        """
        return Rule(
            id=self.name,
            hosts=self.hosts,
            ports=self.ports,
            paths=self.paths,
            placement=self.placement,
            name=self.key,
            format=self.format,
            plain=self.plain,
        )

    @property
    def placeholder(self) -> str:
        """What the box sees. It is the same in every box, as it means nothing."""
        return f"voidbox-placeholder-{self.name}"

    def endpoint(self) -> TokenEndpoint | None:
        """The token endpoint that the box must not reach by itself, if it has one."""
        login = self.source.get("oauth")
        if login is None:
            return None
        url = urlsplit(login["url"])
        return TokenEndpoint(
            host=url.hostname or "",
            path=url.path.rstrip("/"),
            placeholder=self.placeholder,
            refresh_placeholder=self.placeholder,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Interceptions:
    """Everything of a box that its gateway intercepts."""

    credentials: tuple[Credential, ...] = ()
    metered: tuple[str, ...] = ()
    budget: Budget = field(default_factory=Budget)

    def __bool__(self) -> bool:
        return bool(self.credentials or self.metered)

    def to_json(self) -> str:
        """As text for a box's record, with values in it; empty if there is nothing."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True) if self else ""

    @classmethod
    def from_json(cls, text: str) -> Interceptions:
        """What `to_json` gave."""
        if not text:
            return cls()
        data = json.loads(text)
        lists = ("hosts", "ports", "paths")
        return cls(
            credentials=tuple(
                Credential(
                    **{
                        **one,
                        **{name: tuple(one[name]) for name in lists},
                        "placement": Placement(one["placement"]),
                    }
                )
                for one in data["credentials"]
            ),
            metered=tuple(data["metered"]),
            budget=Budget(**data["budget"]),
        )

    def env(self) -> dict[str, str]:
        """What the box's programs get in their environment."""
        if not self:
            return {}
        placed = {
            name: text.replace("{}", one.placeholder)
            for one in self.credentials
            for name, text in one.env.items()
        }
        return {**TRUST_ENV, **placed}

    def prepare(self, broker_fd: int, extra_ca: str = "") -> tuple[Interception, dict[str, Any], bytes]:
        """What a new box's gateway is told, what its broker may give, and what its guest is to trust.

        Args:
            broker_fd: The gateway's end of the socket to its broker.
            extra_ca: PEM certificates that the host trusts besides its own.
        """
        # Only here: cryptography is of no use to a hypervisor whose boxes have no credentials.
        from services.hypervisor.egress.ca import BoxAuthority

        rules = tuple(one.rule() for one in self.credentials)
        endpoints = tuple(found for one in self.credentials if (found := one.endpoint()) is not None)
        told = Interception(
            authority="",
            rules=rules,
            endpoints=endpoints,
            token=secrets.token_hex(32),
            broker_fd=broker_fd,
            metered=self.metered,
            budget=self.budget,
            extra_ca=extra_ca,
        )
        authority = BoxAuthority.create(told.hosts)
        told = dataclasses.replace(told, authority=authority.dump().decode())
        grants = {
            one.name: {"hosts": list(one.hosts), "source": dict(one.source)} for one in self.credentials
        }
        return told, grants, authority.certificate
