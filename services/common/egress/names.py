"""DNS names as rules and questions have them: one spelling for each, and patterns that match them."""

from __future__ import annotations

import re

MAX_NAME = 253
# RFC 1034 §3.5 and the underscore, which service names have (RFC 8552).
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


def normalize(text: str) -> str:
    """The name in lower case, without a dot at its end, other scripts as punycode.

    Raises:
        ValueError: it is no DNS name.
    """
    name = text.removesuffix(".")
    if not name.isascii():
        try:
            name = name.encode("idna").decode()
        except UnicodeError as error:
            raise ValueError(f"{text!r} is not a DNS name: {error}") from error
    name = name.lower()
    if not name or len(name) > MAX_NAME or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise ValueError(f"{text[:80]!r} is not a DNS name")
    if name.rpartition(".")[2].isdecimal():
        raise ValueError(f"{text!r} is an address, not a name")
    return name


def normalize_pattern(text: str) -> str:
    """A name, "*." and a name, or "*".

    Raises:
        ValueError: it is none of these.
    """
    if text == "*":
        return text
    if text.startswith("*."):
        return f"*.{normalize(text[2:])}"
    return normalize(text)


def matches(pattern: str, name: str) -> bool:
    """Whether a normal `name` is covered: "*.a.b" covers all below a.b, however deep, but not a.b."""
    if pattern == "*":
        return True
    if pattern.startswith("*."):
        return name.endswith(pattern[1:]) and len(name) > len(pattern) - 1
    return name == pattern
