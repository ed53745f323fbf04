"""Where the embedded stack keeps its files, and how its services are started: pure data."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.common.address import Address
from services.common.paths import Paths, private_dir

# In order of start; they stop in the opposite order.
SERVICES = ("imager", "hypervisor", "orchestrator")

# What the services may see of the environment of the client that started them. Everything
# else, API keys above all, stays with that client.
_PASSED_PREFIXES = ("VOIDBOX_", "VOID_BOX_", "XDG_", "OTEL_", "LC_")
_PASSED = frozenset({
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "PYTHONPATH", "DOCKER_CONFIG", "REGISTRY_AUTH_FILE",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY",
    "http_proxy", "https_proxy", "no_proxy", "all_proxy", "GRPC_VERBOSITY", "GRPC_TRACE",
    "NODE_EXTRA_CA_CERTS", "npm_config_registry", "NPM_CONFIG_REGISTRY", "npm_config_userconfig",
    "NPM_CONFIG_USERCONFIG",
})  # fmt: skip
_CHOICES = ("VOID_BOX_KERNEL", "VOID_BOX_INITRAMFS", "VOIDBOX_CONFIG")
# Belong to clients: where they find a stack, and how it lets them in.
_HELD_BACK = frozenset(("VOIDBOX_ADDRESS", "VOIDBOX_TOKEN_FILE"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The stack that belongs to one state directory."""

    state: Path
    cache: Path
    runtime: Path

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Layout:
        """The stack of the directories that `env` names."""
        paths = Paths.from_env(env)
        return cls(
            state=paths.state.absolute(), cache=paths.cache.absolute(), runtime=paths.runtime.absolute()
        )

    def at(self, runtime: Path) -> Layout:
        """The same stack with its sockets in `runtime`."""
        return dataclasses.replace(self, runtime=runtime)

    def prepare(self) -> None:
        """Make the directories, private to this user.

        Raises:
            WrongState: one of them is another user's or no directory.
        """
        for path in (self.state, self.cache, self.runtime, self.state / "log", self.tmp):
            private_dir(path)

    def socket(self, service: str) -> Path:
        """Where `service` listens."""
        return self.runtime / f"{service}.sock"

    def address(self, service: str) -> Address:
        """Where `service` listens, as an address.

        Raises:
            InvalidInput: the runtime directory's path is too long for a socket.
        """
        return Address.parse(f"unix:{self.socket(service)}")

    @property
    def control(self) -> Path:
        """Socket of the supervisor."""
        return self.runtime / "stack.sock"

    @property
    def record(self) -> Path:
        """Who runs: written by the supervisor, read when it does not answer any more."""
        return self.state / "stack.json"

    @property
    def start_lock(self) -> Path:
        """Held while somebody starts or removes the stack."""
        return self.state / "start.lock"

    @property
    def stack_lock(self) -> Path:
        """Held by the supervisor as long as it lives."""
        return self.state / "stack.lock"

    @property
    def tmp(self) -> Path:
        """Temporary files of the services; emptied when the stack stops."""
        return self.state / "tmp"

    def log(self, name: str) -> Path:
        """Log file of a service or of the "supervisor"."""
        return self.state / "log" / f"{name}.log"

    def argv(self, service: str) -> list[str]:
        """The command line of `service`."""
        words = [sys.executable, "-P", "-m", f"services.{service}", "--listen", str(self.address(service))]
        if service == "orchestrator":
            for peer in ("imager", "hypervisor"):
                words += [f"--{peer}", str(self.address(peer))]
        return words

    @staticmethod
    def choices(env: Mapping[str, str]) -> dict[str, str]:
        """What decides about boxes and can only be said to the services when they start."""
        return {name: env[name] for name in _CHOICES if env.get(name)}

    def service_env(self, env: Mapping[str, str]) -> dict[str, str]:
        """The environment of the services, from that of the client that starts the stack."""
        passed = {
            key: value
            for key, value in env.items()
            if (key in _PASSED or key.startswith(_PASSED_PREFIXES)) and key not in _HELD_BACK
        }
        return passed | {
            "VOIDBOX_STATE_DIR": str(self.state),
            "VOIDBOX_CACHE_DIR": str(self.cache),
            "VOIDBOX_RUNTIME_DIR": str(self.runtime),
            "TMPDIR": str(self.tmp),
            # gRPC's fork handlers cost time and can hang a service that starts children.
            "GRPC_ENABLE_FORK_SUPPORT": "0",
        }
