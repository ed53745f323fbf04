"""Log records: lines for people on a terminal, JSON objects everywhere else.

Ids of the run, box and call under way travel in `log_fields`, a `ContextVar`, so that no
log call has to repeat them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime

log_fields: ContextVar[Mapping[str, str]] = ContextVar("log_fields", default={})  # noqa: B039 - never mutated

LEVELS = ("debug", "info", "warning", "error")


@contextlib.contextmanager
def log_context(**fields: str) -> Iterator[None]:
    """Add `fields` to every record logged inside the block, by this task and its children."""
    token = log_fields.set({**log_fields.get(), **fields})
    try:
        yield
    finally:
        log_fields.reset(token)


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, logger, message, ids, traceback."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **log_fields.get(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class LineFormatter(logging.Formatter):
    """One readable line per record."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line: time, level, message, ids."""
        ids = " ".join(f"{key}={value}" for key, value in log_fields.get().items())
        clock = datetime.fromtimestamp(record.created, UTC).astimezone().strftime("%H:%M:%S")
        line = f"{clock} {record.levelname.lower():7} {record.getMessage()}" + (f"  [{ids}]" if ids else "")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up(service: str, level: str = "info") -> None:
    """Send all records of `level` and above to stderr in the format that fits it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter() if sys.stderr.isatty() else JsonFormatter(service))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
