"""A box's own attempt to renew a token is answered here, with a placeholder; nobody else is asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import parse_qsl

from services.hypervisor.egress.message import HttpError, Request, Response, get, plain_response
from services.hypervisor.egress.rules import TokenEndpoint

_MAX_BODY: Final = 64 << 10
# So that programs do not come back soon; it means nothing.
_LIFETIME: Final = 8 * 3600


class TokenEndpoints:
    """Answers in the stead of token endpoints.

    Args:
        endpoints: Where, and with what placeholder.
    """

    def __init__(self, endpoints: Sequence[TokenEndpoint]) -> None:
        self._endpoints = tuple(endpoints)

    def wants(self, host: str) -> bool:
        """Whether one of them is at `host`."""
        return any(endpoint.host == host for endpoint in self._endpoints)

    async def answer(self, request: Request, host: str, port: int) -> Response | None:
        """A placeholder for a renewal; everything else at an endpoint is refused.

        Raises:
            HttpError: a box must not log in or out in the host's name.
        """
        path = request.target.partition("?")[0].rstrip("/")
        found = next((one for one in self._endpoints if (one.host, one.path) == (host, path)), None)
        if found is None:
            return None
        body = b""
        async for chunk in request.body:
            body += chunk
            if len(body) > _MAX_BODY:
                raise HttpError(413, "no token request is that long", reason="TOKEN_ENDPOINT")
        if request.method != "POST" or _fields(request, body).get("grant_type") != "refresh_token":
            raise HttpError(
                403, "this login belongs to the host; log in there, not in the box", reason="TOKEN_ENDPOINT"
            )
        answer: dict[str, Any] = {
            "access_token": found.placeholder,
            "refresh_token": found.refresh_placeholder,
            "token_type": "Bearer",
            "expires_in": _LIFETIME,
        }
        if found.id_placeholder:
            answer["id_token"] = found.id_placeholder
        return plain_response(200, json.dumps(answer), kind=b"application/json")


def _fields(request: Request, body: bytes) -> dict[str, Any]:
    kind = (get(request.headers, b"content-type") or b"").lower()
    if b"json" not in kind:
        return dict(parse_qsl(body.decode("latin-1")))
    try:
        fields = json.loads(body)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}
