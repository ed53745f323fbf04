"""`python -m services.orchestrator`: the orchestrator as a process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys

import grpc

from services.common import config as configuration
from services.common import logging as logs
from services.common.address import Address
from services.common.auth import read_token
from services.common.channel import open_channel
from services.common.errors import VoidboxError
from services.common.forward import Forwarder, Metadata, Target
from services.common.paths import Paths
from services.common.server import serve, until_signalled
from services.common.supervision import supervised
from services.orchestrator.blobs import Blobs
from services.orchestrator.config import Config
from services.orchestrator.context import Limits
from services.orchestrator.peers import PATIENCE_SECONDS, Peers
from services.orchestrator.service import Orchestrator
from services.orchestrator.servicer import Servicer
from services.orchestrator.store import Store
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2
from voidbox.imager.v1 import imager_pb2
from voidbox.orchestrator.v1 import orchestrator_pb2, orchestrator_pb2_grpc

log = logging.getLogger(__name__)

ORCHESTRATOR = orchestrator_pb2.DESCRIPTOR.services_by_name["OrchestratorService"].full_name
GUEST = guest_pb2.DESCRIPTOR.services_by_name["GuestService"].full_name
HYPERVISOR = hypervisor_pb2.DESCRIPTOR.services_by_name["HypervisorService"].full_name
IMAGER = imager_pb2.DESCRIPTOR.services_by_name["ImagerService"].full_name


@contextlib.asynccontextmanager
async def running(config: Config, paths: Paths):  # type: ignore[no-untyped-def]
    """The orchestrator while the block runs; yields the addresses that it listens on."""
    listen = Address.parse(config.listen or f"unix:{paths.runtime}/orchestrator.sock")
    hypervisor = Address.parse(config.hypervisor or f"unix:{paths.runtime}/hypervisor.sock")
    imager = Address.parse(config.imager or f"unix:{paths.runtime}/imager.sock")
    token = read_token(config.token_file) if config.token_file else ""
    peer_token = read_token(config.peer_token_file) if config.peer_token_file else ""
    directory = paths.state / "orchestrator"
    limits = Limits(
        event_bytes=config.max_event_mib << 20,
        stream_bytes=config.max_stream_mib << 20,
        artifact_bytes=config.max_artifact_mib << 20,
    )
    async with contextlib.AsyncExitStack() as stack:
        to_hypervisor = await stack.enter_async_context(open_channel(hypervisor, token=peer_token))
        to_imager = await stack.enter_async_context(open_channel(imager, token=peer_token))
        addresses = {"hypervisor": str(hypervisor), "imager": str(imager)}
        peers = Peers(to_hypervisor, to_imager, addresses, PATIENCE_SECONDS)
        store = await asyncio.to_thread(Store, directory)
        orchestrator = await stack.enter_async_context(
            Orchestrator(
                store,
                Blobs(directory / "blobs"),
                peers,
                limits,
                directory / "scratch",
                config.max_parallel_boxes,
            )
        )
        bound = await stack.enter_async_context(
            serve(
                [listen],
                lambda server: orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(
                    Servicer(orchestrator), server
                ),
                [ORCHESTRATOR],
                handlers=[forward_to(to_hypervisor, GUEST, HYPERVISOR), forward_to(to_imager, IMAGER)],
                forwarded=[GUEST, HYPERVISOR, IMAGER],
                token=token,
            )
        )
        yield bound


def forward_to(channel: grpc.aio.Channel, *services: str) -> Forwarder:
    """A handler that passes all calls of `services` on to `channel`."""

    async def resolve(_method: str, _metadata: Metadata) -> Target:
        return Target(channel=channel)

    return Forwarder(services, resolve)


async def _main(config: Config, paths: Paths) -> None:
    async with running(config, paths) as addresses:
        log.info("listening on %s", ", ".join(str(address) for address in addresses))
        with supervised():
            await until_signalled()
        log.info("stopping")


def main() -> None:
    """Run until SIGTERM or SIGINT; exits 2 if the set-up is wrong."""
    try:
        config = configuration.load(Config, "orchestrator", sys.argv[1:], os.environ)
        logs.set_up("orchestrator", config.log_level)
        asyncio.run(_main(config, Paths.from_env(os.environ)))
    except VoidboxError as error:
        print(f"voidbox-orchestrator: {error.message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
