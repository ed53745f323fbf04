"""Settings of the imager."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.common.config import setting
from services.imager.limits import GIB, Limits
from services.imager.registry_settings import RegistrySettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Images: from registries and directories to disks, kernels and initramfs that boxes boot."""

    listen: str = setting("", "address to serve on; empty means unix:<runtime directory>/imager.sock")
    token_file: Path | None = setting(None, "file with the token that callers over TCP must send")
    log_level: str = setting(
        "info", "least severe record to log: debug, info, warning or error", env=("VOIDBOX_LOG",)
    )
    kernel: str = setting("", "kernel of boxes whose spec names none", env=("VOID_BOX_KERNEL",))
    initramfs: str = setting("", "initramfs that goes with it", env=("VOID_BOX_INITRAMFS",))
    max_unpacked_gib: int = setting(64, "refuse images that unpack to more GiB than this")
    registry_connect_seconds: float = setting(10.0, "time for a connection to a registry to stand")
    registry_read_seconds: float = setting(30.0, "time until a registry's next byte")
    registry_attempts: int = setting(4, "tries of each request to a registry")
    parallel_layers: int = setting(4, "layers downloaded at once")
    ca_bundle: Path | None = setting(
        None, "certificates to trust instead of the usual", env=("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
    )
    auth_file: Path | None = setting(None, "file with logins, tried first", env=("REGISTRY_AUTH_FILE",))
    docker_config: Path | None = setting(None, "directory of docker's config.json", env=("DOCKER_CONFIG",))
    http_proxy: str = setting("", "proxy for plain HTTP", env=("http_proxy",))
    https_proxy: str = setting("", "proxy for HTTPS", env=("https_proxy", "HTTPS_PROXY"))
    helper_seconds: float = setting(30.0, "time that a credential helper has")
    registries_conf: Path | None = setting(
        None,
        "file of containers-registries.conf(5) with mirrors, instead of the user's or system's",
        env=("CONTAINERS_REGISTRIES_CONF",),
    )
    no_proxy: str = setting("", "hosts reached without a proxy", env=("no_proxy", "NO_PROXY"))

    def limits(self) -> Limits:
        """What images may make the imager do."""
        return Limits(unpacked_bytes=self.max_unpacked_gib * GIB)

    def registry(self, env: Mapping[str, str]) -> RegistrySettings:
        """How registries are talked to; `env` tells where docker and podman keep logins."""
        pairs = (("http", self.http_proxy), ("https", self.https_proxy))
        return RegistrySettings(
            connect_seconds=self.registry_connect_seconds,
            read_seconds=self.registry_read_seconds,
            attempts=self.registry_attempts,
            parallel_layers=self.parallel_layers,
            proxies={scheme: proxy for scheme, proxy in pairs if proxy},
            no_proxy=self.no_proxy,
            ca_bundle=self.ca_bundle,
            certs_dirs=(
                _config_home(env) / "containers/certs.d",
                Path("/etc/containers/certs.d"),
                Path("/etc/docker/certs.d"),
            ),
            auth_files=tuple(self._auth_files(env)),
            helper_env={key: value for key, value in env.items() if not key.startswith("VOIDBOX_")},
            helper_seconds=self.helper_seconds,
            registries_conf=self._registries_conf(env),
        )

    def _auth_files(self, env: Mapping[str, str]) -> list[Path]:
        """In the order of containers-auth.json(5)."""
        files = [self.auth_file] if self.auth_file else []
        if env.get("XDG_RUNTIME_DIR"):
            files.append(Path(env["XDG_RUNTIME_DIR"]) / "containers/auth.json")
        files.append(Path(f"/run/containers/{os.getuid()}/auth.json"))
        return [
            *files,
            _config_home(env) / "containers/auth.json",
            (self.docker_config or _home(env) / ".docker") / "config.json",
            _home(env) / ".dockercfg",
        ]

    def _registries_conf(self, env: Mapping[str, str]) -> tuple[Path, ...]:
        """In the order of containers-registries.conf(5): one file, then what is dropped in."""
        if self.registries_conf is not None:
            return (self.registries_conf,)
        system, own = Path("/etc/containers"), _config_home(env) / "containers"
        main = next((place for place in (own, system) if (place / "registries.conf").is_file()), system)
        dropped = {
            path.name: path
            for place in (system, own)  # of files with one name the user's counts
            for path in sorted((place / "registries.conf.d").glob("*.conf"))
        }
        return (main / "registries.conf", *(dropped[name] for name in sorted(dropped)))


def _home(env: Mapping[str, str]) -> Path:
    return Path(env.get("HOME") or "/")


def _config_home(env: Mapping[str, str]) -> Path:
    return Path(env["XDG_CONFIG_HOME"]) if env.get("XDG_CONFIG_HOME") else _home(env) / ".config"
