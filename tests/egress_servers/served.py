"""A server of a test: on the loopback, over TLS if it has a certificate, in a thread of its own."""

from __future__ import annotations

import ssl
import threading
from http.server import HTTPServer
from pathlib import Path
from typing import Self


class Served:
    """A context manager that serves `server`; `port` is where it listens.

    Args:
        server: What is served.
        certificate: Certificate and key; None for plain HTTP.
    """

    def __init__(self, server: HTTPServer, certificate: tuple[Path, Path] | None) -> None:
        self._server = server
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        self._thread = threading.Thread(target=server.serve_forever)
        self.port: int = server.server_address[1]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
