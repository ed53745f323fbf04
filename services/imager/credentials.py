"""User names and passwords for registries, from docker's and podman's configuration files and helpers.

Formats: docker's `config.json` ("auths", "credHelpers", "credsStore") and containers-auth.json(5),
whose keys may carry a repository prefix; `.dockercfg`, which is "auths" alone. Helpers are programs
`docker-credential-NAME` (docker-credential-helpers, "get"): they come from a file of the user, not
from an image, and get a time limit and no shell.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from services.common.errors import VoidboxError
from services.common.process import run
from services.imager.reference import DOCKER_HUB, RegistryReference

log = logging.getLogger(__name__)

_HELPER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_HUB_SERVER: Final = "https://index.docker.io/v1/"  # what docker calls its own registry when it asks helpers
_IDENTITY: Final = "<token>"  # a helper's user name when its secret is an identity token
_NOT_FOUND: Final = "credentials not found"


@dataclass(frozen=True, slots=True)
class Credentials:
    """One login; no secret shows in a repr.

    Attributes:
        identity_token: Exchanged for an access token instead of name and password (OAuth2 refresh token).
        registry_token: Sent as it is.
    """

    user: str
    password: str = field(repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)


class Keyring:
    """Finds logins. Everything here blocks, since a helper may have to be asked.

    Args:
        files: Where to look; the first that has a login for an image wins.
        helper_env: Environment of credential helpers.
        helper_seconds: Time that a helper has.

    Attributes:
        trouble: What went wrong with helpers, to be appended to an error; "" if nothing.
    """

    def __init__(
        self, files: Iterable[Path], helper_env: Mapping[str, str] | None = None, helper_seconds: float = 30.0
    ) -> None:
        self._files = tuple(files)
        self._helper_env = dict(helper_env or {})
        self._helper_seconds = helper_seconds
        self.trouble = ""

    def find(self, reference: RegistryReference) -> Credentials | None:
        """The login for `reference` from the first file that has one; the longest matching prefix wins.

        In a file, a helper named for the registry comes before a login, and that before the store
        for all registries. A helper that fails is logged and left out: the image may be public.
        """
        keys = _keys(reference)
        for path in self._files:
            document = _load(path)
            auths, helpers = document.get("auths"), document.get("credHelpers")
            entries = auths if isinstance(auths, dict) else {}
            named = helpers if isinstance(helpers, dict) else {}
            helper = next((named[key] for key in keys if named.get(key)), None)
            found = self._ask(helper, reference, path) if helper else None
            for key in keys:
                found = found or _decode(entries.get(key), path)
            if found is None and document.get("credsStore"):
                found = self._ask(document["credsStore"], reference, path)
            if found:
                return found
        return None

    def _ask(self, helper: object, reference: RegistryReference, path: Path) -> Credentials | None:
        if not isinstance(helper, str) or not _HELPER.fullmatch(helper):
            self._failed(f"{path}: {str(helper)[:60]!r} is no name of a credential helper")
            return None
        program = f"docker-credential-{helper}"
        server = _HUB_SERVER if reference.registry == DOCKER_HUB else reference.registry
        try:
            out = asyncio.run(
                run(
                    [program, "get"],
                    env=self._helper_env,
                    seconds=self._helper_seconds,
                    stdin=server.encode() + b"\n",
                    group=True,
                )
            )
            answer = json.loads(out)
            user, secret = answer["Username"], answer["Secret"]
        except VoidboxError as error:
            if _NOT_FOUND not in error.message:
                self._failed(f"{path}: {error.message}")
            return None
        except (ValueError, KeyError, TypeError, RecursionError):
            self._failed(f"{path}: {program} gives no sound answer")  # which may hold a secret
            return None
        if not isinstance(user, str) or not isinstance(secret, str) or not secret:
            return None
        return Credentials("", "", identity_token=secret) if user == _IDENTITY else Credentials(user, secret)

    def _failed(self, what: str) -> None:
        log.warning("%s; going on without it", what)
        self.trouble += f" ({what})"


def find_credentials(files: Iterable[Path], reference: RegistryReference) -> Credentials | None:
    """As `Keyring.find`, with a minimal environment for helpers."""
    return Keyring(files).find(reference)


def _keys(reference: RegistryReference) -> list[str]:
    """What a file may call the registry, most specific first."""
    parts = reference.repository.split("/")
    keys = ["/".join([reference.registry, *parts[:count]]) for count in range(len(parts), -1, -1)]
    hosts = [reference.registry]
    if reference.registry == DOCKER_HUB:
        keys += ["https://index.docker.io/v1/", "index.docker.io/v1/", "index.docker.io", reference.host]
    for host in hosts:
        for path in ("", "/", "/v1/", "/v2/"):
            keys += [f"https://{host}{path}", f"http://{host}{path}", f"{host}{path}"]
    return keys


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s: cannot be read, its logins are not used: %s", path, error)
        return {}
    if not isinstance(document, dict):
        return {}
    return {"auths": document} if path.name == ".dockercfg" else document


def _decode(entry: object, path: Path) -> Credentials | None:
    if not isinstance(entry, dict):
        return None
    registry_token, identity_token = entry.get("registrytoken"), entry.get("identitytoken")
    if isinstance(registry_token, str) and registry_token:
        return Credentials("", "", registry_token=registry_token)
    user, password = entry.get("username"), entry.get("password")
    encoded = entry.get("auth")
    if not (isinstance(user, str) and isinstance(password, str) and user):
        if not isinstance(encoded, str) or not encoded:
            user = password = ""
        else:
            try:
                user, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
            except (binascii.Error, UnicodeDecodeError):
                log.warning("%s: an entry's auth is not base64 of user:password; it is not used", path)
                user = password = ""
    password = password.rstrip("\0")
    if isinstance(identity_token, str) and identity_token:
        return Credentials(user, "", identity_token=identity_token)
    return Credentials(user, password) if user and password else None
