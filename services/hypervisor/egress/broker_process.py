"""The broker of one box, beside its gateway: it may read files and run programs, the gateway may not.

`python -m services.hypervisor.egress.broker_process --config-fd N` reads `BrokerConfig` as JSON from
descriptor N. It ends when the machine does, or when nobody has the other end of its socket. Brokers of
one login renew it once together (see `oauth.py`), so no process of the host must outlive the others.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.common.errors import InvalidInput
from services.hypervisor import seccomp
from services.hypervisor.egress.broker import Broker, Grant
from services.hypervisor.egress.broker_config import MAX_CONFIG_BYTES, BrokerConfig
from services.hypervisor.egress.oauth import Endpoint, OAuthOwner
from services.hypervisor.egress.serverside import trust
from services.hypervisor.egress.sources import CommandSource, FileSource, KeyringSource, Source, ValueSource
from services.hypervisor.egress.token_file import TokenFile

_DUMPABLE = 4


def make_source(data: Mapping[str, Any], extra_ca: bytes = b"") -> Source:
    """A source from plain data with one key: value, file, command, keyring or oauth.

    Raises:
        InvalidInput: it is none.
    """
    match dict(data):
        case {"value": str(value)}:
            return ValueSource(value)
        case {"file": str(path)}:
            return FileSource(Path(path))
        case {"command": [*words]} if words:
            return CommandSource([str(word) for word in words])
        case {"keyring": {"service": str(service), **rest}}:
            return KeyringSource(service, str(rest.get("user", "")))
        case {"oauth": {"file": str(path), "layout": "plain" | "claude" | "codex" as layout, **rest}}:
            fields: dict[str, Any] = {str(name): value for name, value in rest.items()}
            return OAuthOwner(TokenFile(Path(path), layout), Endpoint(**fields), trust(extra_ca))
    raise InvalidInput(f"a credential cannot come from {', '.join(data) or 'nothing'}")


async def serve(config: BrokerConfig) -> None:
    """Serve until the machine ends or the gateway's side is closed."""
    broker = Broker()
    extra = config.extra_ca.encode()
    grants = {
        rule: Grant(hosts=tuple(grant["hosts"]), source=make_source(grant["source"], extra))
        for rule, grant in config.grants.items()
    }
    broker.admit(grants, config.token)
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    loop.add_reader(config.machine_fd, lambda: None if ended.done() else ended.set_result(None))
    serving = broker.serve(socket.socket(fileno=config.socket_fd))
    try:
        await asyncio.wait({ended, serving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        loop.remove_reader(config.machine_fd)
        await broker.close()


def main() -> None:
    """Run until the box ends."""
    if len(sys.argv) != 3 or sys.argv[1] != "--config-fd":
        sys.exit("usage: python -m services.hypervisor.egress.broker_process --config-fd N")
    with open(int(sys.argv[2]), "rb") as file:
        config = BrokerConfig(**json.loads(file.read(MAX_CONFIG_BYTES)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seccomp.prctl(_DUMPABLE, 0)
    asyncio.run(serve(config))


if __name__ == "__main__":
    os.umask(0o077)
    main()
