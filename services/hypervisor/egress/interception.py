"""Who takes connections over, by what the gateway's configuration says; nobody if it says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.hypervisor.egress.audit import AuditLog
from services.hypervisor.egress.flow import Interceptor


def load(settings: Mapping[str, Any], audit: AuditLog) -> Interceptor | None:
    """The interceptor of a box, made before the gateway gives up its rights: files are read here.

    Args:
        settings: `GatewayConfig.interception`.
        audit: Hears of what it does.

    Raises:
        ValueError: there is none for these settings.
    """
    del audit
    if settings:
        raise ValueError(f"interception: nothing takes connections over for {', '.join(sorted(settings))}")
    return None
