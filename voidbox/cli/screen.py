"""What the CLI prints: to whom, in which format, and never what a box could do to a terminal."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from services.common.errors import VoidboxError

# C0 but tab, DEL, C1, and the characters that reorder or hide text on a terminal.
_UNSAFE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")

_COLORS = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36", "dim": "2", "bold": "1"}


def safe(text: str) -> str:
    """`text` with everything that a terminal would obey shown instead."""

    def show(match: re.Match[str]) -> str:
        code = ord(match.group())
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return _UNSAFE.sub(show, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """Standard output for results, standard error for everything else."""

    json: bool = False
    color: bool = False
    # Whether progress may move the cursor.
    live: bool = False

    @classmethod
    def of(cls, output: str | None, *, no_color: bool, env: Mapping[str, str]) -> Screen:
        """The screen for these options."""
        plain = no_color or bool(env.get("NO_COLOR")) or env.get("TERM") == "dumb"
        terminal = sys.stderr.isatty() and not plain
        return cls(json=output == "json", color=terminal, live=terminal and output != "json")

    def result(self, human: str, data: object) -> None:
        """Print the result of a command."""
        if self.json:
            self.data(data)
        elif human:
            print(human, flush=True)

    def data(self, data: object) -> None:
        """Print one line of JSON."""
        print(json.dumps(data, ensure_ascii=False), flush=True)

    def note(self, text: str) -> None:
        """Tell a person what is going on."""
        if not self.json:
            print(text, file=sys.stderr, flush=True)

    def paint(self, text: str, color: str) -> str:
        """`text` in a colour, where there are colours."""
        return f"\x1b[{_COLORS[color]}m{text}\x1b[0m" if self.color and text else text

    def error(self, error: VoidboxError, exit_code: int) -> None:
        """Report a failed command."""
        if not self.json:
            lines = [safe(line) for line in error.message.splitlines()] or [error.reason]
            print(
                f"{self.paint('error:', 'red')} {lines[0]}", *lines[1:], sep="\n", file=sys.stderr, flush=True
            )
            return
        report: dict[str, Any] = {
            "code": error.code.name,
            "reason": error.reason,
            "message": error.message,
            "metadata": error.metadata,
            "exit_code": int(exit_code),
        }
        problems = getattr(error, "problems", None)
        if problems is not None:
            report["problems"] = [
                {
                    "file": problem.file,
                    "line": problem.line,
                    "column": problem.column,
                    "path": problem.path,
                    "message": problem.message,
                }
                for problem in problems
            ]
        print(json.dumps({"error": report}, ensure_ascii=False), file=sys.stderr, flush=True)


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = ()) -> str:
    """Columns, padded with blanks; the columns in `right` are flush right."""
    lines = [list(header), *([safe(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
    flush = set(right)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at in flush else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def duration(seconds: float) -> str:
    """A duration for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def quiet_broken_pipe() -> None:
    """Whoever read our output has gone: let nothing complain about it at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, ValueError):
            os.dup2(null, stream.fileno())
    os.close(null)
