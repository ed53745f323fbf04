"""A change of a file as a patch that `git apply` and `patch -p1` take; pure functions."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from voidbox.hypervisor.v1 import hypervisor_pb2 as hv

# What difflib compares takes time by the product of both lengths; above this a file is shown as replaced.
_MAX_LINES = 5000
_PLAIN = re.compile(rb"[ !#-\[\]-~]+")
_ESCAPES = {0x22: b'\\"', 0x5C: b"\\\\", 0x09: b"\\t", 0x0A: b"\\n", 0x0D: b"\\r"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A change, with the content of both sides; None if there is none, or it was not sent."""

    change: hv.Change
    before: bytes | None = None
    after: bytes | None = None


def patch(one: Compared) -> bytes:
    """The change as a patch; empty for directories and what cannot be applied."""
    change = one.change
    if change.type not in (hv.CHANGE_TYPE_FILE, hv.CHANGE_TYPE_SYMLINK):
        return b""
    old, new = _name(b"a/" + change.path), _name(b"b/" + change.path)
    lines = [b"diff --git %s %s" % (old, new)]
    mode, host_mode = _mode(change, change.mode), _mode(change, change.host_mode)
    if change.kind == hv.CHANGE_KIND_ADDED:
        lines.append(b"new file mode %o" % mode)
    elif change.kind == hv.CHANGE_KIND_DELETED:
        lines.append(b"deleted file mode %o" % mode)
    elif mode != host_mode:
        lines += [b"old mode %o" % host_mode, b"new mode %o" % mode]
    before, after = sides(one)
    left = b"/dev/null" if change.kind == hv.CHANGE_KIND_ADDED else old
    right = b"/dev/null" if change.kind == hv.CHANGE_KIND_DELETED else new
    if before is None or after is None or not (_is_text(before) and _is_text(after)):
        lines.append(b"Binary files %s and %s differ" % (left, right))
    elif before != after:
        lines += [b"--- " + left, b"+++ " + right]
        return b"\n".join(lines) + b"\n" + b"".join(_hunks(before, after))
    return b"\n".join(lines) + b"\n"


def sides(one: Compared) -> tuple[bytes | None, bytes | None]:
    """Content before and after; a link's is its target; None if it is not known."""
    change = one.change
    after = change.target if change.type == hv.CHANGE_TYPE_SYMLINK else one.after
    before = one.before
    if change.kind == hv.CHANGE_KIND_ADDED:
        before = b""
    if change.kind == hv.CHANGE_KIND_DELETED:
        after = b""
    if before is None and not change.host_size_bytes:
        before = b""
    if after is None and not change.size_bytes:
        after = b""
    return before, after


def counts(one: Compared) -> tuple[int, int] | None:
    """Lines added and removed; None if it is no text, or not known."""
    before, after = sides(one)
    if before is None or after is None or not (_is_text(before) and _is_text(after)):
        return None
    hunks = list(_hunks(before, after)) if before != after else []
    return (
        sum(line.startswith(b"+") for line in hunks),
        sum(line.startswith(b"-") for line in hunks),
    )


def _mode(change: hv.Change, bits: int) -> int:
    if change.type == hv.CHANGE_TYPE_SYMLINK:
        return 0o120000
    return 0o100755 if bits & 0o100 else 0o100644


def _is_text(data: bytes) -> bool:
    if b"\0" in data:
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _lines(data: bytes) -> list[bytes]:
    """Lines with their ends; only a line feed ends one."""
    return re.findall(rb"[^\n]*\n|[^\n]+", data)


def _hunks(before: bytes, after: bytes) -> list[bytes]:
    old, new = _lines(before), _lines(after)
    if max(len(old), len(new)) > _MAX_LINES:
        head = b"@@ -%s +%s @@\n" % (_range(len(old)), _range(len(new)))
        return [head, *map(_end, [b"-" + line for line in old]), *map(_end, [b"+" + line for line in new])]
    # difflib wants text; Latin-1 maps each byte to one character and back.
    found = difflib.unified_diff(
        [line.decode("latin-1") for line in old], [line.decode("latin-1") for line in new]
    )
    return [_end(line.encode("latin-1")) for line in list(found)[2:]]


def _range(count: int) -> bytes:
    return b"1,%d" % count if count else b"0,0"


def _end(line: bytes) -> bytes:
    return line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n"


def _name(path: bytes) -> bytes:
    """A path as git writes it: in quotes if it holds what could be misread."""
    if _PLAIN.fullmatch(path):
        return path
    escaped = b"".join(
        _ESCAPES.get(byte) or (bytes((byte,)) if 0x20 <= byte < 0x7F else b"\\%03o" % byte) for byte in path
    )
    return b'"' + escaped + b'"'
