"""Answers a registry's challenge: HTTP Basic, or a bearer token fetched from where it says.

Distribution's "Token Authentication Specification" and "OAuth2 Token Authentication". A login is
looked up when it is asked for, and goes only to the registry and its token server.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

import requests

from services.common.errors import Denied, Unauthenticated
from services.imager.credentials import Credentials
from services.imager.reference import RegistryReference
from services.imager.retry import TRANSIENT_STATUSES, Transient, retry_after
from services.imager.session import Session

_CLIENT_ID: Final = "voidbox"
_CHALLENGE: Final = re.compile(
    r'([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))|([A-Za-z0-9_-]+)', re.ASCII
)
_TOKEN: Final = re.compile(r"[\x21-\x7e]{1,65536}")


class Authorizer:
    """The Authorization header for one repository of one registry. Safe to use from several threads.

    Args:
        plain: Whether a token server may be reached by plain HTTP.
        find_login: Asked once, when the registry wants a login.
    """

    def __init__(
        self,
        session: Session,
        reference: RegistryReference,
        *,
        plain: bool,
        find_login: Callable[[], Credentials | None],
    ) -> None:
        self._session, self._reference, self._plain = session, reference, plain
        self._find_login = find_login
        self._login: Credentials | None = None
        self._looked_up = False
        self._header = ""
        self._lock = threading.Lock()

    @property
    def header(self) -> str:
        """What worked last; "" at first."""
        return self._header

    def answer(self, challenge: str, refused: str) -> str:
        """The header that answers `challenge`; "" if nothing can.

        Args:
            challenge: The `WWW-Authenticate` header.
            refused: The header that was sent and not accepted, or "".

        Raises:
            Denied: the token server would be reached without TLS.
            Unauthenticated: the token server answers nonsense, or refuses the login.
            Transient: it may work later.
        """
        with self._lock:
            if self._header and self._header != refused:
                return self._header  # another thread was faster
            self._header = self._answer(parse_challenge(challenge))
            return self._header

    def _answer(self, offered: dict[str, dict[str, str]]) -> str:
        if "bearer" in offered:
            return self._bearer(offered["bearer"])
        login = self._find() if "basic" in offered else None
        return _basic(login) if login and login.user else ""

    def _find(self) -> Credentials | None:
        if not self._looked_up:
            self._login, self._looked_up = self._find_login(), True
        return self._login

    def _bearer(self, parameters: dict[str, str]) -> str:
        registry = self._reference.host
        realm = urlsplit(parameters.get("realm", ""))
        if realm.scheme not in (("http", "https") if self._plain else ("https",)) or not realm.hostname:
            raise Denied(
                f"the registry {registry} sends clients for a token to {realm.geturl()[:200]!r}, "
                "which is not https; no credentials were sent",
                reason="INSECURE_TOKEN_SERVER",
            )
        login = self._find()
        if login and login.registry_token:
            return f"Bearer {login.registry_token}"
        scope = parameters.get("scope") or f"repository:{self._reference.repository}:pull"
        service = {"service": parameters["service"]} if parameters.get("service") else {}
        if login and login.identity_token:
            form = {
                "grant_type": "refresh_token",
                "refresh_token": login.identity_token,
                "client_id": _CLIENT_ID,
                "scope": scope,
                **service,
            }
            response = self._session.post_secret(realm.geturl(), form)
        else:
            headers = {"Authorization": _basic(login)} if login else {}
            response = self._session.request(
                "GET", realm.geturl(), params={**service, "scope": scope}, headers=headers
            )
        return self._token(response, f"the token server {realm.hostname} of the registry {registry}", login)

    def _token(self, response: requests.Response, server: str, login: Credentials | None) -> str:
        if response.status_code in TRANSIENT_STATUSES:
            raise Transient(f"{server} answers {response.status_code}", retry_after(response))
        if response.status_code in (400, 401, 403):
            if login is None:
                return ""
            raise Unauthenticated(
                f"{self._reference}: {server} refuses the login of {login.user or 'the identity token'}; "
                f"log in again: docker login {self._reference.registry}",
                reason="REGISTRY_LOGIN",
            )
        try:
            document: Any = json.loads(response.content)
            token = document.get("token") or document.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        if response.status_code != 200 or not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise Unauthenticated(f"{server} gives no sound answer", reason="BAD_TOKEN_SERVER")
        return f"Bearer {token}"


def parse_challenge(text: str) -> dict[str, dict[str, str]]:
    """The schemes of a `WWW-Authenticate` header and their parameters (RFC 9110, 11.6.1); lower case."""
    found: dict[str, dict[str, str]] = {}
    parameters: dict[str, str] = {}
    for name, quoted, plain, scheme in _CHALLENGE.findall(text):
        if scheme:
            parameters = {}
            found.setdefault(scheme.lower(), parameters)
        else:
            parameters[name.lower()] = re.sub(r"\\(.)", r"\1", quoted) or plain
    return found


def _basic(login: Credentials) -> str:
    return "Basic " + base64.b64encode(f"{login.user}:{login.password}".encode()).decode()
