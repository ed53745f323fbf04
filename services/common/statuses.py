"""Keep the status of a call whose server ends it while the client is still writing.

When a write meets the end of the call, `grpc.aio` gives the call the status INTERNAL
"Internal error from Core" at once, although the server's own status is already on its way, and
drops that. Up to a tenth of the calls that a server refuses while they are being written lose
their code and details this way (grpcio 1.71 to 1.85). A failed write here waits for the server's
status instead, as it does in every other gRPC library.
"""

from __future__ import annotations

from typing import Any

from grpc.aio import _call

_MIXIN: Any = getattr(_call, "_StreamRequestMixin", None)


class _Patient:
    """The call below a `grpc.aio` call, which lets only the server say how it ended."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def set_internal_error(self, details: str) -> None:
        """Do nothing: a send operation fails only when the call has ended, so its status follows."""


def keep_statuses() -> None:
    """Make all streams of this process keep their server's status; does so once.

    Raises:
        RuntimeError: this grpcio is built otherwise; look whether it still needs this.
    """
    if _MIXIN is None or not hasattr(_MIXIN, "_write"):
        raise RuntimeError("grpc.aio has changed; check whether services/common/statuses.py is still needed")
    original = _MIXIN._write
    if getattr(original, "keeps_status", False):
        return

    async def write(self: Any, request: object) -> None:
        if not isinstance(self._cython_call, _Patient):
            self._cython_call = _Patient(self._cython_call)
        await original(self, request)

    write.keeps_status = True  # type: ignore[attr-defined]
    _MIXIN._write = write
