"""A token endpoint that rotates refresh tokens and revokes the whole login when one is used twice (RFC 9700).

Counts what it was asked. Runs in a thread of the test.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tests.egress_servers.served import Served


class TokenStub(Served):
    """A context manager; `url` is the endpoint."""

    def __init__(self, certificate: tuple[Path, Path], first: str = "refresh-0-of-the-host") -> None:
        self.asked = 0
        self.reused = 0
        self.revoked = False
        self.failing = 0
        self.issued: list[str] = []
        self._valid = first
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status, answer = stub._answer(self.headers["content-type"], body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = False
        super().__init__(server, certificate)
        self.url = f"https://localhost:{self.port}/oauth/token"

    def _answer(self, kind: str, body: bytes) -> tuple[int, dict[str, Any]]:
        fields = json.loads(body) if "json" in kind else {k: v[0] for k, v in parse_qs(body.decode()).items()}
        with self._lock:
            self.asked += 1
            if self.failing:
                return self.failing, {"error": "temporarily_unavailable"}
            if fields.get("grant_type") != "refresh_token" or self.revoked:
                return 400, {"error": "invalid_grant"}
            if fields["refresh_token"] != self._valid:
                self.reused += 1
                self.revoked = True
                return 400, {"error": "invalid_grant", "error_description": fields["refresh_token"]}
            number = len(self.issued) + 1
            self._valid = f"refresh-{number}-of-the-host"
            self.issued.append(f"access-{number}-of-the-host")
            return 200, {
                "access_token": self.issued[-1],
                "refresh_token": self._valid,
                "token_type": "Bearer",
                "expires_in": 3600,
            }
