"""From `exec`'s options to the box and the program: pure functions."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.common.errors import InvalidInput
from voidbox.guest.v1 import guest_pb2
from voidbox.imager.v1 import imager_pb2

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MODES = ("ro", "rw", "overlay")


def environment(options: Sequence[str], ours: Mapping[str, str]) -> dict[str, str]:
    """`--env` options as a mapping; a bare name copies our variable.

    Raises:
        InvalidInput: a malformed name, or a variable that is not set.
    """
    found: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not _ENV_NAME.fullmatch(name):
            raise InvalidInput(f"--env {option!r}: use NAME=VALUE, or NAME to copy ours", reason="BAD_ENV")
        if not equals and name not in ours:
            raise InvalidInput(f"--env {name}: not set here; set it or use {name}=VALUE", reason="BAD_ENV")
        found[name] = value if equals else ours[name]
    return found


def mounts(options: Sequence[str], base: Path) -> list[dict[str, str]]:
    """`--mount` options as entries of a spec; relative host paths start at `base`.

    Raises:
        InvalidInput: a malformed option.
    """
    entries = []
    for option in options:
        parts = option.split(":")
        if len(parts) not in (2, 3) or not parts[0] or not parts[1].startswith("/"):
            raise InvalidInput(
                f"--mount {option!r}: use HOST:GUEST[:ro|rw|overlay], GUEST absolute", reason="BAD_MOUNT"
            )
        mode = parts[2] if len(parts) == 3 else "ro"
        if mode not in _MODES:
            raise InvalidInput(
                f"--mount {option!r}: mode {mode!r} is none of {', '.join(_MODES)}", reason="BAD_MOUNT"
            )
        entries.append({"host": str(base / parts[0]), "guest": parts[1], "mode": mode})
    return entries


def volumes(options: Sequence[str]) -> list[dict[str, str]]:
    """The volumes that `--volume` options name.

    Raises:
        InvalidInput: one is malformed.
    """
    entries = []
    for option in options:
        name, _, guest = option.partition(":")
        if not name or not guest.startswith("/") or ":" in guest:
            raise InvalidInput(
                f"--volume {option!r}: use NAME:GUEST, GUEST absolute (a host directory: --mount)",
                reason="BAD_VOLUME",
            )
        entries.append({"name": name, "guest": guest})
    return entries


def sandbox_spec(args: Namespace, ours: Mapping[str, str], base: Path) -> bytes:
    """The spec of the box that `exec` starts."""
    sandbox: dict[str, object] = {}
    if args.image:
        sandbox["image"] = args.image
    if args.pull:
        sandbox["pull_policy"] = args.pull
    if args.memory_mb:
        sandbox["memory_mb"] = args.memory_mb
    if args.vcpus:
        sandbox["vcpus"] = args.vcpus
    if args.disk_mb:
        sandbox["disk_mb"] = args.disk_mb
    if args.mount:
        sandbox["mounts"] = mounts(args.mount, base)
    if args.volume:
        sandbox["volumes"] = volumes(args.volume)
    for key, variable in (("kernel", "VOID_BOX_KERNEL"), ("initramfs", "VOID_BOX_INITRAMFS")):
        if ours.get(variable):
            sandbox[key] = str(base / ours[variable])
    spec = {"api_version": "v1", "kind": "sandbox", "name": "exec", "sandbox": sandbox}
    return json.dumps(spec).encode()


def _words(entrypoint: str | None, argv: Sequence[str], config: imager_pb2.ImageConfig) -> list[str]:
    """Program and arguments; another entrypoint takes the image's default arguments away."""
    if entrypoint is None:
        return [*config.entrypoint, *(argv or config.cmd)]
    return [*([entrypoint] if entrypoint else []), *argv]


def start(
    args: Namespace,
    argv: Sequence[str],
    ours: Mapping[str, str],
    config: imager_pb2.ImageConfig | None,
    terminal: guest_pb2.Terminal | None,
) -> guest_pb2.ExecStart:
    """The program to start, from the command line over the image's configuration, as docker does.

    Raises:
        InvalidInput: there is no program.
    """
    image = config is not None
    config = config or imager_pb2.ImageConfig()
    words = _words(args.entrypoint, argv, config)
    if not words:
        raise InvalidInput(
            "no program to run: voidbox exec [options] -- PROGRAM [ARGS...]"
            + (" (the image names none)" if args.image else ""),
            reason="NO_PROGRAM",
        )
    # Entries without '=' are legal in an image and mean nothing.
    env = dict(entry.split("=", 1) for entry in config.env if "=" in entry)
    env |= environment(args.env, ours)
    message = guest_pb2.ExecStart(
        program=words[0],
        args=words[1:],
        env=env,
        working_directory=args.workdir or config.working_dir or ("/" if image else ""),
        create_working_directory=not args.target,
        user=args.user or config.user,
        terminal=terminal,
    )
    if args.timeout:
        message.timeout.FromNanoseconds(int(args.timeout * 1e9))
    return message
