"""The JSON Schema of spec files and the reference of their keys, made from the models.

`python -m voidbox.spec.schema DIRECTORY` writes `spec.schema.json` and the key tables of
`spec.md` in DIRECTORY.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Final

from voidbox.spec.model import Rules, is_required, key_name, rules_of
from voidbox.spec.models import ENV_PATTERN, SkillType, Spec
from voidbox.spec.shapes import SHORTHANDS, Union, split_optional, union_of

_TABLE_HEAD: Final = "| Key | Value | Default | Meaning |\n|---|---|---|---|\n"
_GENERATED: Final = "<!-- The rest of this file is made by `python -m voidbox.spec.schema docs`. -->\n"


def json_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) that editors check spec files with."""
    definitions: dict[str, Any] = {}
    _define(Spec, definitions, {})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "voidbox spec",
        "$ref": "#/$defs/Spec",
        "$defs": definitions,
    }


def _define(cls: type, definitions: dict[str, Any], tag: Mapping[str, str]) -> dict[str, str]:
    reference = {"$ref": f"#/$defs/{cls.__name__}"}
    if cls.__name__ in definitions:
        return reference
    entry: dict[str, Any] = {}
    definitions[cls.__name__] = entry
    properties: dict[str, Any] = {name: {"const": value} for name, value in tag.items()}
    required = list(tag)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        rules = rules_of(field)
        properties[key_name(field)] = {"description": rules.doc} | _schema(
            hints[field.name], rules, definitions
        )
        if is_required(field):
            required.append(key_name(field))
    entry |= {
        "description": _summary(cls),
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": required,
    }
    return reference


def _schema(hint: Any, rules: Rules, definitions: dict[str, Any]) -> dict[str, Any]:
    hint, optional = split_optional(hint)
    schema = _plain(hint, rules, definitions)
    return {"anyOf": [schema, {"type": "null"}]} if optional else schema


def _plain(hint: Any, rules: Rules, definitions: dict[str, Any]) -> dict[str, Any]:
    union = union_of(hint)
    if union is not None:
        return {"oneOf": _shapes(union, definitions)}
    origin = typing.get_origin(hint)
    if origin is tuple:
        items = _schema(typing.get_args(hint)[0], Rules(doc=""), definitions)
        return {"type": "array", "items": items} | ({"minItems": rules.minimum} if rules.minimum else {})
    if origin is not None:
        names = {"pattern": f"^{ENV_PATTERN}$"}
        return {"type": "object", "propertyNames": names, "additionalProperties": {"type": "string"}}
    if dataclasses.is_dataclass(hint):
        shape = dict(_define(typing.cast(type, hint), definitions, {}))
        short = SHORTHANDS.get(typing.cast(type, hint))
        return shape if short is None else {"oneOf": [{"type": short.kind}, shape]}
    if issubclass(hint, Enum):
        return {"enum": [member.value for member in hint]}
    if hint is bool:
        return {"type": "boolean"}
    if hint is int:
        limits = {"minimum": rules.minimum, "maximum": rules.maximum}
        return {"type": "integer"} | {name: limit for name, limit in limits.items() if limit is not None}
    pattern = f"^({rules.pattern})$" if rules.pattern else "^/" if rules.guest_path else ""
    return (
        {"type": "string"}
        | ({"pattern": pattern} if pattern else {})
        | ({"minLength": 1} if rules.not_blank else {})
    )


def _shapes(union: Union, definitions: dict[str, Any]) -> list[dict[str, Any]]:
    shapes: list[dict[str, Any]] = []
    if union.text is not None:
        shapes.append({"type": "string", "pattern": f"^({'|'.join(SkillType)}):.+"})
    shapes += [dict(_define(cls, definitions, {union.tag: name})) for name, cls in union.by_tag.items()]
    shapes += [dict(_define(cls, definitions, {})) for cls in union.by_key.values()]
    return shapes


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def reference() -> str:
    """Tables of all keys, in Markdown."""
    text = _GENERATED
    for name, entry in json_schema()["$defs"].items():
        text += f"\n### {name}\n\n{entry['description']}\n\n{_TABLE_HEAD}"
        fields = {key_name(field): field for field in dataclasses.fields(_class(name))}
        for key, schema in entry["properties"].items():
            default = _default(fields[key]) if key in fields else "required"
            meaning = schema.get("description", "Names this form.").replace("|", "\\|")
            text += f"| `{key}` | {_words(schema)} | {default} | {meaning} |\n"
    return text


def _class(name: str) -> type:
    import voidbox.spec.models as models

    found: type = getattr(models, name)
    return found


def _default(field: dataclasses.Field[Any]) -> str:
    if is_required(field):
        return "required"
    if isinstance(field.default_factory, type) and dataclasses.is_dataclass(field.default_factory):
        return "its defaults"
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if value is None:
        return "none"
    if isinstance(value, Enum):
        return f"`{value.value}`"
    return f"`{json.dumps(value)}`"


def _words(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return _words(schema["anyOf"][0])
    if "oneOf" in schema:
        return " or ".join(_words(shape) for shape in schema["oneOf"])
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        return f"list of {_words(schema['items'])}"
    if schema["type"] == "object":
        return "map of strings"
    limits = "minimum" in schema or "maximum" in schema
    between = f" {schema.get('minimum', '')} to {schema.get('maximum', '')}" if limits else ""
    return str(schema["type"]) + between


def main(directory: Path) -> None:
    """Write both files in `directory`."""
    (directory / "spec.schema.json").write_text(json.dumps(json_schema(), indent=2) + "\n")
    page = directory / "spec.md"
    head = page.read_text().split(_GENERATED)[0] if page.exists() else ""
    page.write_text(head + reference())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
