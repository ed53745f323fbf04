"""What the hypervisor tells a box's shim, and what the shim leaves behind; JSON both ways.

Imports little: the shim starts with it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from services.hypervisor.confine import Namespaces

MAX_CONFIG_BYTES = 1 << 20
STATS = struct.Struct("<QQ")
MAX_ID = (1 << 32) - 2
FIRST_CID, LAST_CID = 3, (1 << 32) - 2
"""0 to 2 are the hypervisor's, local and the host's; the highest is VMADDR_CID_ANY."""

Transport = Literal["vhost-user", "vhost-vsock"]
TRANSPORTS: tuple[Transport, ...] = ("vhost-user", "vhost-vsock")

Reason = Literal["exited", "terminated", "spawn-failed", "setup-failed", "device-failed", "memory-lost"]


class ConfigInvalid(ValueError):
    """The configuration is not one the shim can run; the message names the field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShimConfig:
    """Everything the shim needs. Descriptors are numbers that it inherits.

    Attributes:
        argv: QEMU's command line; the first word is its absolute path.
        env: QEMU's whole environment.
        uid: User to become, or None to stay who it is.
        gid: Group to become; given exactly if `uid` is.
        groups: Supplementary groups to keep then (the one that may open `/dev/kvm`).
        pass_fds: What QEMU inherits, under the same numbers.
        writable_fds: Those of them that it may open again for writing, or write below.
        file_fds: Files among `pass_fds`, each of which it gets as a directory that holds it.
        overlays: Directories among `pass_fds` that it gets as overlays: each with the directory that
            receives the changes, and the overlay's work directory.
        rooted_fds: Those of `overlays` in which root's files are to seem the machine's user's.
        devices: Device files that it opens by path, besides /dev/null and /dev/urandom.
        memory_fd: The one that is its RAM and is handed to it by `ram_descriptor`, or None.
        namespaces: Who makes it namespaces of its own, see `confine.Namespaces`.
        landlock: Whether Landlock restricts it to these files.
        cid: The guest's vsock address.
        transport: `vhost-user` if the shim is the device, `vhost-vsock` if the kernel is.
        vhost_listen_fd: Listening unix socket that QEMU's chardev connects to (`vhost-user` only).
        guest_listen_fd: Listening unix socket whose clients become streams to guest port 1024.
        console_read_fd: Pipe that the guest's console is printed to, or None.
        console_log_fd: File of `services.hypervisor.console_ring` that keeps it; belongs to the pipe.
        stats_fd: File that holds `STATS`: bytes sent to and received from the guest by vsock; or None.
        exit_fd: Empty file that receives the `ExitRecord`, or None.
        ready_fd: Pipe that receives the lines described in `services.hypervisor.shim`, or None.
        term_seconds: What QEMU gets to end on SIGTERM before SIGKILL.
        connect_seconds: How long a client waits for the guest to take its stream.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    uid: int | None = None
    gid: int | None = None
    groups: tuple[int, ...] = ()
    pass_fds: tuple[int, ...] = ()
    writable_fds: tuple[int, ...] = ()
    file_fds: tuple[int, ...] = ()
    overlays: tuple[tuple[int, int, int], ...] = ()
    rooted_fds: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()
    memory_fd: int | None = None
    namespaces: Namespaces = ""
    landlock: bool = False
    cid: int
    transport: Transport = "vhost-user"
    vhost_listen_fd: int | None = None
    guest_listen_fd: int
    console_read_fd: int | None = None
    console_log_fd: int | None = None
    stats_fd: int | None = None
    exit_fd: int | None = None
    ready_fd: int | None = None
    term_seconds: float = 5.0
    connect_seconds: float = 10.0

    def __post_init__(self) -> None:
        _check_words(self.argv, self.env)
        if (self.uid is None) != (self.gid is None) or (self.uid is None and self.groups):
            raise ConfigInvalid("uid and gid belong together, and groups belong to them")
        _check_numbers("uid", [self.uid], 0, MAX_ID)
        _check_numbers("gid", [self.gid], 0, MAX_ID)
        _check_numbers("groups", self.groups, 0, MAX_ID)
        _check_numbers("cid", [self.cid], FIRST_CID, LAST_CID)
        _check_numbers("guest_listen_fd", [self.guest_listen_fd], 3, 1 << 20)
        if self.transport not in TRANSPORTS:
            raise ConfigInvalid(f"transport is {self.transport!r}, not one of {', '.join(TRANSPORTS)}")
        if (self.vhost_listen_fd is None) != (self.transport == "vhost-vsock"):
            raise ConfigInvalid("vhost_listen_fd belongs to transport vhost-user, and only to it")
        if (self.console_read_fd is None) != (self.console_log_fd is None):
            raise ConfigInvalid("console_read_fd and console_log_fd belong together")
        used = self.inherited_fds()
        _check_numbers("descriptors", used, 3, 1 << 20)
        if len(set(used)) != len(used):
            raise ConfigInvalid(f"a descriptor is named twice: {sorted(used)}")
        if not set(self.writable_fds) <= set(self.pass_fds):
            raise ConfigInvalid("writable_fds names a descriptor that QEMU does not inherit")
        if not set(self.file_fds) | {layers[0] for layers in self.overlays} <= set(self.pass_fds):
            raise ConfigInvalid("file_fds or overlays names a descriptor that QEMU does not inherit")
        if not set(self.rooted_fds) <= {layers[0] for layers in self.overlays} or (
            self.rooted_fds and self.uid is None
        ):
            raise ConfigInvalid("rooted_fds names no overlay, or there is no user for it")
        if (self.file_fds or self.overlays) and not self.namespaces:
            raise ConfigInvalid("file_fds and overlays need namespaces")
        if self.memory_fd is not None and self.memory_fd not in self.pass_fds:
            raise ConfigInvalid("memory_fd is a descriptor that QEMU does not inherit")
        if self.namespaces not in ("", "root", "user") or not isinstance(self.landlock, bool):
            raise ConfigInvalid(f"namespaces is {self.namespaces!r}, landlock {self.landlock!r}")
        if not all(isinstance(path, str) and path.startswith("/dev/") for path in self.devices):
            raise ConfigInvalid("devices is not a list of paths below /dev")
        for name in ("term_seconds", "connect_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 3600:
                raise ConfigInvalid(f"{name} is {value!r}, not a number of seconds up to 3600")

    def inherited_fds(self) -> tuple[int, ...]:
        """Every descriptor the shim must inherit, besides the one its configuration comes through."""
        own = (
            self.vhost_listen_fd,
            self.guest_listen_fd,
            self.console_read_fd,
            self.console_log_fd,
            self.stats_fd,
            self.exit_fd,
            self.ready_fd,
        )
        return (*(fd for fd in own if fd is not None), *self.pass_fds, *self.layer_fds())

    def layer_fds(self) -> tuple[int, ...]:
        """The upper and work directories of `overlays`, which QEMU itself does not get."""
        return tuple(fd for layers in self.overlays for fd in layers[1:])

    def to_json(self) -> bytes:
        """What to write to `--config-fd`, before closing it."""
        return json.dumps(asdict(self) | {"env": dict(self.env)}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ShimConfig:
        """The configuration in `data`.

        Raises:
            ConfigInvalid: it is not JSON, a field is missing, unknown, or wrong.
        """
        try:
            content = json.loads(data)
        except ValueError as error:
            raise ConfigInvalid(f"not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ConfigInvalid("not a JSON object")
        unknown = content.keys() - {each.name for each in fields(cls)}
        if unknown:
            raise ConfigInvalid(f"unknown field {min(unknown)!r}")
        for name in (
            "argv",
            "groups",
            "pass_fds",
            "writable_fds",
            "file_fds",
            "overlays",
            "rooted_fds",
            "devices",
        ):
            if name in content:
                if not isinstance(content[name], list):
                    raise ConfigInvalid(f"{name} is not a list")
                content[name] = tuple(content[name])
        content["overlays"] = tuple(tuple(layers) for layers in content.get("overlays", ()))
        try:
            return cls(**content)
        except TypeError as error:
            raise ConfigInvalid(str(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitRecord:
    """How a machine ended, as the shim saw it.

    Attributes:
        exit_code: QEMU's, or None if a signal ended it or it never ran.
        signal: The signal that ended QEMU, or None.
        reason: `exited` by itself, `terminated` on request, or what failed.
        detail: For people; empty if there is nothing to add.
        at: Seconds since the epoch.
    """

    exit_code: int | None = None
    signal: int | None = None
    reason: Reason
    detail: str = ""
    at: float

    def to_json(self) -> bytes:
        """The one line that `exit_fd` receives."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> ExitRecord | None:
        """The record in `data`, or None if the shim did not live to write (all of) it."""
        if not data.endswith(b"\n"):
            return None
        return cls(**json.loads(data))


def _check_words(argv: Any, env: Any) -> None:
    if not isinstance(argv, tuple) or not argv or not all(isinstance(word, str) for word in argv):
        raise ConfigInvalid("argv is not a list of strings")
    if not argv[0].startswith("/"):
        raise ConfigInvalid(f"argv names the program as {argv[0]!r}, not by an absolute path")
    if not isinstance(env, Mapping) or not all(
        isinstance(word, str) for pair in env.items() for word in pair
    ):
        raise ConfigInvalid("env is not a map of strings")
    if any("=" in key or not key for key in env):
        raise ConfigInvalid("env has a name that is empty or holds '='")
    if any("\0" in word for word in (*argv, *env, *env.values())):
        raise ConfigInvalid("a NUL byte in argv or env")


def _check_numbers(name: str, values: Iterable[Any], least: int, most: int) -> None:
    for value in values:
        if value is None and name in ("uid", "gid"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigInvalid(f"{name}: {value!r} is not a number from {least} to {most}")
