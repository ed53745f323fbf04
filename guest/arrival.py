"""Waiting for devices that the hypervisor plugs in: the kernel tells of each by a uevent."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import TypeVar

from guest import log

_KOBJECT_UEVENT, _KERNEL_GROUP = 15, 1  # linux/netlink.h; the kernel's own events, not udev's
# Plugging takes 0.2 s under emulation on an idle host.
SECONDS = 10.0

_T = TypeVar("_T")


def wait_for(find: Callable[[], _T], absent: Callable[[Exception], bool]) -> _T:
    """The result of `find`, tried again after every event while what it raises says `absent`. Blocks.

    Raises:
        Exception: what `find` raised last, or something else than absence.
    """
    try:
        return find()
    except Exception as error:
        if not absent(error):
            raise
    deadline = time.monotonic() + SECONDS
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _KOBJECT_UEVENT) as events:
        events.bind((0, _KERNEL_GROUP))
        while True:
            # Once more after the socket is there: nothing comes between a look and the wait for news.
            try:
                return find()
            except Exception as error:
                left = deadline - time.monotonic()
                if left <= 0 or not absent(error):
                    raise
            events.settimeout(left)
            try:
                events.recv(8192)
            except TimeoutError:
                log.warning("a device has not arrived")
            except OSError as error:  # ENOBUFS: more events than were read
                log.warning(f"uevents: {os.strerror(error.errno or 0)}")
