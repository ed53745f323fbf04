"""The QEMU programs of the host: where they are and which version."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field

from services.common import process
from services.common.errors import WrongState
from services.hypervisor.host_confinement import HostConfinement

INSTALL = "sudo apt-get install -y qemu-system-x86 qemu-utils"
MINIMUM = (7, 2)
_VERSION = re.compile(rb"version (\d+)\.(\d+)\.(\d+)")
# Starting QEMU only to print its version takes 0.05 s; a loaded host may need long.
_VERSION_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """The programs, as absolute paths, QEMU's version, what it can be confined by.

    `reclaims` says whether restored machines give memory back, see `ram_descriptor`.
    """

    system: str
    image: str
    version: str
    confinement: HostConfinement = field(default_factory=HostConfinement)
    reclaims: bool = False


async def find(system: str = "qemu-system-x86_64", image: str = "qemu-img") -> Programs:
    """Find the programs by name on PATH or by path.

    Raises:
        WrongState: one is missing (reason `PROGRAM_MISSING`) or too old (`PROGRAM_TOO_OLD`).
    """
    found = {name: shutil.which(name) for name in (system, image)}
    for name, path in found.items():
        if path is None:
            raise WrongState(
                f"{name} is not installed; run: {INSTALL}", reason="PROGRAM_MISSING", program=name
            )
    output = await process.run([str(found[system]), "--version"], seconds=_VERSION_SECONDS)
    match = _VERSION.search(output)
    if match is None:
        raise WrongState(
            f"{found[system]} does not tell its version; is it QEMU?",
            reason="PROGRAM_TOO_OLD",
            program=system,
        )
    version = tuple(int(part) for part in match.groups())
    if version[:2] < MINIMUM:
        raise WrongState(
            f"QEMU {'.'.join(map(str, version))} is too old; {'.'.join(map(str, MINIMUM))} is needed",
            reason="PROGRAM_TOO_OLD",
            program=system,
        )
    return Programs(system=str(found[system]), image=str(found[image]), version=".".join(map(str, version)))
