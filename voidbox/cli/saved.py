"""`voidbox template`, `snapshot`, `fork` and `box`: saved machines, and copies of boxes that run."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.json_format import MessageToDict

from services.common.errors import InvalidInput
from voidbox.cli.boxes import box_state, find_box, state_word
from voidbox.cli.connection import Context
from voidbox.cli.exitcode import ExitCode
from voidbox.cli.screen import size, table
from voidbox.client import CALL_SECONDS, Client
from voidbox.common.v1 import common_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as hv
from voidbox.imager.v1 import imager_pb2

# A template is a cold boot under emulation on a busy host; a snapshot writes the memory to the disk.
BUILD_SECONDS = 180.0
SAVE_SECONDS = 180.0

Command = Callable[[Context, Client], Awaitable[None]]


def template_command(context: Context) -> int:
    """Build, list or remove templates."""
    return _run(
        context,
        {"build": _build_template, "ls": _list_templates, "rm": _remove_templates}[
            context.args.template_command
        ],
    )


def snapshot_command(context: Context) -> int:
    """Create, list, remove or restore snapshots."""
    commands = {
        "create": _create_snapshot,
        "ls": _list_snapshots,
        "rm": _remove_snapshots,
        "restore": _restore_snapshot,
    }
    return _run(context, commands[context.args.snapshot_command])


def box_command(context: Context) -> int:
    """List or remove boxes, whether a run has them or not."""
    return _run(context, {"ls": _list_boxes, "rm": _remove_boxes}[context.args.box_command])


def fork_command(context: Context) -> int:
    """Copy a running box."""
    return _run(context, _fork)


def _run(context: Context, command: Command) -> int:
    stack = context.stack()

    async def work() -> None:
        async with stack.connect() as client:
            await command(context, client)

    asyncio.run(work())
    return ExitCode.OK


# Templates


async def _build_template(context: Context, client: Client) -> None:
    args = context.args
    request = imager_pb2.ResolveGuestImageRequest(
        kernel_path=args.kernel or "", initramfs_path=args.initramfs or ""
    )
    image = (
        await client.call(lambda: client.imager.ResolveGuestImage(request, timeout=BUILD_SECONDS))
    ).guest_image
    build = hv.BuildTemplateRequest(
        config=hv.BoxConfig(
            kernel_path=image.kernel_path,
            initramfs_path=image.initramfs_path,
            resources=common_pb2.Resources(memory_mib=args.memory_mb or 0, vcpus=args.vcpus or 0),
        )
    )
    template = (
        await client.call(lambda: client.hypervisor.BuildTemplate(build, timeout=BUILD_SECONDS))
    ).template
    context.screen.result(f"{template.id} {size(template.size_bytes)}", _plain(template))


async def _list_templates(context: Context, client: Client) -> None:
    pages = client.pages(client.hypervisor.ListTemplates, hv.ListTemplatesRequest())
    templates = [each async for page in pages for each in page.templates]
    rows = [
        (
            each.id, each.resources.memory_mib, each.resources.vcpus, size(each.size_bytes), each.pooled,
            each.use_time.ToDatetime().strftime("%Y-%m-%d %H:%M"), each.kernel_path,
        )
        for each in templates
    ]  # fmt: skip
    header = ("template", "MiB", "vcpus", "size", "waiting", "used", "kernel")
    context.screen.result(table(header, rows, right=(1, 2, 3, 4)), [_plain(each) for each in templates])


async def _remove_templates(context: Context, client: Client) -> None:
    for name in context.args.templates:
        request = hv.DeleteTemplateRequest(template_id=name)
        await client.call(lambda r=request: client.hypervisor.DeleteTemplate(r, timeout=CALL_SECONDS))  # type: ignore[misc]
    context.screen.result("\n".join(context.args.templates), list(context.args.templates))


# Snapshots


async def _create_snapshot(context: Context, client: Client) -> None:
    args = context.args
    request = hv.CreateSnapshotRequest(
        box_id=await find_box(client, args.box), name=args.name, allow_secrets=args.allow_secrets
    )
    answer = await client.call(lambda: client.hypervisor.CreateSnapshot(request, timeout=SAVE_SECONDS))
    pause = answer.pause.ToTimedelta().total_seconds()
    snapshot = answer.snapshot
    context.screen.result(
        f"{snapshot.name} {size(snapshot.size_bytes)}, the box stood still for {pause:.2f} s",
        {**_plain(snapshot), "pause_seconds": pause},
    )


async def _list_snapshots(context: Context, client: Client) -> None:
    pages = client.pages(client.hypervisor.ListSnapshots, hv.ListSnapshotsRequest())
    snapshots = [each async for page in pages for each in page.snapshots]
    rows = [
        (
            each.name, each.box_id, each.resources.memory_mib, size(each.size_bytes),
            each.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M"), "yes" if each.has_secrets else "",
        )
        for each in snapshots
    ]  # fmt: skip
    header = ("snapshot", "box", "MiB", "size", "taken", "secrets")
    context.screen.result(table(header, rows, right=(2, 3)), [_plain(each) for each in snapshots])


async def _remove_snapshots(context: Context, client: Client) -> None:
    for name in context.args.snapshots:
        request = hv.DeleteSnapshotRequest(name=name)
        await client.call(lambda r=request: client.hypervisor.DeleteSnapshot(r, timeout=CALL_SECONDS))  # type: ignore[misc]
    context.screen.result("\n".join(context.args.snapshots), list(context.args.snapshots))


async def _restore_snapshot(context: Context, client: Client) -> None:
    args = context.args
    box_id = args.box_id or f"{args.name[:50]}-{secrets.token_hex(3)}"
    if not box_id[0].isalpha():
        box_id = f"box-{box_id}"
    request = hv.CreateBoxRequest(box_id=box_id, config=hv.BoxConfig(snapshot=args.name))
    box = (await client.call(lambda: client.hypervisor.CreateBox(request, timeout=SAVE_SECONDS))).box
    context.screen.result(box.id, {"box_id": box.id, "state": state_word(box.state)})


# Boxes


async def _fork(context: Context, client: Client) -> None:
    args = context.args
    parent = await find_box(client, args.box)
    names = args.name or [f"{parent[:52]}-fork-{secrets.token_hex(3)}" for _ in range(args.count)]
    if args.name and args.count != 1 and args.count != len(args.name):
        raise InvalidInput(f"--count {args.count} with {len(args.name)} names", reason="BAD_OPTION")
    request = hv.ForkBoxRequest(box_id=parent, fork_ids=names, allow_secrets=args.allow_secrets)
    answer = await client.call(lambda: client.hypervisor.ForkBox(request, timeout=SAVE_SECONDS))
    pause = answer.pause.ToTimedelta().total_seconds()
    context.screen.result(
        "\n".join(box.id for box in answer.boxes),
        {
            "boxes": [{"box_id": box.id, "state": state_word(box.state)} for box in answer.boxes],
            "pause_seconds": pause,
        },
    )


async def _list_boxes(context: Context, client: Client) -> None:
    boxes = [box async for box in client.list_boxes()]
    rows = [
        (
            box.id, box_state(box), box.origin, box.config.resources.memory_mib,
            box.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M"), box.reason,
        )
        for box in boxes
    ]  # fmt: skip
    header = ("box", "state", "from", "MiB", "created", "reason")
    plain = [
        {
            "box_id": box.id,
            "state": state_word(box.state),
            "auto_paused": box.auto_paused,
            "origin": box.origin,
            "reason": box.reason,
        }
        for box in boxes
    ]
    context.screen.result(table(header, rows, right=(3,)), plain)


async def _remove_boxes(context: Context, client: Client) -> None:
    # All are found before any is touched.
    every = frozenset(hv.BoxState.values())
    boxes = [await find_box(client, name, every) for name in context.args.boxes]
    for box in boxes:
        request = hv.DeleteBoxRequest(box_id=box, force=context.args.force)
        await client.call(lambda r=request: client.hypervisor.DeleteBox(r, timeout=CALL_SECONDS))  # type: ignore[misc]
    context.screen.result("\n".join(boxes), boxes)


def _plain(message: Any) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)
