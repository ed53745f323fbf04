"""What a machine leaves behind in its directory, which says how it ended."""

from __future__ import annotations

import contextlib
from pathlib import Path

from services.hypervisor import console, layout
from services.hypervisor.failure import Remains
from services.hypervisor.shim_config import ExitRecord

_ORDERLY = ("exited", "terminated")
_LOG_TAIL = 4000


def read(directory: Path, shutdown: str) -> Remains:
    """What is there; `shutdown` is the reason that QEMU gave for its end, if it did."""
    record = None
    with contextlib.suppress(OSError, ValueError, TypeError):
        record = ExitRecord.from_json((directory / layout.EXIT_FILE).read_bytes())
    log = ""
    with contextlib.suppress(OSError):
        data = (directory / layout.LOG_FILE).read_bytes()[-_LOG_TAIL:]
        # The device process logs lines of JSON there; its failures are in the exit record.
        lines = console.printable(data).splitlines()
        log = "\n".join(line for line in lines if not line.startswith('{"at":'))
    return Remains(
        exit_code=record.exit_code if record else None,
        exit_signal=(record.signal or 0) if record else 0,
        recorded=record is not None,
        device=record.detail or record.reason if record and record.reason not in _ORDERLY else "",
        shutdown=shutdown,
        console=console.tail(directory / layout.CONSOLE_FILE),
        log=log,
    )
