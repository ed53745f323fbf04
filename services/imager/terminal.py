"""What the image and kernel builders need of the shell they were started from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from services.imager.progress import Progress, Report


def network_env(env: Mapping[str, str]) -> dict[str, str]:
    """What of `env` tells apt, pip and npm how to reach the network."""
    wanted = re.compile(
        r"(https?|ftp|no|all)_proxy|PIP_\w+|npm_config_\S+|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE"
        r"|NODE_EXTRA_CA_CERTS",
        re.IGNORECASE,
    )
    return {key: value for key, value in env.items() if wanted.fullmatch(key)}


def printer(tty: bool, write: Callable[[str], object]) -> Report:
    """A `Report` for people: one line that changes on a terminal, else a line a step."""
    last: list[str] = []

    def report(progress: Progress) -> None:
        step = f"{progress.action} {progress.subject}"
        share = ""
        if progress.total and progress.unit == "bytes":
            share = f" {progress.done / 1e6:.1f}/{progress.total / 1e6:.1f} MB"
        if tty:
            write(f"\r\x1b[K{step}{share}")
        elif last != [step]:
            write(f"{step}{f' ({progress.total / 1e6:.0f} MB)' if share else ''}\n")
        last[:] = [step]

    return report
