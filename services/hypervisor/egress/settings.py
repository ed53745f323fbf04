"""What the gateways of all boxes of a host have in common."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from services.common.errors import InvalidInput
from services.hypervisor.config import Config
from services.hypervisor.egress.nameservers import parse_server
from services.hypervisor.egress.upstream import parse_proxy


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """See `services.hypervisor.egress.gateway_config.GatewayConfig`; `extra_ca` is PEM text."""

    tun: str = "/dev/net/tun"
    resolv_conf: str = "/etc/resolv.conf"
    hosts: str = "/etc/hosts"
    name_servers: tuple[str, ...] = ()
    proxy: str = field(default="", repr=False)
    no_proxy: tuple[str, ...] = ()
    extra_ca: str = ""


def gateway_settings(config: Config) -> GatewaySettings:
    """The settings in the service's configuration.

    Raises:
        InvalidInput: a name server or proxy that is none.
    """
    servers = _words(config.name_servers)
    try:
        for server in servers:
            parse_server(server)
        parse_proxy(config.proxy)
    except ValueError as error:
        raise InvalidInput(f"{error}; see voidbox-hypervisor --help", reason="BAD_CONFIG") from error
    return GatewaySettings(
        tun=config.tun_device,
        resolv_conf=config.resolv_conf,
        hosts=config.hosts_file,
        name_servers=servers,
        proxy=config.proxy,
        no_proxy=_words(config.no_proxy),
        extra_ca=_certificates(config.extra_ca),
    )


def _certificates(path: str) -> str:
    """The PEM text of a file; empty without one."""
    if not path:
        return ""
    try:
        text = Path(path).read_text("ascii")
        ssl.create_default_context().load_verify_locations(cadata=text)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise InvalidInput(f"extra_ca: {path} is no file of certificates: {error}") from error
    return text


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
