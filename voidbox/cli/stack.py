"""`voidbox up`, `down` and `status`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from typing import Any

from services.common.errors import InvalidInput, VoidboxError
from voidbox.cli.connection import Context, Stack
from voidbox.cli.exitcode import ExitCode
from voidbox.cli.runs import runs_table
from voidbox.cli.screen import duration, table
from voidbox.client import Client
from voidbox.hypervisor.v1 import hypervisor_pb2 as hv
from voidbox.orchestrator.v1 import orchestrator_pb2 as pb
from voidbox.stack import lifecycle

EMULATION = "emulation, not a security boundary"


def up_command(context: Context) -> int:
    """Start the embedded stack."""
    _refuse_remote(context)
    layout, status = lifecycle.up(context.layout, os.environ, context.screen.note)
    context.screen.result(f"the voidbox stack is up: unix:{layout.socket('orchestrator')}", status)
    return ExitCode.OK


def down_command(context: Context) -> int:
    """Stop the embedded stack."""
    _refuse_remote(context)
    swept = lifecycle.down(
        context.layout,
        os.environ,
        force=context.args.force,
        say=lambda text: context.screen.note(f"  {text}"),
    )
    text = "no voidbox stack was running" if swept is None else "the voidbox stack is down; nothing is left"
    context.screen.result(text, {"was_running": swept is not None, "ended": swept.ended if swept else []})
    return ExitCode.OK


def _refuse_remote(context: Context) -> None:
    if context.remote is not None:
        raise InvalidInput(
            f"voidbox {context.args.command} is about the embedded stack, but an address is set "
            f"({context.remote}); "
            "unset VOIDBOX_ADDRESS or leave out --address",
            reason="REMOTE_STACK",
        )


def status_command(context: Context) -> int:
    """Describe the stack; exits with `ExitCode.INFRASTRUCTURE` if something of it does not work."""
    embedded: Mapping[str, Any] = {}
    if context.remote is None:
        layout, embedded = lifecycle.status(context.layout)
        stack = Stack(address=layout.address("orchestrator"))
    else:
        stack = context.stack()
    found = asyncio.run(_look(stack))
    services = {entry["name"]: entry for entry in embedded.get("services", ())}
    ok = not found.errors and all(entry["state"] == "running" for entry in services.values())
    ok = ok and all(entry.reachable for entry in (found.status.services if found.status else ()))
    if context.screen.json:
        context.screen.data(_data(embedded, found, ok=ok))
    else:
        print(_human(embedded, found, stack))
    return ExitCode.OK if ok else ExitCode.INFRASTRUCTURE


class _Found:
    """What the stack answers; each part that fails says why."""

    def __init__(self) -> None:
        self.status: pb.GetStatusResponse | None = None
        self.host: hv.GetCapabilitiesResponse | None = None
        self.boxes: list[hv.Box] = []
        self.runs: list[pb.Run] = []
        self.errors: list[str] = []


async def _look(stack: Stack) -> _Found:
    found = _Found()

    async def part(name: str, client: Client) -> None:
        try:
            if name == "orchestrator":
                found.status = await client.status()
            elif name == "runs":
                found.runs = [run async for run in client.list_runs(active=True)]
            elif name == "host":
                found.host = await client.capabilities()
            else:
                found.boxes = [box async for box in client.list_boxes()]
        except VoidboxError as error:
            found.errors.append(f"{name}: {error}")

    async with stack.connect() as client:
        await asyncio.gather(*(part(name, client) for name in ("orchestrator", "runs", "host", "boxes")))
    return found


def host_line(host: hv.GetCapabilitiesResponse) -> str:
    """The host in a line."""
    accelerator = hv.Accelerator.Name(host.accelerator).removeprefix("ACCELERATOR_")
    if accelerator == "UNSPECIFIED":
        accelerator = "no accelerator probed yet"
    boundary = "" if host.security_boundary or "no " in accelerator else f" ({EMULATION})"
    vsock = (
        hv.VsockTransport.Name(host.vsock_transport)
        .removeprefix("VSOCK_TRANSPORT_")
        .lower()
        .replace("_", "-")
    )
    qemu = f"QEMU {host.qemu_version}" if host.qemu_version else "QEMU is not installed"
    return (
        f"{qemu}, {accelerator}{boundary}, vsock by {vsock}, {host.host_cpus} CPUs, "
        f"{host.available_memory_mib} of {host.host_memory_mib} MiB free for boxes"
    )


def _human(embedded: Mapping[str, Any], found: _Found, stack: Stack) -> str:
    lines = []
    version = embedded.get("version") or (found.status.version if found.status else "?")
    since = f", up for {duration(time.time() - embedded['start_time'])}" if embedded else ""
    lines.append(f"voidbox {version} at {stack.address}{since}")
    if embedded:
        rows = [
            (e["name"], e["state"], e["pid"] or "-", e["restarts"], e["address"], e["detail"])
            for e in embedded["services"]
        ]
        lines += ["", table(("SERVICE", "STATE", "PID", "RESTARTS", "ADDRESS", ""), rows)]
    elif found.status:
        rows2 = [
            (s.name, "reachable" if s.reachable else "unreachable", s.address, s.detail)
            for s in found.status.services
        ]
        lines += ["", table(("SERVICE", "STATE", "ADDRESS", ""), rows2)]
    if found.status:
        lines += [f"{s.name} does not answer: {s.detail}" for s in found.status.services if not s.reachable]
    if found.host is not None:
        lines += ["", f"host: {host_line(found.host)}"]
        lines += [f"  {probe.name}: {probe.detail}" for probe in found.host.probes if not probe.usable]
    live = [box for box in found.boxes if box.state not in (hv.BOX_STATE_STOPPED, hv.BOX_STATE_FAILED)]
    lines += ["", f"boxes: {len(live)}"]
    if live:
        rows3 = [
            (
                box.id,
                hv.BoxState.Name(box.state).removeprefix("BOX_STATE_").lower(),
                f"{box.config.resources.memory_mib or 1024} MiB",
                box.vmm_pid or "-",
                box.boot_id[:8],
            )
            for box in live
        ]
        lines.append(table(("BOX", "STATE", "MEMORY", "PID", "BOOT ID"), rows3))
    lines += ["", f"runs: {len(found.runs)}"]
    if found.runs:
        lines.append(runs_table(found.runs))
    lines += [f"error: {error}" for error in found.errors]
    return "\n".join(lines)


def _data(embedded: Mapping[str, Any], found: _Found, *, ok: bool) -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    def plain(message: Any) -> Any:
        return MessageToDict(message, preserving_proto_field_name=True) if message is not None else None

    return {
        "ok": ok,
        "stack": dict(embedded) or None,
        "orchestrator": plain(found.status),
        "host": plain(found.host),
        "boxes": [plain(box) for box in found.boxes],
        "runs": [plain(run) for run in found.runs],
        "errors": found.errors,
    }
