"""Asynchronous stubs with their types.

The generated stub classes serve both kinds of channels, but their annotations know only the
blocking one; the asynchronous annotations are classes that exist for type checkers alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from voidbox.guest.v1 import guest_pb2_grpc
from voidbox.hypervisor.v1 import hypervisor_pb2_grpc
from voidbox.imager.v1 import imager_pb2_grpc
from voidbox.orchestrator.v1 import orchestrator_pb2_grpc

if TYPE_CHECKING:
    import grpc


def guest(channel: grpc.aio.Channel) -> guest_pb2_grpc.GuestServiceAsyncStub:
    """The stub of the guest agent; calls name their box in metadata `voidbox-box-id`."""
    return cast("guest_pb2_grpc.GuestServiceAsyncStub", guest_pb2_grpc.GuestServiceStub(channel))


def hypervisor(channel: grpc.aio.Channel) -> hypervisor_pb2_grpc.HypervisorServiceAsyncStub:
    """The stub of the hypervisor."""
    return cast(
        "hypervisor_pb2_grpc.HypervisorServiceAsyncStub", hypervisor_pb2_grpc.HypervisorServiceStub(channel)
    )


def imager(channel: grpc.aio.Channel) -> imager_pb2_grpc.ImagerServiceAsyncStub:
    """The stub of the imager."""
    return cast("imager_pb2_grpc.ImagerServiceAsyncStub", imager_pb2_grpc.ImagerServiceStub(channel))


def orchestrator(channel: grpc.aio.Channel) -> orchestrator_pb2_grpc.OrchestratorServiceAsyncStub:
    """The stub of the orchestrator."""
    return cast(
        "orchestrator_pb2_grpc.OrchestratorServiceAsyncStub",
        orchestrator_pb2_grpc.OrchestratorServiceStub(channel),
    )
