"""Waiting until a hypervisor has made ahead what it makes ahead, so that what there is can be counted."""

from __future__ import annotations

import asyncio
from pathlib import Path

from services.hypervisor.inotify import FileWatch
from tests.vm import Client, box_config
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

# A boot of the template, a restore, a start of QEMU; a busy host may need ten times as long.
_SECONDS = 240.0


async def all_wait(client: Client, machines: Path, log: Path, kinds: set[str], memory_mib: int = 320) -> None:
    """Return once a machine of each kind waits for boxes of that memory, and the template is on disk.

    Args:
        client: Of the hypervisor.
        machines: The directory of machines that are no boxes.
        log: The hypervisor's, which tells of each that it waits.
        kinds: `pool` and `ready`, as the service is set to have one of each.
    """
    request = pb.BuildTemplateRequest(config=box_config(resources={"memory_mib": memory_mib}))
    with FileWatch(log) as written:
        while True:
            written.clear()
            await client.hypervisor.BuildTemplate(request, timeout=_SECONDS)
            text = log.read_text()
            present = [path.name for path in machines.iterdir()]
            waits = {name.partition("-")[0] for name in present if f"machine {name} waits" in text}
            again = {name.partition("-")[0] for name in present if f"machine {name} goes on waiting" in text}
            if kinds <= waits | again and len(present) == len(kinds):
                return
            async with asyncio.timeout(_SECONDS):
                await written.wait()
