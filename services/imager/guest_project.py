"""This project's own part of the guest image: the agent, what it speaks, the mock agent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from services.common.errors import NotFound
from services.imager.guest_python import SITE

_NOT_IN_GUEST = ("requirements.in", "requirements.lock")
# What of `guest/` lies outside the agent's own, private directory.
_ELSEWHERE = {
    "init": "init",
    "mock-agent": "usr/local/bin/voidbox-mock-agent",
    "mock_agent.py": "usr/local/lib/voidbox/mock_agent.py",
}


def project_root() -> Path:
    """The directory that holds `guest/` and `voidbox/`, in a checkout as in an installation."""
    return Path(__file__).resolve().parents[2]


def project_files(source: Path) -> Iterator[tuple[str, tuple[int, bytes]]]:
    """This project's part as (path in the guest, (mode, content)).

    `guest/rootfs/` is laid over the root; the rest of `guest/` and the stubs it speaks
    are packages for the agent.
    """
    guest = source / "guest"
    if not (guest / "__init__.py").is_file():
        raise NotFound(f"{guest} is not the guest's package", reason="NO_GUEST_SOURCE", path=guest)
    overlay = guest / "rootfs"
    for path in _plain_files(guest):
        name = path.relative_to(guest).as_posix()
        if path.is_relative_to(overlay):
            yield path.relative_to(overlay).as_posix(), _mode_and_content(path)
        elif name in _ELSEWHERE:
            yield _ELSEWHERE[name], _mode_and_content(path)
        elif name not in _NOT_IN_GUEST:
            yield f"{SITE}/guest/{name}", _mode_and_content(path)
    yield f"{SITE}/voidbox/__init__.py", (0o644, b'"""The stubs of voidbox that the guest speaks."""\n')
    for service in ("common", "guest"):
        stubs = source / "voidbox" / service
        for path in _plain_files(stubs):
            if path.suffix == ".py":
                name = path.relative_to(stubs).as_posix()
                yield f"{SITE}/voidbox/{service}/{name}", _mode_and_content(path)


def _plain_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(root).parts)
        if path.is_file() and not path.is_symlink() and not hidden:
            yield path


def _mode_and_content(path: Path) -> tuple[int, bytes]:
    return 0o755 if path.stat().st_mode & 0o100 else 0o644, path.read_bytes()
