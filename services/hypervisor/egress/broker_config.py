"""What the hypervisor tells a box's broker; JSON, over a pipe, since credentials may be in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConfig:
    """What a broker is told.

    Attributes:
        machine_fd: pidfd of the machine's process.
        socket_fd: The gateway has the other end.
        token: The box's.
        grants: By rule: `hosts`, and `source` as `broker_process.make_source` takes it.
        extra_ca: PEM certificates that the host trusts besides its own.
    """

    machine_fd: int
    socket_fd: int
    token: str = field(repr=False)
    grants: Mapping[str, Mapping[str, Any]] = field(repr=False)
    extra_ca: str = ""

    def to_json(self) -> bytes:
        """What to write to the pipe."""
        return json.dumps(asdict(self)).encode()
