"""What a spec says: the four kinds and everything in them, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from voidbox.spec.model import key, model

NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
NAME_HINT: Final = "1 to 63 letters, digits, '_', '-' or '.', starting with a letter or digit"
ENV_PATTERN: Final = r"[A-Za-z_][A-Za-z0-9_]*"

DEFAULT_TIMEOUT_SECS: Final = 1200
DEFAULT_OUTPUT_FILE: Final = "/workspace/output.json"
DEFAULT_INPUT_DIR: Final = "/workspace/input"
DEFAULT_OUTPUT_DIR: Final = "/workspace/output"
# A year; anything longer is a typing mistake, and `0` means no limit.
MAX_TIMEOUT_SECS: Final = 366 * 86_400


class Kind(StrEnum):
    """What a spec describes."""

    AGENT = "agent"
    PIPELINE = "pipeline"
    WORKFLOW = "workflow"
    SANDBOX = "sandbox"


class SandboxMode(StrEnum):
    """`auto` and `local` run a real micro-VM; `mock` runs none."""

    AUTO = "auto"
    LOCAL = "local"
    MOCK = "mock"


class PullPolicy(StrEnum):
    """`always` notices that a tag has moved; `never` takes what is cached."""

    ALWAYS = "always"
    MISSING = "missing"
    NEVER = "never"


class MountMode(StrEnum):
    """What the box may do with a mount; `overlay`: the host's files change only by `voidbox apply`."""

    READ_ONLY = "ro"
    READ_WRITE = "rw"
    OVERLAY = "overlay"


class Provider(StrEnum):
    """Where an agent's model answers; `mock` is the scripted agent of the guest image."""

    CLAUDE = "claude"
    CLAUDE_PERSONAL = "claude-personal"
    CODEX = "codex"
    OLLAMA = "ollama"
    LM_STUDIO = "lm-studio"
    OPENROUTER = "openrouter"
    CUSTOM = "custom"
    MOCK = "mock"


class AgentMode(StrEnum):
    """How an agent runs: once, until stopped, or at a terminal."""

    TASK = "task"
    SERVICE = "service"
    INTERACTIVE = "interactive"


class StepMode(StrEnum):
    """`service`: the step has no time limit."""

    SERVICE = "service"


class OnFailure(StrEnum):
    """Whether later stages run after this one failed; the run fails either way."""

    STOP = "stop"
    CONTINUE = "continue"


class SkillType(StrEnum):
    """The part before the colon of a skill in its short form."""

    AGENT = "agent"
    FILE = "file"
    REMOTE = "remote"
    CLI = "cli"
    MCP = "mcp"


@model
class Mount:
    """A host directory or file that a box sees."""

    host: str = key("Host path; relative to the spec file.", host_path=True)
    guest: str = key("Where the box sees it.", guest_path=True)
    mode: MountMode = key("Access of the box.", default=MountMode.READ_ONLY)


@model
class Limits:
    """What the programs of a box may take, within the machine that they run in."""

    memory_mb: int | None = key(
        "Memory of all programs together in MiB; empty: the machine's.",
        default=None,
        minimum=4,
        maximum=1 << 24,
    )
    processes: int | None = key(
        "Processes and threads of all programs together; empty: what the kernel allows.",
        default=None,
        minimum=1,
        maximum=1 << 22,
    )
    cpu_percent: int | None = key(
        "Processor time of all programs together; 100 is one processor; empty: all of the machine's.",
        default=None,
        minimum=1,
        maximum=25600,
    )
    open_files: int | None = key(
        "Open files of each process; empty: 65536.", default=None, minimum=16, maximum=65536
    )
    file_size_mb: int | None = key(
        "Largest file that a process may write in MiB; empty: no limit.",
        default=None,
        minimum=1,
        maximum=1 << 30,
    )


@model
class Volume:
    """A named disk that stays when the box is gone; one box at a time uses it."""

    name: str = key(
        "Its name; it is made if it is not there.",
        pattern="[a-z0-9][a-z0-9-]{0,62}",
        pattern_hint="a name: 1 to 63 of a-z, 0-9 and '-', no '-' first",
    )
    guest: str = key("Where the box sees it.", guest_path=True)
    size_mb: int | None = key(
        "Its size in MiB when it is made; 10240 if not given.", default=None, minimum=64, maximum=1 << 24
    )


class NetworkPreset(StrEnum):
    """What a box may reach before any rule."""

    NONE = "none"
    LLM = "llm"
    PACKAGES = "packages"
    INTERNET = "internet"


class RuleProtocol(StrEnum):
    """Protocol of a rule's ports."""

    TCP = "tcp"
    UDP = "udp"


class RuleTls(StrEnum):
    """What a TLS connection has to show."""

    NAME = "name"
    ANY = "any"
    STRICT = "strict"


@model
class NetworkRule:
    """What a box may reach, or may not: a name or a prefix, and ports. On one line: `name:443`."""

    host: str | None = key('DNS name, "*." and a name for all below it, or "*".', default=None)
    cidr: str | None = key(
        "Address or prefix. It covers private and other special addresses only if it lies within their "
        "range.",
        default=None,
    )
    ports: tuple[int, ...] = key("Ports; 80 and 443 if empty, 0 for all.", default=())
    protocol: RuleProtocol = key("Protocol of the ports.", default=RuleProtocol.TCP)
    addresses: tuple[str, ...] = key(
        "Private or other special addresses that `host` may have, as prefixes.", default=()
    )
    tls: RuleTls = key(
        "What a TLS connection has to show: the name in the clear, nothing (any), or the name and no "
        "encrypted hello besides (strict).",
        default=RuleTls.NAME,
    )


@model
class NetworkLimits:
    """How much of its network a box may use; 0 means no limit."""

    connections: int = key("Connections open at once.", default=256, minimum=1, maximum=20000)
    new_per_second: int = key("New connections per second.", default=50, minimum=1, maximum=100000)
    kb_per_second: int = key(
        "KiB per second, both directions together.", default=0, minimum=0, maximum=1 << 30
    )
    total_mb: int = key(
        "MiB in the box's life, both directions together.", default=0, minimum=0, maximum=1 << 30
    )


@model
class Network:
    """What a box may reach. `true` is the preset `internet`, `false` means no network device."""

    preset: NetworkPreset = key(
        "What is allowed besides the rules: nothing, the model's provider (llm), package registries and "
        "forges (packages), or all public addresses (internet).",
        default=NetworkPreset.NONE,
    )
    allow: tuple[NetworkRule, ...] = key("What is allowed.", default=())
    deny: tuple[NetworkRule, ...] = key("What is denied although something allows it.", default=())
    host_ports: tuple[int, ...] = key(
        "Ports of the host's loopback that the box reaches at 10.0.2.2.", default=()
    )
    limits: NetworkLimits = key("How much it may use.", default_factory=NetworkLimits)
    learn: bool = key(
        "Allow all public addresses and record what was needed; `voidbox policy learn RUN` prints the rules.",
        default=False,
    )
    enabled: bool = key("Whether there is a network device.", default=True)


@model
class Sandbox:
    """The machine that programs run in."""

    mode: SandboxMode = key("Kind of machine.", default=SandboxMode.AUTO, any_case=True)
    kernel: str | None = key("Kernel file on the hypervisor's host.", default=None, host_path=True)
    initramfs: str | None = key("Initramfs file on the hypervisor's host.", default=None, host_path=True)
    memory_mb: int = key("Guest memory in MiB.", default=1024, minimum=16, maximum=1 << 24)
    vcpus: int = key("Virtual processors.", default=1, minimum=1, maximum=256)
    disk_mb: int | None = key(
        "Size of the root disk of a box with an `image` in MiB; never less than the image needs. Default: "
        "1024 more than the image's disk, which has 1024 free.",
        default=None,
        minimum=1,
        maximum=1 << 24,
    )
    network: Network | None = key(
        "What the box may reach on the network: false (the default) for no network device, true for all "
        "public addresses, or rules.",
        default=None,
    )
    env: Mapping[str, str] = key(
        "Environment of every program. An empty value copies the variable of that name from the client.",
        default_factory=dict,
    )
    mounts: tuple[Mount, ...] = key("Host directories that the box sees.", default=())
    volumes: tuple[Volume, ...] = key("Named disks that outlive the box.", default=())
    image: str | None = key(
        "OCI image whose files are the box's root: a name in a registry, oci:DIR, oci-archive:FILE or "
        "docker-archive:FILE, paths relative to the spec file.",
        default=None,
        not_blank=True,
        image=True,
    )
    guest_image: str | None = key(
        "OCI image that carries kernel and initramfs; empty: never pull one.", default=None
    )
    snapshot: str | None = key(
        "Snapshot to start from; its memory, processors, kernel and root disk count instead of those given "
        "here. Empty: none.",
        default=None,
    )
    pull_policy: PullPolicy = key(
        "When a registry is asked for `image` and `guest_image`: always, so that a moved tag is noticed, "
        "only if it is missing, or never.",
        default=PullPolicy.MISSING,
        any_case=True,
    )
    auto_pause_secs: int = key(
        "The box is paused when nothing has used it for so many seconds, and goes on upon the next call or "
        "connection. An open call and a program that computes are use. 0: never.",
        default=0,
        minimum=0,
        maximum=1 << 24,
    )
    limits: Limits = key("What the programs of the box may take.", default_factory=Limits)
    allowed_commands: tuple[str, ...] = key(
        "What programs, and all that they start, may execute: names on PATH, absolute paths of programs, or "
        "absolute paths of directories with all below. Empty: everything.",
        default=(),
    )


@model
class BoxSandbox:
    """What one box of a pipeline changes of the top-level `sandbox`."""

    memory_mb: int | None = key("Guest memory in MiB.", default=None, minimum=16, maximum=1 << 24)
    vcpus: int | None = key("Virtual processors.", default=None, minimum=1, maximum=256)
    disk_mb: int | None = key("Size of the root disk in MiB.", default=None, minimum=1, maximum=1 << 24)
    network: Network | None = key("What this box may reach instead.", default=None)
    env: Mapping[str, str] = key("Environment, added to the top-level one.", default_factory=dict)
    mounts: tuple[Mount, ...] = key("Mounts, added to the top-level ones.", default=())
    volumes: tuple[Volume, ...] = key("Volumes, added to the top-level ones.", default=())
    image: str | None = key("OCI image for this box instead.", default=None, not_blank=True, image=True)
    pull_policy: PullPolicy | None = key(
        "When a registry is asked for it instead.", default=None, any_case=True
    )
    snapshot: str | None = key("Snapshot to start from instead.", default=None)


@model
class Llm:
    """The model behind an agent."""

    provider: Provider = key("Where the model answers.", any_case=True)
    model: str | None = key("Name of the model.", default=None, not_blank=True)
    base_url: str | None = key("Address of the model's API.", default=None, not_blank=True)
    api_key_env: str | None = key(
        "Client environment variable that holds the API key (provider custom).",
        default=None,
        pattern=ENV_PATTERN,
    )
    credential_proxy: bool = key("Keep the API key out of the box.", default=False)


@model
class Observe:
    """Telemetry of a run."""

    traces: bool = key("Export traces.", default=False)
    metrics: bool = key("Export metrics.", default=False)
    logs: bool = key("Export logs.", default=False)
    otlp_endpoint: str | None = key("Where to export to.", default=None)
    service_name: str | None = key("Name of the service in telemetry.", default=None)
    telemetry_buffer_size: int | None = key(
        "Measurements kept per box.", default=None, minimum=1, maximum=1 << 20
    )


@model
class Retry:
    """Further attempts after a stage failed; the delay doubles each time."""

    max_attempts: int = key("Attempts in all.", default=1, minimum=1, maximum=100)
    initial_delay_ms: int = key(
        "Delay before the second attempt.", default=1000, minimum=0, maximum=3_600_000
    )
    max_delay_ms: int = key(
        "The delay does not grow beyond this.", default=30_000, minimum=0, maximum=3_600_000
    )


@model
class SkillRef:
    """A skill in its short form, `type:value`."""

    type: SkillType = key("What it is.")
    value: str = key("Path, repository, program or command.", not_blank=True)


@model
class ImageSkill:
    """An OCI image whose files the box sees."""

    image: str = key("OCI image.", not_blank=True)
    mount: str = key("Where the box sees it.", guest_path=True)
    readonly: bool = key("Whether writes are refused.", default=True)


@model
class McpSkill:
    """An MCP server that runs in the box."""

    command: str = key("Program.", not_blank=True)
    args: tuple[str, ...] = key("Its arguments.", default=())
    env: Mapping[str, str] = key("Its environment.", default_factory=dict)


@model
class InlineSkill:
    """A skill whose text is in the spec."""

    name: str = key("Name of the skill.", pattern=NAME_PATTERN, pattern_hint=NAME_HINT)
    content: str = key("Its text (Markdown).", not_blank=True)


Skill = SkillRef | ImageSkill | McpSkill | InlineSkill


@model
class Program:
    """A program to run instead of an agent."""

    program: str = key("Name, looked up on the box's PATH, or path.", not_blank=True)
    args: tuple[str, ...] = key("Its arguments.", default=())


@model
class Output:
    """A file or directory of a box that later boxes can have."""

    name: str = key("Name for `from`.", pattern=NAME_PATTERN, pattern_hint=NAME_HINT)
    guest: str = key("Where the box leaves it.", default=DEFAULT_OUTPUT_DIR, guest_path=True)


@model
class OutputInput:
    """The output of an earlier box."""

    source: str = key("Name of the output, or `box.output`.", name="from", not_blank=True)
    guest: str = key("Directory that it is put into.", default=DEFAULT_INPUT_DIR, guest_path=True)


@model
class FileInput:
    """A file or directory of the client's disk."""

    file: str = key("Path; relative to the spec file.", host_path=True, uploaded=True)
    guest: str | None = key(
        f"Path that it gets in the box; {DEFAULT_INPUT_DIR}/<name of the file> unless given.",
        default=None,
        guest_path=True,
    )


Input = OutputInput | FileInput


@model
class Messaging:
    """Messages between agents while they run."""

    enabled: bool = key("Whether the agent takes part.", default=False)
    provider_bridge: str | None = key("How the agent reaches the messages.", default=None)


@model
class Agent:
    """One agent, or one program, in one box."""

    prompt: str | None = key("What the agent is told.", default=None)
    run: Program | None = key("A program to run instead of an agent.", default=None)
    skills: tuple[Skill, ...] = key("What the agent can do.", default=())
    inputs: tuple[FileInput, ...] = key("Files that the box gets.", default=())
    timeout_secs: int | None = key(
        f"Time limit; 0: none; {DEFAULT_TIMEOUT_SECS} unless given.",
        default=None,
        minimum=0,
        maximum=MAX_TIMEOUT_SECS,
    )
    output_file: str | None = key(
        f"File whose content is the result; {DEFAULT_OUTPUT_FILE} unless given.",
        default=None,
        guest_path=True,
    )
    messaging: Messaging | None = key("Messages between agents.", default=None)
    mode: AgentMode = key("How the agent runs.", default=AgentMode.TASK)
    retry: Retry = key("Further attempts after a failure.", default_factory=Retry)


@model
class Box:
    """One box of a pipeline: an agent or a program in a micro-VM of its own."""

    name: str = key("Name, unique in the pipeline.", pattern=NAME_PATTERN, pattern_hint=NAME_HINT)
    prompt: str | None = key("What the agent is told.", default=None)
    run: Program | None = key("A program to run instead of an agent.", default=None)
    skills: tuple[Skill, ...] = key("What the agent can do.", default=())
    llm: Llm | None = key("The model of this box instead of the top-level one.", default=None)
    timeout_secs: int | None = key(
        f"Time limit; 0: none; {DEFAULT_TIMEOUT_SECS} unless given.",
        default=None,
        minimum=0,
        maximum=MAX_TIMEOUT_SECS,
    )
    output_file: str | None = key(
        f"File whose content is the result; {DEFAULT_OUTPUT_FILE} unless given.",
        default=None,
        guest_path=True,
    )
    sandbox: BoxSandbox = key("Changes of the top-level sandbox.", default_factory=BoxSandbox)
    outputs: tuple[Output, ...] = key("What later boxes can have.", default=())
    inputs: tuple[Input, ...] = key(
        "What the box gets: earlier boxes' outputs, the client's files.", default=()
    )
    retry: Retry = key("Further attempts after a failure.", default_factory=Retry)
    on_failure: OnFailure = key("Whether later stages run after this box failed.", default=OnFailure.STOP)


@model
class BoxStage:
    """One box at this point of the pipeline."""

    name: str = key("Name of the box.", not_blank=True)


@model
class FanOutStage:
    """Several boxes at once at this point of the pipeline."""

    boxes: tuple[str, ...] = key("Names of the boxes.", minimum=1)


Stage = BoxStage | FanOutStage


@model
class Pipeline:
    """Boxes, and the order they run in."""

    boxes: tuple[Box, ...] = key("The boxes.", minimum=1)
    stages: tuple[Stage, ...] = key("The order; unless given, the boxes one after the other.", default=())


@model
class StepProgram:
    """The program of a workflow's step."""

    program: str = key("Name, looked up on the box's PATH, or path.", not_blank=True)
    args: tuple[str, ...] = key("Its arguments.", default=())
    stdin_from: str | None = key(
        "Step whose standard output it reads; unless given, the first dependency.",
        default=None,
        not_blank=True,
    )


@model
class Step:
    """One program of a workflow."""

    name: str = key("Name, unique in the workflow.", pattern=NAME_PATTERN, pattern_hint=NAME_HINT)
    run: StepProgram = key("The program.")
    depends_on: tuple[str, ...] = key("Steps that must have succeeded before.", default=())
    mode: StepMode | None = key("`service`: no time limit.", default=None)
    timeout_secs: int | None = key(
        f"Time limit; 0: none; {DEFAULT_TIMEOUT_SECS} unless given.",
        default=None,
        minimum=0,
        maximum=MAX_TIMEOUT_SECS,
    )
    retry: Retry = key("Further attempts after a failure.", default_factory=Retry)


@model
class Workflow:
    """Programs in one shared box, in the order of their dependencies."""

    steps: tuple[Step, ...] = key("The steps.", minimum=1)
    inputs: tuple[FileInput, ...] = key("Files that the box gets.", default=())
    output_step: str | None = key(
        "Step whose standard output is the result; unless given, the last step that nothing depends on.",
        default=None,
        not_blank=True,
    )


@model
class Spec:
    """A spec file."""

    api_version: str = key("Version of the format; `v1`.", default="v1")
    kind: Kind = key("What the spec describes.")
    name: str = key("Name of the runs.", pattern=NAME_PATTERN, pattern_hint=NAME_HINT)
    sandbox: Sandbox = key("The machine.", default_factory=Sandbox)
    llm: Llm | None = key("The model behind the agents.", default=None)
    observe: Observe | None = key("Telemetry.", default=None)
    agent: Agent | None = key("The agent (kind agent).", default=None)
    pipeline: Pipeline | None = key("The pipeline (kind pipeline).", default=None)
    workflow: Workflow | None = key("The workflow (kind workflow).", default=None)
