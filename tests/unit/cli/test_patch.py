"""Changes as patches: git takes them, and makes of the old tree exactly the new one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voidbox.cli.patch import Compared, counts, patch
from voidbox.hypervisor.v1 import hypervisor_pb2 as hv

FILE, LINK = hv.CHANGE_TYPE_FILE, hv.CHANGE_TYPE_SYMLINK
NAMES = [
    b"plain",
    b"with space/and more",
    b"n\xc3\xa4me",
    b'quo"te\\',
    b"tab\there",
    b"new\nline",
    b"\xff\xfe",
]


def compared(path: bytes, before: bytes | None, after: bytes | None, mode: int = 0o644) -> Compared:
    change = hv.Change(path=path, type=FILE, mode=mode, host_mode=0o644 if before is not None else 0)
    change.size_bytes, change.host_size_bytes = len(after or b""), len(before or b"")
    if before is None:
        change.kind = hv.CHANGE_KIND_ADDED
    else:
        change.kind = hv.CHANGE_KIND_DELETED if after is None else hv.CHANGE_KIND_MODIFIED
    return Compared(change=change, before=before, after=after)


def apply(directory: Path, one: Compared) -> bytes | None:
    """What git makes of the file before."""
    name = directory / one.change.path.decode("utf-8", "surrogateescape")
    name.parent.mkdir(parents=True, exist_ok=True)
    if one.before is not None:
        name.write_bytes(one.before)
    command = ["git", "apply", "--whitespace=nowarn", "--unidiff-zero", "-"]
    done = subprocess.run(command, input=patch(one), cwd=directory, capture_output=True, check=False)
    assert done.returncode == 0, (done.stderr, patch(one))
    return name.read_bytes() if name.exists() else None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, b"one\ntwo\n"),
        (None, b"no end"),
        (b"one\ntwo\n", None),
        (b"one\ntwo\nthree\n", b"one\nTWO\nthree\nfour"),
        (b"a\r\nb\x0bc\x0cd\n", b"a\r\nb\x0bc\x0cD\n"),
        ("\u2028x\n\u0085\n".encode(), "\u2028y\n\u0085\n".encode()),
    ],
)
def test_git_applies_it(tmp_path: Path, name: bytes, before: bytes | None, after: bytes | None) -> None:
    assert apply(tmp_path, compared(name, before, after)) == after


def test_git_applies_long_files_modes_and_links(tmp_path: Path) -> None:
    before = b"".join(b"%d\n" % number for number in range(6000))
    after = before.replace(b"17\n", b"x\n")
    assert apply(tmp_path, compared(b"long", before, after)) == after
    apply(tmp_path, compared(b"mode", b"same\n", b"same\n", 0o755))
    assert (tmp_path / "mode").stat().st_mode & 0o100
    link = hv.Change(path=b"link", type=LINK, kind=hv.CHANGE_KIND_ADDED, target=b"long")
    subprocess.run(["git", "apply", "-"], input=patch(Compared(change=link)), cwd=tmp_path, check=True)
    assert (tmp_path / "link").readlink() == Path("long")


lines = st.lists(st.sampled_from([b"a", b"b", b"", b"\\ c", b"+d", b"-e", b"@@"]), max_size=8).map(b"\n".join)


@given(before=lines, after=lines)
@settings(max_examples=25, deadline=None)
def test_git_applies_any_text(tmp_path_factory: pytest.TempPathFactory, before: bytes, after: bytes) -> None:
    if before != after:
        assert apply(tmp_path_factory.mktemp("git"), compared(b"f", before, after)) == after


def test_what_is_no_text_or_was_not_sent_is_told_to_differ() -> None:
    for before, after in ((b"\0", b"x"), (b"x", b"\xff"), (b"x", None)):
        change = hv.Change(
            path=b"f", type=FILE, kind=hv.CHANGE_KIND_MODIFIED, size_bytes=1, host_size_bytes=1
        )
        one = Compared(change=change, before=before, after=after)
        assert patch(one).splitlines()[-1] == b"Binary files a/f and b/f differ"
        assert counts(one) is None
    assert counts(compared(b"f", b"a\nb\n", b"a\nc\nd\n")) == (2, 1)
    directory = hv.Change(path=b"d", type=hv.CHANGE_TYPE_DIRECTORY, kind=hv.CHANGE_KIND_ADDED)
    assert patch(Compared(change=directory)) == b""
