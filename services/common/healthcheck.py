"""Ask a service for its health: `python -m services.common.healthcheck ADDRESS`.

Exits 0 if the service answers SERVING over the standard gRPC health protocol, else 1 with
one line on stderr. Container health checks use it; any gRPC health client does as well.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.address import Address
from services.common.auth import read_token
from services.common.channel import open_channel
from services.common.errors import Unavailable, VoidboxError, from_rpc_error

# A local answer takes milliseconds; a loaded two-core machine under emulation, a second or two.
TIMEOUT_SECONDS = 4.0


async def check(address: Address, *, service: str = "", token: str = "", seconds: float) -> None:
    """Return if `service` (empty: the server as a whole) says SERVING within `seconds`.

    Raises:
        VoidboxError: it does not answer, refuses the call, or says anything else.
    """
    async with open_channel(address, token=token) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its type stubs know only the synchronous one
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            answer = await stub.Check(request, timeout=seconds)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        raise Unavailable(f"it answers {name}", reason="NOT_SERVING")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m services.common.healthcheck", description=__doc__)
    parser.add_argument("address", help="unix:/path or tcp://host:port")
    parser.add_argument("--service", default="", help="full name of a gRPC service (default: the server)")
    parser.add_argument("--token-file", type=Path, help="what a TCP address asks for")
    parser.add_argument("--seconds", type=float, default=TIMEOUT_SECONDS, help="time limit")
    options = parser.parse_args(argv)
    try:
        address = Address.parse(options.address)
        token = read_token(options.token_file) if options.token_file else ""
        asyncio.run(check(address, service=options.service, token=token, seconds=options.seconds))
    except VoidboxError as error:
        print(f"{options.address}: unhealthy: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
