"""Many processes that each own a gateway want the same login's token at once.

argv: how many, token file, endpoint, CA file. Prints each one's token or error, one JSON object a line.
They are forked before any of them starts, and start when the pipe that they all read ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys
from pathlib import Path

from services.common.errors import VoidboxError
from services.hypervisor.egress.oauth import Endpoint, OAuthOwner
from services.hypervisor.egress.token_file import TokenFile


async def one(file: str, url: str, trust: str) -> dict[str, object]:
    context = ssl.create_default_context(cafile=trust)
    owner = OAuthOwner(TokenFile(Path(file), "plain"), Endpoint(url=url, client_id="voidbox"), context)
    try:
        # Two boxes in each process: one call renews, the other waits for it.
        first, second = await asyncio.gather(owner.get(), owner.get())
    except VoidboxError as error:
        return {"error": error.message}
    return {"token": first.value, "same": first == second, "renewals": owner.renewals}


def main() -> None:
    count, file, url, trust = int(sys.argv[1]), *sys.argv[2:5]
    ready, start = os.pipe()
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            os.close(start)
            os.read(ready, 1)
            line = json.dumps(asyncio.run(one(file, url, trust))) + "\n"
            os.write(1, line.encode())
            os._exit(0)
        children.append(child)
    os.close(start)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)


main()
