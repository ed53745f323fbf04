"""The published schema and reference are made from the models, and agree with the parser."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from voidbox.spec.schema import json_schema, main

ROOT = Path(__file__).parents[3]


def test_published_files_are_up_to_date(tmp_path: Path) -> None:
    (tmp_path / "spec.md").write_text((ROOT / "docs/spec.md").read_text())
    main(tmp_path)
    for name in ("spec.md", "spec.schema.json"):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text(), (
            "run `python -m voidbox.spec.schema docs`"
        )


def test_the_schema_is_a_schema_and_accepts_the_examples() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    validator = jsonschema.Draft202012Validator(json_schema())
    for path in sorted((ROOT / "examples/specs").glob("*.*")):
        load = json.loads if path.suffix == ".json" else yaml.safe_load
        validator.validate(load(path.read_text()))


@pytest.mark.parametrize(
    "change", [{"nam": "x"}, {"kind": "agents"}, {"sandbox": {"vcpus": 0}}, {"name": "a/b"}]
)
def test_the_schema_refuses_what_the_parser_refuses(change: dict[str, object]) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    assert not validator.is_valid({"kind": "sandbox", "name": "a"} | change)
