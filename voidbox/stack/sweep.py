"""What is left when the stack has stopped or was killed: find it, end it, prove it gone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from voidbox.stack.identity import Identity
from voidbox.stack.layout import SERVICES, Layout

# Ends boxes one by one; each may take a few seconds of grace.
REAP_SECONDS = 60.0
TERM_SECONDS = 10.0


@dataclass(slots=True, kw_only=True)
class Swept:
    """What a sweep found and did; `left` is empty if nothing remains."""

    ended: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def read_record(layout: Layout) -> dict[str, Any]:
    """What the supervisor wrote about itself; empty if there is no (readable) record."""
    try:
        record = json.loads(layout.record.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(layout: Layout, record: Mapping[str, Any]) -> None:
    """Replace the record, whole or not at all."""
    draft = layout.record.with_name(f"{layout.record.name}.{os.getpid()}")
    draft.write_text(json.dumps(record, indent=1) + "\n")
    draft.replace(layout.record)


def processes(record: Mapping[str, Any]) -> dict[str, Identity]:
    """The processes of a record by name, dead or alive."""
    entries = record.get("services")
    named = {"supervisor": record.get("supervisor"), **(entries if isinstance(entries, dict) else {})}
    return {name: found for name, entry in named.items() if (found := Identity.parse(entry)) is not None}


def sweep(
    layout: Layout, env: Mapping[str, str], say: Callable[[str], None] = lambda _: None, *, boxes: bool = True
) -> Swept:
    """End recorded processes and (if `boxes`) leftover boxes, remove sockets and temporary files.

    To be called while nobody else can start the stack. Idempotent.
    """
    swept = Swept()
    found = [
        (name, identity)
        for name, identity in processes(read_record(layout)).items()
        if identity.pid != os.getpid() and identity.alive
    ]
    for name, identity in found:
        say(f"ending {name} (pid {identity.pid}) that was left behind")
        swept.ended.append(f"{name} (pid {identity.pid})")
        identity.ask_to_end()
    deadline = time.monotonic() + TERM_SECONDS
    for name, identity in found:
        if not identity.wait(max(0.0, deadline - time.monotonic())) and not identity.end(0):
            swept.left.append(f"process {identity.pid} ({name})")
    if boxes:
        swept.left += _reap(layout, env)
    for path in [layout.control, *(layout.socket(name) for name in SERVICES)]:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            swept.left.append(f"socket {path}: {error.strerror}")
    swept.left += _empty(layout.tmp)
    if not swept.left:
        layout.record.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not ours alone, or not empty: it may hold others' files
        layout.runtime.rmdir()
    return swept


def _reap(layout: Layout, env: Mapping[str, str]) -> list[str]:
    """End boxes that no hypervisor owns any more."""
    argv = [sys.executable, "-P", "-m", "services.hypervisor.reap"]
    try:
        done = subprocess.run(
            argv,
            cwd="/",
            env=layout.service_env(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=REAP_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [f"boxes: their removal took longer than {REAP_SECONDS:g} s"]
    if done.returncode == 0:
        return []
    lines = done.stdout.decode(errors="replace").strip().splitlines() or ["no output"]
    return [f"boxes: {lines[-1]}"]


def _empty(directory: Path) -> list[str]:
    left = []
    with contextlib.suppress(FileNotFoundError):
        for entry in list(os.scandir(directory)):
            try:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
            except FileNotFoundError:
                continue
            except OSError as error:
                left.append(f"temporary file {entry.path}: {error.strerror}")
    return left
