"""The one owner of a rotating token: however many boxes need a new one, it is renewed once.

A server that rotates refresh tokens takes a second use of one for theft, and revokes the whole login
(RFC 9700 §4.14.2). So within a process one call renews and the others wait; between processes a lock
on a file beside the token file does the same, and whoever gets it looks first whether the work is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from typing import IO, Any, Final, Literal

from services.common.errors import Unauthenticated, Unavailable
from services.hypervisor.egress.secret import Secret
from services.hypervisor.egress.token_file import TokenFile, Tokens

# Renewed this long before it expires, so that a request under way does not outlive its token.
EARLY_SECONDS: Final = 120.0
# A token that was made just now and is refused is not made better by another one.
YOUNG_SECONDS: Final = 30.0
# Token endpoints answer in under a second; the others wait for whoever has the lock.
ANSWER_SECONDS: Final = 30.0
_MAX_ANSWER: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where tokens are renewed.

    Attributes:
        url: The token endpoint.
        client_id: The program that the login was made for; not a secret (RFC 6749 §2.2).
        encoding: What its body is.
        scope: Asked for again, if the endpoint wants that.
    """

    url: str
    client_id: str
    encoding: Literal["json", "form"] = "json"
    scope: str = ""


class OAuthOwner:
    """Gives a login's access token, renewed when that is needed.

    Args:
        file: Where the login is kept.
        endpoint: Where it is renewed.
        trust: What the endpoint is checked against.
    """

    def __init__(self, file: TokenFile, endpoint: Endpoint, trust: ssl.SSLContext) -> None:
        self._file = file
        self._endpoint = endpoint
        self._opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=trust), _NoRedirect())
        self._single = asyncio.Lock()
        self._dead = b""
        self.renewals = 0

    async def get(self, rejected: bytes = b"") -> Secret:
        """The token as it is now.

        Args:
            rejected: SHA-256 of one that a server has refused.

        Raises:
            NotFound: nobody has logged in.
            Unauthenticated: the login has ended; the message says how to log in.
            Unavailable: the token has expired and its endpoint cannot be reached.
        """
        async with self._single:
            tokens = await asyncio.to_thread(self._current, rejected)
        return Secret(value=tokens.access, headers=tokens.headers, renewable=True)

    def _current(self, rejected: bytes) -> Tokens:
        tokens = self._file.read()
        if self._good(tokens, rejected):
            return tokens
        with self._alone():
            tokens = self._file.read()
            if self._good(tokens, rejected):
                return tokens
            return self._renew(tokens, rejected)

    def _good(self, tokens: Tokens, rejected: bytes) -> bool:
        if tokens.expires and tokens.expires < time.time() + EARLY_SECONDS:
            return False
        return not rejected or not hmac.compare_digest(digest(tokens.access), rejected) or self._young()

    def _young(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return 0 <= time.time() - os.stat(self._file.path).st_mtime < YOUNG_SECONDS
        return False

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        path = os.path.realpath(self._file.path) + ".lock"
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # a holder that dies lets go
            yield
        finally:
            os.close(descriptor)

    def _renew(self, tokens: Tokens, rejected: bytes) -> Tokens:
        if not tokens.refresh:
            raise Unauthenticated(f"the token in {self._file.path} has expired; {self._file.cure}")
        if digest(tokens.refresh) == self._dead:
            raise Unauthenticated(f"the login in {self._file.path} has ended; {self._file.cure}")
        try:
            answer = self._ask(tokens.refresh)
        except _Refused as error:
            again = self._file.read()
            if again.refresh != tokens.refresh:  # a program of the host's own was faster
                return again
            self._dead = digest(tokens.refresh)
            raise Unauthenticated(
                f"the login in {self._file.path} was not renewed ({error}); {self._file.cure}"
            ) from error
        except OSError as error:
            if time.time() < tokens.expires and not hmac.compare_digest(digest(tokens.access), rejected):
                return tokens  # it still counts for a moment
            raise Unavailable(f"{self._endpoint.url} cannot be reached: {error}; try again later") from error
        self.renewals += 1
        return self._file.write(answer, time.time())

    def _ask(self, refresh: str) -> Mapping[str, Any]:
        fields = {
            "grant_type": "refresh_token",
            "refresh_token": refresh,
            "client_id": self._endpoint.client_id,
        }
        if self._endpoint.scope:
            fields["scope"] = self._endpoint.scope
        if self._endpoint.encoding == "json":
            body, kind = json.dumps(fields).encode(), "application/json"
        else:
            body, kind = urllib.parse.urlencode(fields).encode(), "application/x-www-form-urlencoded"
        headers = {"content-type": kind, "accept": "application/json", "user-agent": "voidbox"}
        request = urllib.request.Request(self._endpoint.url, body, headers)  # noqa: S310 (a rule's own URL)
        try:
            with self._opener.open(request, timeout=ANSWER_SECONDS) as response:
                data = response.read(_MAX_ANSWER)
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (400, 401, 403):
                    raise _Refused(_reason(error)) from None
                raise OSError(f"it answered {error.code}") from None
        try:
            answer = json.loads(data)
        except ValueError as error:
            raise OSError("it did not answer with JSON") from error
        if not isinstance(answer, dict) or not isinstance(answer.get("access_token"), str):
            raise OSError("it answered without a token")
        return answer


class _Refused(Exception):
    """The endpoint does not take the refresh token."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A refresh token goes to its endpoint and nowhere else."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> None:
        """Not followed: the redirect becomes an error."""


def digest(secret: str) -> bytes:
    """By which a secret is named where it is not to be shown."""
    return hashlib.sha256(secret.encode()).digest()


def _reason(error: urllib.error.HTTPError) -> str:
    """The error code of RFC 6749 §5.2; nothing else of the answer, which may repeat the token."""
    with contextlib.suppress(ValueError, OSError):
        answer = json.loads(error.read(_MAX_ANSWER))
        code = answer.get("error") if isinstance(answer, dict) else None
        if code in (
            "invalid_grant",
            "invalid_request",
            "invalid_client",
            "unauthorized_client",
            "access_denied",
        ):
            return str(code)
    return f"status {error.code}"
