"""Whether this host lets boxes have a network: one namespace is made as for a box, and thrown away.

`python -m services.hypervisor.egress.host_network TUN` ends with 0, or prints why not.
"""

from __future__ import annotations

import os
import sys

from services.hypervisor.egress import namespace
from services.hypervisor.egress.namespace import NamespaceFailed

PROBE_SECONDS = 30.0


async def find(tun: str) -> str:
    """Why boxes cannot have a network here, with the cure; empty if they can."""
    from services.common.errors import VoidboxError
    from services.common.process import run

    try:
        await run([sys.executable, "-P", "-m", __name__, tun], seconds=PROBE_SECONDS)
    except VoidboxError as error:
        return error.message.strip().splitlines()[-1].rpartition("NETWORK: ")[2]
    return ""


def main(argv: list[str]) -> int:
    """Try it."""
    try:
        found = namespace.make(argv[0])
    except (NamespaceFailed, OSError) as error:
        os.write(2, f"NETWORK: {error}\n".encode())
        return 1
    for fd in (found.tap, *found.sockets()):
        os.close(fd)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
