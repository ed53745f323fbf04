"""The embedded stack: started once by many, restarted when it dies, gone without a trace. No machines."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.voidbox_cli import Voidbox, finish, stack
from voidbox.stack.identity import Identity

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def own() -> Iterator[Voidbox]:
    with stack(guest=False) as voidbox:
        yield voidbox


def record(voidbox: Voidbox) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((voidbox.state / "stack.json").read_text())
    return found


def identities(voidbox: Voidbox) -> list[Identity]:
    entries = record(voidbox)
    found = [Identity.parse(entry) for entry in [entries["supervisor"], *entries["services"].values()]]
    return [identity for identity in found if identity is not None]


def test_clients_that_come_at_once_share_one_stack(own: Voidbox) -> None:
    processes = [own.popen("--output", "json", "up") for _ in range(4)]
    answers = [finish(process) for process in processes]
    assert [done.code for done in answers] == [0] * 4, answers
    assert len({done.json["pid"] for done in answers}) == 1
    # A command that needs the stack starts it by itself, and finds the one that runs.
    assert own("ps").text.startswith("RUN")
    assert own.status()["stack"]["pid"] == answers[0].json["pid"]


def test_a_stack_is_started_by_the_first_command_that_needs_it(own: Voidbox) -> None:
    assert own("status", code=4).stderr.startswith("error: no voidbox stack is running")
    assert own("--output", "json", "ps").json == []
    assert own.status()["ok"] is True


@pytest.mark.parametrize("name", ["imager", "hypervisor", "orchestrator"])
def test_a_killed_service_is_back_at_the_next_call(own: Voidbox, name: str) -> None:
    own("up")
    before = own.service_pid(name)
    os.kill(before, signal.SIGKILL)
    own("up")
    assert own.service_pid(name) != before
    assert own.status()["ok"] is True


def test_down_ends_every_process_and_removes_every_socket(own: Voidbox) -> None:
    own("up")
    running = identities(own)
    assert len(running) == 4
    assert own("down").text == "the voidbox stack is down; nothing is left\n"
    assert [identity for identity in running if identity.alive] == []
    assert own.leftovers() == []
    assert own("down").text == "no voidbox stack was running\n"


def test_a_killed_supervisor_takes_the_services_along_and_the_next_up_works(own: Voidbox) -> None:
    own("up")
    running = identities(own)
    os.kill(record(own)["supervisor"]["pid"], signal.SIGKILL)
    assert all(identity.wait(20) for identity in running)
    own("up")
    assert own.status()["ok"] is True


def test_services_that_cannot_hear_of_its_death_are_ended_by_down(own: Voidbox) -> None:
    own("up")
    running = identities(own)
    pids = [identity.pid for identity in running]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    os.kill(record(own)["supervisor"]["pid"], signal.SIGKILL)
    own("down")
    assert [identity for identity in running if identity.alive] == []


def test_a_hanging_supervisor_does_not_stop_a_forced_down(own: Voidbox) -> None:
    own("up")
    running = identities(own)
    os.kill(record(own)["supervisor"]["pid"], signal.SIGSTOP)
    own("down", "--force")
    assert [identity for identity in running if identity.alive] == []


def test_a_service_that_cannot_start_is_named_with_the_end_of_its_log(own: Voidbox) -> None:
    own.env["VOIDBOX_IMAGER_MAX_UNPACKED_GIB"] = "many"
    error = own.error("up", code=4)
    assert error["reason"] == "STACK_FAILED"
    assert "imager exited with code 2" in error["message"]
    assert "VOIDBOX_IMAGER_MAX_UNPACKED_GIB: 'many' is not a int" in error["message"]
    del own.env["VOIDBOX_IMAGER_MAX_UNPACKED_GIB"]
    own("up")


def test_a_stack_of_another_version_is_not_used(own: Voidbox) -> None:
    own("up")
    own("down")
    own.runtime.mkdir(mode=0o700, exist_ok=True)
    # Holds the lock and answers as a supervisor of another version would.
    import fcntl

    lock = os.open(own.state / "stack.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(own.runtime / "stack.sock"))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(
                    b'{"kind": "status", "state": "running", "version": "9.9.9", "services": []}\n'
                )

        thread = threading.Thread(target=answer)
        thread.start()
        error = own.error("ps", code=4)
        thread.join()
    os.close(lock)
    assert error["reason"] == "OTHER_VERSION"
    assert "9.9.9" in error["message"]
    assert "voidbox down" in error["message"]


def test_a_kernel_that_the_running_stack_does_not_know_is_not_silently_ignored(own: Voidbox) -> None:
    own("up")
    own.env["VOID_BOX_KERNEL"] = "/some/kernel"
    error = own.error("ps", code=4)
    assert error["reason"] == "OTHER_ENVIRONMENT"
    assert "/some/kernel" in error["message"]
    own("down")
    own("up")
    assert own("ps").code == 0


def test_a_socket_path_that_is_too_long_is_an_error_with_the_cure(own: Voidbox, tmp_path: Path) -> None:
    own.env["VOIDBOX_RUNTIME_DIR"] = str(tmp_path / ("d" * 100))
    assert "VOIDBOX_RUNTIME_DIR" in own.error("up", code=3)["message"]
    own.env["VOIDBOX_RUNTIME_DIR"] = str(own.runtime)


def test_the_clients_secrets_do_not_reach_the_services(own: Voidbox) -> None:
    own.env["SOME_API_KEY"] = "very-secret"
    own("up")
    for identity in identities(own):
        assert b"very-secret" not in Path(f"/proc/{identity.pid}/environ").read_bytes()


def test_a_remote_address_that_does_not_answer_is_named(own: Voidbox) -> None:
    begin = time.monotonic()
    error = own.error("--address", "tcp://127.0.0.1:1", "ps", code=4)
    assert error["reason"] == "STACK_UNREACHABLE"
    assert "tcp://127.0.0.1:1" in error["message"]
    assert time.monotonic() - begin < 30
    assert own.error("--address", "nonsense", "ps", code=3)["reason"] == "BAD_ADDRESS"
    assert not (own.state / "stack.json").exists()


def test_the_stack_keeps_no_stream_of_its_client_open(own: Voidbox) -> None:
    process = own.popen("up")
    # Ends only when nobody holds the write ends of our pipes any more.
    finish(process, 60)
    assert process.returncode == 0


def test_doctor_says_what_is_missing_and_how_to_get_it(own: Voidbox) -> None:
    done = own("--output", "json", "doctor", code=4)
    checks = {check["name"]: check for check in done.json["checks"]}
    assert done.json["ok"] is False
    assert checks["guest image"]["level"] == "failed"
    assert "build-guest" in checks["guest image"]["cure"]
    assert checks["qemu"]["level"] == "ok"
    assert checks["python"]["level"] == "ok"
