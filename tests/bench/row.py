"""One line of the benchmarks' table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure: medians in `unit`, of `what` and of its floor or of the peer that it is held against.

    Attributes:
        limit: The largest `value` that the project allows itself.
        most: The largest `value / floor`.
        least: The smallest `value / floor`, where `what` is the peer and the floor is ours.
    """

    what: str
    value: float
    floor_name: str
    floor: float
    unit: str
    limit: float | None = None
    most: float | None = None
    least: float | None = None

    @property
    def ratio(self) -> float:
        """`value` in units of the floor."""
        return self.value / self.floor

    @property
    def goal(self) -> str:
        """The limits as text."""
        parts = []
        if self.limit is not None:
            parts.append(f"{self.limit:g} {self.unit}")
        if self.most is not None:
            parts.append(f"ratio at most {self.most:g}")
        if self.least is not None:
            parts.append(f"ratio at least {self.least:g}")
        return ", ".join(parts)

    @property
    def missed(self) -> bool:
        """Whether a limit is passed."""
        return (
            (self.limit is not None and self.value > self.limit)
            or (self.most is not None and self.ratio > self.most)
            or (self.least is not None and self.ratio < self.least)
        )
