"""The one exception tree, and its mapping to and from gRPC status.

Every failure that leaves a service is a `VoidboxError`; on the wire it is a status
with exactly one `google.rpc.ErrorInfo` (domain `voidbox`), whose `reason` names the
condition and whose `metadata` names the place. A workload's exit code is data, never
an error.
"""

from __future__ import annotations

import contextlib
from typing import ClassVar, NoReturn

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "voidbox"
STATUS_DETAILS_KEY = "grpc-status-details-bin"


class VoidboxError(Exception):
    """A failure with a stable reason, a message that names the cure, and its place.

    Args:
        message: What is wrong and what to do about it, in one or two sentences.
        reason: UPPER_SNAKE_CASE, stable across releases; the class default if empty.
        metadata: Names the place: file, line, box, image, path.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, reason: str = "", **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = {key: str(value) for key, value in metadata.items()}


class InvalidInput(VoidboxError):
    """The caller's input is wrong whatever the state of the system."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_INPUT"


class NotFound(VoidboxError):
    """The named thing does not exist."""

    code = grpc.StatusCode.NOT_FOUND
    default_reason = "NOT_FOUND"


class AlreadyExists(VoidboxError):
    """The id is taken by something else."""

    code = grpc.StatusCode.ALREADY_EXISTS
    default_reason = "ALREADY_EXISTS"


class WrongState(VoidboxError):
    """The system is not in a state that allows this; retrying alone will not help."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "WRONG_STATE"


class Exhausted(VoidboxError):
    """Memory, disk, slots or a quota is used up."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "EXHAUSTED"


class OffsetLost(VoidboxError):
    """A stream offset is no longer kept, or does not exist yet."""

    code = grpc.StatusCode.OUT_OF_RANGE
    default_reason = "OFFSET_LOST"


class Unauthenticated(VoidboxError):
    """The token or the claimed secret is missing or wrong."""

    code = grpc.StatusCode.UNAUTHENTICATED
    default_reason = "UNAUTHENTICATED"


class Denied(VoidboxError):
    """The caller is known and not allowed, or a path escapes its root."""

    code = grpc.StatusCode.PERMISSION_DENIED
    default_reason = "DENIED"


class Unavailable(VoidboxError):
    """A peer is not reachable now; retrying may help."""

    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "UNAVAILABLE"


class TimedOut(VoidboxError):
    """A named time limit passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "TIMED_OUT"


class Cancelled(VoidboxError):
    """The caller cancelled."""

    code = grpc.StatusCode.CANCELLED
    default_reason = "CANCELLED"


class Conflict(VoidboxError):
    """A concurrent change won; read again and retry."""

    code = grpc.StatusCode.ABORTED
    default_reason = "CONFLICT"


class Corrupt(VoidboxError):
    """Stored or received content does not match its digest or format."""

    code = grpc.StatusCode.DATA_LOSS
    default_reason = "CORRUPT"


class NotBuilt(VoidboxError):
    """The surface is defined but this version does not implement it."""

    code = grpc.StatusCode.UNIMPLEMENTED
    default_reason = "NOT_IMPLEMENTED"


class Internal(VoidboxError):
    """A defect in voidbox."""


_BY_CODE: dict[grpc.StatusCode, type[VoidboxError]] = {
    cls.code: cls
    for cls in (
        InvalidInput, NotFound, AlreadyExists, WrongState, Exhausted, OffsetLost, Unauthenticated, Denied,
        Unavailable, TimedOut, Cancelled, Conflict, Corrupt, NotBuilt, Internal,
    )
}  # fmt: skip


def to_status(error: VoidboxError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """The code, details and trailing metadata that carry `error` over the wire."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    detail = any_pb2.Any()
    detail.Pack(info)
    code_number: int = error.code.value[0]
    status = status_pb2.Status(code=code_number, message=error.message, details=[detail])
    return error.code, error.message, ((STATUS_DETAILS_KEY, status.SerializeToString()),)


async def abort(context: grpc.aio.ServicerContext, error: VoidboxError) -> NoReturn:  # type: ignore[type-arg]
    """End an RPC with `error`.

    `context.abort` rather than `abort_with_status`: the latter hides the error from
    OpenTelemetry's interceptor.
    """
    code, details, trailing = to_status(error)
    await context.abort(code, details, trailing)
    raise AssertionError("abort returned")


def from_rpc_error(error: grpc.RpcError) -> VoidboxError:
    """The exception that the peer raised, rebuilt from its status."""
    call = error if isinstance(error, grpc.aio.AioRpcError) else None
    code = call.code() if call else grpc.StatusCode.UNKNOWN
    details = (call.details() if call else str(error)) or code.name
    reason, metadata = "", {}
    for key, value in (call.trailing_metadata() or ()) if call else ():
        if key != STATUS_DETAILS_KEY or not isinstance(value, bytes):
            continue
        # A hostile or foreign peer may send anything here; its code and text still count.
        with contextlib.suppress(DecodeError):
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    reason, metadata = info.reason, dict(info.metadata)
    metadata = {key: value for key, value in metadata.items() if key not in ("message", "reason")}
    return _BY_CODE.get(code, Internal)(details, reason=reason, **metadata)
