"""A tree of nodes into the spec's dataclasses, strictly, collecting every fault."""

from __future__ import annotations

import dataclasses
import difflib
import posixpath
import re
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, Final, TypeVar

from voidbox.spec.model import Rules, is_required, key_name, rules_of
from voidbox.spec.models import ENV_PATTERN, SkillRef, SkillType
from voidbox.spec.nodes import Node, describe
from voidbox.spec.problems import Path, Problem, render_path
from voidbox.spec.shapes import SHORTHANDS, Union, split_optional, union_of

_T = TypeVar("_T")
_FAILED: Final = object()
_IMAGE_FILES: Final = ("oci:", "oci-archive:", "docker-archive:")
_MAX_PROBLEMS: Final = 200


class Binder:
    """Builds dataclasses from nodes; `problems` holds what was wrong, `places` where each value stood.

    Args:
        filename: Shown in every problem.
        base_dir: Absolute directory that relative host paths are resolved against. None: it is
            not known, so relative paths are faults, but for files that the client uploads.
    """

    def __init__(self, filename: str, base_dir: str | None) -> None:
        self.problems: list[Problem] = []
        self.places: dict[Path, Node] = {}
        self._filename = filename
        self._base_dir = base_dir

    def bind(self, node: Node, cls: type[_T]) -> _T | None:
        """The object that `node` describes, or None after an unrecoverable fault."""
        built = self._object(node, cls, (), {})
        return None if built is _FAILED else typing.cast(_T, built)

    def report(self, path: Path, message: str) -> None:
        """Add a problem at `path`, or at its nearest ancestor that has a place."""
        at = path
        while at not in self.places and at:
            at = at[:-1]
        self._problem(self.places[at], path, message)

    def _problem(self, node: Node, path: Path, message: str) -> object:
        if len(self.problems) < _MAX_PROBLEMS:
            problem = Problem(
                file=self._filename,
                line=node.line,
                column=node.column,
                path=render_path(path),
                message=message,
            )
            self.problems.append(problem)
        return _FAILED

    def _object(self, node: Node, cls: type, path: Path, tag: Mapping[str, str]) -> object:
        self.places[path] = node
        if node.kind != "map":
            return self._problem(node, path, f"expected a map, found {describe(node)}")
        fields = {key_name(field): field for field in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        failed = False
        for key, value in node.value:
            if key.value in tag:
                continue
            field = fields.get(key.value)
            if field is None:
                self._problem(key, (*path, key.value), unknown("key", key.value, [*fields, *tag]))
                continue
            bound = self._value(value, hints[field.name], rules_of(field), (*path, key.value))
            if bound is _FAILED:
                failed = True
            else:
                values[field.name] = bound
        given = {key.value for key, _ in node.value}
        for name, field in fields.items():
            if is_required(field) and name not in given:
                failed = True
                self._problem(node, path, f"key '{name}' is missing: {rules_of(field).doc}")
        return _FAILED if failed else cls(**values)

    def _value(self, node: Node, hint: Any, rules: Rules, path: Path) -> object:
        self.places[path] = node
        hint, optional = split_optional(hint)
        if node.kind == "null":
            if optional:
                return None
            return self._problem(
                node, path, f"expected {_expected(hint)}, found nothing; give a value or drop the key"
            )
        union = union_of(hint)
        if union is not None:
            return self._union(node, union, path)
        origin = typing.get_origin(hint)
        if origin is tuple:
            return self._list(node, typing.get_args(hint)[0], rules, path)
        if origin is not None and issubclass(origin, Mapping):
            return self._env(node, path)
        short = SHORTHANDS.get(hint)
        if short is not None and node.kind == short.kind:
            try:
                return short.make(node.value)
            except ValueError as error:
                return self._problem(node, path, str(error))
        if short is not None and node.kind != "map":
            return self._problem(node, path, f"expected {short.words} or a map, found {describe(node)}")
        if dataclasses.is_dataclass(hint):
            return self._object(node, typing.cast(type, hint), path, {})
        if isinstance(hint, type) and issubclass(hint, Enum):
            return self._enum(node, hint, rules, path)
        return self._scalar(node, hint, rules, path)

    def _list(self, node: Node, item: Any, rules: Rules, path: Path) -> object:
        if node.kind != "list":
            return self._problem(node, path, f"expected a list, found {describe(node)}")
        if rules.minimum and not node.value:
            return self._problem(node, path, "cannot be empty")
        plain = Rules(doc=rules.doc)
        items = [self._value(child, item, plain, (*path, at)) for at, child in enumerate(node.value)]
        return _FAILED if _FAILED in items else tuple(items)

    def _env(self, node: Node, path: Path) -> object:
        if node.kind != "map":
            return self._problem(node, path, f"expected a map of strings, found {describe(node)}")
        bound: dict[str, str] = {}
        failed = False
        for key, value in node.value:
            at = (*path, key.value)
            self.places[at] = value
            if not re.fullmatch(ENV_PATTERN, key.value):
                failed = True
                self._problem(
                    key, at, "a variable's name is letters, digits and '_', not starting with a digit"
                )
                continue
            text = self._scalar(value, str, Rules(doc=""), at)
            if text is _FAILED:
                failed = True
            else:
                bound[key.value] = typing.cast(str, text)
        return _FAILED if failed else bound

    def _enum(self, node: Node, enum: type[Enum], rules: Rules, path: Path) -> object:
        names = [str(member.value) for member in enum]
        if node.kind != "string":
            return self._problem(node, path, f"expected one of {', '.join(names)}, found {describe(node)}")
        text = node.value.lower() if rules.any_case else node.value
        if text == "lmstudio" and "lm-studio" in names:
            text = "lm-studio"
        if text not in names:
            return self._problem(
                node, path, f"{unknown('value', node.value, names)} Known: {', '.join(names)}"
            )
        return enum(text)

    def _scalar(self, node: Node, hint: Any, rules: Rules, path: Path) -> object:
        wanted = {str: "string", int: "integer", bool: "boolean"}[hint]
        if node.kind != wanted:
            cure = (
                "; put it in quotes"
                if wanted == "string" and node.kind in ("integer", "number", "boolean")
                else ""
            )
            return self._problem(node, path, f"expected {_expected(hint)}, found {describe(node)}{cure}")
        if hint is int:
            if rules.minimum is not None and node.value < rules.minimum:
                return self._problem(
                    node, path, f"{str(node.value)[:40]} is too small; at least {rules.minimum}"
                )
            if rules.maximum is not None and node.value > rules.maximum:
                return self._problem(
                    node, path, f"{str(node.value)[:40]} is too large; at most {rules.maximum}"
                )
        if hint is str:
            return self._string(node, rules, path)
        return node.value

    def _host_path(self, text: str, node: Node, rules: Rules, path: Path) -> object:
        if not text:
            return self._problem(node, path, "a path cannot be empty")
        if text.startswith("~"):
            return self._problem(
                node, path, "'~' is not expanded; write the path out, or relative to this file"
            )
        if self._base_dir is None and not rules.uploaded and not text.startswith("/"):
            return self._problem(
                node, path, f"{text[:80]!r} is relative, and the directory it starts from is unknown"
            )
        return resolve_path(text, self._base_dir)

    def _string(self, node: Node, rules: Rules, path: Path) -> object:
        text: str = node.value
        if "\0" in text:
            return self._problem(node, path, "must not hold a NUL character")
        if rules.not_blank and not text.strip():
            return self._problem(node, path, "cannot be empty")
        if rules.pattern and not re.fullmatch(rules.pattern, text):
            return self._problem(node, path, f"{text[:80]!r} is not {rules.pattern_hint or rules.pattern}")
        if rules.host_path:
            return self._host_path(text, node, rules, path)
        if rules.image:
            scheme, place, rest = split_image(text)
            resolved = self._host_path(place, node, rules, path) if scheme else place
            return f"{scheme}{resolved}{rest}" if isinstance(resolved, str) else resolved
        if rules.guest_path:
            fault = guest_path_fault(text)
            if fault:
                return self._problem(node, path, fault)
            return "/" + posixpath.normpath(text).lstrip("/")
        return text

    def _union(self, node: Node, union: Union, path: Path) -> object:
        if union.text is not None and node.kind == "string":
            return self._skill(node, path)
        if node.kind != "map":
            return self._problem(node, path, f"expected a map, found {describe(node)}")
        keys = {key.value: value for key, value in node.value}
        if union.tag:
            tag = keys.get(union.tag)
            names = list(union.by_tag)
            if tag is None:
                return self._problem(node, path, f"key '{union.tag}' is missing; one of {', '.join(names)}")
            if tag.kind != "string" or tag.value not in union.by_tag:
                return self._problem(
                    tag, (*path, union.tag), f"expected one of {', '.join(names)}, found {describe(tag)}"
                )
            return self._object(node, union.by_tag[tag.value], path, {union.tag: tag.value})
        chosen = [key for key in union.by_key if key in keys]
        if len(chosen) != 1:
            names = [f"'{key}'" for key in union.by_key]
            return self._problem(node, path, f"needs exactly one of the keys {', '.join(names)}")
        return self._object(node, union.by_key[chosen[0]], path, {})

    def _skill(self, node: Node, path: Path) -> object:
        kind, colon, value = node.value.partition(":")
        names = [member.value for member in SkillType]
        if not colon:
            return self._problem(node, path, f"invalid skill {node.value[:80]!r}, expected '<type>:<value>'")
        if kind not in names:
            message = f"unsupported skill type {kind[:40]!r}; use {'|'.join(names)}"
            return self._problem(node, path, message)
        if not value.strip():
            return self._problem(node, path, f"skill '{kind}:' has no value after the colon")
        rules = Rules(doc="", host_path=kind == SkillType.FILE, uploaded=True)
        text = self._string(dataclasses.replace(node, value=value), rules, path)
        return _FAILED if text is _FAILED else SkillRef(type=SkillType(kind), value=typing.cast(str, text))


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """`unknown key 'memroy_mb'; did you mean 'memory_mb'?`"""
    close = difflib.get_close_matches(given[:80], list(known), n=1)
    return f"unknown {what} {given[:80]!r}" + (f"; did you mean {close[0]!r}?" if close else ".")


def resolve_path(text: str, base_dir: str | None) -> str:
    """`text` as an absolute, normalized path; relative ones start from `base_dir` (`/` if None)."""
    return "/" + posixpath.normpath(posixpath.join(base_dir or "/", text)).lstrip("/")


def split_image(text: str) -> tuple[str, str, str]:
    """Scheme, path and the rest of a reference to an image in a file; only a path if it is in a registry."""
    scheme = next((word for word in _IMAGE_FILES if text.startswith(word)), "")
    if not scheme:
        return "", text, ""
    place, colon, rest = text.removeprefix(scheme).partition(":")
    return scheme, place, colon + rest


def resolve_image(text: str, base_dir: str) -> str:
    """An image reference whose path, if it has one, is absolute."""
    scheme, place, rest = split_image(text)
    return f"{scheme}{resolve_path(place, base_dir)}{rest}" if scheme and place else text


def guest_path_fault(text: str) -> str:
    """Why `text` is no path in a box; empty if it is one."""
    if not text.startswith("/"):
        return f"{text[:80]!r} is not an absolute path in the box, like /workspace/data"
    if ".." in text.split("/"):
        return "a path in the box must not hold '..'"
    if len(text.encode()) > 4095:
        return "a path in the box is at most 4095 bytes long"
    return ""


def _expected(hint: Any) -> str:
    if dataclasses.is_dataclass(hint) or (
        typing.get_origin(hint) is not None and typing.get_origin(hint) is not tuple
    ):
        return "a map"
    if typing.get_origin(hint) is tuple:
        return "a list"
    return {str: "a string", int: "an integer", bool: "true or false"}.get(hint, "a value")
