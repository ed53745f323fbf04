"""What a valid spec may ask for that this version does not do: refused when it is submitted.

Nothing is ever ignored: a run that starts gets all that its spec says.
"""

from __future__ import annotations

from collections.abc import Iterator

from services.common.errors import NotBuilt
from voidbox.spec.models import (
    Agent,
    AgentMode,
    Box,
    ImageSkill,
    Llm,
    McpSkill,
    Observe,
    Provider,
    SandboxMode,
    Skill,
    SkillRef,
    SkillType,
    Spec,
)


def check_supported(spec: Spec) -> None:
    """Refuse what cannot be done.

    Raises:
        NotBuilt: every such wish, with its place and what to do instead.
    """
    wishes = list(_wishes(spec))
    if wishes:
        raise NotBuilt("\n".join(wishes), reason="NOT_IN_THIS_VERSION")


def _wishes(spec: Spec) -> Iterator[str]:
    if spec.sandbox.mode is SandboxMode.MOCK:
        yield "sandbox.mode: mock runs no machine, which this version does not offer; use auto"
    yield from _snapshot("sandbox", spec.sandbox.snapshot, spec.sandbox.image)
    if spec.observe is not None and spec.observe != Observe():
        yield "observe: telemetry export is not in this version; remove the block"
    if spec.llm is not None and spec.agent is None and spec.pipeline is None:
        yield from _llm("llm", spec.llm)
    if spec.agent is not None:
        yield from _agent(spec, spec.agent)
    for at, box in enumerate(spec.pipeline.boxes if spec.pipeline else ()):
        yield from _box(spec, box, f"pipeline.boxes[{at}]")


def _snapshot(place: str, snapshot: str | None, image: str | None) -> Iterator[str]:
    if snapshot and image:
        yield f"{place}.snapshot: a snapshot has a root of its own; remove it or {place}.image"


def _agent(spec: Spec, agent: Agent) -> Iterator[str]:
    if agent.mode is not AgentMode.TASK:
        yield f"agent.mode: {agent.mode} is not in this version; use task"
    if agent.messaging is not None and agent.messaging.enabled:
        yield "agent.messaging: messages between agents are not in this version; remove it"
    if agent.run is None:
        yield from _llm("llm", spec.llm)
        yield from _skills("agent", agent.skills)
    elif spec.llm is not None and spec.llm.provider is not Provider.MOCK:
        yield from _llm("llm", spec.llm)


def _box(spec: Spec, box: Box, place: str) -> Iterator[str]:
    snapshot = box.sandbox.snapshot or spec.sandbox.snapshot
    yield from _snapshot(f"{place}.sandbox", snapshot, box.sandbox.image or spec.sandbox.image)
    if box.run is None:
        yield from _llm(f"{place}.llm" if box.llm else "llm", box.llm or spec.llm)
        yield from _skills(place, box.skills)


def _llm(place: str, llm: Llm | None) -> Iterator[str]:
    provider = llm.provider if llm else Provider.CLAUDE
    if provider is not Provider.MOCK:
        default = "" if llm else " (the default)"
        yield (
            f"{place}.provider: {provider}{default} is not in this version; "
            "use `provider: mock`, or `run` to start a program instead of an agent"
        )
    elif llm is not None and llm.credential_proxy:
        yield f"{place}.credential_proxy: not in this version; the mock agent needs no key"


def _skills(place: str, skills: tuple[Skill, ...]) -> Iterator[str]:
    for at, skill in enumerate(skills):
        where = f"{place}.skills[{at}]"
        if isinstance(skill, ImageSkill):
            yield f"{where}: skills from OCI images are not in this version; use file: or an inline skill"
        elif isinstance(skill, McpSkill) or (isinstance(skill, SkillRef) and skill.type is SkillType.MCP):
            yield f"{where}: MCP servers are not in this version; remove it"
        elif isinstance(skill, SkillRef) and skill.type is SkillType.REMOTE:
            yield f"{where}: remote skills are not in this version; download it and use file:"
