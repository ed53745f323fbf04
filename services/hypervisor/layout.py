"""Where the hypervisor keeps what: one private directory per box, named by its id.

<state>/hypervisor/lock          held by the one service that owns the boxes below
<state>/hypervisor/probes.json   what probes found on this boot of the host
<state>/hypervisor/boxes/<id>/   one box: everything of it, so removing it removes all
    state.json  secret  exit.json  device.json  vsock.stats  console.log  vmm.log  *.qcow2
    guest.sock  qmp.sock  nic.json  gateway.json  gateway.log  egress.jsonl
<state>/hypervisor/machines/<name>/   the same for machines that are no boxes: they end with the service
<state>/hypervisor/volumes/<name>/    a volume (services.hypervisor.volumes)
<state>/hypervisor/changes/<box id>/  what a box has changed in overlays (services.hypervisor.changes)
<state>/hypervisor/templates/<id>/    a saved machine (services.hypervisor.saved)
<state>/hypervisor/snapshots/<name>/  the same, with its disks
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import WrongState
from services.common.paths import private_dir

GUEST_SOCKET = "guest.sock"
QMP_SOCKET = "qmp.sock"
EXIT_FILE = "exit.json"
STATS_FILE = "vsock.stats"
DEVICE_FILE = "device.json"
CONSOLE_FILE = "console.log"
LOG_FILE = "vmm.log"
NIC_FILE = "nic.json"
GATEWAY_FILE = "gateway.json"
GATEWAY_LOG_FILE = "gateway.log"
EGRESS_FILE = "egress.jsonl"
SECRET_FILE = "secret"  # noqa: S105 - a file's name
DEVICE_DIRECTORY = "device"
_TRASH = ".trash-"


@dataclass(frozen=True, slots=True)
class Layout:
    """The hypervisor's files below the state directory `state`."""

    state: Path

    @property
    def root(self) -> Path:
        """The directory that holds everything of the hypervisor."""
        return self.state / "hypervisor"

    @property
    def boxes(self) -> Path:
        """The directory that holds the boxes' directories."""
        return self.root / "boxes"

    @property
    def machines(self) -> Path:
        """The directory that holds the directories of machines that are no boxes (yet)."""
        return self.root / "machines"

    @property
    def templates(self) -> Path:
        """The directory that holds the templates' directories."""
        return self.root / "templates"

    @property
    def snapshots(self) -> Path:
        """The directory that holds the snapshots' directories."""
        return self.root / "snapshots"

    @property
    def volumes(self) -> Path:
        """The directory that holds the volumes."""
        return self.root / "volumes"

    @property
    def changes(self) -> Path:
        """The directory that holds what boxes have changed in overlays."""
        return self.root / "changes"

    def template(self, template_id: str) -> Path:
        """A template's directory."""
        return self.templates / template_id

    @property
    def probes(self) -> Path:
        """What the probes found."""
        return self.root / "probes.json"

    def make(self) -> None:
        """Make the directories, private to this user."""
        private_dir(self.state)
        private_dir(self.root)
        private_dir(self.boxes)
        private_dir(self.machines)
        private_dir(self.templates)
        private_dir(self.snapshots)
        private_dir(self.volumes)
        private_dir(self.changes)

    def box(self, box_id: str) -> Path:
        """A box's directory; `box_id` has been checked."""
        return self.boxes / box_id

    def box_ids(self) -> list[str]:
        """The ids of the boxes that have a directory."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(entry.name for entry in os.scandir(self.boxes) if not entry.name.startswith("."))
        return []

    def remove(self, box_id: str) -> None:
        """Remove a box's directory; it vanishes at once under its name, whole. Idempotent."""
        trash = self.boxes / f"{_TRASH}{box_id}"
        shutil.rmtree(trash, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            self.box(box_id).rename(trash)
            shutil.rmtree(trash)

    @staticmethod
    def clear_machine(directory: Path) -> None:
        """Remove what a machine has left in a box's directory, so that another can start there."""
        names = (GUEST_SOCKET, QMP_SOCKET, EXIT_FILE, STATS_FILE, DEVICE_FILE, CONSOLE_FILE, LOG_FILE)
        for name in (*names, NIC_FILE, GATEWAY_FILE, GATEWAY_LOG_FILE, EGRESS_FILE):
            (directory / name).unlink(missing_ok=True)
        shutil.rmtree(directory / DEVICE_DIRECTORY, ignore_errors=True)

    @staticmethod
    def clear_disks(directory: Path) -> None:
        """Remove the private layers of disks in a box's directory."""
        for path in directory.glob("*.qcow2"):
            path.unlink()

    def empty_trash(self) -> None:
        """Finish removals that were interrupted."""
        for entry in list(os.scandir(self.boxes)):
            if entry.name.startswith(_TRASH):
                shutil.rmtree(entry.path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the boxes for the length of the block; the kernel lets go if the process dies.

        Raises:
            WrongState: another process holds them.
        """
        self.make()
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WrongState(
                    f"another hypervisor owns the boxes in {self.root}; stop it (voidbox down) "
                    "or set another VOIDBOX_STATE_DIR",
                    reason="STATE_IN_USE",
                    path=self.root,
                ) from None
            yield
        finally:
            os.close(fd)
