"""Which of several shapes a value has: the unions of the spec format."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from services.common.egress.text import parse_rule
from voidbox.spec.models import (
    BoxStage,
    FanOutStage,
    FileInput,
    ImageSkill,
    InlineSkill,
    Input,
    McpSkill,
    Network,
    NetworkPreset,
    NetworkRule,
    OutputInput,
    RuleProtocol,
    Skill,
    SkillRef,
    Stage,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Union:
    """How the shapes of a union are told apart.

    Attributes:
        by_key: A key that only this shape has, to the shape.
        tag: The key that names the shape, if the format has one.
        by_tag: Its values.
        text: The shape that is written as one string, if any.
    """

    by_key: Mapping[str, type] = field(default_factory=dict)
    tag: str = ""
    by_tag: Mapping[str, type] = field(default_factory=dict)
    text: type | None = None


UNIONS: Final[Mapping[frozenset[Any], Union]] = {
    frozenset(typing.get_args(Skill)): Union(
        by_key={"image": ImageSkill, "command": McpSkill, "content": InlineSkill}, text=SkillRef
    ),
    frozenset(typing.get_args(Input)): Union(by_key={"from": OutputInput, "file": FileInput}),
    frozenset(typing.get_args(Stage)): Union(tag="type", by_tag={"box": BoxStage, "fan_out": FanOutStage}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shorthand:
    """A scalar that stands for a map.

    Attributes:
        kind: The scalar's kind: "boolean" or "string".
        words: What to call such a scalar.
        make: The object; raises ValueError with what is wrong.
    """

    kind: str
    words: str
    make: Callable[[Any], Any]


def _network(value: bool) -> Network:
    return Network(preset=NetworkPreset.INTERNET if value else NetworkPreset.NONE, enabled=value)


def _network_rule(text: str) -> NetworkRule:
    parts = parse_rule(text)
    return NetworkRule(
        host=parts.get("host"),
        cidr=parts.get("cidr"),
        ports=parts["ports"],
        protocol=RuleProtocol(parts["protocol"]),
    )


SHORTHANDS: Final[Mapping[type, Shorthand]] = {
    Network: Shorthand(kind="boolean", words="true or false", make=_network),
    NetworkRule: Shorthand(kind="string", words="a rule like example.com:443", make=_network_rule),
}


def split_optional(hint: Any) -> tuple[Any, bool]:
    """`T | None` as (T, True), anything else as (hint, False)."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else ()
    if type(None) not in members:
        return hint, False
    rest = [member for member in members if member is not type(None)]
    assert len(rest) == 1, "an optional union is not part of the format"
    return rest[0], True


def union_of(hint: Any) -> Union | None:
    """How to tell the members of `hint` apart; None if it is no union."""
    return UNIONS[frozenset(typing.get_args(hint))] if isinstance(hint, types.UnionType) else None
