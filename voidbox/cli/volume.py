"""`voidbox volume`: named disks that outlive the boxes that use them."""

from __future__ import annotations

import asyncio
from functools import partial

from voidbox.cli.connection import Context
from voidbox.cli.exitcode import ExitCode
from voidbox.cli.screen import size, table
from voidbox.client import CALL_SECONDS, Client
from voidbox.hypervisor.v1 import hypervisor_pb2 as hv

# Making one formats it.
_CREATE_SECONDS = 150.0


def volume_command(context: Context) -> int:
    """Make, list or remove volumes."""
    stack = context.stack()
    command = {"create": _create, "ls": _list, "rm": _remove}[context.args.volume_command]

    async def run() -> None:
        async with stack.connect() as client:
            await command(context, client)

    asyncio.run(run())
    return ExitCode.OK


async def _create(context: Context, client: Client) -> None:
    request = hv.CreateVolumeRequest(name=context.args.name, size_mib=context.args.size_mb or 0)
    answer = await client.call(lambda: client.hypervisor.CreateVolume(request, timeout=_CREATE_SECONDS))
    context.screen.result(answer.volume.name, _data(answer.volume))


async def _list(context: Context, client: Client) -> None:
    pages = client.pages(client.hypervisor.ListVolumes, hv.ListVolumesRequest())
    found = [one async for page in pages for one in page.volumes]
    rows = [(one.name, size(one.size_mib << 20), size(one.used_bytes), one.box_id or "-") for one in found]
    context.screen.result(
        table(("VOLUME", "SIZE", "USED", "BOX"), rows, right=(1, 2)), [_data(one) for one in found]
    )


async def _remove(context: Context, client: Client) -> None:
    for name in context.args.names:
        request = hv.DeleteVolumeRequest(name=name)
        await client.call(partial(client.hypervisor.DeleteVolume, request, timeout=CALL_SECONDS))
    context.screen.result("\n".join(context.args.names), {"removed": context.args.names})


def _data(volume: hv.Volume) -> dict[str, object]:
    return {
        "name": volume.name,
        "size_mb": volume.size_mib,
        "used_bytes": volume.used_bytes,
        "box_id": volume.box_id,
    }
