"""Files in which programs keep rotating tokens: Claude Code's, Codex's, and a plain layout of our own.

Everything in a file that is not about the tokens stays as it is. A file is replaced whole, so a reader
needs no lock.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import datetime
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from services.common.errors import Corrupt, NotFound

Layout = Literal["plain", "claude", "codex"]

MAX_BYTES = 1 << 20
_LOGIN: Mapping[Layout, str] = {
    "plain": "get a new token and write it there",
    "claude": "log in on the host with `claude auth login`",
    "codex": "log in on the host with `codex login`",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a file says.

    Attributes:
        access: The token that requests carry.
        refresh: What gets the next one; empty if nothing does.
        expires: Seconds since 1970; 0 if it is not known.
        headers: Headers that go with the token.
    """

    access: str = field(repr=False)
    refresh: str = field(default="", repr=False)
    expires: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


class TokenFile:
    """The file of one login.

    Args:
        path: The file.
        layout: Whose it is.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        self.cure = _LOGIN[layout]

    def read(self) -> Tokens:
        """What it says now.

        Raises:
            NotFound: there is no file, or no token in it.
            Corrupt: it is not of that layout.
        """
        return self._tokens(self._document())

    def _document(self) -> dict[str, Any]:
        try:
            with self.path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except FileNotFoundError as error:
            raise NotFound(f"there is no {self.path}; {self.cure}", path=self.path) from error
        except OSError as error:
            raise NotFound(f"{self.path} cannot be read: {error.strerror}", path=self.path) from error
        try:
            document = json.loads(data)
        except ValueError as error:
            raise Corrupt(f"{self.path} is not JSON; {self.cure}", path=self.path) from error
        if not isinstance(document, dict):
            raise Corrupt(f"{self.path} is not a JSON object; {self.cure}", path=self.path)
        return document

    def _tokens(self, document: Mapping[str, Any]) -> Tokens:
        part = document
        if self.layout == "claude":
            part = _object(document, "claudeAiOauth")
            access, refresh = part.get("accessToken"), part.get("refreshToken")
            expires = _number(part.get("expiresAt")) / 1000
            headers: dict[str, str] = {}
        else:
            if self.layout == "codex":
                part = _object(document, "tokens")
            access, refresh = part.get("access_token"), part.get("refresh_token")
            expires = _number(part.get("expires_at")) or _expiry(access)
            account = part.get("account_id")
            headers = {"chatgpt-account-id": account} if isinstance(account, str) and account else {}
        if not isinstance(access, str) or not access:
            raise NotFound(f"{self.path} has no token; {self.cure}", path=self.path)
        return Tokens(
            access=access,
            refresh=refresh if isinstance(refresh, str) else "",
            expires=expires,
            headers=headers,
        )

    def write(self, answer: Mapping[str, Any], now: float) -> Tokens:
        """Store what a token endpoint has answered (RFC 6749 §5.1); what it leaves out stays.

        Raises:
            OSError: it could not be stored.
        """
        document = self._document()
        lifetime = _number(answer.get("expires_in"))
        if self.layout == "claude":
            part = document["claudeAiOauth"]
            part["accessToken"] = answer["access_token"]
            part["refreshToken"] = answer.get("refresh_token") or part.get("refreshToken")
            part["expiresAt"] = int((now + lifetime) * 1000) if lifetime else 0
            if isinstance(answer.get("scope"), str):
                part["scopes"] = answer["scope"].split()
        else:
            part = document["tokens"] if self.layout == "codex" else document
            for key in ("access_token", "refresh_token", "id_token"):
                if answer.get(key):
                    part[key] = answer[key]
            if self.layout == "plain":
                part["expires_at"] = now + lifetime if lifetime else 0
            else:
                when = datetime.datetime.fromtimestamp(now, datetime.UTC)
                document["last_refresh"] = when.isoformat().replace("+00:00", "Z")
        self._replace(json.dumps(document, indent=2).encode())
        return self._tokens(document)

    def _replace(self, data: bytes) -> None:
        target = Path(os.path.realpath(self.path))
        before = target.stat()
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(descriptor, before.st_mode & 0o600)
                if os.geteuid() == 0:
                    os.fchown(descriptor, before.st_uid, before.st_gid)
                os.fsync(descriptor)
            os.replace(name, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _object(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = document.get(key)
    return part if isinstance(part, dict) else {}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def _expiry(token: object) -> float:
    """`exp` of a JWT (RFC 7519 §4.1.4); 0 if it is none. It is a hint, so its signature does not matter."""
    parts = token.split(".") if isinstance(token, str) else []
    if len(parts) != 3:
        return 0.0
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, binascii.Error):
        return 0.0
    return _number(claims.get("exp")) if isinstance(claims, dict) else 0.0
