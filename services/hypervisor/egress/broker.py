"""Hands credentials to gateways, each only those of its own box's rules, over a unix socket.

A gateway is a confined process that parses what a box sends; it must not be able to ask for more than
its box may use. So it proves which box it serves by a token that was made for that box.

One JSON object a line, both ways: `{"id", "token", "rule", "host", "rejected"}`, `{"id", "value",
"headers", "renewable"}` or `{"id", "error", "reason"}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from services.common.egress.names import matches
from services.common.errors import Denied, Unavailable, VoidboxError
from services.hypervisor.egress.oauth import digest
from services.hypervisor.egress.secret import Secret
from services.hypervisor.egress.sources import Source

MAX_LINE: Final = 256 << 10
# A source may run a command, and a renewal may wait for one that another process makes.
ANSWER_SECONDS: Final = 180.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A credential that a box may use, and where."""

    hosts: tuple[str, ...]
    source: Source


class Broker:
    """Knows the boxes and what each may use."""

    def __init__(self) -> None:
        self._boxes: dict[bytes, Mapping[str, Grant]] = {}
        self._serving: set[asyncio.Task[None]] = set()

    def admit(self, grants: Mapping[str, Grant], token: str = "") -> str:
        """Let a box use `grants`; its token, new unless one is given."""
        token = token or secrets.token_hex(32)
        self._boxes[digest(token)] = dict(grants)
        return token

    def dismiss(self, token: str) -> None:
        """The box is gone; its token counts no more."""
        self._boxes.pop(digest(token), None)

    async def get(self, token: str, rule: str, host: str, rejected: bytes) -> Secret:
        """A credential for a box.

        Raises:
            Denied: the box may not use it there.
        """
        # By digest: how long a look-up takes says nothing about the token.
        grant = self._boxes.get(digest(token), {}).get(rule)
        if grant is None or not any(matches(pattern, host) for pattern in grant.hosts):
            raise Denied(f"the box may not use credential {rule!r} for {host}", reason="NOT_GRANTED")
        return await grant.source.get(rejected)

    def serve(self, sock: socket.socket) -> asyncio.Task[None]:
        """Answer on a connected socket, in the background, until it or the broker ends."""
        task = asyncio.create_task(self._serve(sock))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        return task

    async def close(self) -> None:
        """Stop answering."""
        tasks = list(self._serving)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=MAX_LINE)
        try:
            while line := await reader.readline():
                writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                await writer.drain()
        except (OSError, ValueError):  # ValueError: a line that never ends
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            asked = json.loads(line)
            token, rule, host = (str(asked[key]) for key in ("token", "rule", "host"))
            rejected = bytes.fromhex(asked.get("rejected", ""))
            number = str(asked.get("id", ""))
        except (ValueError, KeyError, TypeError, AttributeError):
            return {"error": "the question is malformed", "reason": "MALFORMED"}
        try:
            secret = await self.get(token, rule, host, rejected)
        except VoidboxError as error:
            return {"id": number, "error": error.message, "reason": error.reason}
        return {
            "id": number,
            "value": secret.value,
            "headers": dict(secret.headers),
            "renewable": secret.renewable,
        }


class BrokerClient:
    """What a gateway has: its box's token and a socket to the broker. One question at a time.

    Args:
        sock: Connected to a broker; owned from now on.
        token: The box's token.
    """

    def __init__(self, sock: socket.socket, token: str) -> None:
        self._sock = sock
        self._token = token
        self._lock = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(self, rule: str, host: str, rejected: str = "") -> Secret:
        """As CredentialSource."""
        number = secrets.token_hex(8)
        question = {
            "id": number,
            "token": self._token,
            "rule": rule,
            "host": host,
            "rejected": hashlib.sha256(rejected.encode()).hexdigest() if rejected else "",
        }
        asking = asyncio.create_task(self._ask(number, json.dumps(question).encode() + b"\n"))
        # Whoever asks may be cancelled; the answer must be read all the same, or the next one gets it.
        answer = await asyncio.shield(asking)
        if "error" in answer:
            raise Denied(str(answer["error"]), reason=str(answer.get("reason", "")))
        return Secret(value=answer["value"], headers=answer["headers"], renewable=answer["renewable"])

    async def _ask(self, number: str, question: bytes) -> dict[str, Any]:
        async with self._lock:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    if self._streams is None:
                        self._streams = await asyncio.open_unix_connection(sock=self._sock, limit=MAX_LINE)
                    reader, writer = self._streams
                    writer.write(question)
                    await writer.drain()
                    while line := await reader.readline():
                        answer = json.loads(line)
                        # A gateway that was here before may have gone without its answer.
                        if isinstance(answer, dict) and answer.get("id") == number:
                            return answer
            except (OSError, ValueError, TimeoutError) as error:
                raise Unavailable(f"the host's credentials cannot be had: {error}") from error
        raise Unavailable("the host's credentials cannot be had: the service has ended")

    async def close(self) -> None:
        """Close the connection."""
        if self._streams is None:
            self._sock.close()
            return
        writer = self._streams[1]
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
