"""The corpus is replayed, and inputs near it are tried: hostile and broken ones first of all."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.errors import VoidboxError
from services.imager.ext4 import Ext4Writer
from services.imager.layers import LayerMerger, LayerSource
from services.imager.limits import Limits
from services.imager.tree import Kind
from tests.fuzz.imager.outcomes import REFUSED, TAKEN
from tests.fuzz.imager.targets import CORPUS, TARGETS, split_layers
from tests.imager_images import build_ext4, compress, sha256

FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())


def test_every_target_has_a_corpus() -> None:
    assert {path.parent.name for path in FILES} == set(TARGETS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_corpus_holds(path) -> None:  # type: ignore[no-untyped-def]
    TARGETS[path.parent.name](path.read_bytes())


def tars_of(name: str) -> list[bytes]:
    """The layers in a file of the corpus: two in `two-…`, else one after the first byte."""
    data = (CORPUS / "layers" / name).read_bytes()
    return split_layers(data) if name.startswith("two-") else [data[1:]]


def test_every_hostile_layer_has_an_outcome() -> None:
    names = {path.name for path in (CORPUS / "layers").iterdir() if path.name[:4] in ("bad-", "odd-", "two-")}
    assert names == REFUSED.keys() | TAKEN.keys() | {"odd-gnu-long", "odd-many-names"}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_hostile_is_refused_for_the_right_reason(name: str, tmp_path: Path) -> None:
    with pytest.raises(VoidboxError) as caught:
        build_ext4(tmp_path / "image", tars_of(name))
    assert caught.value.reason == REFUSED[name]


@pytest.mark.parametrize("name", sorted(TAKEN))
def test_what_is_only_odd_becomes_this_tree(name: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("w+b") as file, Ext4Writer(file, uuid=bytes(16), hash_seed=bytes(16)) as writer:
        merger = LayerMerger(writer, Limits())
        for tar in tars_of(name):
            digest = sha256(tar)
            merger.apply(LayerSource(digest=digest, size=len(tar), diff_id=digest, blob=io.BytesIO(tar)))
    found = []
    marks = {Kind.DIRECTORY: b"/", Kind.SYMLINK: b"@"}
    paths = {id(merger.tree.root): b""}
    for directory, part, node in merger.tree.walk():
        path = paths[id(directory)] + part + marks.get(node.kind, b"")
        paths[id(node)] = path
        found.append(path.decode("latin-1"))
    assert sorted(found) == TAKEN[name]


@pytest.mark.parametrize("how", ["gzip", "zstd"])
def test_a_bomb_is_refused_at_the_limit_and_costs_little_memory(how: str, tmp_path: Path) -> None:
    """A quarter of a gigabyte of zeros in some kilobytes; the limit is one MiB."""
    bomb = compress(bytes(1 << 28), how)
    digest = sha256(bomb)
    with (
        (tmp_path / "image").open("w+b") as file,
        Ext4Writer(file, uuid=bytes(16), hash_seed=bytes(16)) as writer,
    ):
        merger = LayerMerger(writer, Limits(unpacked_bytes=1 << 20))
        with pytest.raises(VoidboxError) as caught:
            merger.apply(LayerSource(digest=digest, size=len(bomb), diff_id=None, blob=io.BytesIO(bomb)))
    # Zero blocks end the archive; what follows them counts against the limit all the same.
    assert caught.value.reason == "IMAGE_TOO_LARGE"
    assert (tmp_path / "image").stat().st_size < 2 << 20


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
