"""Machines that are no boxes, after a restart of the service: the pool's go on waiting, all others end.

A machine of the pool leaves a note in its directory once it waits: of which template it is, and the
secret that its guest obeys until a box claims it. A machine without such a note was on its way when
the service ended, and belongs to nobody.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import VoidboxError
from services.hypervisor import record
from services.hypervisor.layout import Layout
from services.hypervisor.model import BoxRecord
from services.hypervisor.pidfd import host_boot_id, kill_now

log = logging.getLogger(__name__)

NOTE = "waiting.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A machine that an earlier service left in its pool."""

    directory: Path
    record: BoxRecord
    template_id: str
    secret: bytes


def note(directory: Path, template_id: str, secret: bytes) -> None:
    """Note that the machine in `directory` waits.

    Raises:
        Exhausted: the disk is full.
    """
    text = json.dumps({"template": template_id, "secret": secret.hex()})
    record.write_atomically(directory / NOTE, text.encode())


def take_note(directory: Path) -> None:
    """Remove the note: the machine waits no longer. Idempotent."""
    (directory / NOTE).unlink(missing_ok=True)


def find(layout: Layout) -> list[Waiting]:
    """The machines that wait, oldest first; ends and removes all others that are no boxes. Blocks."""
    found = []
    for entry in list(os.scandir(layout.machines)):
        directory = Path(entry.path)
        try:
            found.append(_read(directory))
        except (OSError, ValueError, KeyError, TypeError, VoidboxError) as error:
            if entry.name.startswith("pool-"):
                log.info("machine %s is ended: %s", entry.name, error)
            end(directory)
    return sorted(found, key=lambda each: each.record.create_time)


def _read(directory: Path) -> Waiting:
    present = record.load(directory)
    if present.host_boot_id != host_boot_id():
        raise ValueError("the host has restarted")
    noted = json.loads((directory / NOTE).read_bytes())
    template_id, secret = noted["template"], bytes.fromhex(noted["secret"])
    if not isinstance(template_id, str) or not secret:
        raise ValueError(f"{NOTE} is damaged")
    return Waiting(directory=directory, record=present, template_id=template_id, secret=secret)


def end(directory: Path) -> None:
    """End and remove the machine in `directory`, which is no box. Blocks."""
    with contextlib.suppress(OSError, VoidboxError):
        found = record.load(directory)
        if found.shim_pid and found.host_boot_id == host_boot_id():
            kill_now(found.shim_pid, found.shim_start)
    shutil.rmtree(directory, ignore_errors=True)


def end_all(layout: Layout) -> None:
    """End and remove all machines that are no boxes. Blocks."""
    for entry in list(os.scandir(layout.machines)):
        end(Path(entry.path))
