"""Reads the entries of a tar stream: V7, ustar, PAX (POSIX.1-2001) and GNU, sparse files too.

Formats: POSIX `pax`, "The ustar interchange format"; GNU tar manual, "Basic Tar Format" and
"Storing Sparse Files". Names are bytes. Nothing is unpacked, and every number, length and name
in the archive is checked before it is used. Rules where archives in the wild disagree:

- Two zero blocks end the archive, and so does the end of the stream between two entries.
- A global PAX header is checked and ignored, as container engines do.
- The data of an entry that cannot have any (link, directory, device) is not announced by its size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple
from zlib import adler32

from services.common.errors import Corrupt, InvalidInput
from services.imager.bytestream import ByteStream

BLOCK: Final = 512
MAX_PAX_BYTES: Final = 1 << 20  # Linux limits a name to 4 KiB and an inode's xattrs to 64 KiB
MAX_NAME_BYTES: Final = 4096  # PATH_MAX
MAX_SPARSE_FRAGMENTS: Final = 1 << 18

FILE, HARDLINK, SYMLINK, CHARDEV, BLOCKDEV, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_KINDS: Final = {FILE, HARDLINK, SYMLINK, CHARDEV, BLOCKDEV, DIRECTORY, FIFO}
_DECIMAL: Final = re.compile(rb"^(-?)(\d{1,20})(?:\.(\d*))?$")
_PLAIN_KINDS: Final = {FILE, HARDLINK, SYMLINK, DIRECTORY}
_NO_XATTRS: Final[dict[bytes, bytes]] = {}
_REMEMBERED: Final = 4096  # fields of headers whose meaning is kept
_XATTR_PREFIX: Final = b"SCHILY.xattr."


class TarEntry(NamedTuple):
    """One member. `stored` bytes of data follow it in the stream.

    Attributes:
        name: As stored, long names resolved, not normalised.
        kind: One of `FILE`, `HARDLINK`, `SYMLINK`, `CHARDEV`, `BLOCKDEV`, `DIRECTORY`, `FIFO`.
        size: Length of the file, holes included.
        mtime_ns: Nanoseconds since 1970.
        link: Target of a symbolic or hard link.
        sparse: For a sparse file its data fragments as (offset, length), in order.
    """

    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    stored: int
    mtime_ns: int
    link: bytes
    major: int
    minor: int
    xattrs: dict[bytes, bytes]
    sparse: list[tuple[int, int]] | None


def read_tar(stream: ByteStream) -> Iterator[TarEntry]:
    """The entries of `stream`. Data that the consumer leaves unread is skipped.

    Raises:
        Truncated: the stream ends inside a header or inside data.
        Corrupt: a header is damaged or inconsistent.
        InvalidInput: a member is of a kind that no container image has.
    """
    pax: dict[bytes, bytes] = {}
    long_name: bytes | None = None
    long_link: bytes | None = None
    sparse_map: list[tuple[int, int]] = []
    owners, times = _Owners(), _Times()
    read = stream.read
    while True:
        header = read(BLOCK)
        if len(header) == BLOCK and not pax and long_name is long_link is None:
            entry = _plain_entry(header, owners, times)
            if entry is not None:
                stored = entry.stored
                if not stored:
                    yield entry
                    continue
                end = stream.position + stored
                yield entry
                if stream.position < end:
                    stream.skip(end - stream.position)
                if stored % BLOCK:
                    _skip_padding(stream, stored)
                continue
        if not header:
            if pax or long_name is not None or long_link is not None:
                raise Corrupt(f"the archive ends after an extended header, at byte {stream.position}")
            return
        if len(header) < BLOCK:
            raise Corrupt(f"the archive ends inside a header, at byte {stream.position}", reason="TRUNCATED")
        if not header.strip(b"\0"):
            following = stream.read(BLOCK)
            if following.strip(b"\0"):
                raise Corrupt(f"a lone zero block is followed by data at byte {stream.position}")
            return
        _check_sum(header, stream.position)
        kind = header[156:157]
        size = _number(header, 124, 12, "size")
        if size < 0:
            raise Corrupt(f"negative size at byte {stream.position}")
        if kind in (b"x", b"g", b"X"):
            records = _pax_records(_payload(stream, size, "PAX header"))
            if kind != b"g":
                pax, sparse_map = records
            continue
        if kind in (b"L", b"K"):
            text = _payload(stream, size, "long name").rstrip(b"\0")
            long_name, long_link = (text, long_link) if kind == b"L" else (long_name, text)
            continue
        if kind == b"V":
            _skip_padded(stream, size)
            continue
        entry = _entry(stream, header, kind, size, pax, sparse_map, long_name, long_link)
        pax, sparse_map, long_name, long_link = {}, [], None, None
        end = stream.position + entry.stored
        yield entry
        if stream.position < end:
            stream.skip(end - stream.position)
        if entry.stored % BLOCK:
            _skip_padding(stream, entry.stored)


class _Owners(dict[bytes, tuple[int, int, int]]):
    """Mode, uid and gid of the 24 bytes of a header that hold them: an archive has few that differ."""

    def __missing__(self, field: bytes) -> tuple[int, int, int]:
        if len(self) >= _REMEMBERED:
            self.clear()
        value = _octal(field[:8]), _octal(field[8:16]), _octal(field[16:])
        self[field] = value
        return value


class _Times(dict[bytes, int]):
    """Nanoseconds of the 12 bytes of a header that hold a time."""

    def __missing__(self, field: bytes) -> int:
        if len(self) >= _REMEMBERED:
            self.clear()
        value = self[field] = _octal(field) * 10**9
        return value


def _octal(field: bytes) -> int:
    """An octal number, digits only, that ends with the field's first NUL or space.

    Raises:
        ValueError: it is something else.
    """
    digits = field.rstrip(b" \0")
    if not digits.isdigit():
        raise ValueError(field)
    return int(digits, 8)


def _plain_entry(header: bytes, owners: _Owners, times: _Times) -> TarEntry | None:
    """The entry of a header as nearly all are; None if it must be looked at more closely.

    Nearly all: ustar or GNU magic, ASCII, one of the commonest kinds, plain octal numbers, a right checksum.
    Takes 3 us instead of 20, and says nothing that the careful way would not say.
    """
    kind = header[156:157]
    # Adler-32's low half is 1 + the sum of the bytes modulo 65521; 512 ASCII bytes stay below that.
    if header[257:262] != b"ustar" or kind not in _PLAIN_KINDS or not header.isascii():
        return None
    stored_sum = header[148:156]
    try:
        expected = _octal(stored_sum)
        if adler32(header) & 0xFFFF != 1 + expected + sum(stored_sum) - 8 * 0x20:
            return None
        mode, uid, gid = owners[header[100:124]]
        size = _octal(header[124:136])
        mtime_ns = times[header[136:148]]
    except ValueError:
        return None
    name = header[:100]
    name = name[: name.find(b"\0")] if name[99] == 0 else name
    if header[345]:
        if header[257:263] != b"ustar\0":
            return None
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    link = header[157:257].split(b"\0", 1)[0] if header[157] else b""
    size = size if kind == FILE else 0
    return TarEntry(name, kind, mode & 0o7777, uid, gid, size, size, mtime_ns, link, 0, 0, _NO_XATTRS, None)


def _skip_padding(stream: ByteStream, stored: int) -> None:
    """Padding after the last member may be missing where end blocks are."""
    padding = -stored % BLOCK
    got = len(stream.read(padding))
    if got not in (0, padding):
        raise Corrupt(f"the archive ends inside padding, at byte {stream.position}", reason="TRUNCATED")


def _skip_padded(stream: ByteStream, size: int) -> None:
    stream.skip(size + -size % BLOCK)


def _payload(stream: ByteStream, size: int, what: str) -> bytes:
    if size > MAX_PAX_BYTES:
        raise Corrupt(f"{what} of {size} bytes at byte {stream.position}; at most {MAX_PAX_BYTES} make sense")
    data = stream.exactly(size + -size % BLOCK)
    return data[:size]


def _check_sum(header: bytes, position: int) -> None:
    stored = _number(header, 148, 8, "checksum")
    unsigned = sum(header) - sum(header[148:156]) + 8 * 0x20
    if stored == unsigned:
        return
    # Some old writers summed signed bytes.
    signed = unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    if stored != signed:
        raise Corrupt(f"header checksum {stored:o} is not {unsigned:o}, before byte {position}")


def _number(header: bytes, at: int, length: int, what: str) -> int:
    """An octal field, or GNU's base-256 for what octal cannot hold."""
    field = header[at : at + length]
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=False)
        bits = 8 * length
        if field[0] & 0x40:
            return value - (1 << bits)
        return value - (1 << (bits - 1))
    text = field.strip(b" \0")
    if not text:
        return 0
    text = text.split(b"\0", 1)[0].rstrip(b" ")
    if not text.isdigit() or b"8" in text or b"9" in text:
        raise Corrupt(
            f"this is no tar archive, or a damaged one: {what} field {field!r} is not a number; "
            "build the image again"
        )
    return int(text, 8)


def _text(header: bytes, at: int, length: int) -> bytes:
    return header[at : at + length].split(b"\0", 1)[0]


def _pax_records(data: bytes) -> tuple[dict[bytes, bytes], list[tuple[int, int]]]:
    """The records of one header, and the fragments that GNU's sparse format 0.0 repeats."""
    records: dict[bytes, bytes] = {}
    fragments: list[tuple[int, int]] = []
    offset: int | None = None
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 21)
        digits = data[at:space] if space > 0 else b""
        if not digits.isdigit():
            if not data[at:].strip(b"\0"):
                break  # some writers pad the last record
            raise Corrupt(f"PAX record {data[at : at + 20]!r} has no length")
        end = at + int(digits)
        record = data[space + 1 : end]
        key, equals, value = record.partition(b"=")
        if end > len(data) or end <= space + 1 or not equals or not key or value[-1:] != b"\n":
            raise Corrupt(f"PAX record {data[at : at + 20]!r} is malformed")
        value = value[:-1]
        if key == b"GNU.sparse.offset":
            offset = _plain_int(value, "sparse offset")
        elif key == b"GNU.sparse.numbytes":
            if offset is None:
                raise Corrupt("sparse length without an offset")
            fragments.append((offset, _plain_int(value, "sparse length")))
            offset = None
        records[key] = value
        at = end
    return records, fragments


def _plain_int(text: bytes, what: str) -> int:
    if not text.isdigit() or len(text) > 20:
        raise Corrupt(f"{what} {text[:40]!r} is not a number")
    return int(text)


def _pax_time(text: bytes) -> int:
    match = _DECIMAL.match(text)
    if not match:
        raise Corrupt(f"mtime {text[:40]!r} is not a decimal number")
    sign, whole, fraction = match.groups()
    nanoseconds = int(whole) * 10**9 + int(((fraction or b"") + b"0" * 9)[:9])
    return -nanoseconds if sign else nanoseconds


def _entry(
    stream: ByteStream,
    header: bytes,
    kind: bytes,
    size: int,
    pax: dict[bytes, bytes],
    sparse_map: list[tuple[int, int]],
    long_name: bytes | None,
    long_link: bytes | None,
) -> TarEntry:
    magic = header[257:265]
    name = _text(header, 0, 100)
    if magic[:6] == b"ustar\0" and header[345]:
        name = _text(header, 345, 155) + b"/" + name
    link = _text(header, 157, 100)
    name = long_name if long_name is not None else name
    link = long_link if long_link is not None else link
    uid, gid = _number(header, 108, 8, "uid"), _number(header, 116, 8, "gid")
    mtime_ns = _number(header, 136, 12, "mtime") * 10**9
    xattrs: dict[bytes, bytes] = {}
    if pax:
        name, link = pax.get(b"path") or name, pax.get(b"linkpath") or link
        size = _plain_int(pax[b"size"], "size") if pax.get(b"size") else size
        uid = _plain_int(pax[b"uid"], "uid") if pax.get(b"uid") else uid
        gid = _plain_int(pax[b"gid"], "gid") if pax.get(b"gid") else gid
        mtime_ns = _pax_time(pax[b"mtime"]) if pax.get(b"mtime") else mtime_ns
        cut = len(_XATTR_PREFIX)
        xattrs = {key[cut:]: value for key, value in pax.items() if key.startswith(_XATTR_PREFIX)}
    kind, real_kind = _kind(kind, name), kind
    stored = size if kind == FILE else 0
    real_size, sparse = stored, None
    if kind == FILE:
        if real_kind == b"S":
            real_size, sparse = _gnu_sparse(stream, header)
        elif any(key.startswith(b"GNU.sparse.") for key in pax):
            name = pax.get(b"GNU.sparse.name") or name
            real_size, sparse, stored = _pax_sparse(stream, pax, sparse_map, stored)
        if sparse is not None:
            sparse = _checked_map(sparse, real_size, stored, name)
    for what, text in (("name", name), ("link target", link)):
        if len(text) > MAX_NAME_BYTES:
            raise InvalidInput(f"{what} of {len(text)} bytes; Linux allows {MAX_NAME_BYTES}")
        if b"\0" in text:
            raise InvalidInput(f"{what} {text[:60]!r} contains a NUL byte")
    if not 0 <= uid < 1 << 32 or not 0 <= gid < 1 << 32:
        raise InvalidInput(f"owner {uid}:{gid} of {name[:60]!r} is not a 32-bit number")
    device = kind in (CHARDEV, BLOCKDEV)
    major = _number(header, 329, 8, "device major") if device else 0
    minor = _number(header, 337, 8, "device minor") if device else 0
    mode = _number(header, 100, 8, "mode") & 0o7777
    return TarEntry(
        name, kind, mode, uid, gid, real_size, stored, mtime_ns, link, major, minor, xattrs, sparse
    )


def _kind(kind: bytes, name: bytes) -> bytes:
    if kind in _KINDS:
        return kind
    if kind in (b"\0", b"7", b"S"):
        # V7 marked directories by a slash at the end only.
        return DIRECTORY if kind == b"\0" and name.endswith(b"/") else FILE
    raise InvalidInput(f"{name[:60]!r} is a tar member of type {kind!r}, which images cannot contain")


def _gnu_sparse(stream: ByteStream, header: bytes) -> tuple[int, list[tuple[int, int]]]:
    """The map of an old GNU sparse member: four fragments here, 21 in each block that follows."""
    real_size = _number(header, 483, 12, "sparse size")
    fragments: list[tuple[int, int]] = []
    block, at, count, more = header, 386, 4, header[482]
    while True:
        for i in range(count):
            start = at + 24 * i
            if not block[start] and not block[start + 12]:
                break
            fragments.append((_number(block, start, 12, "offset"), _number(block, start + 12, 12, "length")))
        if not more:
            return real_size, fragments
        if len(fragments) > MAX_SPARSE_FRAGMENTS:
            raise Corrupt(f"more than {MAX_SPARSE_FRAGMENTS} sparse fragments")
        block, at, count = stream.exactly(BLOCK), 0, 21
        more = block[504]


def _pax_sparse(stream: ByteStream, pax: dict[bytes, bytes], repeated: list[tuple[int, int]],
                stored: int) -> tuple[int, list[tuple[int, int]], int]:  # fmt: skip
    """Real size, map and remaining stored bytes of a sparse member in PAX form 0.0, 0.1 or 1.0."""
    if pax.get(b"GNU.sparse.major") == b"1":
        real_size = _plain_int(pax.get(b"GNU.sparse.realsize", b""), "sparse size")
        fragments, used = _embedded_map(stream, stored)
        return real_size, fragments, stored - used
    real_size = _plain_int(pax.get(b"GNU.sparse.size", b""), "sparse size")
    text = pax.get(b"GNU.sparse.map")
    if text is None:
        return real_size, repeated, stored
    numbers = [_plain_int(word, "sparse map") for word in text.split(b",")] if text else []
    if len(numbers) % 2:
        raise Corrupt("the sparse map has an odd count of numbers")
    return real_size, list(zip(numbers[::2], numbers[1::2], strict=True)), stored


def _embedded_map(stream: ByteStream, stored: int) -> tuple[list[tuple[int, int]], int]:
    """Form 1.0: newline-terminated decimal numbers before the data, padded to whole blocks."""
    text, used = b"", 0
    numbers: list[int] = []
    wanted = 1
    while len(numbers) < wanted:
        line, newline, rest = text.partition(b"\n")
        if newline:
            numbers.append(_plain_int(line, "sparse map"))
            text = rest
            if len(numbers) == 1:
                wanted = 1 + 2 * numbers[0]
                if numbers[0] > MAX_SPARSE_FRAGMENTS:
                    raise Corrupt(f"{numbers[0]} sparse fragments; at most {MAX_SPARSE_FRAGMENTS} make sense")
            continue
        if used + BLOCK > stored or len(text) > BLOCK:
            raise Corrupt("the sparse map is longer than its member")
        text += stream.exactly(BLOCK)
        used += BLOCK
    return list(zip(numbers[1::2], numbers[2::2], strict=True)), used


def _checked_map(fragments: list[tuple[int, int]], real_size: int, stored: int,
                 name: bytes) -> list[tuple[int, int]]:  # fmt: skip
    if real_size < 0:
        raise Corrupt(f"the sparse file {name[:60]!r} has a negative size")
    end = total = 0
    for offset, length in fragments:
        if length < 0 or offset < end or offset + length > real_size:
            raise Corrupt(f"the sparse map of {name[:60]!r} overlaps itself or passes the file's end")
        end = offset + length
        total += length
    if total != stored:
        raise Corrupt(f"the sparse map of {name[:60]!r} covers {total} bytes, {stored} are stored")
    return [(offset, length) for offset, length in fragments if length]
