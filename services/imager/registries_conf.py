"""Where an image is really asked for: mirrors, other locations, blocked registries.

Format: containers-registries.conf(5), version 2, as podman, skopeo and buildah read it. Of a file
the `[[registry]]` tables count. Short names are not looked up by it: a bare name is always on
Docker Hub, whatever machine it is said on.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from services.common.errors import Denied, InvalidInput, VoidboxError
from services.imager.reference import RegistryReference, parse_reference

_PULLS: Final = ("all", "digest-only", "tag-only")


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A place to ask.

    Attributes:
        reference: The image as it is called there.
        insecure: Whether plain HTTP is allowed.
    """

    reference: RegistryReference
    insecure: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mirror:
    location: str
    insecure: bool
    pull: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """One `[[registry]]` table of the file `place`."""

    prefix: str
    location: str
    insecure: bool
    blocked: bool
    mirrors: tuple[_Mirror, ...]
    place: Path

    def matches(self, name: str) -> bool:
        """Whether it is about the image `name`, which is a registry and a repository."""
        if self.prefix.startswith("*."):
            return name.partition("/")[0].partition(":")[0].endswith(self.prefix[1:])
        return name == self.prefix or name.startswith(f"{self.prefix}/")

    def moved(self, name: str, location: str) -> str:
        """`name` with `location` instead of the prefix."""
        if not location:
            return name
        rest = (
            name.partition("/")[2] if self.prefix.startswith("*.") else name[len(self.prefix) :].lstrip("/")
        )
        return f"{location}/{rest}" if rest else location


def endpoints(files: Iterable[Path], reference: RegistryReference, insecure: bool) -> list[Endpoint]:
    """Where to ask for `reference`, best first; the last is its own registry, maybe at another location.

    Args:
        insecure: Whether the caller allows plain HTTP for the image's own registry.

    Raises:
        Denied: the registry is blocked.
        InvalidInput: a file is malformed; the message names it.
    """
    rules: dict[str, _Rule] = {}
    for path in files:
        rules |= {rule.prefix: rule for rule in _rules(path)}
    name = f"{reference.registry}/{reference.repository}"
    matching = [rule for rule in rules.values() if rule.matches(name)]
    if not matching:
        return [Endpoint(reference=reference, insecure=insecure)]
    rule = max(matching, key=lambda rule: len(rule.prefix))
    if rule.blocked:
        raise Denied(
            f"{reference}: {rule.place} blocks {rule.prefix}", reason="REGISTRY_BLOCKED", reference=reference
        )
    unwanted = "tag-only" if reference.digest else "digest-only"
    found = [
        Endpoint(reference=_moved(rule, reference, name, mirror.location), insecure=mirror.insecure)
        for mirror in rule.mirrors
        if mirror.pull != unwanted
    ]
    own = _moved(rule, reference, name, rule.location)
    return [*found, Endpoint(reference=own, insecure=insecure or rule.insecure)]


def _moved(rule: _Rule, reference: RegistryReference, name: str, location: str) -> RegistryReference:
    suffix = (f":{reference.tag}" if reference.tag else "") + (
        f"@{reference.digest}" if reference.digest else ""
    )
    moved_name = rule.moved(name, location)
    host, slash, _ = moved_name.partition("/")
    if not slash or not (host == "localhost" or "." in host or ":" in host):
        # Such a name would be taken for one on Docker Hub.
        raise _bad(rule.place, f"location {location!r} makes {moved_name!r} of {name}, which names no host")
    try:
        moved = parse_reference(f"docker://{moved_name}{suffix}")
    except VoidboxError as error:
        raise _bad(rule.place, f"location {location!r}: {error.message}") from error
    assert isinstance(moved, RegistryReference)
    return moved


def _rules(path: Path) -> list[_Rule]:
    try:
        document = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise _bad(path, str(error)) from error
    return [_rule(table, path) for table in _tables(document, "registry", path)]


def _rule(table: Mapping[str, Any], path: Path) -> _Rule:
    location = _text(table, "location", path)
    prefix = _text(table, "prefix", path) or location
    if not prefix:
        raise _bad(path, "a [[registry]] has neither prefix nor location")
    digest_only = _flag(table, "mirror-by-digest-only", path)
    mirrors = []
    for mirror in _tables(table, "mirror", path):
        pull = _text(mirror, "pull-from-mirror", path) or ("digest-only" if digest_only else "all")
        if pull not in _PULLS:
            raise _bad(path, f"pull-from-mirror is {pull!r}, not one of {', '.join(_PULLS)}")
        place = _text(mirror, "location", path)
        if not place:
            raise _bad(path, f"a mirror of {prefix} has no location")
        mirrors.append(_Mirror(location=place, insecure=_flag(mirror, "insecure", path), pull=pull))
    return _Rule(
        prefix=prefix.rstrip("/"),
        location=location,
        insecure=_flag(table, "insecure", path),
        blocked=_flag(table, "blocked", path),
        mirrors=tuple(mirrors),
        place=path,
    )


def _tables(table: Mapping[str, Any], key: str, path: Path) -> list[Mapping[str, Any]]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _bad(path, f"{key} is not a list of tables; write [[{key}]]")
    return value


def _text(table: Mapping[str, Any], key: str, path: Path) -> str:
    value = table.get(key, "")
    if not isinstance(value, str):
        raise _bad(path, f"{key} is not a string")
    return value.rstrip("/")


def _flag(table: Mapping[str, Any], key: str, path: Path) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise _bad(path, f"{key} is not true or false")
    return value


def _bad(path: Path, why: str) -> InvalidInput:
    return InvalidInput(f"{path}: {why}", reason="BAD_REGISTRIES_CONF", file=path)
