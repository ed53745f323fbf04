"""Who the machines run as: nobody's user, and no two machines the same one.

Two processes of one user may read each other's memory, so a machine that was broken out of must
not be the user of another. An unprivileged service has only its own user to give.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import InvalidInput
from services.hypervisor.inputs import Identity

# Above all that systemd gives out (https://systemd.io/UIDS-GIDS, "Summary"), below 2**31.
FIRST_MACHINE_UID = 1_879_048_192
MACHINE_UIDS = 65536
NOBODY = 65534


@dataclass(frozen=True, slots=True)
class Identities:
    """The users `first` to `first + count - 1`, each with the group of the same number."""

    first: int
    count: int

    @classmethod
    def for_service(cls, first: int, count: int, uid_map: Path = Path("/proc/self/uid_map")) -> Identities:
        """What this process can give: the users asked for if it is root, else its own.

        In a user namespace that lacks them, all machines are `nobody`.

        Raises:
            InvalidInput: there are no such users.
        """
        if os.geteuid() != 0:
            return cls(os.geteuid(), 1)
        if not 0 <= first < first + count < 1 << 32 or count < 1:
            raise InvalidInput(
                f"machine_uid {first} and machine_uids {count}: there are no such users", reason="BAD_CONFIG"
            )
        for line in uid_map.read_text().splitlines():
            start, _, length = map(int, line.split())
            if start <= first and first + count <= start + length:
                return cls(first, count)
        return cls(NOBODY, 1)

    def slot(self, cid: int) -> int:
        """Which of the users the machine with this CID is; two that run at once must differ."""
        return cid % self.count

    def of(self, cid: int) -> Identity:
        """The user and group of the machine with this CID."""
        if os.geteuid() != 0:
            return Identity(os.geteuid(), os.getegid())
        number = self.first + self.slot(cid)
        return Identity(number, number)
