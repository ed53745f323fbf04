"""Whether restored machines of this host can give memory back: tried, by a process that does it.

`python -m services.hypervisor.reclaim` is that process; its exit code says so.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import sys

from services.hypervisor import ram_descriptor, seccomp
from services.hypervisor.ram_descriptor import NUMBER, OPEN_FLAGS, OPEN_MODE, PATH, PUNCH_HOLE, NotOpened

# An interpreter that starts; a loaded host may need long.
PROBE_SECONDS = 60.0
_CONTENT = b"what others are restored from"


async def supported() -> str:
    """Nothing if they can, else why not."""
    from services.common.errors import VoidboxError
    from services.common.process import run

    try:
        await run([sys.executable, "-P", "-m", __name__], seconds=PROBE_SECONDS)
    except VoidboxError as error:
        return error.message.splitlines()[-1]
    return ""


def main() -> int:
    """Put the filter on a process and see that it does what it is for."""
    if os.uname().machine not in ram_descriptor.SYSTEM_CALLS:
        os.write(2, f"no numbers of system calls for {os.uname().machine}\n".encode())
        return 1
    seccomp.no_new_privileges()
    ours, theirs = socket.socketpair()
    memory = os.memfd_create("voidbox-probe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(memory, _CONTENT)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    pid = os.fork()
    if pid == 0:
        os._exit(_machine(theirs))
    theirs.close()
    try:
        listener = ram_descriptor.receive(ours)
        ram_descriptor.answer(listener, memory, os.pidfd_open(pid))
        os.close(listener)
    except (OSError, NotOpened) as error:
        os.write(2, f"{error}\n".encode())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _machine(report: socket.socket) -> int:
    """Do as QEMU does, and tell whether it went as it shall."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        ram_descriptor.install(report)
    except OSError as error:
        os.write(2, f"{error}\n".encode())
        return 1
    report.close()
    path, flags, mode = PATH.encode(), OPEN_FLAGS, OPEN_MODE
    opened = libc.open(path, flags, mode) if libc.open(path, os.O_RDWR) == -1 else -1
    size = ctypes.c_long(len(_CONTENT))
    punched = libc.fallocate(ctypes.c_int(opened), PUNCH_HOLE, ctypes.c_long(0), size)
    kept = opened == NUMBER and os.pread(opened, len(_CONTENT), 0) == _CONTENT
    again = libc.open(path, flags, mode)
    good = kept and punched == 0 and (again, ctypes.get_errno()) == (-1, errno.ENOSYS)
    if not good:
        os.write(2, b"the filter does not do what it is for\n")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
