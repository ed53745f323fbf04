"""YAML and JSON text into one tree of nodes that know their line and column.

The text is untrusted: size, depth and the number of nodes (aliases expanded) are
bounded, duplicate keys and unknown tags are refused, and nothing is ever constructed
but strings, numbers, booleans, lists and maps. YAML scalars follow the 1.2 core schema,
so `yes`, `no` and `on` are strings and `12:30` is not a number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from json.decoder import JSONDecodeError, scanstring  # type: ignore[attr-defined]
from typing import Any, Final, Literal

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

MAX_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 32
# A spec of 1000 boxes with ten keys each is 20,000 nodes; an alias bomb passes this in no time.
MAX_NODES: Final = 50_000

NodeKind = Literal["map", "list", "string", "integer", "number", "boolean", "null"]


class Malformed(Exception):
    """The text is not the format it claims, or passes a limit; `line` and `column` count from 1."""

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(message)
        self.message, self.line, self.column = message, line, column


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A value and where it starts.

    `value` is a tuple of (key node, value node) pairs for a map, a tuple of nodes for a
    list, else the scalar itself.
    """

    kind: NodeKind
    value: Any
    line: int
    column: int


def read_nodes(text: str, language: Literal["yaml", "json"]) -> Node:
    """The tree of `text`.

    Raises:
        Malformed: with the place of the first fault.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise Malformed(f"larger than {MAX_BYTES} bytes", 1, 1)
    return _Json(text).document() if language == "json" else _yaml_document(text)


class _CoreResolver(BaseResolver):
    """Implicit types of the YAML 1.2 core schema."""


_TAG = "tag:yaml.org,2002:"
for _name, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
):
    _CoreResolver.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)


class _Loader(Reader, Scanner, Parser, Composer, _CoreResolver):
    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _CoreResolver.__init__(self)
        self._depth = 0
        self._count = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        self._count += 1
        try:
            if self._depth > MAX_DEPTH or self._count > MAX_NODES:
                what = f"nested deeper than {MAX_DEPTH} levels"
                if self._count > MAX_NODES:
                    what = f"more than {MAX_NODES} values"
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise Malformed(what, mark.line + 1, mark.column + 1)
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def _yaml_document(text: str) -> Node:
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except ReaderError as error:
        before = text[: error.position]
        line = before.count("\n") + 1
        column = error.position - (before.rfind("\n") + 1) + 1
        raise Malformed(f"character {error.character!r} is not allowed in YAML", line, column) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(part for part in (error.context, error.problem) if part)
        hint = "; indent with spaces, not tabs" if "'\\t'" in problem else ""
        raise Malformed(
            problem + hint, mark.line + 1 if mark else 1, mark.column + 1 if mark else 1
        ) from error
    if root is None:
        raise Malformed("the file is empty", 1, 1)
    return _Converter().node(root, 0)


class _Converter:
    """PyYAML nodes to ours; counts every visit, so aliases cannot multiply without end."""

    def __init__(self) -> None:
        self._count = 0

    def node(self, node: yaml.Node, depth: int) -> Node:
        line, column = node.start_mark.line + 1, node.start_mark.column + 1
        self._count += 1
        if self._count > MAX_NODES:
            raise Malformed(f"more than {MAX_NODES} values, counting each use of an alias", line, column)
        if depth > MAX_DEPTH:
            raise Malformed(f"nested deeper than {MAX_DEPTH} levels", line, column)
        tag = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            pairs = [(self._key(key, depth), self.node(value, depth + 1)) for key, value in node.value]
            return Node(kind="map", value=_unique(pairs), line=line, column=column)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            items = tuple(self.node(item, depth + 1) for item in node.value)
            return Node(kind="list", value=items, line=line, column=column)
        if isinstance(node, yaml.ScalarNode):
            kind, value = _scalar(node.value, tag, line, column)
            return Node(kind=kind, value=value, line=line, column=column)
        raise Malformed(f"tag {node.tag} is not allowed", line, column)

    def _key(self, node: yaml.Node, depth: int) -> Node:
        key = self.node(node, depth + 1)
        if key.kind != "string":
            raise Malformed(
                f"a key must be a string, found {describe(key)}; put it in quotes", key.line, key.column
            )
        return key


def _scalar(text: str, tag: str, line: int, column: int) -> tuple[NodeKind, Any]:
    try:
        match tag:
            case "str":
                # An escaped pair of surrogates is one character, which PyYAML leaves apart.
                return "string", text.encode("utf-16", "surrogatepass").decode("utf-16")
            case "null":
                return "null", None
            case "bool":
                return "boolean", {"true": True, "false": False}[text.lower()]
            case "int":
                base = {"0o": 8, "0x": 16}.get(text[:2], 10)
                return "integer", int(text[2:] if base != 10 else text, base)
            case "float":
                return "number", float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except (ValueError, KeyError) as error:
        raise Malformed(f"{text[:40]!r} is no {tag}", line, column) from error
    raise Malformed(f"tag !{tag.removeprefix('!')} is not allowed", line, column)


def _unique(pairs: list[tuple[Node, Node]]) -> tuple[tuple[Node, Node], ...]:
    seen: dict[str, Node] = {}
    for key, _ in pairs:
        if key.value in seen:
            first = seen[key.value]
            raise Malformed(
                f"key {key.value!r} is given twice, first on line {first.line}", key.line, key.column
            )
        seen[key.value] = key
    return tuple(pairs)


def describe(node: Node) -> str:
    """`node` in words, for a message: "the integer 5", "a list"."""
    match node.kind:
        case "map" | "list":
            return f"a {node.kind}"
        case "null":
            return "nothing (null)"
        case "string":
            text = node.value if len(node.value) <= 40 else node.value[:37] + "..."
            return f"the string {text!r}"
        case "boolean":
            return f"the boolean {'true' if node.value else 'false'}"
        case _:
            return f"the {node.kind} {str(node.value)[:40]}"


_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORDS: Final[dict[str, tuple[NodeKind, Any]]] = {
    "true": ("boolean", True),
    "false": ("boolean", False),
    "null": ("null", None),
}


class _Json:
    """RFC 8259 by recursive descent, because the standard parser keeps no positions."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._count = 0
        self._line, self._line_start = 1, 0
        self._marked = 0

    def document(self) -> Node:
        self._space()
        if self._at == len(self._text):
            raise self._bad("the file is empty")
        node = self._value(0)
        self._space()
        if self._at != len(self._text):
            raise self._bad("text after the end of the JSON value")
        return node

    def _place(self) -> tuple[int, int]:
        lines = self._text.count("\n", self._marked, self._at)
        if lines:
            self._line += lines
            self._line_start = self._text.rfind("\n", self._marked, self._at) + 1
        self._marked = self._at
        return self._line, self._at - self._line_start + 1

    def _bad(self, message: str) -> Malformed:
        return Malformed(message, *self._place())

    def _space(self) -> None:
        found = _SPACE.match(self._text, self._at)
        assert found is not None
        self._at = found.end()

    def _take(self, character: str) -> bool:
        self._space()
        if self._text.startswith(character, self._at):
            self._at += 1
            return True
        return False

    def _value(self, depth: int) -> Node:
        line, column = self._place()
        self._count += 1
        if self._count > MAX_NODES:
            raise self._bad(f"more than {MAX_NODES} values")
        if depth > MAX_DEPTH:
            raise self._bad(f"nested deeper than {MAX_DEPTH} levels")
        match self._text[self._at : self._at + 1]:
            case "{":
                return Node(kind="map", value=self._map(depth), line=line, column=column)
            case "[":
                return Node(kind="list", value=self._list(depth), line=line, column=column)
            case '"':
                return Node(kind="string", value=self._string(), line=line, column=column)
        for word, (kind, value) in _WORDS.items():
            if self._text.startswith(word, self._at):
                self._at += len(word)
                return Node(kind=kind, value=value, line=line, column=column)
        number = _NUMBER.match(self._text, self._at)
        if number is None:
            raise self._bad(
                "expected a JSON value" if self._at < len(self._text) else "the text ends too early"
            )
        kind = "number" if number[1] or number[2] else "integer"
        try:
            value = float(number[0]) if kind == "number" else int(number[0])
        except ValueError as error:
            raise self._bad(f"{number[0][:40]}... has too many digits") from error
        self._at = number.end()
        return Node(kind=kind, value=value, line=line, column=column)

    def _string(self) -> str:
        try:
            value, self._at = scanstring(self._text, self._at + 1, True)
        except JSONDecodeError as error:
            raise Malformed(error.msg, error.lineno, error.colno) from error
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self._bad("the string holds half of a surrogate pair") from error
        return str(value)

    def _map(self, depth: int) -> tuple[tuple[Node, Node], ...]:
        self._at += 1
        pairs: list[tuple[Node, Node]] = []
        if self._take("}"):
            return ()
        while True:
            self._space()
            line, column = self._place()
            if not self._text.startswith('"', self._at):
                raise self._bad("expected a key in double quotes")
            key = Node(kind="string", value=self._string(), line=line, column=column)
            if not self._take(":"):
                raise self._bad("expected ':' after the key")
            self._space()
            pairs.append((key, self._value(depth + 1)))
            if self._take("}"):
                return _unique(pairs)
            if not self._take(","):
                raise self._bad("expected ',' or '}'")

    def _list(self, depth: int) -> tuple[Node, ...]:
        self._at += 1
        items: list[Node] = []
        if self._take("]"):
            return ()
        while True:
            self._space()
            items.append(self._value(depth + 1))
            if self._take("]"):
                return tuple(items)
            if not self._take(","):
                raise self._bad("expected ',' or ']'")
