"""A spec turned into stages: what each runs, in which box, after whom, with what data.

The plan is a pure function of the spec, so it is made anew from the stored spec after a
restart and is always the same.
"""

from __future__ import annotations

import dataclasses
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field

from services.common.egress.policy import Policy
from services.common.errors import InvalidInput
from voidbox.spec.checks import dependencies, find_output, input_guest, stages_of
from voidbox.spec.models import (
    DEFAULT_OUTPUT_FILE,
    DEFAULT_TIMEOUT_SECS,
    Agent,
    Box,
    BoxSandbox,
    BoxStage,
    FileInput,
    Input,
    Kind,
    Limits,
    Llm,
    Mount,
    Network,
    OnFailure,
    Pipeline,
    PullPolicy,
    Retry,
    Sandbox,
    Skill,
    Spec,
    Step,
    StepMode,
    Volume,
    Workflow,
)
from voidbox.spec.network import policy_of

# A pipeline's boxes at once are limited by the host's memory; a workflow's steps share one box.
MAX_PARALLEL_STEPS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The box that a stage runs in."""

    kernel: str = ""
    initramfs: str = ""
    guest_image: str = ""
    image: str = ""
    snapshot: str = ""
    memory_mib: int = 1024
    vcpus: int = 1
    disk_mib: int = 0
    env: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    limits: Limits = field(default_factory=Limits)
    allowed_commands: tuple[str, ...] = ()
    volumes: tuple[Volume, ...] = ()
    pull_policy: PullPolicy = PullPolicy.MISSING
    cold_boot: bool = False
    auto_pause: int = 0
    egress: Policy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentWork:
    """An agent and what it is told."""

    prompt: str
    llm: Llm | None
    skills: tuple[Skill, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramWork:
    """A program."""

    program: str
    args: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """Nothing of its own: the box is there for others until it is stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientFile:
    """A file or tree that the client has uploaded under `path`; it becomes `guest` in the box."""

    path: str
    guest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutput:
    """The output `name` of `stage`, unpacked into the directory `guest`."""

    stage: str
    name: str
    guest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """A file or directory of the box that becomes the artifact `name`."""

    name: str
    guest: str

    @property
    def is_file(self) -> bool:
        """Whether the path looks like a file's: its last part has a suffix."""
        return "." in posixpath.basename(self.guest).lstrip(".")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """One stage.

    Attributes:
        group: Stages of one group run side by side.
        carry_from: Stages whose results it gets, in declared order; the run's input if empty.
        stdin_from: Workflow: the stage whose result is its standard input.
        output_file: File whose content is the result, if written; empty: standard output is.
        timeout: Seconds the program may take; None: no limit.
    """

    name: str
    position: int
    group: int
    depends_on: tuple[str, ...] = ()
    carry_from: tuple[str, ...] = ()
    stdin_from: str = ""
    machine: Machine
    work: AgentWork | ProgramWork | Resident
    inputs: tuple[ClientFile | StageOutput, ...] = ()
    outputs: tuple[Collected, ...] = ()
    output_file: str = ""
    timeout: float | None = None
    retry: Retry = field(default_factory=Retry)
    on_failure: OnFailure = OnFailure.STOP


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All stages in declared order.

    Attributes:
        shared: All stages run in one box.
        output_from: Stages whose results are the run's output.
    """

    name: str
    kind: Kind
    stages: tuple[PlannedStage, ...]
    shared: bool = False
    output_from: tuple[str, ...] = ()

    def stage(self, name: str) -> PlannedStage:
        """The stage called `name`."""
        return next(stage for stage in self.stages if stage.name == name)


def make_plan(spec: Spec, extra_mounts: tuple[Mount, ...] = (), *, cold_boot: bool = False) -> Plan:
    """The plan of a valid spec whose environment is resolved.

    Raises:
        InvalidInput: boxes are to boot by themselves, and one is of a snapshot.
    """
    match spec.kind:
        case Kind.AGENT:
            assert spec.agent is not None
            stages: tuple[PlannedStage, ...] = (_agent(spec, spec.agent, extra_mounts),)
        case Kind.PIPELINE:
            assert spec.pipeline is not None
            stages = _pipeline(spec, spec.pipeline, extra_mounts)
        case Kind.WORKFLOW:
            assert spec.workflow is not None
            stages = _workflow(spec, spec.workflow, extra_mounts)
        case Kind.SANDBOX:
            machine = _machine(spec.sandbox, BoxSandbox(), extra_mounts)
            stages = (PlannedStage(name="sandbox", position=0, group=0, machine=machine, work=Resident()),)
    if cold_boot:
        stages = tuple(_cold(stage) for stage in stages)
    return Plan(
        name=spec.name,
        kind=spec.kind,
        stages=stages,
        shared=spec.kind is Kind.WORKFLOW,
        output_from=_output_from(spec, stages),
    )


def _cold(stage: PlannedStage) -> PlannedStage:
    if stage.machine.snapshot:
        raise InvalidInput(
            f"stage {stage.name} starts from snapshot {stage.machine.snapshot}, which cannot boot by itself; "
            "leave out --cold or the snapshot",
            reason="COLD_SNAPSHOT",
            field="options.cold_boot",
        )
    return dataclasses.replace(stage, machine=dataclasses.replace(stage.machine, cold_boot=True))


def _output_from(spec: Spec, stages: tuple[PlannedStage, ...]) -> tuple[str, ...]:
    if spec.workflow is not None:
        if spec.workflow.output_step:
            return (spec.workflow.output_step,)
        needed = {name for stage in stages for name in stage.depends_on}
        return ([stage.name for stage in stages if stage.name not in needed][-1],)
    last = max(stage.group for stage in stages)
    return tuple(stage.name for stage in stages if stage.group == last)


def _egress(network: Network | None, llm: Llm | None) -> Policy | None:
    try:
        return policy_of(network, llm)
    except ValueError as error:  # the rules have been checked; an address of a model has not
        raise InvalidInput(f"llm.base_url: {error}", reason="BAD_SPEC", field="llm.base_url") from error


def _machine(sandbox: Sandbox, box: BoxSandbox, extra: tuple[Mount, ...], llm: Llm | None = None) -> Machine:
    return Machine(
        kernel=sandbox.kernel or "",
        initramfs=sandbox.initramfs or "",
        guest_image=sandbox.guest_image or "",
        image=box.image or sandbox.image or "",
        snapshot=box.snapshot or sandbox.snapshot or "",
        memory_mib=box.memory_mb or sandbox.memory_mb,
        vcpus=box.vcpus or sandbox.vcpus,
        disk_mib=box.disk_mb or sandbox.disk_mb or 0,
        env={**sandbox.env, **box.env},
        mounts=(*sandbox.mounts, *box.mounts, *extra),
        limits=sandbox.limits,
        allowed_commands=sandbox.allowed_commands,
        volumes=(*sandbox.volumes, *box.volumes),
        pull_policy=box.pull_policy or sandbox.pull_policy,
        auto_pause=sandbox.auto_pause_secs,
        egress=_egress(box.network or sandbox.network, llm),
    )


def _timeout(seconds: int | None) -> float | None:
    return None if seconds == 0 else float(DEFAULT_TIMEOUT_SECS if seconds is None else seconds)


def _inputs(inputs: tuple[Input, ...], boxes: tuple[Box, ...]) -> tuple[ClientFile | StageOutput, ...]:
    planned: list[ClientFile | StageOutput] = []
    for entry in inputs:
        if isinstance(entry, FileInput):
            planned.append(ClientFile(path=entry.file, guest=input_guest(entry)))
        else:
            box, output = find_output(entry.source, boxes)[0]
            planned.append(StageOutput(stage=box.name, name=output, guest=entry.guest))
    return tuple(planned)


def _work(item: Agent | Box, llm: Llm | None) -> AgentWork | ProgramWork:
    if item.run is not None:
        return ProgramWork(program=item.run.program, args=item.run.args)
    return AgentWork(prompt=item.prompt or "", llm=llm, skills=item.skills)


def _output_file(item: Agent | Box) -> str:
    # A program's result is what it prints, unless told otherwise; an agent is asked to write the file.
    return item.output_file or ("" if item.run is not None else DEFAULT_OUTPUT_FILE)


def _agent(spec: Spec, agent: Agent, extra: tuple[Mount, ...]) -> PlannedStage:
    return PlannedStage(
        name="agent",
        position=0,
        group=0,
        machine=_machine(spec.sandbox, BoxSandbox(), extra, spec.llm),
        work=_work(agent, spec.llm),
        inputs=_inputs(agent.inputs, ()),
        output_file=_output_file(agent),
        timeout=_timeout(agent.timeout_secs),
        retry=agent.retry,
    )


def _pipeline(spec: Spec, pipeline: Pipeline, extra: tuple[Mount, ...]) -> tuple[PlannedStage, ...]:
    boxes = {box.name: box for box in pipeline.boxes}
    planned: list[PlannedStage] = []
    before: tuple[str, ...] = ()
    earlier: list[Box] = []
    for group, stage in enumerate(stages_of(pipeline)):
        names = (stage.name,) if isinstance(stage, BoxStage) else stage.boxes
        for name in names:
            box = boxes[name]
            planned.append(
                PlannedStage(
                    name=name,
                    position=len(planned),
                    group=group,
                    depends_on=before,
                    carry_from=before,
                    machine=_machine(spec.sandbox, box.sandbox, extra, box.llm or spec.llm),
                    work=_work(box, box.llm or spec.llm),
                    inputs=_inputs(box.inputs, tuple(earlier)),
                    outputs=tuple(Collected(name=out.name, guest=out.guest) for out in box.outputs),
                    output_file=_output_file(box),
                    timeout=_timeout(box.timeout_secs),
                    retry=box.retry,
                    on_failure=box.on_failure,
                )
            )
        earlier += [boxes[name] for name in names]
        before = names
    return tuple(planned)


def _workflow(spec: Spec, workflow: Workflow, extra: tuple[Mount, ...]) -> tuple[PlannedStage, ...]:
    machine = _machine(spec.sandbox, BoxSandbox(), extra)
    levels = _levels(workflow.steps)
    files = _inputs(workflow.inputs, ())
    planned: list[PlannedStage] = []
    for position, step in enumerate(workflow.steps):
        needs = dependencies(step.depends_on, step.run.stdin_from)
        planned.append(
            PlannedStage(
                name=step.name,
                position=position,
                group=levels[step.name],
                depends_on=needs,
                stdin_from=step.run.stdin_from or (needs[0] if needs else ""),
                machine=machine,
                work=ProgramWork(program=step.run.program, args=step.run.args),
                inputs=files,
                timeout=None if step.mode is StepMode.SERVICE else _timeout(step.timeout_secs),
                retry=step.retry,
            )
        )
    return tuple(planned)


def _levels(steps: tuple[Step, ...]) -> dict[str, int]:
    """One more than the greatest level of what a step depends on; steps without are 0."""
    needs = {step.name: dependencies(step.depends_on, step.run.stdin_from) for step in steps}
    followers: dict[str, list[str]] = {name: [] for name in needs}
    missing = {name: len(names) for name, names in needs.items()}
    for name, names in needs.items():
        for other in names:
            followers[other].append(name)
    levels = dict.fromkeys(needs, 0)
    ready = [name for name, count in missing.items() if count == 0]
    while ready:
        name = ready.pop()
        for follower in followers[name]:
            levels[follower] = max(levels[follower], levels[name] + 1)
            missing[follower] -= 1
            if not missing[follower]:
                ready.append(follower)
    return levels
