"""What is wrong with a spec: each problem with its place, all of them in one error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from services.common.errors import InvalidInput

MAX_REPORTED: Final = 20

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One fault: where (line and column count from 1; 0 if the whole file), and what to do."""

    file: str
    line: int = 0
    column: int = 0
    path: str = ""
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class SpecError(InvalidInput):
    """The spec cannot be run; `problems` holds every fault found, in file order."""

    default_reason = "INVALID_SPEC"

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: (problem.line, problem.column)))
        shown = [str(problem) for problem in self.problems[:MAX_REPORTED]]
        if len(self.problems) > MAX_REPORTED:
            shown.append(f"... and {len(self.problems) - MAX_REPORTED} more")
        first = self.problems[0]
        super().__init__(
            "\n".join(shown), file=first.file, line=first.line, column=first.column, path=first.path
        )


def render_path(path: Path) -> str:
    """`("pipeline", "boxes", 2, "name")` as `pipeline.boxes[2].name`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
