"""`python -m services.imager`: the imager as a process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Mapping

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # before grpc is imported: children are spawned

from services.common import config as configuration
from services.common import logging as logs
from services.common.address import Address
from services.common.auth import read_token
from services.common.errors import VoidboxError
from services.common.paths import Paths, private_dir
from services.common.server import serve, until_signalled
from services.imager.cache import ImageCache
from services.imager.config import Config
from services.imager.guest_choice import Wish
from services.imager.jobs import Jobs
from services.imager.pull import ImageStore
from services.imager.servicer import ImagerServicer
from services.imager.terminal import network_env
from voidbox.imager.v1 import imager_pb2, imager_pb2_grpc

log = logging.getLogger(__name__)

IMAGER = imager_pb2.DESCRIPTOR.services_by_name["ImagerService"].full_name


@contextlib.asynccontextmanager
async def running(config: Config, paths: Paths, env: Mapping[str, str]) -> AsyncIterator[list[Address]]:
    """The imager while the block runs; yields the addresses that it listens on."""
    listen = Address.parse(config.listen or f"unix:{paths.runtime}/imager.sock")
    token = read_token(config.token_file) if config.token_file else ""
    await asyncio.to_thread(private_dir, paths.cache)
    cache = await asyncio.to_thread(ImageCache, paths.cache / "images")
    store = ImageStore(cache, config.registry(env), config.limits())
    async with Jobs() as jobs:
        servicer = ImagerServicer(
            store,
            jobs,
            cache=paths.cache,
            environment=Wish(kernel=config.kernel, initramfs=config.initramfs),
            build_env=network_env(env),
        )
        async with serve(
            [listen],
            lambda server: imager_pb2_grpc.add_ImagerServiceServicer_to_server(servicer, server),
            [IMAGER],
            token=token,
        ) as bound:
            yield bound


async def _main(config: Config, paths: Paths) -> None:
    async with running(config, paths, os.environ) as addresses:
        log.info("listening on %s", ", ".join(str(address) for address in addresses))
        await until_signalled()
        log.info("stopping")


def main() -> None:
    """Run until SIGTERM or SIGINT; exits 2 if the set-up is wrong."""
    try:
        config = configuration.load(Config, "imager", sys.argv[1:], os.environ)
        logs.set_up("imager", config.log_level)
        asyncio.run(_main(config, Paths.from_env(os.environ)))
    except VoidboxError as error:
        print(f"voidbox-imager: {error.message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
