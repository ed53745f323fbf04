"""What every call of the guest's service goes through: who may call, and how it fails."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from _operator import _compare_digest as compare_digest  # hmac's own, without hashlib's megabytes
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from guest import log
from guest.errors import AgentError, Code, wrong_state

SECRET_KEY = "voidbox-secret-bin"  # noqa: S105 - the name of the metadata key
CHUNK_LIMIT = 65536
_FIRST_MESSAGE = 0.5  # seconds
_DRAIN = 5.0  # seconds; a client that uploads on and on is cut off then


_Method = TypeVar("_Method", bound=Callable[..., Awaitable[Any]])


class Gate:
    """Knows the claimed secret and who may call what."""

    def __init__(self) -> None:
        self.secret = b""

    @property
    def claimed(self) -> bool:
        """Whether the box has an identity."""
        return bool(self.secret)

    def check(self, metadata: Any, *, before_claim: bool) -> None:
        """Let the call pass or fail it.

        Raises:
            AgentError: FAILED_PRECONDITION before the claim, UNAUTHENTICATED after it.
        """
        if not self.secret:
            if before_claim:
                return
            raise wrong_state("the box has not been claimed; the first call is Claim", reason="UNCLAIMED")
        if not self.matches(metadata):
            raise AgentError(
                Code.UNAUTHENTICATED,
                "BAD_SECRET",
                f"metadata {SECRET_KEY} is missing or not the claimed secret",
            )

    def matches(self, metadata: Any) -> bool:
        """Whether the metadata carry the secret in force."""
        given = [value for key, value in metadata or () if key == SECRET_KEY]
        return len(given) == 1 and isinstance(given[0], bytes) and compare_digest(given[0], self.secret)


def call(
    *, before_claim: bool = False, always: bool = False, drain: bool = False
) -> Callable[[_Method], _Method]:
    """Decorate a method of the servicer: check the caller, map every failure to a status.

    Args:
        before_claim: Whether the call is answered while the box has no identity.
        always: Whether the caller is not checked here at all.
        drain: Whether what the client still sends is taken before the call is failed.
    """

    def decorate(method: _Method) -> _Method:
        @functools.wraps(method)
        async def answer(self: Any, request: Any, context: Any) -> Any:
            try:
                if not always:
                    try:
                        self.gate.check(context.invocation_metadata(), before_claim=before_claim)
                    except AgentError:
                        await _take(request, 1, _FIRST_MESSAGE)
                        raise
                return await method(self, request, context)
            except AgentError as error:
                failure = error
            except OSError as error:
                log.error(f"{method.__name__}: {error!r}")
                failure = AgentError(Code.INTERNAL, "IO_ERROR", f"{method.__name__}: {error}")
            except MemoryError:
                failure = AgentError(
                    Code.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "the guest agent is out of memory"
                )
            if drain:
                await _take(request, None, _DRAIN)
            await context.abort(failure.code, failure.message, failure.trailing())
            return None

        return answer  # type: ignore[return-value]

    return decorate


async def _take(request: Any, count: int | None, seconds: float) -> None:
    """Take `count` messages of a stream, or all, before its call is failed.

    A client of grpc.aio whose write meets the end of the call half-way reports INTERNAL
    instead of the reason it was given.
    """
    if not hasattr(request, "__aiter__"):
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            async for _ in request:
                if count is not None and (count := count - 1) <= 0:
                    return
