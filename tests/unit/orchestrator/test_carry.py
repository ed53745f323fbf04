"""Results reach the next stage whole: named, in order, and never cut inside a character."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.orchestrator import carry
from services.orchestrator.carry import Carried, compose_prompt, input_json, text_for_prompt


def carried(tmp_path: Path, name: str, data: bytes) -> Carried:
    path = tmp_path / name
    path.write_bytes(data)
    return Carried(name=name, path=path)


def test_names_order_errors_and_binary_are_kept(tmp_path: Path) -> None:
    items = [
        carried(tmp_path, "b", "☃\0".encode()),
        Carried(name="x", error="exit code 1"),
        carried(tmp_path, "a", b"\xff"),
    ]
    assert json.loads(input_json(items)) == [
        {"name": "b", "output": "☃\0"},
        {"name": "x", "error": "exit code 1"},
        {"name": "a", "output_base64": base64.b64encode(b"\xff").decode()},
    ]


@pytest.mark.parametrize("limit", range(1, 12))
def test_a_long_result_is_cut_at_a_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(carry, "MAX_IN_JSON", limit)
    text = "aß☃𐀀ß☃"
    (entry,) = json.loads(input_json([carried(tmp_path, "x", text.encode())]))
    assert text.startswith(entry["output"])
    assert entry["truncated"] is True
    assert limit - 4 < len(entry["output"].encode()) <= limit


@given(st.text(min_size=1, max_size=8), st.integers(3990, 4010))
def test_the_prompt_holds_4000_characters_of_any_text(piece: str, length: int) -> None:
    text = (piece * length)[:length]
    prompt = compose_prompt("do it", text, "/workspace/output.json", "/workspace/input.json")
    assert text[:4000] in prompt
    assert prompt.endswith("Write your output to /workspace/output.json.")
    assert ("The text above is cut." in prompt) == (len(text) > 4000)


def test_the_text_for_a_prompt_is_read_to_the_limit_only(tmp_path: Path) -> None:
    item = carried(tmp_path, "x", ("𐀀" * 5000).encode())
    assert len(text_for_prompt([item])) == 4001
    assert text_for_prompt([item, Carried(name="y", error="e")]).startswith('[{"name": "x"')


def test_a_prompt_without_data_is_as_in_the_spec() -> None:
    assert compose_prompt("do it", "", "", "") == "do it"
