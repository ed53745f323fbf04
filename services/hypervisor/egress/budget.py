"""What a box may use of the models that it asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Action = Literal["stop", "pause"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a box may use; 0 means no limit.

    Attributes:
        requests: Requests to metered hosts.
        tokens: Tokens of all kinds together.
        usd: Cost by the table of prices, or as the provider says.
        action: Whether a request over budget is refused, or waits until there is more.
    """

    requests: int = 0
    tokens: int = 0
    usd: float = 0.0
    action: Action = "stop"
