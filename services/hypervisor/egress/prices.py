"""What a model's tokens cost: a table of list prices, replaceable by the operator's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from services.common.errors import InvalidInput
from services.hypervisor.egress.usage import Usage

_KINDS = ("input", "output", "cache_read", "cache_write")


class Prices:
    """Prices by the beginning of a model's name, USD for a million tokens."""

    def __init__(self, models: Mapping[str, Mapping[str, float]]) -> None:
        self._models = {name: dict(prices) for name, prices in models.items()}

    @classmethod
    def load(cls, path: Path | None = None) -> Prices:
        """The table that comes with voidbox, or a file of the same form.

        Raises:
            InvalidInput: the file is not one.
        """
        data = (
            (resources.files(__package__) / "data/prices.json").read_bytes()
            if path is None
            else path.read_bytes()
        )
        try:
            return cls.parse(json.loads(data)["models"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{path} is no table of prices: {error}", path=path) from error

    @classmethod
    def parse(cls, models: Mapping[str, Mapping[str, Any]]) -> Prices:
        """A checked table.

        Raises:
            ValueError: a price is none.
        """
        for name, prices in models.items():
            for kind, price in prices.items():
                if kind not in _KINDS or not isinstance(price, int | float) or price < 0:
                    raise ValueError(f"{name}: {kind} {price!r}")
            if not {"input", "output"} <= set(prices):
                raise ValueError(f"{name}: input and output are needed")
        return cls(models)

    def to_json(self) -> dict[str, dict[str, float]]:
        """The table, for `parse`."""
        return self._models

    def known(self, model: str) -> bool:
        """Whether there is a price for `model`."""
        return self._find(model) is not None

    def cost(self, model: str, usage: Usage) -> float:
        """USD; 0 for an unknown model."""
        prices = self._find(model)
        if prices is None:
            return 0.0
        # A cache that has no price of its own costs as much as reading anew.
        cost = sum(getattr(usage, kind) * prices.get(kind, prices["input"]) for kind in _KINDS)
        return float(cost) / 1e6

    def _find(self, model: str) -> Mapping[str, float] | None:
        name = model.rpartition("/")[2].lower()
        names = [known for known in self._models if name.startswith(known)]
        return self._models[max(names, key=len)] if names else None
