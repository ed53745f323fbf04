"""`GuestService`, put together from its three groups of calls."""

from __future__ import annotations

import asyncio

from guest.exec_service import ExecCalls
from guest.file_service import FileCalls
from guest.guest_state import Guest
from guest.machine_service import MachineCalls
from guest.mounts import Mounts
from guest.rpc import Gate


class GuestServicer(ExecCalls, FileCalls, MachineCalls):
    """All calls of the service.

    Args:
        gate: Who may call.
        guest: The box.
        stopping: Set once the box is ready to be switched off.
    """

    def __init__(self, gate: Gate, guest: Guest, stopping: asyncio.Event) -> None:
        self.gate = gate
        self.guest = guest
        self.stopping = stopping
        self.claiming = asyncio.Lock()
        self.mounts = Mounts(guest.settings)
