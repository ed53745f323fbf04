"""From a spec file to a request: names, inputs, places of what is missing."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import InvalidInput
from voidbox.cli import submit
from voidbox.cli.parser import parse
from voidbox.spec import SpecError


@settings(deadline=None)  # the machine may be busy
@given(st.text(max_size=80))
def test_a_chosen_run_id_is_always_valid(name: str) -> None:
    made = submit.run_id(Namespace(run_id=None), name)
    assert submit._RUN_ID.fullmatch(made), made


@pytest.mark.parametrize("text", ["", "A", "1a", "a_b", "a" * 64, "../x", "a/b"])
def test_a_malformed_run_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="--run-id"):
        submit.run_id(parse(["run", "x", f"--run-id={text}"]), "n")


def test_exactly_one_spec_is_needed() -> None:
    assert submit.spec_path(parse(["run", "a.yaml"])) == "a.yaml"
    assert submit.spec_path(parse(["run", "--file", "a.yaml"])) == "a.yaml"
    for words in (["run"], ["run", "a", "--file", "b"]):
        with pytest.raises(InvalidInput, match="name one spec file"):
            submit.spec_path(parse(words))


def test_input_is_text_or_a_file_and_must_be_text_of_bounded_length(tmp_path: Path) -> None:
    assert submit.input_text(None) == ""
    assert submit.input_text("plain") == "plain"
    file = tmp_path / "f"
    file.write_text("grüezi")
    assert submit.input_text(f"@{file}") == "grüezi"
    file.write_bytes(b"\xff")
    with pytest.raises(InvalidInput, match="UTF-8"):
        submit.input_text(f"@{file}")
    file.write_bytes(b"x" * (submit.MAX_INPUT_BYTES + 1))
    with pytest.raises(InvalidInput, match="longer"):
        submit.input_text(f"@{file}")


def test_missing_files_are_told_with_their_places_all_at_once(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "kind: pipeline\nname: p\npipeline:\n  boxes:\n    - name: one\n      run: {program: x}\n"
        "      inputs:\n        - {file: a/none}\n        - {file: there}\n        - file: b/nil\n"
    )
    (tmp_path / "there").mkdir()
    with pytest.raises(SpecError) as caught:
        submit.read(str(path))
    assert [(p.line, p.column) for p in caught.value.problems] == [(8, 18), (10, 17)]
    assert "create it" in str(caught.value)


def test_files_are_relative_to_the_spec_not_to_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/data").write_text("x")
    path = tmp_path / "d/s.yaml"
    path.write_text("kind: agent\nname: a\nagent:\n  run: {program: x}\n  inputs: [{file: data}]\n")
    monkeypatch.chdir(tmp_path)
    assert submit.read("d/s.yaml").files == (tmp_path / "d/data",)
