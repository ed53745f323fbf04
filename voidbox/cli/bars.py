"""How far work on images is: a bar per piece on a terminal, a line per piece elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from voidbox.cli.screen import Screen, safe, size
from voidbox.imager.v1 import imager_pb2 as pb

_WIDTH = 20


def bar(share: float, width: int = _WIDTH) -> str:
    """A bar of `width` characters of which `share` (0 to 1) is full."""
    full = round(max(0.0, min(1.0, share)) * width)
    return "━" * full + "╌" * (width - full)


def short(subject: str) -> str:
    """A subject as it is shown: of a digest its first digits."""
    return subject.removeprefix("sha256:")[:12] if "sha256:" in subject else subject


class Bars:
    """A bar per piece of work on a terminal, a line per piece elsewhere."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._tasks: dict[tuple[str, str], Any] = {}
        self._progress: Any = None
        if screen.live:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[amount]}", markup=False),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )

    def show(self, progress: pb.Progress) -> None:
        """Show how far a piece of work is."""
        key = (progress.subject, progress.action)
        text = safe(f"{progress.action} {short(progress.subject)}".strip())
        counted = progress.unit == "bytes" and progress.total > 0
        if self._progress is None:
            if key not in self._tasks:
                self._tasks[key] = None
                self._screen.note(f"{text} ({size(progress.total)})" if counted else text)
            return
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(text, total=progress.total or None, amount="")
        amount = size(progress.done) if progress.unit == "bytes" and progress.done else ""
        if counted:
            amount = f"{size(progress.done)} of {size(progress.total)}"
        self._progress.update(
            self._tasks[key], completed=progress.done, total=progress.total or None, amount=amount
        )

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
