"""How registries are talked to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrySettings:
    """How registries are talked to.

    Attributes:
        connect_seconds: Until a connection stands.
        read_seconds: Until the next byte of an answer.
        attempts: Of each request, and of each blob in all.
        backoff_seconds: Before the second attempt; doubles.
        slow_bytes_per_second: A download that stays below this for `slow_seconds` is broken off.
        slow_seconds: See above.
        parallel_layers: Downloads at once.
        proxies: By scheme, as `requests` wants them.
        no_proxy: Hosts that are not reached by proxy, in the usual form.
        ca_bundle: File with the certificates to trust, or None for the system's.
        certs_dirs: Directories with further certificates for one registry each, as in
            containers-certs.d(5): `HOST:PORT/*.crt`, and `*.cert` with `*.key` to show it.
        auth_files: Where logins are looked up.
        helper_env: Environment of credential helpers.
        helper_seconds: A credential helper that takes longer is ended; some open a browser.
        registries_conf: Files of containers-registries.conf(5); later ones win.
    """

    connect_seconds: float = 10.0
    read_seconds: float = 30.0
    attempts: int = 4
    backoff_seconds: float = 0.5
    slow_bytes_per_second: int = 1024
    slow_seconds: float = 30.0
    parallel_layers: int = 4
    proxies: Mapping[str, str] = field(default_factory=dict, repr=False)  # may hold a password
    no_proxy: str = ""
    ca_bundle: Path | None = None
    certs_dirs: tuple[Path, ...] = ()
    auth_files: tuple[Path, ...] = ()
    helper_env: Mapping[str, str] = field(default_factory=dict, repr=False)
    helper_seconds: float = 30.0
    registries_conf: tuple[Path, ...] = ()
