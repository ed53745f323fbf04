"""What must hold across a whole spec, beyond the type of each key."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from voidbox.spec.bind import unknown
from voidbox.spec.models import (
    DEFAULT_INPUT_DIR,
    Agent,
    AgentMode,
    Box,
    BoxStage,
    FileInput,
    ImageSkill,
    InlineSkill,
    Input,
    Kind,
    Mount,
    Network,
    OutputInput,
    Pipeline,
    Program,
    Retry,
    Skill,
    SkillRef,
    SkillType,
    Spec,
    Stage,
    StepMode,
    Volume,
    Workflow,
)
from voidbox.spec.network import rule_of
from voidbox.spec.problems import Path

Report = Callable[[Path, str], None]

API_VERSION = "v1"
# Artifacts that every stage has.
_NO_DISK = "a box without sandbox.image has no disk, its files are in memory: raise memory_mb instead"
RESERVED_OUTPUTS = frozenset({"output", "stderr"})


def check(spec: Spec, report: Report) -> None:
    """Report every rule that `spec` breaks."""
    if spec.api_version != API_VERSION:
        report(("api_version",), f"unsupported api_version {spec.api_version!r}, expected {API_VERSION!r}")
    _blocks(spec, report)
    _mounts(spec.sandbox.mounts, ("sandbox", "mounts"), report)
    _disks(spec, report)
    _volumes(spec, report)
    if spec.sandbox.network is not None:
        _network(spec.sandbox.network, ("sandbox", "network"), report)
    for at, box in enumerate(spec.pipeline.boxes if spec.pipeline is not None else ()):
        if box.sandbox.network is not None:
            _network(box.sandbox.network, ("pipeline", "boxes", at, "sandbox", "network"), report)
    if spec.agent is not None and spec.kind is Kind.AGENT:
        _agent(spec, spec.agent, report)
    if spec.pipeline is not None and spec.kind is Kind.PIPELINE:
        _pipeline(spec, spec.pipeline, report)
    if spec.workflow is not None and spec.kind is Kind.WORKFLOW:
        _workflow(spec.workflow, report)


def _blocks(spec: Spec, report: Report) -> None:
    blocks = {Kind.AGENT: spec.agent, Kind.PIPELINE: spec.pipeline, Kind.WORKFLOW: spec.workflow}
    for kind, block in blocks.items():
        if kind is spec.kind and block is None:
            report(("kind",), f"kind: {kind} requires the block '{kind}'")
        if kind is not spec.kind and block is not None:
            article = "an" if kind is Kind.AGENT else "a"
            report((kind.value,), f"kind: {spec.kind} does not accept {article} {kind} block")


def _disks(spec: Spec, report: Report) -> None:
    image, boxes = spec.sandbox.image, spec.pipeline.boxes if spec.pipeline is not None else ()
    if spec.sandbox.disk_mb is not None and image is None and not any(box.sandbox.image for box in boxes):
        report(("sandbox", "disk_mb"), _NO_DISK)
    for at, box in enumerate(boxes):
        if box.sandbox.disk_mb is not None and image is None and box.sandbox.image is None:
            report(("pipeline", "boxes", at, "sandbox", "disk_mb"), _NO_DISK)


def _network(network: Network, path: Path, report: Report) -> None:
    for name in ("allow", "deny"):
        for at, rule in enumerate(getattr(network, name)):
            try:
                rule_of(rule)
            except ValueError as error:
                report((*path, name, at), str(error))
    for at, port in enumerate(network.host_ports):
        if not 1 <= port <= 65535:
            report((*path, "host_ports", at), f"{port} is not a port, 1 to 65535")
    if not network.enabled and network != Network(enabled=False):
        report(path, "rules for a network that is not enabled; remove `enabled: false`")


def _volumes(spec: Spec, report: Report) -> None:
    """A volume is one box's at a time, and is mounted where nothing else is."""
    shared = spec.sandbox.volumes
    _mounts(shared, ("sandbox", "volumes"), report, [mount.guest for mount in spec.sandbox.mounts])
    if spec.pipeline is None:
        return
    boxes = {box.name: box.sandbox for box in spec.pipeline.boxes}
    for at, box in enumerate(spec.pipeline.boxes):
        taken = [mount.guest for mount in (*spec.sandbox.mounts, *box.sandbox.mounts)]
        taken += [volume.guest for volume in shared]
        _mounts(box.sandbox.volumes, ("pipeline", "boxes", at, "sandbox", "volumes"), report, taken)
    for at, stage in enumerate(spec.pipeline.stages):
        names = () if isinstance(stage, BoxStage) else stage.boxes
        used = Counter(one.name for name in names if name in boxes for one in (*shared, *boxes[name].volumes))
        for volume, count in used.items():
            if count > 1:
                report(
                    ("pipeline", "stages", at),
                    f"volume {volume!r} is in {count} boxes that run at once; one box at a time can have it",
                )


def _mounts(mounts: Sequence[Mount | Volume], path: Path, report: Report, taken: Iterable[str] = ()) -> None:
    seen = set(taken)
    for at, mount in enumerate(mounts):
        if mount.guest in seen:
            report((*path, at, "guest"), f"{mount.guest} is mounted twice")
        if mount.guest == "/":
            report((*path, at, "guest"), "the box's root cannot be a mount; use sandbox.image")
        seen.add(mount.guest)


def _work(
    prompt: str | None, run: Program | None, skills: Sequence[Skill], path: Path, report: Report
) -> None:
    if prompt is None and run is None:
        report(path, "needs either a 'prompt' (for an agent) or 'run' (a program)")
    if prompt is not None and run is not None:
        report((*path, "run"), "has both 'prompt' and 'run'; give one of them")
    if run is not None and skills:
        report((*path, "skills"), "skills are for agents; a box with 'run' cannot have them")
    names: set[str] = set()
    for at, skill in enumerate(skills):
        name = skill_name(skill)
        if name in names:
            report((*path, "skills", at), f"there is already a skill named {name!r}")
        if name:
            names.add(name)
        if isinstance(skill, ImageSkill) and skill.mount == "/":
            report((*path, "skills", at, "mount"), "a skill cannot be mounted at the box's root")


def skill_name(skill: Skill) -> str:
    """The directory name that a skill of files gets in the box; empty for other skills."""
    if isinstance(skill, InlineSkill):
        return skill.name
    if isinstance(skill, SkillRef) and skill.type is SkillType.FILE:
        base = posixpath.basename(skill.value)
        parent = posixpath.basename(posixpath.dirname(skill.value))
        return parent if base == "SKILL.md" and parent else base.removesuffix(".md")
    return ""


def _retry(retry: Retry, path: Path, report: Report) -> None:
    if retry.initial_delay_ms > retry.max_delay_ms:
        report((*path, "retry"), f"initial_delay_ms is greater than max_delay_ms ({retry.max_delay_ms})")


def _agent(spec: Spec, agent: Agent, report: Report) -> None:
    path: Path = ("agent",)
    _work(agent.prompt, agent.run, agent.skills, path, report)
    _retry(agent.retry, path, report)
    _inputs(agent.inputs, path, report)
    if agent.prompt is not None and not agent.prompt.strip() and agent.mode is not AgentMode.INTERACTIVE:
        report(("agent", "prompt"), "agent.prompt cannot be empty")
    if agent.mode is not AgentMode.TASK:
        if agent.run is not None:
            report(("agent", "mode"), f"mode: {agent.mode} is for agents with a prompt, not for 'run'")
        if agent.timeout_secs is not None:
            report(("agent", "timeout_secs"), f"mode: {agent.mode} and timeout_secs are mutually exclusive")
    if agent.mode is AgentMode.SERVICE:
        if agent.output_file is None:
            report(("agent", "mode"), "mode: service requires output_file")
        if spec.llm is not None and spec.llm.credential_proxy:
            report(("llm", "credential_proxy"), "credential_proxy is not available with mode: service")


def _inputs(inputs: Sequence[Input], path: Path, report: Report) -> None:
    seen: set[str] = set()
    for at, entry in enumerate(inputs):
        guest = input_guest(entry)
        if guest in seen:
            report((*path, "inputs", at), f"two inputs go to {guest}; give each its own 'guest'")
        if guest == "/":
            report((*path, "inputs", at, "guest"), "an input cannot replace the box's root")
        seen.add(guest)


def input_guest(entry: Input) -> str:
    """Where an input goes in the box."""
    if isinstance(entry, FileInput) and entry.guest is None:
        return posixpath.join(DEFAULT_INPUT_DIR, posixpath.basename(entry.file))
    assert entry.guest is not None
    return entry.guest


def stages_of(pipeline: Pipeline) -> tuple[Stage, ...]:
    """The stages as declared, else the boxes one after the other."""
    return pipeline.stages or tuple(BoxStage(name=box.name) for box in pipeline.boxes)


def _pipeline(spec: Spec, pipeline: Pipeline, report: Report) -> None:
    boxes: dict[str, Box] = {}
    for at, box in enumerate(pipeline.boxes):
        path: Path = ("pipeline", "boxes", at)
        if box.name in boxes:
            report((*path, "name"), f"there is already a box named {box.name!r}")
        boxes[box.name] = box
        _work(box.prompt, box.run, box.skills, path, report)
        _retry(box.retry, path, report)
        _inputs(box.inputs, path, report)
        if box.run is not None and box.llm is not None:
            report((*path, "llm"), "llm is for agents; a box with 'run' cannot have it")
        taken = [mount.guest for mount in spec.sandbox.mounts]
        _mounts(box.sandbox.mounts, (*path, "sandbox", "mounts"), report, taken)
        names = Counter(output.name for output in box.outputs)
        for place, output in enumerate(box.outputs):
            if output.name in RESERVED_OUTPUTS:
                message = f"{output.name!r} is the name of what the box prints; choose another one"
                report((*path, "outputs", place, "name"), message)
            if names[output.name] > 1:
                report(
                    (*path, "outputs", place, "name"), f"there are {names[output.name]} outputs of this name"
                )
    positions = _stage_positions(pipeline, boxes, report)
    for at, box in enumerate(pipeline.boxes):
        for place, entry in enumerate(box.inputs):
            if isinstance(entry, OutputInput) and box.name in positions:
                where: Path = ("pipeline", "boxes", at, "inputs", place, "from")
                _source(box, entry, boxes, positions, where, report)


def _stage_positions(pipeline: Pipeline, boxes: dict[str, Box], report: Report) -> dict[str, int]:
    positions: dict[str, int] = {}
    for at, stage in enumerate(stages_of(pipeline)):
        path: Path = ("pipeline", "stages", at)
        single = isinstance(stage, BoxStage)
        if not single and at == 0:
            report(path, "pipeline first stage cannot be fan_out; put a box before it")
        for place, name in enumerate([stage.name] if isinstance(stage, BoxStage) else stage.boxes):
            where: Path = (*path, "name") if single else (*path, "boxes", place)
            if name not in boxes:
                report(where, unknown("box", name, boxes))
            elif name in positions and pipeline.stages:
                report(where, f"box {name!r} runs already in stage {positions[name] + 1}; a box runs once")
            positions.setdefault(name, at)
    for at, box in enumerate(pipeline.boxes):
        if box.name not in positions:
            report(("pipeline", "boxes", at, "name"), f"box {box.name!r} is in no stage; add it or remove it")
    return positions


def find_output(source: str, boxes: Iterable[Box]) -> list[tuple[Box, str]]:
    """The (box, output name) pairs that `source` may mean; one unless it is unknown or ambiguous."""
    found = [(box, output.name) for box in boxes for output in box.outputs if output.name == source]
    if found:
        return found
    return [
        (box, output.name) for box in boxes for output in box.outputs if f"{box.name}.{output.name}" == source
    ]


def _source(
    box: Box, entry: OutputInput, boxes: dict[str, Box], positions: dict[str, int], path: Path, report: Report
) -> None:
    before = [other for other in boxes.values() if positions.get(other.name, 1 << 30) < positions[box.name]]
    found = find_output(entry.source, before)
    if len(found) == 1:
        return
    if found:
        names = ", ".join(f"{other.name}.{output}" for other, output in found)
        report(path, f"{entry.source!r} is an output of several boxes; write one of {names}")
        return
    available = ", ".join(output.name for other in before for output in other.outputs)
    elsewhere = find_output(entry.source, boxes.values())
    if elsewhere:
        other = elsewhere[0][0]
        when = (
            "itself"
            if other is box
            else "a later stage"
            if positions.get(other.name, 0) > positions[box.name]
            else ""
        )
        reason = f"of {when or 'the same stage'}; inputs come from earlier stages"
        report(path, f"{entry.source!r} is an output {reason} (available: [{available}])")
        return
    report(
        path, f"box {box.name!r} input {entry.source!r} references unknown output (available: [{available}])"
    )


def _workflow(workflow: Workflow, report: Report) -> None:
    steps = {step.name: step for step in workflow.steps}
    seen: set[str] = set()
    _inputs(workflow.inputs, ("workflow",), report)
    for at, step in enumerate(workflow.steps):
        path: Path = ("workflow", "steps", at)
        if step.name in seen:
            report((*path, "name"), f"there is already a step named {step.name!r}")
        seen.add(step.name)
        _retry(step.retry, path, report)
        if step.mode is StepMode.SERVICE and step.timeout_secs is not None:
            report(path, f"step {step.name!r}: mode: service and timeout_secs are mutually exclusive")
        for place, name in enumerate(step.depends_on):
            if name not in steps:
                report((*path, "depends_on", place), unknown("step", name, steps))
            elif name in step.depends_on[:place]:
                report((*path, "depends_on", place), f"{name!r} is named twice")
        source = step.run.stdin_from
        if source is not None and source not in steps:
            report((*path, "run", "stdin_from"), unknown("step", source, steps))
    if workflow.output_step is not None and workflow.output_step not in steps:
        report(("workflow", "output_step"), unknown("step", workflow.output_step, steps))
    cycle = find_cycle(
        {name: dependencies(step.depends_on, step.run.stdin_from) for name, step in steps.items()}
    )
    if cycle:
        at = next(place for place, step in enumerate(workflow.steps) if step.name == cycle[0])
        report(("workflow", "steps", at, "depends_on"), f"circular dependency: {' -> '.join(cycle)}")


def dependencies(depends_on: Sequence[str], stdin_from: str | None) -> tuple[str, ...]:
    """The steps that a step waits for; reading another's output is waiting for it."""
    extra = () if stdin_from is None or stdin_from in depends_on else (stdin_from,)
    return (*depends_on, *extra)


def find_cycle(graph: dict[str, tuple[str, ...]]) -> list[str]:
    """One cycle of `graph`, its first name repeated at the end; empty if there is none."""
    done: set[str] = set()
    for start in graph:
        # Depth first without recursion: a workflow may have more steps than Python has stack.
        trail: list[str] = [start]
        pending = [iter(graph[start])]
        while pending and start not in done:
            name = next(pending[-1], None)
            if name is None:
                pending.pop()
                done.add(trail.pop())
            elif name in trail:
                return [*trail[trail.index(name) :], name]
            elif name in graph and name not in done:
                trail.append(name)
                pending.append(iter(graph[name]))
    return []
