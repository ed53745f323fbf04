"""Clients that share no code with voidbox do the whole job with the .proto files or reflection alone.

A Node.js program (`@grpc/grpc-js`) and `buf curl` each list the services by reflection, make a
box through the orchestrator's address, run a program in it, and read a file.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NODE = ROOT / "tests/e2e/node"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SERVICES = {
    "grpc.channelz.v1.Channelz",
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "voidbox.guest.v1.GuestService",
    "voidbox.hypervisor.v1.HypervisorService",
    "voidbox.imager.v1.ImagerService",
    "voidbox.orchestrator.v1.OrchestratorService",
}
# A cold boot under emulation on a busy machine, and all calls after it.
_SECONDS = 300

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


def program(name: str, cure: str) -> str:
    """Where the program `name` is; it belongs to what `make setup-dev` installs."""
    found = shutil.which(name)
    assert found, f"{name} is not installed; run: {cure}"
    return found


def run(words: Sequence[str], *, text: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        words, env=env, input=text, capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    assert done.returncode == code, f"{done.returncode} instead of {code}:\n{done.stdout}{done.stderr}"
    return done


@pytest.fixture(scope="module")
def node() -> str:
    found = program("node", "apt-get install nodejs npm")
    installed = NODE / "node_modules/.package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < (NODE / "package-lock.json").stat().st_mtime:
        run([program("npm", "apt-get install nodejs npm"), "ci", "--prefix", str(NODE)])
        os.utime(installed)
    return found


def test_a_node_client_makes_a_box_and_works_in_it(node: str, address: str) -> None:
    seen = json.loads(run([node, str(NODE / "client.mjs"), str(ROOT / "protos"), address]).stdout)
    assert set(seen["services"]) == SERVICES
    assert seen["box"]["state"] == "BOX_STATE_RUNNING"
    boot_id = seen["box"]["boot_id"]
    assert boot_id != BOOT_ID.read_text().strip()
    assert seen["exec"] == {"stdout": f"{boot_id}\n", "stderr": "wört\n", "code": 7}
    assert seen["stdin"]["bytes"] == 1_000_003
    assert seen["stdin"]["received"] == seen["stdin"]["sent"]
    assert seen["file"]["written"] == 100_000
    assert seen["file"]["received"] == seen["file"]["sent"]
    for name, code in (
        ("missing_file", "NOT_FOUND"),
        ("missing_program", "NOT_FOUND"),
        ("missing_box", "NOT_FOUND"),
        ("deleted", "NOT_FOUND"),
    ):
        assert seen[name]["code"] == code, seen[name]
        assert seen[name]["message"]


class Buf:
    """`buf curl`, speaking gRPC to the server and JSON to us, with the server's reflection as schema."""

    def __init__(self, address: str) -> None:
        buf = str(Path(sys.executable).with_name("buf"))
        socket = address.removeprefix("unix:")
        self._words = [buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--unix-socket", socket]

    def services(self) -> set[str]:
        """The server's services."""
        return set(run([*self._words, "--list-services", "http://localhost"]).stdout.split())

    def call(self, method: str, *requests: Mapping[str, Any], box: str = "", code: int = 0) -> Any:
        """The responses to `requests`; with an exit code other than 0, the error.

        `buf curl` exits with 8 times the gRPC status code.
        """
        words = [*self._words, "--data", "@-", *(["--header", f"voidbox-box-id: {box}"] if box else [])]
        text = "\n".join(json.dumps(request) for request in requests)
        done = run([*words, f"http://localhost/{method}"], text=text, code=code)
        return list(_documents(done.stdout)) if code == 0 else json.loads(done.stderr)


def _documents(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    while text := text.lstrip():
        document, end = decoder.raw_decode(text)
        yield document
        text = text[end:]


def _output(events: Sequence[Any], stream: str) -> bytes:
    chunks = [event["event"]["output"] for event in events if "output" in event["event"]]
    return b"".join(base64.b64decode(chunk["data"]) for chunk in chunks if chunk["stream"] == stream)


def test_buf_curl_makes_a_box_and_works_in_it(address: str) -> None:
    buf = Buf(address)
    assert buf.services() == SERVICES
    (resolved,) = buf.call("voidbox.imager.v1.ImagerService/ResolveGuestImage", {})
    config = {
        "kernelPath": resolved["guestImage"]["kernelPath"],
        "initramfsPath": resolved["guestImage"]["initramfsPath"],
        "resources": {"memoryMib": 512},
    }
    box = f"buf-{uuid.uuid4().hex[:8]}"
    hypervisor = "voidbox.hypervisor.v1.HypervisorService"
    guest = "voidbox.guest.v1.GuestService"
    (created,) = buf.call(f"{hypervisor}/CreateBox", {"boxId": box, "config": config})
    try:
        assert created["box"]["state"] == "BOX_STATE_RUNNING"
        script = "cat; echo; cat /proc/sys/kernel/random/boot_id; echo oops >&2; exit 3"
        start = {"program": "sh", "args": ["-c", script], "stdin": True}
        line = base64.b64encode("grüße".encode()).decode()
        stdin = {"stdin": {"data": line, "offset": 0, "eof": True}}
        events = buf.call(f"{guest}/Exec", {"start": start}, {"input": stdin}, box=box)
        assert "started" in events[0]["event"]
        assert events[-1]["event"]["exit"]["exitCode"] == 3
        said = _output(events, "STD_STREAM_STDOUT").decode().splitlines()
        assert said == ["grüße", created["box"]["bootId"]]
        assert _output(events, "STD_STREAM_STDERR") == b"oops\n"

        chunks = buf.call(f"{guest}/ReadFile", {"path": "/proc/sys/kernel/ostype"}, box=box)
        assert b"".join(base64.b64decode(chunk["data"]) for chunk in chunks) == b"Linux\n"

        missing = buf.call(f"{guest}/ReadFile", {"path": "/no/such/file"}, box=box, code=8 * 5)
        assert missing["code"] == "not_found"
        (detail,) = missing["details"]
        assert detail["type"] == "google.rpc.ErrorInfo"
    finally:
        buf.call(f"{hypervisor}/DeleteBox", {"boxId": box, "force": True})
    gone = buf.call(f"{hypervisor}/GetBox", {"boxId": box}, code=8 * 5)
    assert gone["code"] == "not_found"
