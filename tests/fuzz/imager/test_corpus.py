"""The corpus is replayed, and inputs near it are tried: hostile and broken ones first of all."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.errors import VoidboxError
from tests.fuzz.imager.targets import CORPUS, TARGETS
from tests.imager_images import build_ext4

FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())


def test_every_target_has_a_corpus() -> None:
    assert {path.parent.name for path in FILES} == set(TARGETS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_corpus_holds(path) -> None:  # type: ignore[no-untyped-def]
    TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.parametrize("path", sorted((CORPUS / "layers").glob("bad-*")), ids=lambda path: path.name)
def test_what_is_called_bad_is_refused(path, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(VoidboxError):
        build_ext4(tmp_path / "i", [path.read_bytes()[1:]])


@pytest.mark.parametrize("path", sorted((CORPUS / "layers").glob("odd-*")), ids=lambda path: path.name)
def test_what_is_only_odd_is_taken(path, tmp_path) -> None:  # type: ignore[no-untyped-def]
    build_ext4(tmp_path / "i", [path.read_bytes()[1:]])


@pytest.mark.parametrize("name", sorted(TARGETS))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_inputs_near_the_corpus_hold(name: str, data: st.DataObject) -> None:
    seeds = [path.read_bytes() for path in FILES if path.parent.name == name]
    chosen = bytearray(data.draw(st.sampled_from(seeds)))
    for _ in range(data.draw(st.integers(0, 4))):
        if chosen:
            at = data.draw(st.integers(0, len(chosen) - 1))
            new = data.draw(st.binary(max_size=4))
            chosen[at : at + len(new)] = new  # of the same length: tar blocks keep their places
    TARGETS[name](bytes(chosen))
