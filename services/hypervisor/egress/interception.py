"""Who takes connections over, by what the gateway's configuration says; nobody if it says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.common.errors import VoidboxError
from services.hypervisor.egress.audit import AuditLog
from services.hypervisor.egress.flow import Interceptor


def load(settings: Mapping[str, Any], audit: AuditLog) -> Interceptor | None:
    """The interceptor of a box, made before the gateway gives up its rights: files are read here.

    Args:
        settings: `GatewayConfig.interception`, as `assembly.Interception.to_json` gives it.
        audit: Hears of what it does.

    Raises:
        ValueError: there is none for these settings.
    """
    if not settings:
        return None
    # Only here: TLS and HTTP are 15 MB that a gateway without interception does without.
    from services.hypervisor.egress.assembly import Interception, build

    try:
        return build(Interception.from_json(settings), audit)
    except (TypeError, VoidboxError) as error:
        raise ValueError(f"interception: {error}") from error
