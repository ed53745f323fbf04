"""Agents: how each is started, and how its output becomes an outcome."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from services.common.errors import NotBuilt
from services.orchestrator.plan import AgentWork
from voidbox.spec.checks import skill_name
from voidbox.spec.models import InlineSkill, Mount, Provider, SkillRef, SkillType, Volume

WORKSPACE: Final = "/workspace"
HOME: Final = "/home/sandbox"

MOCK_AGENT: Final = "/usr/local/bin/voidbox-mock-agent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """How an agent is started."""

    program: str
    args: tuple[str, ...]
    env: Mapping[str, str]


def command(work: AgentWork, prompt: str) -> Command:
    """The command of the agent that `work` asks for.

    Raises:
        NotBuilt: this version does not have it.
    """
    provider = work.llm.provider if work.llm else Provider.CLAUDE
    if provider is not Provider.MOCK:
        raise NotBuilt(f"provider {provider} is not in this version", provider=provider)
    model = ("--model", work.llm.model) if work.llm and work.llm.model else ()
    args = ("-p", prompt, "--output-format", "stream-json", "--verbose", *model)
    return Command(program=MOCK_AGENT, args=args, env={"HOME": HOME})


def own_directory(mounts: Iterable[Mount | Volume]) -> str:
    """Where files of ours go: not into a directory that is the user's own."""
    ours = not any(covers(mount.guest, WORKSPACE) for mount in mounts)
    return WORKSPACE if ours else HOME


def covers(mounted: str, path: str) -> bool:
    """Whether `path` lies in what is mounted at `mounted`."""
    return path == mounted or path.startswith(mounted.rstrip("/") + "/")


@dataclass(frozen=True, slots=True, kw_only=True)
class SkillFile:
    """A skill's file or directory in the box: from `text`, else uploaded under `path`."""

    name: str
    guest: str
    text: str = ""
    path: str = ""


def skill_files(work: AgentWork, directory: str) -> list[SkillFile]:
    """The skills that are files, in the layout that Claude Code reads: `<name>/SKILL.md`."""
    files: list[SkillFile] = []
    for skill in work.skills:
        folder = posixpath.join(directory, ".claude/skills", skill_name(skill))
        if isinstance(skill, InlineSkill):
            files.append(SkillFile(name=skill.name, guest=folder, text=skill.content))
        elif isinstance(skill, SkillRef) and skill.type is SkillType.FILE:
            files.append(SkillFile(name=skill_name(skill), guest=folder, path=skill.value))
    return files
