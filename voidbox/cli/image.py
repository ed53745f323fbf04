"""`voidbox image …`: the image cache of the stack's host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from services.common.errors import Corrupt, InvalidInput
from voidbox.cli.bars import Bars
from voidbox.cli.connection import Context
from voidbox.cli.exitcode import ExitCode
from voidbox.cli.image_export import FORMATS, export
from voidbox.cli.screen import Screen, safe, size, table
from voidbox.client import CALL_SECONDS, Client, rpc_errors
from voidbox.imager.v1 import imager_pb2 as pb
from voidbox.spec.bind import resolve_image

_POLICIES = {
    "always": pb.PULL_POLICY_ALWAYS,
    "missing": pb.PULL_POLICY_MISSING,
    "never": pb.PULL_POLICY_NEVER,
}
_KERNELS = {"debian": pb.KERNEL_FLAVOR_DEBIAN, "slim": pb.KERNEL_FLAVOR_SLIM}
# Reading a cache of many gigabytes, and writing its disks once more.
_VERIFY_SECONDS = 3600


def image_command(context: Context) -> int:
    """One of the image commands."""
    commands = {
        "pull": _pull,
        "push": _push,
        "ls": _list,
        "inspect": _inspect,
        "rm": _remove,
        "prune": _prune,
        "verify": _verify,
        "export": _export,
        "build-guest": _build_guest,
        "build-agent": _build_agent,
    }
    stack = context.stack()

    async def run() -> None:
        async with stack.connect() as client:
            await commands[context.args.image_command](context, client)

    asyncio.run(run())
    return ExitCode.OK


def local_reference(reference: str) -> str:
    """A reference to a file of this host with an absolute path: the imager has another directory."""
    return resolve_image(reference, str(Path.cwd()))


async def _pull(context: Context, client: Client) -> None:
    request = pb.PullImageRequest(
        reference=local_reference(context.args.reference),
        policy=_POLICIES[context.args.policy],
        platform=_platform(context.args.platform or ""),
        insecure=context.args.insecure,
    )
    kind, image = await _follow(
        context.screen, _messages(client.imager.PullImage(request)), "image", "guest_image"
    )
    if kind == "guest_image":
        _show_guest(context, image)
        return
    context.screen.result(f"{image.reference} {image.digest.value}", _plain(image))


async def _build_guest(context: Context, client: Client) -> None:
    request = pb.BuildGuestImageRequest(
        kernel=_KERNELS[context.args.kernel], make_default=not context.args.no_default
    )
    _, image = await _follow(context.screen, _messages(client.imager.BuildGuestImage(request)), "guest_image")
    _show_guest(context, image)


async def _build_agent(context: Context, client: Client) -> None:
    args = context.args
    request = pb.BuildAgentImageRequest(
        agent=args.agent,
        architecture=args.arch or "",
        package_path=str(Path.cwd() / args.package) if args.package else "",
    )
    _, disk = await _follow(context.screen, _messages(client.imager.BuildAgentImage(request)), "disk")
    context.screen.result(
        f"{args.agent} {disk.version}: {disk.path} ({size(disk.size_bytes)}), program {disk.program}",
        _plain(disk),
    )


async def _push(context: Context, client: Client) -> None:
    args = context.args
    request = pb.PushImageRequest(
        source=args.source if args.guest else local_reference(args.source),
        reference=args.reference,
        insecure=args.insecure,
        guest_image=args.guest,
    )
    _, digest = await _follow(context.screen, _messages(client.imager.PushImage(request)), "digest")
    context.screen.result(
        f"{args.reference} {digest.value}", {"reference": args.reference, "digest": digest.value}
    )


def _show_guest(context: Context, image: pb.GuestImage) -> None:
    context.screen.result(
        f"guest image {image.digest.value} with kernel {image.kernel_version}\n"
        f"{image.kernel_path}\n{image.initramfs_path}",
        _plain(image),
    )


async def _list(context: Context, client: Client) -> None:
    images: list[pb.Image] = []
    stored: list[pb.StoredContent] = []
    request = pb.ListImagesRequest(include_stored=context.args.all)
    async for page in client.pages(client.imager.ListImages, request):
        images += page.images
        stored += page.stored
    rows = [
        (
            image.reference,
            image.digest.value.removeprefix("sha256:")[:12],
            f"{image.platform.os}/{image.platform.architecture}",
            size(image.size_bytes),
            image.pull_time.ToDatetime().strftime("%Y-%m-%d %H:%M"),
        )
        for image in images
    ]
    text = table(("REFERENCE", "DIGEST", "PLATFORM", "SIZE", "PULLED"), rows, right=(3,))
    data: Any = [_plain(image) for image in images]
    if context.args.all:
        text += "\n\n" + _stored_table(stored)
        data = {"images": data, "stored": [_plain(item) for item in stored]}
    context.screen.result(text, data)


def _stored_table(stored: list[pb.StoredContent]) -> str:
    rows = [
        (
            item.kind,
            item.name + (" (default)" if item.is_default else ""),
            item.digest.value,
            size(item.size_bytes),
            item.use_time.ToDatetime().strftime("%Y-%m-%d %H:%M"),
        )
        for item in stored
    ]
    return table(("KIND", "NAME", "DIGEST", "SIZE", "USED"), rows, right=(3,))


async def _inspect(context: Context, client: Client) -> None:
    image = await client.get_image(local_reference(context.args.reference))
    if context.screen.json:
        context.screen.data(_plain(image))
        return
    import yaml

    context.screen.result(yaml.safe_dump(_plain(image), sort_keys=False, allow_unicode=True).rstrip(), None)


async def _remove(context: Context, client: Client) -> None:
    freed = 0
    for reference in context.args.references:
        request = pb.DeleteImageRequest(reference=local_reference(reference))
        with rpc_errors():
            freed += (await client.imager.DeleteImage(request, timeout=CALL_SECONDS)).freed_bytes
    context.screen.result(f"freed {size(freed)}", {"freed_bytes": freed})


async def _prune(context: Context, client: Client) -> None:
    request = pb.PruneImagesRequest(
        max_size_bytes=context.args.max_size or (context.args.max_size_mb or 0) << 20
    )
    if context.args.older_than:
        request.older_than.FromNanoseconds(int(context.args.older_than * 1e9))
    with rpc_errors():
        response = await client.imager.PruneImages(request, timeout=300)
    context.screen.result(
        "\n".join([*response.references, f"freed {size(response.freed_bytes)}"]),
        {"references": list(response.references), "freed_bytes": response.freed_bytes},
    )


async def _verify(context: Context, client: Client) -> None:
    reference = local_reference(context.args.reference) if context.args.reference else ""
    request = pb.VerifyImageRequest(reference=reference, repair=context.args.repair)
    with rpc_errors():
        found = await client.imager.VerifyImage(request, timeout=_VERIFY_SECONDS)
    lines = [
        f"damaged{' and removed' if one.removed else ''}: {one.kind} {one.digest} ({safe(one.path)})"
        for one in found.problems
    ]
    context.screen.result(
        "\n".join([*lines, f"{found.checked} pieces read, {len(lines)} damaged"]),
        {"checked": found.checked, "problems": [_plain(one) for one in found.problems]},
    )
    left = [one for one in found.problems if not one.removed]
    if left:
        cure = (
            "a running box has it open; stop it first"
            if context.args.repair
            else "remove it with: voidbox image verify --repair"
        )
        raise Corrupt(f"the cache holds damaged content; {cure}", reason="CACHE_DAMAGED")


async def _export(context: Context, client: Client) -> None:
    reference = local_reference(context.args.reference)
    request = pb.ExportImageRequest(
        reference=reference, format=FORMATS[context.args.format], compression=context.args.compression
    )
    await export(context, client, reference, lambda client: _messages(client.imager.ExportImage(request)))


async def _messages(call: Any) -> AsyncIterator[Any]:
    try:
        with rpc_errors():
            async for message in call:
                yield message
    finally:
        call.cancel()


async def _follow(screen: Screen, messages: AsyncIterator[Any], *wanted: str) -> tuple[str, Any]:
    """Show progress until the message with the result comes; its kind and the result."""
    with Bars(screen) as bars:
        async for message in messages:
            kind = message.WhichOneof("result")
            if kind in wanted:
                return kind, getattr(message, kind)
            bars.show(message.progress)
    raise AssertionError("the stream ended without a result and without an error")


def _platform(text: str) -> pb.Platform:
    """OS/ARCH[/VARIANT] or ARCH; the imager checks the words."""
    parts = text.split("/") if "/" in text else ["", text]
    if len(parts) > 3:
        raise InvalidInput(f"--platform {text}: write OS/ARCH[/VARIANT]", reason="BAD_PLATFORM")
    return pb.Platform(**dict(zip(("os", "architecture", "variant"), parts, strict=False)))


def _plain(message: Any) -> Any:
    return MessageToDict(message, preserving_proto_field_name=True)
