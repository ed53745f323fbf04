"""Whether another user could run the project's own code from this checkout."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _open_to_all(path: Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in path.parents)


def _closed() -> str:
    """The first of our paths that only its owner can enter; empty if there is none."""
    interpreter = Path(sys.executable)
    for path in (ROOT / "pyproject.toml", interpreter, interpreter.resolve()):
        if not _open_to_all(path):
            return str(path)
    return ""


needs_another_user = pytest.mark.skipif(
    os.geteuid() != 0 or bool(_closed()),
    reason=f"needs root and a checkout that others may enter; closed: {_closed() or 'none, but not root'}",
)
