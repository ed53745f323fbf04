"""What a box's gateway decided and did: one JSON line per event, in a file that only grows."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

EventKind = Literal["dns", "tcp", "closed", "udp", "icmp", "gateway", "http", "secret", "meter"]

MAX_LOG_BYTES = 64 << 20
"""What a box can have written by trying without end; what is beyond is counted only."""
_MAX_TEXT = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One decision, or the end of what was allowed.

    Attributes:
        kind: What it is about.
        allowed: What was decided.
        name: DNS name, empty if none is known.
        address: Address; empty for a question.
        port: Port, 0 if there is none.
        rule: The rule that decided.
        reason: Why not, in words.
        sent: Bytes from the box.
        received: Bytes to the box.
        duration: Seconds that it was open.
        detail: What only this kind has; text and numbers, never a secret.
    """

    kind: EventKind
    allowed: bool = True
    name: str = ""
    address: str = ""
    port: int = 0
    rule: str = ""
    reason: str = ""
    sent: int = 0
    received: int = 0
    duration: float = 0.0
    detail: Mapping[str, str | int | float | bool] = field(default_factory=dict)


class AuditLog:
    """Appends events to `fd`, which it does not own.

    Args:
        fd: A file that was opened to append; -1 keeps nothing.
        box: The box's id, which each line carries.
        limit: Bytes that the file may have.
    """

    def __init__(self, fd: int, box: str, limit: int = MAX_LOG_BYTES) -> None:
        self._fd = fd
        self._box = box
        self._left = limit - (os.fstat(fd).st_size if fd >= 0 else 0)
        self.lost = 0

    def record(self, event: Event) -> None:
        """Write one event at once; if the disk is full or the limit reached, it is counted as lost."""
        fields: dict[str, Any] = {
            "time": round(time.time(), 6),
            "box": self._box,
            "kind": event.kind,
            "allowed": event.allowed,
        }
        for key in ("name", "address", "port", "rule", "reason", "sent", "received", "duration"):
            if value := getattr(event, key):
                fields[key] = value[:_MAX_TEXT] if isinstance(value, str) else value
        if event.detail:
            fields["detail"] = dict(event.detail)
        if self.lost:
            fields["lost"] = self.lost
        line = json.dumps(fields, ensure_ascii=True).encode() + b"\n"
        if self._fd < 0 or len(line) > self._left:
            self.lost += 1
            return
        with contextlib.suppress(OSError):
            if os.write(self._fd, line) == len(line):
                self._left -= len(line)
                self.lost = 0
                return
        self.lost += 1
