"""Registries for tests: a real one, and a small real HTTP server whose answers each test chooses."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.imager_images import Item, compress, directory, make_tar, need, run, sha256

TARS = [
    make_tar(
        [directory(b"etc"), Item(name=b"etc/a", data=os.urandom(300_000)), Item(name=b"b", data=b"lower")]
    ),
    make_tar([Item(name=b"b", data=b"upper"), Item(name=b"etc/.wh.a")]),
]
CONFIG = {"Entrypoint": ["/bin/sh"], "Cmd": ["-c", "id"], "Env": ["A=b"], "WorkingDir": "/etc", "User": "1:2"}
# What `htpasswd -Bbn user pass:word` prints.
HTPASSWD = "user:$2y$05$olOh9eXlqhW694lUbWTptecyitRSLTjPk4q7O0RV3oSYrwPbI0zta\n"
OCI = "application/vnd.oci.image.manifest.v1+json"


@contextlib.contextmanager
def docker_registry(place: Path, more: dict[str, Any] | None = None) -> Iterator[str]:
    """Debian's docker-registry on a loopback port; yields host:port."""
    program = need("docker-registry", "docker-registry")
    place.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = {
        "version": 0.1,
        "log": {"level": "info"},
        "storage": {"filesystem": {"rootdirectory": str(place / "data")}, "delete": {"enabled": True}},
        "http": {"addr": f"127.0.0.1:{port}"},
        **(more or {}),
    }
    (place / "config.yml").write_text(json.dumps(config))
    process = subprocess.Popen(
        [program, "serve", place / "config.yml"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        for line in process.stderr:  # it says so when it listens
            if "listening on" in line:
                break
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)
        drain.join(10)
        if process.stderr:
            process.stderr.close()


def push(layout: Path, target: str, *options: str) -> None:
    """`skopeo copy` from our layout."""
    run(need("skopeo", "skopeo"), "--insecure-policy", "copy", "--dest-tls-verify=false", *options,
        f"oci:{layout}:t", f"docker://{target}")  # fmt: skip


Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class Hostile:
    """An HTTP server: paths to answers; what it saw is kept."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.posts: dict[str, Answer] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.blobs: dict[str, bytes] = {}
        self.stop = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            """Looks the answer up."""

            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.requests.append((self.path, dict(self.headers)))
                answer = outer.answers.get(self.path)
                if answer is None:
                    send(self, 404, b"{}")
                    return
                with contextlib.suppress(ConnectionError):
                    answer(self)

            def do_POST(self) -> None:
                outer.requests.append((self.path, dict(self.headers)))
                with contextlib.suppress(ConnectionError):
                    outer.posts.get(self.path, status(404))(self)

            def log_message(self, *_: object) -> None:
                """Keep quiet."""

        class Server(http.server.ThreadingHTTPServer):
            """Says nothing when a client hangs up."""

            def handle_error(self, request: Any, client_address: Any) -> None:
                if not isinstance(sys.exc_info()[1], OSError):
                    super().handle_error(request, client_address)

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        """End it and everything that it keeps waiting."""
        self.stop.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def serve_image(self, name: str = "app", tag: str = "t", tars: list[bytes] | None = None) -> list[str]:
        """Offer a sound image; returns the layers' paths."""
        layers = [compress(tar, "gzip") for tar in (TARS if tars is None else tars)]
        diff_ids = [sha256(tar) for tar in (TARS if tars is None else tars)]
        rootfs = {"type": "layers", "diff_ids": diff_ids}
        config = json.dumps(
            {"architecture": "amd64", "os": "linux", "config": CONFIG, "rootfs": rootfs}
        ).encode()
        manifest = json.dumps(
            {"schemaVersion": 2, "mediaType": OCI,
             "config": described(config, "application/vnd.oci.image.config.v1+json"),
             "layers": [described(layer, "application/vnd.oci.image.layer.v1.tar+gzip") for layer in layers]}
        ).encode()  # fmt: skip
        for reference in (tag, sha256(manifest)):
            self.answers[f"/v2/{name}/manifests/{reference}"] = body(manifest, OCI)
        paths = []
        for blob in (config, *layers):
            paths.append(f"/v2/{name}/blobs/{sha256(blob)}")
            self.answers[paths[-1]] = body(blob)
            self.blobs[paths[-1]] = blob
        return paths[1:]


def described(data: bytes, media_type: str) -> dict[str, Any]:
    """A descriptor."""
    return {"mediaType": media_type, "digest": sha256(data), "size": len(data)}


def send(handler: http.server.BaseHTTPRequestHandler, status: int, data: bytes, **headers: str) -> None:
    """A whole answer."""
    handler.send_response(status)
    for key, value in {"Content-Length": str(len(data)), **headers}.items():
        handler.send_header(key.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def body(data: bytes, media_type: str = "application/octet-stream") -> Answer:
    """Answers 200, or the range asked for."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        if asked:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            send(handler, 206, data[start:], Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            send(handler, 200, data, Content_Type=media_type)

    return answer


def status(code: int, **headers: str) -> Answer:
    """Answers with a status alone."""
    return lambda handler: send(handler, code, b"{}", **headers)


def first_then(count: int, first: Answer, then: Answer) -> Answer:
    """`first` for `count` requests, `then` afterwards."""
    seen = 0

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        nonlocal seen
        seen += 1
        (first if seen <= count else then)(handler)

    return answer
