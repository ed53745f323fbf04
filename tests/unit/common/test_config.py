"""Flags win over the environment, that over the file, that over defaults; mistakes are named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from services.common.config import load, setting
from services.common.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A sample service."""

    listen: str = setting("unix:/run/a", "where to listen")
    pool_size: int = setting(2, "clones that wait")
    ratio: float = setting(0.5, "a share")
    confined: bool = setting(True, "whether it is confined")
    token_file: Path | None = setting(None, "the token", env=("VOIDBOX_TOKEN_FILE",))


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path), "VOIDBOX_CONFIG": str(tmp_path / "config.yaml")}


def write(env: dict[str, str], text: str) -> None:
    Path(env["VOIDBOX_CONFIG"]).write_text(text)


def test_defaults_hold_when_nothing_is_said(tmp_path: Path) -> None:
    assert load(Sample, "sample", [], {"HOME": str(tmp_path)}) == Sample()


def test_flags_win_over_environment_and_environment_over_the_file(env: dict[str, str]) -> None:
    write(env, "sample: {pool_size: 3, ratio: 0.1, listen: 'unix:/file'}")
    env |= {"VOIDBOX_SAMPLE_POOL_SIZE": "4", "VOIDBOX_SAMPLE_LISTEN": "unix:/env"}
    config = load(Sample, "sample", ["--pool-size", "5"], env)
    assert (config.pool_size, config.listen, config.ratio) == (5, "unix:/env", 0.1)


def test_another_variable_can_name_a_field(env: dict[str, str]) -> None:
    write(env, "")
    assert load(Sample, "sample", [], env | {"VOIDBOX_TOKEN_FILE": "/t"}).token_file == Path("/t")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample: {pool_sise: 3}", "did you mean 'pool_size'"),
        ("sample: {zzz: 3}", "known keys: confined"),
        ("sample: {pool_size: many}", "sample.pool_size: 'many' is not a int"),
        ("sample: [1]", "'sample' must be a mapping"),
        ("[1]", "'sample' must be a mapping"),
        ("sample: {", "config.yaml"),
    ],
)
def test_a_mistake_in_the_file_names_file_and_key(env: dict[str, str], text: str, message: str) -> None:
    write(env, text)
    with pytest.raises(InvalidInput, match=r"config\.yaml") as caught:
        load(Sample, "sample", [], env)
    assert message in str(caught.value)


def test_a_missing_file_that_was_named_is_an_error(env: dict[str, str]) -> None:
    with pytest.raises(InvalidInput, match="no such file"):
        load(Sample, "sample", [], env)


@pytest.mark.parametrize(("text", "value"), [("no", False), ("0", False), ("On", True), ("true", True)])
def test_booleans_are_words(env: dict[str, str], text: str, value: bool) -> None:
    write(env, f"sample: {{confined: '{text}'}}")
    assert load(Sample, "sample", [], env).confined is value


def test_a_word_that_is_no_boolean_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="--confined: 'maybe' is not a bool"):
        load(Sample, "sample", ["--confined", "maybe"], {"HOME": "/nowhere"})
