"""Every error class crosses the wire: status and ErrorInfo out, the same class back in."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from services.common import errors
from services.common.errors import STATUS_DETAILS_KEY, VoidboxError, from_rpc_error, to_status

CLASSES = sorted(errors._BY_CODE.values(), key=lambda cls: cls.__name__)


def received(error: VoidboxError) -> VoidboxError:
    code, details, trailing = to_status(error)
    return from_rpc_error(
        grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)
    )


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_comes_back_as_it_was_raised(cls: type[VoidboxError]) -> None:
    error = received(cls("the disk is full: /var", reason="DISK_FULL", path="/var", free_bytes=0))
    assert type(error) is cls
    assert error.message == "the disk is full: /var"
    assert error.reason == "DISK_FULL"
    assert error.metadata == {"path": "/var", "free_bytes": "0"}


def test_no_two_classes_share_a_status_code() -> None:
    leaves = list(VoidboxError.__subclasses__())
    assert len({cls.code for cls in leaves}) == len(leaves) == len(CLASSES)


def test_a_status_carries_exactly_one_error_info() -> None:
    _, _, trailing = to_status(errors.NotFound("no box b", box="b"))
    ((key, value),) = trailing
    status = status_pb2.Status.FromString(value)
    info = error_details_pb2.ErrorInfo()
    assert key == STATUS_DETAILS_KEY
    assert len(status.details) == 1
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason, dict(info.metadata)) == ("voidbox", "NOT_FOUND", {"box": "b"})


def test_a_status_of_a_foreign_server_becomes_an_error_too() -> None:
    error = from_rpc_error(
        grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "refused")
    )
    assert type(error) is errors.Unavailable
    assert error.message == "refused"


def test_metadata_named_like_a_parameter_does_not_break_the_receiver() -> None:
    error = errors.Internal("broken")
    error.metadata = {"message": "x", "reason": "y", "box": "b"}
    assert received(error).metadata == {"box": "b"}


def test_garbage_in_the_details_does_not_hide_the_error() -> None:
    trailing = grpc.aio.Metadata((STATUS_DETAILS_KEY, b"\xff\xff\xff"))
    error = from_rpc_error(
        grpc.aio.AioRpcError(grpc.StatusCode.NOT_FOUND, grpc.aio.Metadata(), trailing, "no such thing")
    )
    assert type(error) is errors.NotFound
    assert error.message == "no such thing"
