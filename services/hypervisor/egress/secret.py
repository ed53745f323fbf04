"""A credential's value, on its way from who owns it to the request that needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """A credential as it is now.

    Attributes:
        value: The credential.
        headers: More headers that go with it, such as an account's id.
        renewable: Whether asking again may give another, when a server has refused this one.
    """

    value: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    renewable: bool = False


class CredentialSource(Protocol):
    """Gives the credentials of one box's rules, and no others."""

    async def get(self, rule: str, host: str, rejected: str = "") -> Secret:
        """The credential of `rule` for a request to `host`.

        Args:
            rejected: A value that the server has just refused; it is not given again.

        Raises:
            VoidboxError: there is none, with the cure.
        """
        ...
