"""`voidbox stats`, `pause`, `resume`, `console` and `port-forward` on a box that runs."""

from __future__ import annotations

import signal
import socket
import urllib.request

import pytest

from tests.e2e.voidbox_cli import MEMORY, Voidbox, finish

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

SERVER = """
import http.server, os
os.chdir("/")
server = http.server.HTTPServer(("127.0.0.1", 8080), http.server.SimpleHTTPRequestHandler)
print("up", flush=True)
server.serve_forever()
"""


def test_stats_tell_of_host_and_guest(voidbox: Voidbox, sandbox: str) -> None:
    (sample,) = voidbox("--output", "json", "stats", "--interval", "0.3", sandbox).lines
    assert sample["box_id"].startswith(sandbox)
    assert 0 < sample["guest_memory_available_bytes"] < sample["guest_memory_total_bytes"] < 512 << 20
    assert 0 < sample["private_bytes"] <= sample["resident_bytes"]
    assert sample["cpu_seconds"] > 0
    everything = voidbox("stats", "--interval", "0.3").text
    assert sample["box_id"] in everything


def test_a_paused_box_stands_still_until_it_is_resumed(voidbox: Voidbox, sandbox: str) -> None:
    (paused,) = voidbox("--output", "json", "pause", sandbox).json
    assert paused["state"] == "paused"
    error = voidbox.error("exec", "--in", paused["box_id"], "--", "true", code=125)
    assert "paused" in error["message"]
    assert voidbox("resume", sandbox).text.strip() == f"{paused['box_id']} running"
    voidbox("exec", "--in", sandbox, "--", "true")


def test_the_console_is_found_by_run_and_by_box(voidbox: Voidbox, sandbox: str) -> None:
    (box,) = voidbox.boxes()
    assert voidbox("console", sandbox).text == voidbox("console", box["id"]).text
    error = voidbox.error("console", "no-such-box", code=3)
    assert error["reason"] == "BOX_NOT_FOUND"


def test_a_port_of_the_box_is_reached_for_as_long_as_the_command_runs(voidbox: Voidbox, sandbox: str) -> None:
    server = voidbox.popen("exec", "--in", sandbox, "--", "python3", "-c", SERVER)
    assert server.stdout is not None
    assert server.stdout.readline() == b"up\n"
    forward = voidbox.popen("port-forward", sandbox, "0:8080", "0:9")
    assert forward.stdout is not None
    open_port, closed_port = (
        int(forward.stdout.readline().split(b" ")[0].rpartition(b":")[2]) for _ in range(2)
    )
    with urllib.request.urlopen(f"http://127.0.0.1:{open_port}/etc/passwd", timeout=60) as answer:
        assert b"sandbox" in answer.read()
    with socket.create_connection(("127.0.0.1", closed_port), timeout=60) as refused:
        assert refused.recv(1) == b""
    forward.send_signal(signal.SIGINT)
    assert finish(forward).code == 130
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", open_port), timeout=5)
    server.send_signal(signal.SIGINT)
    finish(server)


def test_a_volume_keeps_what_a_box_has_written(voidbox: Voidbox) -> None:
    words = (*MEMORY, "--volume", "notes:/notes", "--", "sh", "-c")
    voidbox("exec", *words, "echo kept > /notes/file")
    assert voidbox("exec", *words, "cat /notes/file").text == "kept\n"
    (volume,) = voidbox("--output", "json", "volume", "ls").json
    assert (volume["name"], volume["size_mb"], volume["box_id"]) == ("notes", 10240, "")
    assert voidbox.error("volume", "create", "notes", "--size-mb", "64", code=3)["reason"] == "VOLUME_EXISTS"
    assert voidbox("volume", "rm", "notes").text == "notes\n"
    assert voidbox.error("volume", "rm", "notes", code=3)["reason"] == "VOLUME_NOT_FOUND"
    assert voidbox.error("exec", "--volume", "notes", "--", "true", code=125)["reason"] == "BAD_VOLUME"
