"""The tar reader agrees with Python's `tarfile` on what is sound and refuses what is not."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import Corrupt, InvalidInput, VoidboxError
from services.imager import tarstream
from services.imager.bytestream import ByteStream, Truncated
from services.imager.tarstream import BLOCK, TarEntry, read_tar
from tests.imager_images import Item, directory, hardlink, make_tar, symlink


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    """`data` in chunks of `size`."""
    return iter([data[at : at + size] for at in range(0, len(data), size)])


def read(data: bytes, size: int = 1 << 16) -> list[tuple[TarEntry, bytes]]:
    """All entries with their data."""
    stream = ByteStream(pieces(data, size))
    return [
        (entry, b"".join(bytes(piece) for piece in stream.chunks(entry.stored))) for entry in read_tar(stream)
    ]


# Beginning, middle and end of every field of a header.
HEADER_PLACES = [0, 50, 99, 100, 106, 107, 108, 115, 116, 123, 124, 134, 135, 136, 147, 148, 154, 155, 156,
                 157, 200, 256, 257, 262, 263, 265, 329, 337, 345, 400, 499, 500, 511]  # fmt: skip
ITEMS = [
    directory(b"dir"),
    Item(name=b"dir/file", data=b"contents" * 1000, mode=0o4711, uid=123, gid=456),
    Item(name=b"dir/" + b"long/" * 60 + b"name", data=b"x"),
    symlink(b"link", b"target/" * 40 + b"end"),
    hardlink(b"hard", b"dir/file"),
    Item(name=b"dev", kind=tarfile.CHRTYPE, device=(10, 20)),
    Item(name=b"fifo", kind=tarfile.FIFOTYPE),
    Item(name=b"empty"),
    Item(name=b"\xff\xfe", data=b"raw"),
    Item(name=b"large-ids", uid=3_000_000, gid=4_000_000_000),
]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("size", [1, 7, 512, 513, 10_000, 1 << 20])
def test_all_forms_are_read_whatever_the_chunks(form: int, size: int) -> None:
    found = read(make_tar(ITEMS, form=form), size)
    assert [entry.name.rstrip(b"/") for entry, _ in found] == [item.name for item in ITEMS]
    for (entry, data), item in zip(found, ITEMS, strict=True):
        assert (entry.uid, entry.gid, entry.mode, entry.link) == (item.uid, item.gid, item.mode, item.link)
        assert (entry.major, entry.minor) == item.device
        assert data == item.data
        whole = item.mtime_ns // 10**9 * 10**9
        assert entry.mtime_ns == (item.mtime_ns if form == tarfile.PAX_FORMAT else whole)


def test_unread_data_is_skipped() -> None:
    stream = ByteStream(pieces(make_tar(ITEMS), 1000))
    assert len(list(read_tar(stream))) == len(ITEMS)


def test_extended_attributes_are_bytes() -> None:
    value = bytes(range(256)) + b"\n\n= 12 x=y\n"
    [(entry, _)] = read(make_tar([Item(name=b"f", xattrs={b"user.x": value})]))
    assert entry.xattrs == {b"user.x": value}


def test_an_archive_may_end_without_end_blocks() -> None:
    data = make_tar([Item(name=b"a", data=b"x" * 512), Item(name=b"b", data=b"y")])
    end = data.rstrip(b"\0")
    cut = data[: -(-len(end) // BLOCK) * BLOCK]
    assert [entry.name for entry, _ in read(cut)] == [b"a", b"b"]
    assert [entry.name for entry, _ in read(end)] == [b"a", b"b"], "padding of the last member may be missing"
    assert read(b"") == []


def test_every_other_cut_is_noticed() -> None:
    data = make_tar([Item(name=b"a", data=b"x" * 1000), Item(name=b"l" * 200, data=b"y" * 10)])
    whole = [entry.name for entry, _ in read(data)]
    for cut in range(0, len(data), 61):
        try:
            names = [entry.name for entry, _ in read(data[:cut])]
        except Corrupt:
            continue
        assert names == whole[: len(names)]
        assert cut % BLOCK == 0 or data[cut:].strip(b"\0") == b"" or len(names) < len(whole)


def test_data_cut_short_is_truncated() -> None:
    data = make_tar([Item(name=b"a", data=b"x" * 1000)])
    position = data.rindex(b"x")
    with pytest.raises(Truncated, match="too early"):
        read(data[:position])


def patched(at: int, value: bytes, *, fix: bool = True, item: Item | None = None) -> bytes:
    """An archive whose first header has `value` at `at`, with a right checksum again."""
    data = bytearray(make_tar([item or Item(name=b"f", data=b"abc")], form=tarfile.GNU_FORMAT))
    data[at : at + len(value)] = value
    if fix:
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (patched(0, b"g", fix=False), "checksum"),
        (patched(124, b"00000000xyz\0"), "size field"),
        (patched(124, b"00000000009\0"), "size field"),
        (patched(124, b"\xff" * 12), "negative size"),
        (patched(108, b"\xff" * 8), "owner -1"),
        (patched(156, b"M"), "type b'M'"),
        (patched(156, b"Z"), "type b'Z'"),
        (patched(124, b"\x80" + b"\x7f" * 11), "too early"),
        (bytes(512) + b"x" * 512, "lone zero block"),
        (b"x" * 300, "inside a header"),
    ],
)
def test_damaged_headers_are_refused(data: bytes, why: str) -> None:
    with pytest.raises((Corrupt, InvalidInput), match=why):
        read(data)


def record(text: bytes) -> bytes:
    """One PAX record: its length counts itself."""
    for length in range(len(text) + 3, len(text) + 9):
        line = b"%d %s\n" % (length, text)
        if len(line) == length:
            return line
    raise AssertionError(text)


def pax(*texts: bytes, raw: bytes | None = None, kind: bytes = b"x") -> bytes:
    """An archive of one file below a PAX header."""
    body = raw if raw is not None else b"".join(map(record, texts))
    header = tarfile.TarInfo("pax")
    header.type, header.size = kind, len(body)
    file = make_tar([Item(name=b"f", data=b"abc")], form=tarfile.USTAR_FORMAT)
    return header.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512) + file


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (pax(raw=b"99 path=x\n"), "malformed"),
        (pax(raw=b"path=x\n"), "no length"),
        (pax(raw=b"0 a=b\n"), "malformed"),
        (pax(raw=b"3 a\n"), "malformed"),
        (pax(raw=b"6 ab=c"), "malformed"),
        (pax(b"size=-1"), "size"),
        (pax(b"size=1e9"), "size"),
        (pax(b"uid=4294967296"), "32-bit"),
        (pax(b"mtime=yesterday"), "mtime"),
        (pax(b"path=" + b"x" * 5000), "5000 bytes"),
        (pax(b"path=a\0b"), "NUL"),
        (pax(b"GNU.sparse.map=0,5", b"GNU.sparse.size=10"), "covers 5 bytes, 3"),
        (pax(b"GNU.sparse.map=5,3", b"GNU.sparse.size=4"), "passes the file's end"),
        (pax(b"GNU.sparse.map=5,1,4,2", b"GNU.sparse.size=10"), "overlaps"),
        (pax(b"GNU.sparse.map=1", b"GNU.sparse.size=10"), "odd count"),
        (pax(b"GNU.sparse.map=0,3"), "sparse size"),
        (pax(b"GNU.sparse.major=1", b"GNU.sparse.realsize=5"), "longer than its member"),
        (pax(raw=b"x" * ((1 << 20) + 1)), "at most"),
        (pax(b"path=x")[:1024], "after an extended header"),
    ],
)
def test_hostile_pax_headers_are_refused(data: bytes, why: str) -> None:
    with pytest.raises((Corrupt, InvalidInput), match=why):
        read(data)


def test_pax_overrides_and_times() -> None:
    [(entry, _)] = read(pax(b"path=longer/name", b"mtime=-1.5", b"uid=70000", b"comment=x"))
    assert (entry.name, entry.mtime_ns, entry.uid) == (b"longer/name", -1_500_000_000, 70_000)
    [(entry, _)] = read(pax(b"mtime=1.123456789123"))
    assert entry.mtime_ns == 1_123_456_789


def test_a_global_header_is_ignored_but_checked() -> None:
    assert [entry.name for entry, _ in read(pax(b"path=everywhere", kind=b"g"))] == [b"f"]
    with pytest.raises(Corrupt):
        read(pax(raw=b"rubbish", kind=b"g"))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=3000), st.integers(1, 600))
def test_any_bytes_end_in_entries_or_a_clear_error(data: bytes, size: int) -> None:
    try:
        read(data, size)
    except VoidboxError:
        return


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_mutation_of_a_sound_archive_is_read_or_refused(data: st.DataObject) -> None:
    archive = bytearray(
        make_tar(ITEMS[:6], form=data.draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])))
    )
    for _ in range(data.draw(st.integers(1, 6))):
        archive[data.draw(st.integers(0, len(archive) - 1))] = data.draw(st.integers(0, 255))
    try:
        read(bytes(archive))
    except VoidboxError:
        return


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_quick_way_through_a_header_says_what_the_careful_way_says(data: st.DataObject) -> None:
    header = bytearray(make_tar([data.draw(st.sampled_from(ITEMS[:1] + ITEMS[3:]))])[:BLOCK])
    for at in data.draw(st.lists(st.sampled_from(HEADER_PLACES), max_size=3)):
        header[at] = data.draw(st.sampled_from(b"\0 07891aA/\x80\xff-+_"))
    if data.draw(st.booleans()):
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    archive = bytes(header) + bytes(3 * BLOCK)

    def outcome() -> object:
        try:
            return [entry for entry, _ in read(archive)]
        except VoidboxError as error:
            return type(error), error.message

    quick = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tarstream, "_plain_entry", lambda *_: None)
        assert outcome() == quick


def test_python_and_we_agree_on_a_real_tree(tmp_path: object) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(os.path.dirname(__file__), "tests", recursive=True)
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as archive:
        expected = [(os.fsencode(member.name), member.size) for member in archive]
    assert [(entry.name.rstrip(b"/"), entry.size) for entry, _ in read(buffer.getvalue())] == expected
