"""Following a run: a line per stage that moves on a terminal, plain lines elsewhere, or JSON."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from google.protobuf.json_format import MessageToDict

from voidbox.cli.bars import bar
from voidbox.cli.screen import Screen, duration, safe, size
from voidbox.cli.view import ENDED, Line, RunView, StageView, seconds_between, stage_state
from voidbox.orchestrator.v1 import orchestrator_pb2 as pb

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

REDRAWS_PER_SECOND = 8

_STATE_COLORS: dict[int, str] = {
    pb.STAGE_STATE_SUCCEEDED: "green",
    pb.STAGE_STATE_FAILED: "red",
    pb.STAGE_STATE_TIMED_OUT: "red",
    pb.STAGE_STATE_CANCELLED: "yellow",
    pb.STAGE_STATE_SKIPPED: "yellow",
    pb.STAGE_STATE_RETRYING: "yellow",
}
_MARKS: dict[int, str] = {
    pb.STAGE_STATE_SUCCEEDED: "✓",
    pb.STAGE_STATE_FAILED: "✗",
    pb.STAGE_STATE_TIMED_OUT: "✗",
    pb.STAGE_STATE_CANCELLED: "■",
    pb.STAGE_STATE_SKIPPED: "-",
}


class Display(Protocol):
    """Shows a run while it goes on."""

    def event(self, event: pb.Event) -> None:
        """Show what has happened."""

    def note(self, text: str) -> None:
        """Tell something about the command itself."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def display_for(screen: Screen, run: pb.Run) -> Display:
    """The display that fits the screen."""
    if screen.json:
        return JsonDisplay(screen)
    return LiveDisplay(screen, RunView(run)) if screen.live else PlainDisplay(screen, RunView(run))


class JsonDisplay:
    """Each event as one line of JSON on standard output."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def event(self, event: pb.Event) -> None:
        """Print the event."""
        self._screen.data({"type": "event", "event": MessageToDict(event, preserving_proto_field_name=True)})

    def note(self, text: str) -> None:
        """Nothing: notes are for people."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class PlainDisplay:
    """Lines with the time of day on standard error, in order."""

    def __init__(self, screen: Screen, view: RunView) -> None:
        self._screen = screen
        self._view = view
        self._width = max((len(name) for name in view.stages), default=0)

    def event(self, event: pb.Event) -> None:
        """Print what the event tells."""
        for line in self._view.apply(event):
            self._screen.note(self.format(line))

    def format(self, line: Line) -> str:
        """A line as it is printed."""
        clock = datetime.fromtimestamp(line.time, UTC).astimezone().strftime("%H:%M:%S")
        name = (line.stage or "run").ljust(self._width)
        mark = "|" if line.kind in ("output", "agent") else "·"
        return f"{clock} {name} {mark} {safe(line.text)}".rstrip()

    def note(self, text: str) -> None:
        """Print it."""
        self._screen.note(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class LiveDisplay:
    """A block of moving lines, one per stage, below the lines that programs print."""

    def __init__(self, screen: Screen, view: RunView) -> None:
        from rich.console import Console
        from rich.live import Live

        self._screen = screen
        self._view = view
        self._width = max((len(name) for name in view.stages), default=0)
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._live = Live(
            _Block(view),
            console=self._console,
            refresh_per_second=REDRAWS_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def event(self, event: pb.Event) -> None:
        """Redraw, and print what programs and agents print above the block."""
        from rich.text import Text

        for line in self._view.apply(event):
            if line.kind in ("output", "agent", "notice"):
                style = {"notice": "yellow"}.get(line.kind, "red" if line.stderr else "")
                name = Text(f"{(line.stage or 'run').ljust(self._width)} | ", style="cyan")
                self._console.print(name.append(safe(line.text), style=style), soft_wrap=True)

    def note(self, text: str) -> None:
        """Print it above the block."""
        from rich.text import Text

        # Not print(style=…), which would colour the moving lines too.
        self._console.print(Text(safe(text), style="yellow"), soft_wrap=True)

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()


class _Block:
    """The moving lines; drawn anew each time."""

    def __init__(self, view: RunView) -> None:
        from rich.spinner import Spinner

        self._view = view
        self._spinner = Spinner("dots")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        now = time.time()
        width = max((len(name) for name in self._view.stages), default=0)
        # More stages than fit would make the terminal scroll with every redraw: those at work come first.
        room = max(1, options.max_height - 2)
        stages = list(self._view.stages.values())
        shown = stages if len(stages) <= room else [stage for stage in stages if stage.active][:room]
        for stage in shown:
            text = Text(no_wrap=True, overflow="ellipsis")
            color = _STATE_COLORS.get(stage.state, "blue" if stage.active else "dim")
            mark = (
                str(self._spinner.render(time.monotonic())) if stage.active else _MARKS.get(stage.state, "·")
            )
            text.append(f"{mark} ", style=color).append(stage.name.ljust(width), style="bold")
            text.append(f"  {describe(stage)}".ljust(24), style=color)
            text.append(elapsed(stage, now).rjust(10))
            if stage.reason and stage.state in ENDED:
                text.append(f"  {safe(stage.reason)}", style=color)
            elif stage.last_line:
                text.append(f"  {safe(stage.last_line.strip())}", style="dim")
            yield text


def describe(stage: StageView) -> str:
    """State and phase of a stage in a few words."""
    word = stage_state(stage.state)
    if stage.active and stage.phase and stage.phase != "program":
        word = stage.phase
        if stage.share is not None:
            word += f" {bar(stage.share)} {stage.share:.0%}"
            if stage.unit == "bytes":
                done, total = stage.amount
                word += f" {size(done)} of {size(total)}"
    return word


def elapsed(stage: StageView, now: float) -> str:
    """How long a stage has taken."""
    if not stage.start:
        return ""
    return duration(seconds_between(stage.start, stage.end or now))
