"""The tie between a service and the supervisor that started it.

The supervisor passes one end of a socket pair, its number in `VOIDBOX_SUPERVISOR_FD`. The
service writes one line to it once it serves, so nobody has to poll for its socket. End of
file on it means that the supervisor is gone, however it went, and the service ends too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator

log = logging.getLogger(__name__)

FD_VARIABLE = "VOIDBOX_SUPERVISOR_FD"
READY = b"ready\n"


@contextlib.contextmanager
def supervised() -> Iterator[None]:
    """Report readiness on entry, and until the exit end this process when the supervisor ends.

    Does nothing when no supervisor started this process. The variable is taken out of the
    environment, so that no child of the service inherits the tie.
    """
    number = os.environ.pop(FD_VARIABLE, "")
    if not number.isdecimal():
        yield
        return
    fd = int(number)
    os.set_inheritable(fd, False)
    loop = asyncio.get_running_loop()

    def on_readable() -> None:
        try:
            gone = os.read(fd, 64) == b""
        except OSError:
            gone = True
        if gone:
            loop.remove_reader(fd)
            log.warning("the supervisor is gone; ending")
            os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(fd, on_readable)
    # A supervisor that died in the meantime is noticed by the reader.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        os.write(fd, READY)
    try:
        yield
    finally:
        loop.remove_reader(fd)
        os.close(fd)
