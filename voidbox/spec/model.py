"""Dataclasses that describe themselves: every key carries its rules and its documentation.

`@model` makes a frozen, slotted, keyword-only dataclass; `key(...)` is a field with
rules. The binder (`bind.py`) and the JSON Schema (`schema.py`) both read them, so what
is documented is what is enforced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Final, TypeVar, dataclass_transform

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a key accepts beyond its type.

    Attributes:
        doc: One or two sentences for the reader of the schema.
        name: The key in the file, if it is not the field's name (`from` is a keyword).
        minimum: Least integer, or 1 for a list that must not be empty.
        maximum: Greatest integer.
        pattern: Regular expression that the whole string matches.
        pattern_hint: The pattern in words.
        host_path: Relative paths are resolved against the spec's directory.
        image: A reference to an image; of one in a file or directory the path is resolved as by `host_path`.
        uploaded: The client sends the file at that path; the name alone identifies it.
        guest_path: An absolute, normalized path inside the box.
        not_blank: The string must hold more than white space.
        any_case: Enum values are matched without regard to case.
    """

    doc: str
    name: str = ""
    minimum: int | None = None
    maximum: int | None = None
    pattern: str = ""
    pattern_hint: str = ""
    host_path: bool = False
    image: bool = False
    uploaded: bool = False
    guest_path: bool = False
    not_blank: bool = False
    any_case: bool = False


RULES: Final = "voidbox"


def key(
    doc: str,
    *,
    default: Any = MISSING,
    default_factory: Callable[[], Any] | None = None,
    **rules: Any,
) -> Any:
    """A field of a `@model` with its documentation and rules."""
    metadata: Mapping[str, Any] = {RULES: Rules(doc=doc, **rules)}
    if default_factory is not None:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(key,))
def model(cls: type[_T]) -> type[_T]:
    """Make `cls` a frozen, slotted, keyword-only dataclass."""
    return dataclass(frozen=True, slots=True, kw_only=True)(cls)


def rules_of(field: dataclasses.Field[Any]) -> Rules:
    """The rules that `key` attached."""
    found: Rules = field.metadata[RULES]
    return found


def key_name(field: dataclasses.Field[Any]) -> str:
    """How the field is spelled in a spec file."""
    return rules_of(field).name or field.name


def is_required(field: dataclasses.Field[Any]) -> bool:
    """True if the key must be present."""
    return field.default is MISSING and field.default_factory is MISSING
