"""User names and passwords for registries, from docker's and podman's configuration files.

Formats: docker's `config.json` ("auths") and containers-auth.json(5), whose keys may carry a
repository prefix. Credential helpers are not asked in this version; a log line says so.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.imager.reference import DOCKER_HUB, RegistryReference

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Credentials:
    """One login; the password never shows in a repr."""

    user: str
    password: str = field(repr=False)


def find_credentials(files: Iterable[Path], reference: RegistryReference) -> Credentials | None:
    """The login for `reference` from the first file that has one; the longest matching prefix wins."""
    for path in files:
        document = _load(path)
        auths = document.get("auths")
        entries = auths if isinstance(auths, dict) else {}
        for key in _keys(reference):
            found = _decode(entries.get(key), path)
            if found:
                return found
        helpers = document.get("credHelpers")
        named = isinstance(helpers, dict) and any(key in helpers for key in _keys(reference))
        if named or (document.get("credsStore") and any(key in entries for key in _keys(reference))):
            log.warning(
                "%s: the login for %s is in a credential helper, which this version does not ask; "
                "write it into a file with: podman login --authfile FILE %s",
                path, reference.registry, reference.registry,
            )  # fmt: skip
    return None


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
    return document if isinstance(document, dict) else {}


def _decode(entry: object, path: Path) -> Credentials | None:
    if not isinstance(entry, dict):
        return None
    user, password = entry.get("username"), entry.get("password")
    if isinstance(user, str) and isinstance(password, str) and user:
        return Credentials(user, password)
    encoded = entry.get("auth")
    if not isinstance(encoded, str) or not encoded:
        return None
    try:
        user, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        log.warning("%s: an entry's auth is not base64 of user:password; it is not used", path)
        return None
    return Credentials(user, password.rstrip("\0")) if colon and user else None
