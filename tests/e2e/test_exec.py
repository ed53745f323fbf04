"""`voidbox exec` and `cp`: a program in a box is like a program here."""

from __future__ import annotations

import hashlib
import os
import pty
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.e2e.voidbox_cli import MEMORY, SECONDS, Voidbox, finish, read_until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


def test_a_fresh_box_runs_the_program_and_is_gone_afterwards(voidbox: Voidbox) -> None:
    before = voidbox("--output", "json", "ps", "-a").json
    script = 'cat; echo "$GREETING" >&2; uname -r >&2; exit 7'
    done = voidbox(
        "exec", *MEMORY, "--env", "GREETING=grüezi", "--", "sh", "-c", script, stdin=b"in\0put\xff\n", code=7
    )
    assert done.stdout == b"in\0put\xff\n"
    greeting, release = done.stderr.splitlines()[-2:]
    assert greeting == "grüezi"
    assert release != os.uname().release
    assert voidbox.boxes() == []
    assert voidbox("--output", "json", "ps", "-a").json == before


@pytest.mark.parametrize("code", [0, 1, 42, 125, 255])
def test_the_exit_code_is_the_programs(voidbox: Voidbox, sandbox: str, code: int) -> None:
    voidbox("exec", "--in", sandbox, "--", "sh", "-c", f"exit {code}", code=code)


def test_a_signal_that_ends_the_program_is_told_as_shells_do(voidbox: Voidbox, sandbox: str) -> None:
    voidbox("exec", "--in", sandbox, "--", "sh", "-c", "kill -SEGV $$", code=128 + signal.SIGSEGV)


def test_a_program_that_is_not_there_or_cannot_run_has_its_own_code(voidbox: Voidbox, sandbox: str) -> None:
    missing = voidbox.error("exec", "--in", sandbox, "--", "no-such-program", code=127)
    assert missing["reason"] == "PROGRAM_NOT_FOUND"
    assert "no-such-program" in missing["message"]
    voidbox("exec", "--in", sandbox, "--", "/etc/passwd", code=126)


def test_bytes_pass_unchanged_both_ways(voidbox: Voidbox, sandbox: str) -> None:
    data = os.urandom(1024) * 3000 + bytes(range(256)) + "日本".encode()
    done = voidbox("exec", "--in", sandbox, "--", "cat", stdin=data)
    assert hashlib.sha256(done.stdout).hexdigest() == hashlib.sha256(data).hexdigest()


def test_without_a_pipe_standard_input_is_empty(voidbox: Voidbox, sandbox: str) -> None:
    assert voidbox("exec", "--in", sandbox, "--", "wc", "-c").text.strip() == "0"


def test_the_clock_is_the_hosts_not_that_of_the_boots_begin(voidbox: Voidbox, sandbox: str) -> None:
    before = time.time()
    words = ("exec", "--in", sandbox, "--", "python3", "-c", "import time; print(time.time())")
    now = float(voidbox(*words).text)
    # A boot under emulation takes more than 4 s; setting the clock, one call.
    assert before - 3 < now < time.time() + 3


def test_user_directory_and_environment_are_those_asked_for(voidbox: Voidbox, sandbox: str) -> None:
    script = 'echo "$(id -u) $(pwd) $A"'
    words = ("--user", "0", "--workdir", "/tmp", "--env", "A=1=2", "--", "sh", "-c", script)
    assert voidbox("exec", "--in", sandbox, *words).text == "0 /tmp 1=2\n"


def test_the_time_limit_kills_and_leaves_no_process(voidbox: Voidbox, sandbox: str) -> None:
    done = voidbox(
        "exec", "--in", sandbox, "--timeout", "1", "--", "sh", "-c", "sleep 4711 & sleep 4711", code=124
    )
    assert "--timeout" in done.stderr
    # The search must not find itself.
    listing = voidbox("exec", "--in", sandbox, "--", "sh", "-c", "ps w | grep '[4]711' || true")
    assert listing.text == ""


def test_signals_are_passed_on_to_the_program(voidbox: Voidbox, sandbox: str) -> None:
    script = "trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.1; done"
    process = voidbox.popen("exec", "--in", sandbox, "--", "sh", "-c", script)
    read_until(process, b"ready", stream="stdout")
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert (done.code, done.stdout) == (9, b"caught\n")


def test_a_terminal_is_a_terminal_with_our_size(voidbox: Voidbox, sandbox: str) -> None:
    control, terminal = pty.openpty()
    os.set_blocking(control, True)
    import fcntl
    import struct
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 101, 0, 0))
    before = termios.tcgetattr(terminal)
    words = (
        "exec",
        "-t",
        "--in",
        sandbox,
        "--",
        "sh",
        "-c",
        "test -t 0 && stty size && read x && echo got $x",
    )
    process = voidbox.popen(*words, stdin=terminal, stdout=terminal, stderr=terminal)
    seen = bytearray()

    def pump() -> None:
        answered = False
        while True:
            try:
                data = os.read(control, 4096)
            except OSError:
                return
            if not data:
                return
            seen.extend(data)
            if b"33 101" in seen and not answered:
                answered = True
                os.write(control, b"hello\r")
            if b"got hello" in seen:
                return

    reader = threading.Thread(target=pump)
    reader.start()
    assert process.wait(SECONDS) == 0, bytes(seen)
    reader.join(10)
    assert b"got hello" in seen
    assert termios.tcgetattr(terminal) == before
    os.close(control)
    os.close(terminal)


def test_a_client_that_is_killed_takes_its_program_with_it(voidbox: Voidbox, sandbox: str) -> None:
    process = voidbox.popen("exec", "--in", sandbox, "--", "sh", "-c", "echo up; exec sleep 8153")
    read_until(process, b"up", stream="stdout")
    process.kill()
    finish(process)
    # The guest gives a client 30 s to come back (ExecStart.detach_grace); wait inside the box.
    script = "for i in $(seq 600); do ps w | grep -q '[s]leep 8153' || exit 0; sleep 0.1; done; exit 1"
    voidbox("exec", "--in", sandbox, "--", "sh", "-c", script)


def test_files_and_directories_are_copied_both_ways(voidbox: Voidbox, sandbox: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/data.bin").write_bytes(os.urandom(200_000))
    (tree / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (tree / "run.sh").chmod(0o755)
    (tree / "link").symlink_to("run.sh")
    voidbox("cp", str(tree), f"{sandbox}:/workspace/")
    assert voidbox("exec", "--in", sandbox, "--", "/workspace/tree/run.sh").text == "ran\n"
    back = tmp_path / "back"
    voidbox("cp", f"{sandbox}:/workspace/tree", str(back))
    assert (back / "sub/data.bin").read_bytes() == (tree / "sub/data.bin").read_bytes()
    assert os.access(back / "run.sh", os.X_OK)
    assert os.readlink(back / "link") == "run.sh"
    voidbox("cp", str(tree / "run.sh"), f"{sandbox}:/tmp/one.sh")
    voidbox("cp", f"{sandbox}:/tmp/one.sh", str(tmp_path / "one.sh"))
    assert (tmp_path / "one.sh").read_text() == (tree / "run.sh").read_text()


def test_copying_what_is_not_there_names_it(voidbox: Voidbox, sandbox: str, tmp_path: Path) -> None:
    error = voidbox.error("cp", f"{sandbox}:/workspace/missing", str(tmp_path), code=3)
    assert "/workspace/missing" in error["message"]
    error = voidbox.error("cp", str(tmp_path / "missing"), f"{sandbox}:/workspace", code=3)
    assert "missing" in error["message"]
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_is_no_error_message(voidbox: Voidbox, sandbox: str) -> None:
    process = voidbox.popen("exec", "--in", sandbox, "--", "yes")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    error = process.stderr.read()
    assert process.wait(SECONDS) == 141
    assert error == b""
    process.stderr.close()


def test_python_is_there_for_programs(voidbox: Voidbox, sandbox: str) -> None:
    done = voidbox("exec", "--in", sandbox, "--", "python3", "-c", "import sys; print(sys.version_info[0])")
    assert done.text == f"{sys.version_info[0]}\n"
