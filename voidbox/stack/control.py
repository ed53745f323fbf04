"""The client's side of the supervisor's control socket; blocking, standard library only."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A status with the log tails of three failed services is some 30 kB.
_LIMIT_BYTES = 1024 * 1024


class NoAnswer(Exception):
    """Nobody listens on the control socket, or it ended before it answered."""


def ask(
    path: Path,
    request: dict[str, Any],
    *,
    seconds: float,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Send one request and return the answer.

    Args:
        path: The control socket.
        request: The request, see `voidbox.stack.supervisor`.
        seconds: Longest silence.
        progress: Called with each line of progress before the answer.

    Raises:
        NoAnswer: nobody listens, or the peer closed without an answer.
        TimeoutError: it kept silent for too long.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(seconds)
            connection.connect(str(path))
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as lines:
                while line := lines.readline(_LIMIT_BYTES):
                    message: dict[str, Any] = json.loads(line)
                    if message.get("kind") != "progress":
                        return message
                    progress(str(message.get("text", "")))
    except TimeoutError:
        raise
    except (OSError, ValueError) as error:
        raise NoAnswer(f"{path}: {error}") from error
    raise NoAnswer(f"{path}: closed without an answer")
