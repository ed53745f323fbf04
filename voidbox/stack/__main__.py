"""`python -m voidbox.stack`: the supervisor process; started by `voidbox up`, not by hand.

It inherits two file descriptors: the held lock of the stack and its control socket.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys

from services.common import logging as common_logging
from voidbox.stack.layout import Layout
from voidbox.stack.supervisor import Supervisor


def main() -> int:
    """Run the supervisor until it is told to stop; returns its exit code."""
    parser = argparse.ArgumentParser(prog="voidbox-stack", description=__doc__)
    parser.add_argument("--lock-fd", type=int, required=True, help="descriptor that holds the stack's lock")
    parser.add_argument("--listen-fd", type=int, required=True, help="descriptor of the control socket")
    parser.add_argument("--log-level", default="info", help="least level that is logged")
    args = parser.parse_args()
    common_logging.set_up("supervisor", args.log_level)
    os.chdir("/")  # no directory is kept busy
    os.set_inheritable(args.lock_fd, False)
    os.set_inheritable(args.listen_fd, False)
    listener = socket.socket(fileno=args.listen_fd)
    listener.setblocking(False)
    layout = Layout.from_env(os.environ)

    async def run() -> int:
        return await Supervisor(layout, os.environ, listener).run()

    return asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
