"""What the hypervisor tells a box's gateway; JSON, over a pipe, since a proxy's password may be in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """All that a gateway needs. Descriptors are numbers that it inherits.

    Attributes:
        box: The box's id.
        policy: As `services.common.egress.plain` writes it.
        uid: User to become, or None to stay who it is.
        gid: Group to become; given exactly if `uid` is.
        machine_fd: pidfd of the machine's process; the gateway ends with it.
        control_fd: Socket that receives the tap's descriptor, or why there is none.
        audit_fd: File that events are appended to.
        tun: The tun device.
        host_address: Where the host's declared ports are.
        resolv_conf: Path of the host's resolv.conf.
        hosts: Path of the host's hosts file.
        name_servers: Servers to ask instead of those of `resolv_conf`.
        proxy: URL of an upstream proxy, empty for none.
        no_proxy: What goes directly in spite of it.
        interception: For `services.hypervisor.egress.interception`.
    """

    box: str
    policy: str
    uid: int | None = None
    gid: int | None = None
    machine_fd: int
    control_fd: int
    audit_fd: int
    tun: str = "/dev/net/tun"
    host_address: str = "127.0.0.1"
    resolv_conf: str = "/etc/resolv.conf"
    hosts: str = "/etc/hosts"
    name_servers: tuple[str, ...] = ()
    proxy: str = field(default="", repr=False)
    no_proxy: tuple[str, ...] = ()
    interception: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def to_json(self) -> bytes:
        """What to write to the pipe."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> GatewayConfig:
        """The configuration in `data`.

        Raises:
            ValueError, TypeError: it is not one.
        """
        content = json.loads(data)
        for name in ("name_servers", "no_proxy"):
            content[name] = tuple(content.get(name, ()))
        return cls(**content)
