"""Where the host has a credential: a value that it was given, a file, a command's output, a keyring."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from services.common.errors import InvalidInput, NotFound
from services.common.process import run
from services.hypervisor.egress.oauth import digest
from services.hypervisor.egress.secret import Secret

# `gcloud auth print-access-token` takes 2 s, a hardware token waits for a finger.
COMMAND_SECONDS: Final = 60.0
# What a command has said counts this long, or until a server refuses it.
COMMAND_KEPT: Final = 300.0
MAX_BYTES: Final = 64 << 10


class Source(Protocol):
    """Gives one credential."""

    async def get(self, rejected: bytes = b"") -> Secret:
        """The credential now.

        Args:
            rejected: SHA-256 of a value that a server has refused.

        Raises:
            VoidboxError: there is none, with the cure.
        """
        ...


class ValueSource:
    """A value that is known."""

    def __init__(self, value: str) -> None:
        self._secret = Secret(value=value)

    async def get(self, rejected: bytes = b"") -> Secret:
        """The value."""
        return self._secret


class FileSource:
    """A file's content, without the line end after it; read each time, so it may be rotated."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def get(self, rejected: bytes = b"") -> Secret:
        """The file's content."""
        try:
            data = await asyncio.to_thread(self._read)
        except OSError as error:
            raise NotFound(f"{self._path} cannot be read: {error.strerror}", path=self._path) from error
        return Secret(value=_text(data, str(self._path)), renewable=True)

    def _read(self) -> bytes:
        with self._path.open("rb") as file:
            return file.read(MAX_BYTES + 1)


class CommandSource:
    """What a program of the host prints; run again when it is old or was refused."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = tuple(argv)
        self._single = asyncio.Lock()
        self._known: Secret | None = None
        self._when = 0.0

    async def get(self, rejected: bytes = b"") -> Secret:
        """The program's output."""
        async with self._single:
            known = self._known
            fresh = time.monotonic() - self._when < COMMAND_KEPT
            if known is not None and fresh and digest(known.value) != rejected:
                return known
            out = await run(self._argv, seconds=COMMAND_SECONDS, group=True)
            self._known = Secret(value=_text(out, self._argv[0]), renewable=True)
            self._when = time.monotonic()
            return self._known


class KeyringSource(CommandSource):
    """An entry of the desktop's keyring (Secret Service), or of the macOS keychain."""

    def __init__(self, service: str, user: str) -> None:
        if sys.platform == "darwin":
            argv = ["security", "find-generic-password", "-w", "-s", service, *(["-a", user] if user else [])]
        else:
            argv = ["secret-tool", "lookup", "service", service, *(["username", user] if user else [])]
        super().__init__(argv)


def _text(data: bytes, place: str) -> str:
    if len(data) > MAX_BYTES:
        raise InvalidInput(f"{place} has more than {MAX_BYTES} bytes; that is no credential")
    try:
        text = data.decode("ascii").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{place} does not give a credential: it is not text in ASCII") from error
    if not text:
        raise NotFound(f"{place} gives an empty credential")
    return text
