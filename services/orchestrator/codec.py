"""Records to and from the JSON that the database holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

from services.orchestrator.engine import StageStatus
from services.orchestrator.records import Digest, Facts, InputFile, Options, Request, Stage, Usage
from services.orchestrator.states import FailureClass, StageState
from voidbox.spec.models import Mount, MountMode

# Kept in columns of their own.
_ELSEWHERE = frozenset({"spec", "facts"})


def to_json(value: Any) -> str:
    """A record as JSON."""
    return json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.name not in _ELSEWHERE]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def request_from_json(text: str, spec: bytes) -> Request:
    """The request that `to_json` wrote; its spec is kept apart."""
    data = json.loads(text)
    files = [file | {"digest": Digest(**file["digest"])} for file in data["files"]]
    mounts = [mount | {"mode": MountMode(mount["mode"])} for mount in data["mounts"]]
    data |= {
        "files": tuple(InputFile(**file) for file in files),
        "mounts": tuple(Mount(**mount) for mount in mounts),
        "options": Options(**data["options"]),
    }
    return Request(spec=spec, **data)


def facts_from_json(text: str) -> Facts:
    """The facts that `to_json` wrote."""
    data = json.loads(text)
    phases = tuple((name, seconds) for name, seconds in data["phases"])
    return Facts(**data | {"usage": Usage(**data["usage"]), "phases": phases})


def stage_from_json(text: str, facts: Facts) -> Stage:
    """The stage that `to_json` wrote; its facts are kept apart."""
    data = json.loads(text)
    status = data["status"]
    status |= {
        "state": StageState(status["state"]),
        "failure_class": FailureClass(status["failure_class"]),
    }
    return Stage(
        **data | {"status": StageStatus(**status), "depends_on": tuple(data["depends_on"]), "facts": facts}
    )
