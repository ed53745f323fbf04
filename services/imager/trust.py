"""Which certificates a registry is trusted by, and which it is shown."""

from __future__ import annotations

import functools
import ssl
from pathlib import Path
from typing import Any

import certifi
from requests.adapters import HTTPAdapter

from services.common.errors import InvalidInput
from services.imager.registry_settings import RegistrySettings


class TlsAdapter(HTTPAdapter):
    """Speaks HTTPS by one `ssl` context, instead of by the certificates that `requests` brings."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__()

    def init_poolmanager(self, *positional: Any, **named: Any) -> Any:
        """As the base class, with our context."""
        return super().init_poolmanager(*positional, **named, ssl_context=self._context)  # type: ignore[no-untyped-call, unused-ignore]

    def proxy_manager_for(self, proxy: str, **named: Any) -> Any:
        """As the base class, with our context."""
        return super().proxy_manager_for(proxy, **named, ssl_context=self._context)  # type: ignore[no-untyped-call, unused-ignore]

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Nothing: the context says it all; the base class would add certificates of its own."""


def context_for(settings: RegistrySettings, host: str) -> ssl.SSLContext:
    """The context for connections to `host`, which may carry a port.

    Raises:
        InvalidInput: a file of certificates or keys cannot be used.
    """
    found = [path for place in settings.certs_dirs for path in _files(place / host)]
    if not found:
        return _usual(settings.ca_bundle)
    context = _new(settings.ca_bundle)
    for path in found:
        try:
            if path.suffix == ".crt":
                context.load_verify_locations(path)
            else:
                context.load_cert_chain(path, path.with_suffix(".key"))
        except (OSError, ssl.SSLError) as error:
            raise _unusable(path, error) from error
    return context


def _files(place: Path) -> list[Path]:
    try:
        return sorted(path for path in place.iterdir() if path.suffix in (".crt", ".cert"))
    except OSError:
        return []


@functools.lru_cache(4)  # reading the system's certificates takes some 10 ms
def _usual(bundle: Path | None) -> ssl.SSLContext:
    return _new(bundle)


def _new(bundle: Path | None) -> ssl.SSLContext:
    try:
        if bundle is not None:
            return ssl.create_default_context(cafile=bundle)
        paths = ssl.get_default_verify_paths()
        system = paths.cafile or paths.capath
        return ssl.create_default_context(cafile=None if system else certifi.where())
    except (OSError, ssl.SSLError) as error:
        raise _unusable(bundle or Path(certifi.where()), error) from error


def _unusable(path: Path, error: Exception) -> InvalidInput:
    return InvalidInput(f"{path} cannot be used as certificate: {error}", reason="BAD_CERTIFICATE", path=path)
