"""Failures of the agent, and their way onto the wire.

A failure is a gRPC status with exactly one `google.rpc.ErrorInfo` (domain `voidbox`).
The three messages it takes are encoded by hand: two dozen lines instead of one more
generated module in every guest's memory.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

import grpc

_TYPE_URL = b"type.googleapis.com/google.rpc.ErrorInfo"
DETAILS_KEY = "grpc-status-details-bin"
_DETAIL_LIMIT = 2048  # trailing metadata is bounded to 8 KiB by gRPC

Code = grpc.StatusCode


class AgentError(Exception):
    """A failure with its status code, a stable reason and the place it concerns."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message[:_DETAIL_LIMIT]
        self.metadata = {key: str(value)[:_DETAIL_LIMIT] for key, value in metadata.items()}

    def trailing(self) -> tuple[tuple[str, bytes], ...]:
        """The trailing metadata that carries the details."""
        return ((DETAILS_KEY, encode_status(self.code.value[0], self.message, self.reason, self.metadata)),)


def invalid(message: str, reason: str = "INVALID_INPUT", **metadata: object) -> AgentError:
    """The caller's input is wrong whatever the state of the box."""
    return AgentError(Code.INVALID_ARGUMENT, reason, message, **metadata)


def not_found(message: str, reason: str = "NOT_FOUND", **metadata: object) -> AgentError:
    """The named thing does not exist."""
    return AgentError(Code.NOT_FOUND, reason, message, **metadata)


def wrong_state(message: str, reason: str = "WRONG_STATE", **metadata: object) -> AgentError:
    """The box is not in a state that allows this."""
    return AgentError(Code.FAILED_PRECONDITION, reason, message, **metadata)


def exhausted(message: str, reason: str = "EXHAUSTED", **metadata: object) -> AgentError:
    """Memory, disk or slots are used up."""
    return AgentError(Code.RESOURCE_EXHAUSTED, reason, message, **metadata)


def denied(message: str, reason: str = "DENIED", **metadata: object) -> AgentError:
    """The path is not for callers, or leaves its root."""
    return AgentError(Code.PERMISSION_DENIED, reason, message, **metadata)


def not_implemented(method: str) -> AgentError:
    """The surface is defined but this version does not have it."""
    return AgentError(
        Code.UNIMPLEMENTED, "NOT_IMPLEMENTED", f"{method} is not part of this version of the guest agent"
    )


_BY_ERRNO = {
    errno.ENOENT: (Code.NOT_FOUND, "NOT_FOUND"),
    errno.ENOTDIR: (Code.FAILED_PRECONDITION, "NOT_A_DIRECTORY"),
    errno.EISDIR: (Code.FAILED_PRECONDITION, "IS_A_DIRECTORY"),
    errno.EEXIST: (Code.ALREADY_EXISTS, "ALREADY_EXISTS"),
    errno.ENOTEMPTY: (Code.FAILED_PRECONDITION, "NOT_EMPTY"),
    errno.EACCES: (Code.PERMISSION_DENIED, "DENIED"),
    errno.EPERM: (Code.PERMISSION_DENIED, "DENIED"),
    errno.EROFS: (Code.FAILED_PRECONDITION, "READ_ONLY"),
    errno.ELOOP: (Code.PERMISSION_DENIED, "UNSAFE_LINK"),
    errno.EXDEV: (Code.PERMISSION_DENIED, "ESCAPES_ROOT"),
    errno.ENOSPC: (Code.RESOURCE_EXHAUSTED, "DISK_FULL"),
    errno.EDQUOT: (Code.RESOURCE_EXHAUSTED, "DISK_FULL"),
    errno.ENOMEM: (Code.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY"),
    errno.EMFILE: (Code.RESOURCE_EXHAUSTED, "TOO_MANY_FILES"),
    errno.ENFILE: (Code.RESOURCE_EXHAUSTED, "TOO_MANY_FILES"),
    errno.EFBIG: (Code.RESOURCE_EXHAUSTED, "FILE_TOO_LARGE"),
    errno.ENAMETOOLONG: (Code.INVALID_ARGUMENT, "NAME_TOO_LONG"),
    errno.EBUSY: (Code.FAILED_PRECONDITION, "BUSY"),
}


def from_os_error(error: OSError, path: str) -> AgentError:
    """The failure of a file call on `path`, as its caller knows it."""
    code, reason = _BY_ERRNO.get(error.errno or 0, (Code.INTERNAL, "IO_ERROR"))
    text = error.strerror or str(error)
    return AgentError(
        code, reason, f"{path}: {text}", path=path, errno=errno.errorcode.get(error.errno or 0, "?")
    )


def encode_status(code: int, message: str, reason: str, metadata: Mapping[str, str]) -> bytes:
    """A serialized google.rpc.Status with one ErrorInfo."""
    info = _field(1, reason.encode()) + _field(2, b"voidbox")
    for key, value in sorted(metadata.items()):
        info += _field(3, _field(1, key.encode()) + _field(2, value.encode(errors="replace")))
    detail = _field(1, _TYPE_URL) + _field(2, info)
    return b"\x08" + _varint(code) + _field(2, message.encode(errors="replace")) + _field(3, detail)


def _field(number: int, data: bytes) -> bytes:
    return bytes((number << 3 | 2,)) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
