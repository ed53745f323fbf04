"""An audit log in which each record has the hash of the one before it, so that a change shows.

Whoever may write the file could make all of it anew; the last hash is kept elsewhere (with the run), and
then a changed, missing, added or cut-off record is found and named.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

_FORMAT: Final = struct.Struct("=q32s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The end of a chain.

    Attributes:
        count: How many records there are.
        hash: The last one's, hexadecimal.
    """

    count: int
    hash: str


class Chain:
    """Links records. Its state lies in memory that forks share; one process at a time adds to it.

    Args:
        name: What the chain is of; another name makes another chain of the same records.
        head: Where to go on; None to begin.
    """

    def __init__(self, name: str, head: Head | None = None) -> None:
        self._memory = mmap.mmap(-1, _FORMAT.size)
        head = head or origin(name)
        self._memory[:] = _FORMAT.pack(head.count, bytes.fromhex(head.hash))

    @property
    def head(self) -> Head:
        """The end as it is now."""
        count, last = _FORMAT.unpack(self._memory[:])
        return Head(count=count, hash=last.hex())

    def link(self, fields: dict[str, Any]) -> bytes:
        """The line for a record; it counts once `accept` was called."""
        head = self.head
        linked = {"seq": head.count + 1, "prev": head.hash, **fields}
        return json.dumps({**linked, "hash": _hash(linked)}).encode() + b"\n"

    def accept(self, line: bytes) -> None:
        """The line was written."""
        record = json.loads(line)
        self._memory[:] = _FORMAT.pack(record["seq"], bytes.fromhex(record["hash"]))


def origin(name: str) -> Head:
    """The end of an empty chain."""
    return Head(count=0, hash=hashlib.sha256(f"voidbox audit {name}".encode()).hexdigest())


def verify(name: str, lines: Iterable[bytes], head: Head | None = None) -> tuple[Head, list[str]]:
    """Check a chain.

    Args:
        name: What the chain is of.
        lines: Its records.
        head: What its end should be, if that is known.

    Returns:
        The end that was found, and what is wrong, in words that name the record.
    """
    at, wrong = origin(name), []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            said, prev, seq = record.pop("hash"), record["prev"], int(record["seq"])
        except (ValueError, KeyError, TypeError, AttributeError):
            wrong.append(f"line {number} is not a record")
            continue
        if seq > at.count + 1:
            missing = (
                f"record {at.count + 1}" if seq == at.count + 2 else f"records {at.count + 1} to {seq - 1}"
            )
            wrong.append(f"{missing}: missing before line {number}")
        elif seq <= at.count:
            wrong.append(f"record {seq}: out of order at line {number}")
        elif prev != at.hash:
            wrong.append(f"record {seq}: does not follow the record before it")
        if _hash(record) != said:
            wrong.append(f"record {seq}: was edited")
        at = Head(count=seq, hash=str(said))
    if head is not None and head != at and not (wrong and head.count == at.count):
        if head.count > at.count:
            wrong.append(f"records {at.count + 1} to {head.count}: missing at the end")
        else:
            wrong.append(f"record {at.count}: the end is not the one that the run has noted")
    return at, wrong


def _hash(record: dict[str, Any]) -> str:
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
