"""Archives are deterministic, come back as they went in, and hostile ones are refused."""

from __future__ import annotations

import io
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import Corrupt, InvalidInput
from services.imager import cpio

_PART = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda part: part not in (".", "..", "TRAILER!!!")
)
_NAMES = st.lists(_PART, min_size=1, max_size=3).map("/".join)
_U16 = st.integers(0, 0xFFFF)


def written(entries: list[cpio.Entry]) -> bytes:
    out = io.BytesIO()
    size = cpio.write_archive(entries, out)
    assert size == len(out.getvalue())
    return out.getvalue()


@given(
    st.dictionaries(_NAMES, st.tuples(st.binary(max_size=40), st.integers(0, 0o7777), _U16, _U16), max_size=8)
)
def test_what_was_written_comes_back_with_its_parents_first(
    files: dict[str, tuple[bytes, int, int, int]],
) -> None:
    entries = [
        cpio.file(name, content, mode, uid=uid, gid=gid)
        for name, (content, mode, uid, gid) in files.items()
        if not any(other.startswith(f"{name}/") for other in files)
    ]
    back = list(cpio.read_archive(written(entries)))
    assert {entry.name: entry for entry in back if stat.S_ISREG(entry.mode)} == {e.name: e for e in entries}
    seen = {""}
    for entry in back:
        assert entry.name.rpartition("/")[0] in seen
        seen.add(entry.name)


@given(st.permutations([cpio.file(f"d/{n}", b"x" * n) for n in range(5)]))
def test_the_order_of_entries_does_not_change_the_bytes(entries: list[cpio.Entry]) -> None:
    assert written(entries) == written(sorted(entries, key=lambda entry: entry.name))


def test_the_bytes_are_the_format_the_kernel_documents() -> None:
    archive = written([cpio.character_device("console", 5, 1, 0o600)])
    header = b"070701" + b"".join(
        b"%08X" % field
        for field in (1, stat.S_IFCHR | 0o600, 0, 0, 1, 0, 0, 0, 0, 5, 1, len("console") + 1, 0)
    )
    assert archive.startswith(header + b"console\0")
    assert archive.endswith(b"TRAILER!!!\0\0\0\0")
    assert len(archive) % 4 == 0


def test_a_file_on_disk_is_copied_and_a_link_keeps_its_target(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"a" * 3_000_001)
    back = list(cpio.read_archive(written([cpio.file("f", source, 0o755), cpio.symlink("l", "../f")])))
    assert back[0].content == source.read_bytes()
    assert (back[1].content, stat.S_ISLNK(back[1].mode)) == (b"../f", True)


@pytest.mark.parametrize(
    "name", ["", "/etc", "a/../b", "./a", "a//b", "a/", "TRAILER!!!", "a\0b", "x" * 5000]
)
def test_a_name_that_an_archive_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput):
        written([cpio.file(name, b"")])


def test_two_contents_for_one_name_are_refused_and_equal_ones_are_one() -> None:
    assert len(list(cpio.read_archive(written([cpio.file("a", b"1"), cpio.file("a", b"1")])))) == 1
    with pytest.raises(InvalidInput, match="two different entries"):
        written([cpio.file("a", b"1"), cpio.file("a", b"2")])


def test_a_file_cannot_be_a_directory_of_another() -> None:
    with pytest.raises(InvalidInput, match="not a directory"):
        written([cpio.file("a", b""), cpio.file("a/b", b"")])


@given(st.binary(max_size=300))
def test_bytes_that_are_no_archive_are_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt):
        list(cpio.read_archive(data))


@given(st.integers(0, 250), st.binary(min_size=1, max_size=8))
def test_a_damaged_archive_is_corrupt_or_an_archive(at: int, damage: bytes) -> None:
    archive = bytearray(written([cpio.file("a", b"content"), cpio.symlink("b", "a")]))
    archive[at : at + len(damage)] = damage
    try:
        entries = list(cpio.read_archive(bytes(archive)))
    except Corrupt:
        return
    assert sum(len(entry.content) for entry in entries if isinstance(entry.content, bytes)) <= len(archive)


@given(st.integers(0, 200))
def test_a_cut_archive_is_corrupt(length: int) -> None:
    archive = written([cpio.file("a", b"content" * 20)])
    with pytest.raises(Corrupt):
        list(cpio.read_archive(archive[: min(length, len(archive) - 30)]))
