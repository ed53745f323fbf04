"""`voidbox validate` and `voidbox inspect`: what a spec is, without running it."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from voidbox.cli import report
from voidbox.cli.connection import Context, Stack
from voidbox.cli.exitcode import ExitCode
from voidbox.cli.submit import read, spec_path
from voidbox.orchestrator.v1 import orchestrator_pb2 as pb


def validate_command(context: Context) -> int:
    """Check a spec and the files that it names."""
    path = spec_path(context.args)
    spec = read(path).spec
    context.screen.result(
        f"valid: {path} (kind={spec.kind.value}, api_version={spec.api_version})",
        {"valid": True, "file": path, "kind": spec.kind.value, "api_version": spec.api_version},
    )
    return ExitCode.OK


def inspect_command(context: Context) -> int:
    """Show a spec file with all defaults, or a run."""
    name = spec_path(context.args)
    if _is_file(name):
        spec = _plain(read(name).spec)
        if context.screen.json:
            context.screen.data(spec)
        else:
            import yaml

            context.screen.result(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True).rstrip(), spec)
        return ExitCode.OK
    run = asyncio.run(_get(context.stack(), name))
    if context.screen.json:
        context.screen.data(MessageToDict(run, preserving_proto_field_name=True))
    else:
        context.screen.result(report.human(run, context.screen).lstrip("\n"), None)
    return ExitCode.OK


def _is_file(name: str) -> bool:
    return "/" in name or name.lower().endswith((".yaml", ".yml", ".json")) or Path(name).exists()


async def _get(stack: Stack, run_id: str) -> pb.Run:
    async with stack.connect() as client:
        return await client.get_run(run_id)


def _plain(value: object) -> Any:
    """Dataclasses and enums as what YAML and JSON know; keys that are not set are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: _plain(entry) for name, entry in entries if entry is not None}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
