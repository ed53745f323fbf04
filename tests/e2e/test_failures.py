"""What a user sees when something dies or is stopped in the middle of a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.voidbox_cli import (
    MEMORY,
    Done,
    Voidbox,
    finish,
    pipeline,
    program_box,
    read_until,
    spec,
    stack,
)

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

# Counts on, so that a gap or a repetition shows.
COUNT = "i=0; while [ $i -lt 200 ]; do echo line $i; i=$((i+1)); sleep 0.05; done"


@pytest.fixture(scope="module")
def own() -> Iterator[Voidbox]:
    with stack() as voidbox:
        voidbox("up")
        yield voidbox


def start(own: Voidbox, path: Path, script: str) -> subprocess.Popen[bytes]:
    """A run of one box that has begun to print."""
    process = own.popen(
        "--output",
        "json",
        "run",
        spec(path / "p.json", pipeline("one", program_box("one", "sh", "-c", script))),
    )
    read_until(process, b'"output"', stream="stdout")
    return process


def result(done: Done) -> dict[str, Any]:
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert last["type"] == "result", done
    return last


def test_a_killed_machine_fails_the_run_with_the_reason(own: Voidbox, tmp_path: Path) -> None:
    process = start(own, tmp_path, COUNT)
    (box,) = own.boxes()
    os.kill(box["vmm_pid"], signal.SIGKILL)
    done = finish(process)
    found = result(done)
    assert done.code == 4
    assert found["failure_class"] == "infrastructure"
    assert box["id"] in found["reason"] + found["stage_results"][0]["reason"]
    assert own.boxes() == []


@pytest.mark.parametrize("name", ["orchestrator", "hypervisor"])
def test_a_run_goes_on_when_a_service_is_killed(own: Voidbox, tmp_path: Path, name: str) -> None:
    process = start(own, tmp_path, COUNT)
    os.kill(own.service_pid(name), signal.SIGKILL)
    done = finish(process)
    assert done.code == 0, done.stderr + own.logs()
    assert result(done)["output"] == "".join(f"line {i}\n" for i in range(200))
    assert own.boxes() == []


def test_exec_goes_on_when_both_services_are_killed(own: Voidbox) -> None:
    process = own.popen("exec", *MEMORY, "--", "sh", "-c", COUNT)
    first = read_until(process, b"line 1", stream="stdout")
    for name in ("hypervisor", "orchestrator"):
        os.kill(own.service_pid(name), signal.SIGKILL)
    done = finish(process)
    assert done.code == 0, done.stderr + own.logs()
    assert (first + done.stdout).decode() == "".join(f"line {i}\n" for i in range(200))
    assert own.boxes() == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_cancels_the_run_and_waits_for_its_boxes(
    own: Voidbox, tmp_path: Path, number: int, code: int
) -> None:
    path = spec(
        tmp_path / "p.json", pipeline("endless", program_box("one", "sh", "-c", "echo up; sleep 1000"))
    )
    process = own.popen("run", path)
    read_until(process, b"| up")
    process.send_signal(number)
    done = finish(process)
    assert done.code == code
    assert "cancelling the run" in done.stderr
    assert "cancelled" in done.stderr
    assert own.boxes() == []


def test_a_failed_program_a_timeout_and_their_exit_codes(own: Voidbox, tmp_path: Path) -> None:
    boxes = [
        program_box("bad", "sh", "-c", "echo its last words >&2; exit 3"),
        program_box("never", "true"),
    ]
    done = own("--output", "json", "run", spec(tmp_path / "bad.json", pipeline("bad", *boxes)), code=1)
    bad, never = done.lines[-1]["stage_results"]
    assert (bad["state"], bad["exit_code"], bad["failure_class"]) == ("failed", 3, "workload")
    assert "its last words" in bad["reason"]
    assert never["state"] == "skipped"
    slow = pipeline("slow", program_box("slow", "sleep", "1000", timeout_secs=1))
    done = own("run", spec(tmp_path / "slow.json", slow), code=5)
    assert "time limit" in done.stderr
    assert own.boxes() == []


def test_a_detached_run_is_followed_stopped_and_removed(own: Voidbox, tmp_path: Path) -> None:
    document = pipeline("away", program_box("one", "sh", "-c", "echo first; sleep 1000"))
    words = ("run", spec(tmp_path / "p.json", document), "--detach", "--run-id", "away")
    assert own(*words).text == "away\n"
    logs = own.popen("logs", "-f", "away")
    read_until(logs, b"one | first", stream="stdout")
    listed = own("--output", "json", "ps").json
    assert [run["run_id"] for run in listed] == ["away"]
    assert own.error("rm", "away", code=4)["code"] == "FAILED_PRECONDITION"
    assert own("stop", "away").text == "away cancelled\n"
    assert finish(logs).code == 0
    assert own("logs", "away").text == "one | first\n"
    assert own("rm", "away").text == "away\n"
    assert own.error("logs", "away", code=3)["code"] == "NOT_FOUND"
    assert own.boxes() == []


def test_down_stops_runs_and_leaves_nothing(own: Voidbox, tmp_path: Path) -> None:
    process = start(own, tmp_path, "echo up; sleep 1000")
    own("down")
    done = finish(process)
    assert done.code == 6
    assert own.leftovers() == []
    own("up")


def test_killing_everything_leaves_what_down_removes(own: Voidbox, tmp_path: Path) -> None:
    document = pipeline("lost", program_box("one", "sh", "-c", "echo first; sleep 1000"))
    own("run", spec(tmp_path / "p.json", document), "--detach", "--run-id", "lost")
    logs = own.popen("logs", "-f", "lost")
    read_until(logs, b"first", stream="stdout")
    logs.kill()
    finish(logs)
    (box,) = own.boxes()
    entries = json.loads((own.state / "stack.json").read_text())
    for entry in [entries["supervisor"], *entries["services"].values()]:
        os.kill(entry["pid"], signal.SIGKILL)
    assert Path(f"/proc/{box['vmm_pid']}").exists()
    own("down")
    assert own.leftovers() == []
    own("up")
