"""What is kept of a run: its request, its stages' facts, and the entries of its log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from services.orchestrator.engine import StageStatus
from services.orchestrator.states import FailureClass, RunState
from voidbox.spec.models import Kind, Mount

STDOUT, STDERR = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """Content named by its sha256, with its length in bytes."""

    value: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """Uploaded content under the absolute path that the spec names."""

    path: str
    digest: Digest
    tree: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a run is treated; 0 means no limit, or the service's default for `max_parallel`."""

    orphan_seconds: float = 0
    max_parallel: int = 0
    timeout_seconds: float = 0
    cold_boot: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """All that a run was made from; enough to make its plan again."""

    spec: bytes
    filename: str
    input: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    files: tuple[InputFile, ...] = ()
    mounts: tuple[Mount, ...] = ()
    base_directory: str = ""
    options: Options = field(default_factory=Options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an agent has used."""

    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    tool_calls: int = 0
    turns: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cost_usd=self.cost_usd + other.cost_usd,
            tool_calls=self.tool_calls + other.tool_calls,
            turns=self.turns + other.turns,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a stage's latest attempt beyond its status.

    Attributes:
        start_time: When its first attempt started, seconds since the epoch; 0 if it has not.
        phases: (name, seconds) of the latest attempt.
        egress_offset: How far the log of its box's gateway is in the run's.
    """

    box_id: str = ""
    exec_id: str = ""
    boot_id: str = ""
    kernel_release: str = ""
    start_time: float = 0.0
    end_time: float = 0.0
    usage: Usage = field(default_factory=Usage)
    phases: tuple[tuple[str, float], ...] = ()
    egress_offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage as it is now: its place in the plan, its status and its facts."""

    name: str
    position: int
    group: int
    depends_on: tuple[str, ...] = ()
    status: StageStatus = field(default_factory=StageStatus)
    facts: Facts = field(default_factory=Facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run as it is now.

    Attributes:
        begin_time: When it was created or last retried.
        generation: How often it was retried.
    """

    id: str
    name: str
    kind: Kind
    state: RunState
    reason: str = ""
    failure_class: FailureClass = FailureClass.NONE
    stopping: RunState | None = None
    create_time: float = 0.0
    begin_time: float = 0.0
    end_time: float = 0.0
    stages: tuple[Stage, ...] = ()
    output: bytes = b""
    output_truncated: bool = False
    request: Request | None = None
    request_digest: str = ""
    generation: int = 0
    event_count: int = 0

    @property
    def usage(self) -> Usage:
        """What all stages have used together."""
        return sum((stage.facts.usage for stage in self.stages), Usage())


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """Something that a stage has produced."""

    stage: str
    name: str
    digest: Digest
    tree: bool = False


# Entries of a run's log


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMoved:
    """The run has changed its state."""

    state: RunState
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMoved:
    """A stage has changed its state."""

    stage: Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A program has printed `data`, at `offset` of the stream."""

    stream: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Work on an image or box makes progress."""

    subject: str
    action: str
    done: int = 0
    total: int = 0
    unit: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """An agent said something."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUsed:
    """An agent used a tool."""

    name: str
    summary: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """An agent's usage so far."""

    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An artifact was stored."""

    artifact: Artifact


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something that a user should know."""

    text: str
    warning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Egress:
    """What the gateway of a stage's box decided: an `EgressEvent`, serialized."""

    data: bytes


Entry = RunMoved | StageMoved | Output | Progress | Said | ToolUsed | Used | Stored | Notice | Egress


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """An entry in its place in the log; `time` is seconds since the epoch."""

    offset: int
    time: float
    stage: str
    entry: Entry
