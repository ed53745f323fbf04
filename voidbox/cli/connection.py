"""From a command to a connected client: the address given, else the embedded stack."""

from __future__ import annotations

import asyncio
import contextlib
import os
from argparse import Namespace
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from services.common import config
from services.common.address import Address
from services.common.auth import read_token
from services.common.errors import Unavailable
from voidbox.cli.screen import Screen
from voidbox.client import Client
from voidbox.stack import lifecycle
from voidbox.stack.layout import Layout

# A remote stack that does not answer within this time is not there.
FIRST_ANSWER_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of the command line client."""

    address: str = config.setting("", "stack to use instead of the embedded one", env=("VOIDBOX_ADDRESS",))
    token_file: Path | None = config.setting(
        None, "file with the token of a stack on TCP", env=("VOIDBOX_TOKEN_FILE",)
    )
    output: str = config.setting("human", "format of what is printed: human or json")
    log_level: str = config.setting("warning", "least level of log records", env=("VOIDBOX_LOG_LEVEL",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What every command gets."""

    args: Namespace
    screen: Screen
    settings: Settings
    layout: Layout

    @property
    def remote(self) -> Address | None:
        """The address of the stack that the user names, if any."""
        text = self.args.address or self.settings.address
        return Address.parse(text) if text else None

    def stack(self) -> Stack:
        """The stack to use; the embedded one is started if it does not run.

        Blocks, and is to be called outside of an event loop: so Ctrl-C ends it.

        Raises:
            VoidboxError: the stack cannot be started, or its address or token is wrong.
        """
        address = self.remote
        if address is None:
            layout, _ = lifecycle.up(self.layout, os.environ, self.screen.note)
            return Stack(address=layout.address("orchestrator"))
        token = read_token(self.settings.token_file) if self.settings.token_file is not None else ""
        return Stack(address=address, token=token, remote=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Where a stack listens, and how it lets us in."""

    address: Address
    token: str = field(default="", repr=False)
    remote: bool = False

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[Client]:
        """A client of the stack.

        Raises:
            Unavailable: a remote stack does not answer (reason `STACK_UNREACHABLE`).
        """
        async with Client.open(self.address, self.token) as client:
            if self.remote:
                try:
                    async with asyncio.timeout(FIRST_ANSWER_SECONDS):
                        await client.status()
                except (TimeoutError, Unavailable) as error:
                    raise Unavailable(
                        f"no voidbox stack answers at {self.address}; "
                        "check the address (--address, VOIDBOX_ADDRESS)",
                        reason="STACK_UNREACHABLE",
                        address=self.address,
                    ) from error
            yield client
