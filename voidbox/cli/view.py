"""A run as its events tell it: pure state that every kind of display draws from."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field

from voidbox.cli.bars import short
from voidbox.cli.screen import size
from voidbox.common.v1 import common_pb2
from voidbox.orchestrator.v1 import orchestrator_pb2 as pb

# A program that never ends its line still gets it shown.
MAX_LINE = 4096

ENDED = frozenset(
    (
        pb.STAGE_STATE_SUCCEEDED,
        pb.STAGE_STATE_FAILED,
        pb.STAGE_STATE_CANCELLED,
        pb.STAGE_STATE_TIMED_OUT,
        pb.STAGE_STATE_SKIPPED,
    )
)
RUN_ENDED = frozenset(
    (pb.RUN_STATE_SUCCEEDED, pb.RUN_STATE_FAILED, pb.RUN_STATE_CANCELLED, pb.RUN_STATE_TIMED_OUT)
)


def stage_state(state: int) -> str:
    """A stage's state as a word."""
    return (
        pb.StageState.Name(pb.StageState.ValueType(state))
        .removeprefix("STAGE_STATE_")
        .lower()
        .replace("_", " ")
    )


def run_state(state: int) -> str:
    """A run's state as a word."""
    return pb.RunState.Name(pb.RunState.ValueType(state)).removeprefix("RUN_STATE_").lower().replace("_", " ")


def kind_name(kind: int) -> str:
    """A run's kind as in the spec."""
    return pb.RunKind.Name(pb.RunKind.ValueType(kind)).removeprefix("RUN_KIND_").lower()


def failure_class(kind: int) -> str:
    """A kind of failure as a word; empty for none."""
    if kind == pb.FAILURE_CLASS_UNSPECIFIED:
        return ""
    return pb.FailureClass.Name(pb.FailureClass.ValueType(kind)).removeprefix("FAILURE_CLASS_").lower()


def seconds_between(start: float, end: float) -> float:
    """A span that a moved clock does not make negative."""
    return max(0.0, end - start)


class Lines:
    """Bytes in, whole lines of text out; split multi-byte characters are put together."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._rest = ""

    def feed(self, data: bytes) -> list[str]:
        """The lines that `data` completes."""
        *lines, self._rest = (self._rest + self._decoder.decode(data)).split("\n")
        while len(self._rest) > MAX_LINE:
            lines.append(self._rest[:MAX_LINE])
            self._rest = self._rest[MAX_LINE:]
        # Of a line that was drawn over itself (a progress bar) the last state counts.
        return [line.rstrip("\r").rpartition("\r")[2] for line in lines]

    def rest(self) -> list[str]:
        """The unfinished line, if there is one."""
        rest, self._rest = self._rest + self._decoder.decode(b"", final=True), ""
        return [rest] if rest else []


@dataclass(slots=True, kw_only=True)
class StageView:
    """What is shown of a stage."""

    name: str
    state: int = pb.STAGE_STATE_PENDING
    # What is being done before and after the program, e.g. "boot".
    phase: str = ""
    start: float = 0.0
    end: float = 0.0
    attempts: int = 0
    reason: str = ""
    last_line: str = ""
    # Share of a known amount of work, 0 to 1; None if not known.
    share: float | None = None
    # What `phase` works on: (done, total) of each subject, and what is counted.
    work: dict[str, tuple[int, int]] = field(default_factory=dict)
    unit: str = ""
    lines: dict[int, Lines] = field(default_factory=dict)

    @property
    def amount(self) -> tuple[int, int]:
        """How much of `phase` is done, and of how much, over all that it works on."""
        return sum(done for done, _ in self.work.values()), sum(total for _, total in self.work.values())

    @property
    def active(self) -> bool:
        """Whether something is being done for it now."""
        return self.state in (pb.STAGE_STATE_STARTING, pb.STAGE_STATE_RUNNING, pb.STAGE_STATE_RETRYING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line to show: `kind` is "output", "state", "notice", "agent" or "run"."""

    kind: str
    stage: str
    text: str
    time: float
    stderr: bool = False


class RunView:
    """All stages of a run, in plan order, brought up to date by `apply`."""

    def __init__(self, run: pb.Run) -> None:
        self.stages: dict[str, StageView] = {}
        self.run_state: int = run.state
        for stage in run.stages:
            self.stages[stage.name] = StageView(name=stage.name)

    def apply(self, event: pb.Event) -> Iterator[Line]:
        """Take one event; yields what it is worth telling."""
        kind = event.WhichOneof("event")
        time = event.time.ToMicroseconds() / 1e6
        if kind == "run_state":
            self.run_state = event.run_state.state
            if self.run_state in RUN_ENDED or self.run_state == pb.RUN_STATE_CANCELLING:
                yield self._line("run", event, _with(run_state(self.run_state), event.run_state.reason), time)
            return
        if kind == "notice":
            word = "warning: " if event.notice.level == pb.NOTICE_LEVEL_WARNING else ""
            yield self._line("notice", event, word + event.notice.text, time)
            return
        if not event.stage:
            return
        view = self.stages.setdefault(event.stage, StageView(name=event.stage))
        if kind == "stage_state":
            yield from self._stage(view, event, time)
        elif kind == "output":
            lines = view.lines.setdefault(event.output.stream, Lines()).feed(event.output.data)
            yield from self._output(view, event, lines, event.output.stream, time)
        elif kind == "progress":
            yield from self._progress(view, event, time)
        elif kind == "agent_message":
            for text in event.agent_message.text.splitlines():
                view.last_line = text
                yield self._line("agent", event, text, time)
        elif kind == "tool_call":
            view.last_line = f"{event.tool_call.name} {event.tool_call.summary}".strip()
            yield self._line("agent", event, f"→ {view.last_line}", time)

    def _stage(self, view: StageView, event: pb.Event, time: float) -> Iterator[Line]:
        stage = event.stage_state.stage
        if stage.state in ENDED:
            for stream, lines in view.lines.items():
                yield from self._output(view, event, lines.rest(), stream, time)
        changed = stage.state != view.state or stage.attempts != view.attempts
        view.state, view.attempts, view.reason = stage.state, stage.attempts, stage.reason
        view.start = stage.start_time.ToMicroseconds() / 1e6 if stage.HasField("start_time") else view.start
        view.end = stage.end_time.ToMicroseconds() / 1e6 if stage.HasField("end_time") else 0.0
        view.share, view.work = None, {}
        view.phase = "program" if stage.state == pb.STAGE_STATE_RUNNING else ""
        if changed and stage.state != pb.STAGE_STATE_PENDING:
            word = stage_state(stage.state)
            if stage.state == pb.STAGE_STATE_STARTING and stage.attempts > 1:
                word += f" (attempt {stage.attempts})"
            if stage.state in ENDED and view.start and view.end:
                word += f" after {seconds_between(view.start, view.end):.1f} s"
            yield self._line("state", event, _with(word, stage.reason), time)

    def _progress(self, view: StageView, event: pb.Event, time: float) -> Iterator[Line]:
        progress = event.progress
        fresh = bool(progress.action) and progress.action != view.phase
        if fresh:
            view.phase, view.work = progress.action, {}
        # Each layer that is downloaded gets its line: it is what takes long.
        fresh = fresh or (progress.action == "download" and progress.subject not in view.work)
        view.work[progress.subject], view.unit = (progress.done, progress.total), progress.unit
        done, total = view.amount
        view.share = min(1.0, done / total) if total > 0 else None
        if fresh:
            counted = progress.unit == "bytes" and progress.total > 0
            text = f"{progress.action} {short(progress.subject)}".strip()
            yield self._line("phase", event, f"{text} ({size(progress.total)})" if counted else text, time)

    def _output(
        self, view: StageView, event: pb.Event, lines: list[str], stream: int, time: float
    ) -> Iterator[Line]:
        for text in lines:
            view.last_line = text or view.last_line
            yield Line(
                kind="output",
                stage=event.stage,
                text=text,
                time=time,
                stderr=stream == common_pb2.STD_STREAM_STDERR,
            )

    @staticmethod
    def _line(kind: str, event: pb.Event, text: str, time: float) -> Line:
        return Line(kind=kind, stage=event.stage, text=text, time=time)


def _with(word: str, reason: str) -> str:
    return f"{word}: {reason}" if reason else word
