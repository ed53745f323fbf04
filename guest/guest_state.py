"""The one box that this agent serves: who it is and what it holds."""

from __future__ import annotations

import marshal
from typing import Any

from guest import users
from guest.control import Control
from guest.errors import wrong_state
from guest.execs import Execs
from guest.limits import Confinement
from guest.root import Root
from guest.settings import Settings
from guest.streams import Budget
from guest.users import Account

VERSION = "0.1.0"


class Guest:
    """State that the servicers share."""

    def __init__(self, settings: Settings, control: Control) -> None:
        self.settings = settings
        self.control = control
        self.execs = Execs(control, Budget(ring_budget()))
        self.env: dict[str, str] = {}
        self.uid = 1000
        self.gid = 1000
        self.groups: tuple[int, ...] = (1000,)
        self.box_id = ""
        self._root: Root | None = None

    @property
    def root(self) -> Root:
        """The root that programs run in."""
        if self._root is None:
            raise wrong_state("the box has not been claimed", reason="UNCLAIMED")
        return self._root

    def set_root(self, root: Root) -> None:
        """Use `root` from now on."""
        self._root = root

    def account(self, user: str) -> Account:
        """Who a program runs as.

        Raises:
            AgentError: there is no such user.
        """
        passwd = self.root.read_text("/etc/passwd")
        if user:
            return users.lookup(user, passwd, self.root.read_text("/etc/group"), self.uid)
        row = next((row for row in users.rows(passwd, 7) if row[2] == str(self.uid)), None)
        home = "/root" if self.uid == 0 else "/home/sandbox"
        name = row[0] if row else "sandbox"
        return Account(self.uid, self.gid, self.groups, name, home, row[6] if row else "")

    def save(self, secret: bytes) -> None:
        """Leave the identity with PID 1, for the agent that follows this one should it die."""
        state: dict[str, Any] = {
            "secret": secret,
            "uid": self.uid,
            "gid": self.gid,
            "groups": self.groups,
            "env": self.env,
            "box_id": self.box_id,
            "root": self.root.path,
            "confinement": tuple(self.execs.confinement),
        }
        self.control.tell({"op": "state", "state": marshal.dumps(state)})

    def restore(self, blob: bytes) -> bytes:
        """Take over the identity that an earlier agent has left; returns the secret."""
        state: dict[str, Any] = marshal.loads(blob)  # noqa: S302 - from PID 1, which had it from this code
        self.uid, self.gid, self.groups = state["uid"], state["gid"], state["groups"]
        self.env, self.box_id = state["env"], state["box_id"]
        self.execs.confinement = Confinement(*state["confinement"])
        own = state["root"] != self.settings.root_disk
        self._root = Root(state["root"], (self.settings.run_dir,) if own else ())
        secret: bytes = state["secret"]
        return secret


def ring_budget() -> int:
    """Bytes that all rings together may take: an eighth of the memory, at least 8 MiB."""
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    return max(8 << 20, total // 8)
