"""`python -m services.hypervisor`: the hypervisor as a process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # before grpc is imported: children are spawned

from services.common import config as configuration
from services.common import logging as logs
from services.common.address import Address
from services.common.auth import read_token
from services.common.errors import InvalidInput, VoidboxError
from services.common.paths import Paths
from services.common.server import serve, until_signalled
from services.common.supervision import supervised
from services.hypervisor.admission import Host
from services.hypervisor.config import Config
from services.hypervisor.egress.settings import gateway_settings
from services.hypervisor.identities import Identities
from services.hypervisor.launcher import DriverFactory
from services.hypervisor.layout import Layout
from services.hypervisor.pool import Bounds
from services.hypervisor.probe import Prober
from services.hypervisor.qemu import QemuDriver
from services.hypervisor.registry import Registry
from services.hypervisor.routing import GUEST_SERVICE, BoxForwarder
from services.hypervisor.servicer import HypervisorServicer
from voidbox.hypervisor.v1 import hypervisor_pb2, hypervisor_pb2_grpc

log = logging.getLogger(__name__)

ROOMY_CPUS, ROOMY_MIB = 4, 8192
HYPERVISOR = hypervisor_pb2.DESCRIPTOR.services_by_name["HypervisorService"].full_name


@contextlib.asynccontextmanager
async def running(
    config: Config, paths: Paths, *, driver: DriverFactory = QemuDriver
) -> AsyncIterator[list[Address]]:
    """The hypervisor while the block runs; yields the addresses that it listens on.

    Boxes go on when the block ends.

    Raises:
        InvalidInput: a setting that cannot be.
        WrongState: another hypervisor owns the boxes, or the address is in use.
    """
    if not 0.1 <= config.memory_overcommit <= 100:
        raise InvalidInput("memory_overcommit must be 0.1 to 100", reason="BAD_CONFIG")
    if not 0 <= config.parallel_starts <= 1000:
        raise InvalidInput("parallel_starts must be 0 to 1000", reason="BAD_CONFIG")
    if config.snapshots_mib < 0:
        raise InvalidInput("snapshots_mib must not be negative", reason="BAD_CONFIG")
    if config.changes_mib < 1 or config.kept_changes_mib < 0:
        raise InvalidInput("changes_mib must be positive, kept_changes_mib not negative", reason="BAD_CONFIG")
    listen = Address.parse(config.listen or f"unix:{paths.runtime}/hypervisor.sock")
    token = read_token(config.token_file) if config.token_file else ""
    identities = Identities.for_service(config.machine_uid, config.machine_uids)
    layout = Layout(paths.state)
    with layout.locked():
        prober = Prober(
            layout.probes, identities.of(0), system=config.qemu, image=config.qemu_img, tun=config.tun_device
        )
        async with Registry(
            layout,
            prober,
            identities,
            memory_overcommit=config.memory_overcommit,
            parallel_starts=config.parallel_starts or max(2, len(os.sched_getaffinity(0))),
            pool=pool_bounds(config, Host.measure()),
            ready=config.ready_size,
            templates=config.templates,
            snapshots_mib=config.snapshots_mib,
            changes_mib=config.changes_mib,
            kept_changes_mib=config.kept_changes_mib,
            gateway=gateway_settings(config),
            driver=driver,
        ) as registry:
            servicer = HypervisorServicer(registry, prober)
            async with serve(
                [listen],
                lambda server: hypervisor_pb2_grpc.add_HypervisorServiceServicer_to_server(servicer, server),
                [HYPERVISOR],
                handlers=[BoxForwarder(registry)],
                forwarded=[GUEST_SERVICE],
                token=token,
            ) as bound:
                yield bound


def pool_bounds(config: Config, host: Host) -> Bounds:
    """What the warm pool may take.

    Raises:
        InvalidInput: a setting that cannot be.
    """
    if not -1 <= config.pool_size <= 64:
        raise InvalidInput("pool_size must be -1 to 64", reason="BAD_CONFIG")
    if not 0 <= config.ready_size <= 64:
        raise InvalidInput("ready_size must be 0 to 64", reason="BAD_CONFIG")
    if not 1 <= config.pool_idle_seconds <= 86400 or not config.pool_memory_mib >= 0:
        raise InvalidInput(
            "pool_idle_seconds must be 1 to 86400, pool_memory_mib not negative", reason="BAD_CONFIG"
        )
    # Filling it costs a second of a processor each time, which a small host rather gives to its boxes.
    roomy = host.cpus >= ROOMY_CPUS and host.memory_mib >= ROOMY_MIB
    return Bounds(
        size=int(roomy) if config.pool_size < 0 else config.pool_size,
        idle_seconds=config.pool_idle_seconds,
        memory_mib=config.pool_memory_mib or host.memory_mib // 8,
    )


async def _main(config: Config, paths: Paths) -> None:
    async with running(config, paths) as addresses:
        log.info("listening on %s", ", ".join(str(address) for address in addresses))
        with supervised():
            await until_signalled()
        log.info("stopping; boxes go on")


def main() -> None:
    """Run until SIGTERM or SIGINT; exits 2 if the set-up is wrong."""
    try:
        config = configuration.load(Config, "hypervisor", sys.argv[1:], os.environ)
        logs.set_up("hypervisor", config.log_level)
        asyncio.run(_main(config, Paths.from_env(os.environ)))
    except VoidboxError as error:
        print(f"voidbox-hypervisor: {error.message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
