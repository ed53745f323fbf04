"""What becomes of each hostile or odd layer of the corpus, by the name of its file.

`REFUSED` says why (the reason of the error), `TAKEN` what is in the tree afterwards: directories end
with a slash, symbolic links with an at sign; names are shown as Latin-1. Files called `bad-…` and
`odd-…` are one layer; `two-…` are two, cut where `targets.split_layers` cuts.
"""

from __future__ import annotations

from typing import Final

REFUSED: Final[dict[str, str]] = {
    "bad-acl": "BAD_XATTR",
    "bad-bomb-in-sparse-size": "INVALID_INPUT",
    "bad-deep-symlink-chain": "SYMLINK_LOOP",
    "bad-device-too-large": "INVALID_INPUT",
    "bad-dotdot": "PATH_ESCAPE",
    "bad-dotdot-first": "PATH_ESCAPE",
    "bad-dotdot-in-hardlink-target": "PATH_ESCAPE",
    "bad-dotdot-in-whiteout": "PATH_ESCAPE",
    "bad-hardlink-cycle": "BAD_HARDLINK",
    "bad-hardlink-missing": "BAD_HARDLINK",
    "bad-hardlink-outside": "PATH_ESCAPE",
    "bad-hardlink-to-directory": "BAD_HARDLINK",
    "bad-hardlink-to-itself": "BAD_HARDLINK",
    "bad-huge-size": "INVALID_INPUT",
    "bad-lost-found": "INVALID_INPUT",
    "bad-member-of-unknown-type": "INVALID_INPUT",
    "bad-name-256-bytes": "NAME_TOO_LONG",
    "bad-negative-size": "CORRUPT",
    "bad-parent-is-a-file": "PARENT_NOT_DIRECTORY",
    "bad-pax-name-with-nul": "INVALID_INPUT",
    "bad-pax-path-dotdot": "PATH_ESCAPE",
    "bad-pax-record-length-lies": "CORRUPT",
    "bad-pax-size-huge": "INVALID_INPUT",
    "bad-root-is-a-file": "INVALID_INPUT",
    "bad-size-of-all-ones": "TRUNCATED",
    "bad-sparse-map-overlaps": "CORRUPT",
    "bad-sparse-map-past-end": "CORRUPT",
    "bad-symlink-loop": "SYMLINK_LOOP",
    "bad-truncated-data": "TRUNCATED",
    "bad-truncated-header": "TRUNCATED",
    "bad-whiteout-as-directory": "BAD_WHITEOUT",
    "bad-whiteout-of-dot": "BAD_WHITEOUT",
    "bad-whiteout-of-nothing": "BAD_WHITEOUT",
    "bad-whiteout-of-parent": "BAD_WHITEOUT",
    "bad-xattr-too-large": "BAD_XATTR",
    "two-layers": "TRUNCATED",
}

TAKEN: Final[dict[str, list[str]]] = {
    "odd-absolute": ["etc/", "etc/passwd"],
    "odd-acl": ["f"],
    "odd-devices": ["b", "c", "p"],
    "odd-duplicates": ["f@"],
    "odd-duplicates-of-other-types": ["a"],
    "odd-empty": [],
    "odd-hardlink-to-symlink": ["h", "s@"],
    "odd-lost-found": ["lost+found/", "lost+found/x"],
    "odd-no-end": ["f"],
    "odd-not-utf8": ["ÿþ\n"],
    "odd-opaque-of-nothing": [],
    "odd-opaque-of-root": ["keep"],
    "odd-pax": ["f"],
    "odd-plain": ["d/", "d/f", "h", "s@"],
    "odd-symlink-far-up-then-through-it": ["s@", "tmp/", "tmp/x"],
    "odd-symlink-then-through-it": ["etc/", "etc/passwd", "out@"],
    "odd-symlink-to-absolute-then-through-it": ["etc/", "etc/passwd", "s@"],
    "odd-symlink-up-then-through-it": ["out@", "passwd"],
    "odd-whiteout-through-symlink": ["d/", "d/x", "s@"],
    "odd-whiteouts": [],
    "odd-zero-blocks": [],
    "two-directory-becomes-file": ["a", "d", "s@"],
    "two-hardlink-to-lower": ["d/", "d/lower", "h", "s@"],
    "two-opaque-first": ["a", "d/", "d/upper", "s@"],
    "two-opaque-last": ["a", "d/", "d/upper", "s@"],
    "two-whiteout-after-its-replacement": ["a", "d/", "d/lower", "s@"],
    "two-whiteout-through-symlink": ["a", "d/", "s@"],
}
