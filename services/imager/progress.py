"""How far a long piece of work is, as the imager reports it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One report.

    Attributes:
        subject: What is worked on: a layer's digest, a package set, a step.
        action: What is done to it: "download", "convert", "compile".
        done: Units done.
        total: Units in all; 0 if not known.
        unit: "bytes", "files" or "steps".
    """

    subject: str
    action: str
    done: int = 0
    total: int = 0
    unit: str = "steps"


Report = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """A `Report` that tells nobody."""
