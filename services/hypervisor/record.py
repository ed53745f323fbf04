"""`state.json`: a box's record on disk, written whole or not at all."""

from __future__ import annotations

import dataclasses
import enum
import errno
import json
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from services.common.errors import Corrupt, Exhausted
from services.hypervisor.model import BoxConfig, BoxRecord

FILE_NAME = "state.json"
_VERSION = 1

T = TypeVar("T")


def save(directory: Path, record: BoxRecord) -> None:
    """Write `record` into the box's directory, atomically; the old one stays if that fails.

    Raises:
        Exhausted: the disk is full.
    """
    text = json.dumps({"version": _VERSION, "box": _plain(record)}, separators=(",", ":"))
    write_atomically(directory / FILE_NAME, text.encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file `path` (mode 0600) by rename.

    Not synced: it has to survive this process, not the host, whose boxes end with it; and the
    caller is an event loop, which a busy disk would hold up.

    Raises:
        Exhausted: the disk is full.
    """
    partial = path.with_name(f".{path.name}.new")
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise full_disk(error, path.parent) from error


def full_disk(error: OSError, where: Path) -> Exception:
    """`error` itself, or what to tell the caller when the disk of `where` is full."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return Exhausted(
        f"the disk of {where} is full; free space or set VOIDBOX_STATE_DIR", reason="DISK_FULL", path=where
    )


def load(directory: Path) -> BoxRecord:
    """The record in the box's directory.

    Raises:
        FileNotFoundError: there is none.
        Corrupt: it is not one that this version wrote.
    """
    path = directory / FILE_NAME
    try:
        document = json.loads(path.read_bytes())
        if document["version"] != _VERSION:
            raise ValueError(f"version {document['version']}")
        record: BoxRecord = _build(BoxRecord, document["box"])
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{path} is damaged: {error}", reason="BAD_STATE_FILE", path=path) from error


def config_to_plain(config: BoxConfig) -> Any:
    """A configuration as JSON can hold it."""
    return _plain(config)


def config_from_plain(document: Any) -> BoxConfig:
    """The configuration that `config_to_plain` was given.

    Raises:
        ValueError: it is not one that this version wrote.
    """
    config: BoxConfig = _build(BoxConfig, document)
    return config


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _build(kind: Any, value: Any) -> Any:
    origin = get_origin(kind)
    if origin in (types.UnionType, Union):
        inner = [arg for arg in get_args(kind) if arg is not type(None)]
        return None if value is None else _build(inner[0], value)
    if origin is tuple:
        return tuple(_build(get_args(kind)[0], item) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        return {str(key): str(item) for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _build(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
    if issubclass(kind, enum.Enum):
        return kind(value)
    if not isinstance(value, (int, float) if kind is float else kind):
        raise TypeError(f"{value!r} is not a {kind.__name__}")
    return value
