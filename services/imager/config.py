"""Settings of the imager."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.common.config import setting
from services.imager.limits import GIB, Limits
from services.imager.registry import RegistrySettings


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
            auth_files=tuple(self._auth_files(env)),
        )

    def _auth_files(self, env: Mapping[str, str]) -> list[Path]:
        """In the order of containers-auth.json(5)."""
        files = [self.auth_file] if self.auth_file else []
        if env.get("XDG_RUNTIME_DIR"):
            files.append(Path(env["XDG_RUNTIME_DIR"]) / "containers/auth.json")
        home = Path(env.get("HOME") or "/")
        config_home = Path(env["XDG_CONFIG_HOME"]) if env.get("XDG_CONFIG_HOME") else home / ".config"
        return [
            *files,
            config_home / "containers/auth.json",
            (self.docker_config or home / ".docker") / "config.json",
        ]
