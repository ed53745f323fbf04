"""Where voidbox keeps its files, by the XDG base directory rules.

One directory each for state (runs, boxes, logs), cache (images, guest files: all of it
can be rebuilt) and runtime (sockets; short paths, since a unix socket's is limited to
107 bytes). `VOIDBOX_STATE_DIR`, `VOIDBOX_CACHE_DIR` and `VOIDBOX_RUNTIME_DIR` override.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import WrongState


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """The three base directories; none is created until `private_dir` is called."""

    state: Path
    cache: Path
    runtime: Path

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Paths:
        """The directories that `env` names, else the XDG defaults."""
        home = Path(env.get("HOME") or os.path.expanduser("~"))
        runtime_base = env.get("XDG_RUNTIME_DIR")
        runtime = Path(runtime_base) / "voidbox" if runtime_base else Path(f"/tmp/voidbox-{os.getuid()}")  # noqa: S108
        return cls(
            state=_pick(env, "VOIDBOX_STATE_DIR", "XDG_STATE_HOME", home / ".local/state"),
            cache=_pick(env, "VOIDBOX_CACHE_DIR", "XDG_CACHE_HOME", home / ".cache"),
            runtime=Path(env["VOIDBOX_RUNTIME_DIR"]) if env.get("VOIDBOX_RUNTIME_DIR") else runtime,
        )


def _pick(env: Mapping[str, str], own: str, xdg: str, default: Path) -> Path:
    if env.get(own):
        return Path(env[own])
    return Path(env.get(xdg) or default) / "voidbox"


def private_dir(path: Path) -> Path:
    """Make `path` a directory of ours with mode 0700, and return it.

    Raises:
        WrongState: it exists and is a link, a file, or another user's.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise WrongState(
            f"{path} is not a directory owned by uid {os.getuid()}; remove it or set another directory",
            reason="UNSAFE_DIRECTORY",
            path=path,
        )
    if stat.S_IMODE(info.st_mode) & 0o077:
        path.chmod(0o700)
    return path
