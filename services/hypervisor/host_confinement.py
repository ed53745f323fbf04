"""What this host allows machines to be confined by: tried, from all down to nothing, with QEMU itself.

`python -m services.hypervisor.host_confinement PROGRAM NAMESPACES LANDLOCK UID` runs
`PROGRAM --version` as a machine would be and ends with its exit code.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from services.hypervisor import confine
from services.hypervisor.confine import Namespaces

# Two interpreters and a QEMU that prints its version: 0.3 s on an idle host.
PROBE_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfinement:
    """How machines are confined here; `detail` says it in words, and what is missing why."""

    namespaces: Namespaces = ""
    landlock: bool = False
    detail: str = "not tried"

    @property
    def whole(self) -> bool:
        """Whether nothing is missing."""
        return bool(self.namespaces) and self.landlock


async def find(program: str, uid: int) -> HostConfinement:
    """Try what this host allows, best first.

    Args:
        program: QEMU's absolute path.
        uid: Who machines run as, if we are root.
    """
    from services.common.errors import VoidboxError
    from services.common.process import run

    kind: Namespaces = "root" if os.geteuid() == 0 else "user"
    abi = confine.landlock_abi()
    whys: list[str] = [] if abi else ["this kernel has no Landlock (lsm=landlock)"]
    tries: list[tuple[Namespaces, bool]] = [(kind, True), (kind, False), ("", True)]
    for namespaces, landlock in tries:
        if landlock and not abi:
            continue
        argv = [sys.executable, "-P", "-m", __name__, program, namespaces, str(int(landlock)), str(uid)]
        try:
            await run(argv, seconds=PROBE_SECONDS)
        except VoidboxError as error:
            whys.append(error.message.splitlines()[-1].rpartition(": ")[2])
            continue
        have = []
        if namespaces:
            have.append("network, mount, process and IPC namespaces and a root of its own")
        if landlock:
            have.append(f"Landlock (version {abi})")
        missing = "" if namespaces and landlock else f"; missing: {'; '.join(dict.fromkeys(whys))}"
        return HostConfinement(namespaces=namespaces, landlock=landlock, detail=" and ".join(have) + missing)
    return HostConfinement(detail=f"neither namespaces nor Landlock: {'; '.join(dict.fromkeys(whys))}")


def main(argv: list[str]) -> int:
    """Run the program once, confined; see the module."""
    program, namespaces, landlock, uid = argv
    number = int(uid) if os.geteuid() == 0 else None
    try:
        confine.unshare(namespaces)  # type: ignore[arg-type]
        pid = os.fork()
        if pid == 0:
            if namespaces:
                confine.change_root(program, (), ())
            confine.drop_privileges(number, number, ())
            confine.no_new_privileges()
            if landlock == "1":
                confine.restrict(program, (), ())
            os.execv(program, [program, "--version"])  # noqa: S606
    except OSError as error:
        os.write(2, f"{error.strerror or error}\n".encode())
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
