"""The command line against the real orchestrator with fake boxes: what is printed, and which exit code."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import pty
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import Exhausted
from services.common.paths import Paths
from services.orchestrator import convert
from services.orchestrator.__main__ import running
from services.orchestrator.config import Config
from tests.contract.orchestrator_fakes import ERR, Fakes, Process


@dataclass(frozen=True, kw_only=True)
class Done:
    code: int
    out: bytes
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


class Cli:
    """`voidbox` as a process, with the address of the test's orchestrator."""

    def __init__(self, root: Path, fakes: Fakes) -> None:
        self.root, self.fakes = root, fakes
        self.env = {"PATH": os.environ["PATH"], "HOME": str(root), "XDG_CONFIG_HOME": str(root / "config")}
        self.env["VOIDBOX_ADDRESS"] = f"unix:{root}/rt/orchestrator.sock"
        self._stack = contextlib.AsyncExitStack()

    async def start(self) -> None:
        config = Config(
            hypervisor=f"unix:{self.fakes.hypervisor_socket}", imager=f"unix:{self.fakes.imager_socket}"
        )
        paths = Paths(state=self.root / "state", cache=self.root / "cache", runtime=self.root / "rt")
        await self._stack.enter_async_context(running(config, paths))

    async def stop(self) -> None:
        await self._stack.aclose()
        self._stack = contextlib.AsyncExitStack()

    async def begin(
        self, *words: str, stdin: int = DEVNULL, stdout: int = PIPE, stderr: int = PIPE
    ) -> asyncio.subprocess.Process:
        argv = [sys.executable, "-P", "-m", "voidbox", *words]
        return await asyncio.create_subprocess_exec(
            *argv, env=self.env, cwd=self.root, stdin=stdin, stdout=stdout, stderr=stderr
        )

    async def finish(self, process: asyncio.subprocess.Process, stdin: bytes | None = None) -> Done:
        async with asyncio.timeout(60):
            out, err = await process.communicate(stdin)
        text = (err or b"").decode()
        assert "Traceback" not in text, text
        assert process.returncode is not None
        return Done(code=process.returncode, out=out or b"", err=text)

    async def __call__(self, *words: str, code: int = 0, stdin: bytes | None = None) -> Done:
        process = await self.begin(*words, stdin=DEVNULL if stdin is None else PIPE)
        done = await self.finish(process, stdin)
        assert done.code == code, f"{done.code}: {done.out!r}\n{done.err}"
        return done

    def spec(self, *boxes: dict[str, Any], **more: Any) -> str:
        document = {"kind": "pipeline", "name": "p", "pipeline": {"boxes": list(boxes)} | more}
        path = self.root / "p.json"
        path.write_text(json.dumps(document))
        return str(path)


def box(name: str, program: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "run": {"program": program}} | more


@pytest.fixture
async def fakes(tmp_path: Path) -> AsyncIterator[Fakes]:
    made = Fakes(tmp_path)

    async def hello(process: Process) -> int:
        await process.print("hello\n")
        return 0

    async def fail(process: Process) -> int:
        await process.print("last \x1b[31mwords\n", ERR)
        return 3

    async def hang(process: Process) -> int:
        await process.print("up\n")
        await asyncio.Event().wait()
        return 0

    async def cat(process: Process) -> int:
        data = await process.read_stdin()
        await process.print(data)
        await process.print(f"{len(data)}\n", ERR)
        return 42

    made.programs |= {"hello": hello, "fail": fail, "hang": hang, "cat": cat}
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def cli(tmp_path: Path, fakes: Fakes) -> AsyncIterator[Cli]:
    made = Cli(tmp_path, fakes)
    await made.start()
    yield made
    await made.stop()


async def test_a_run_shows_progress_and_report_and_gives_its_output_alone_on_stdout(cli: Cli) -> None:
    done = await cli("run", cli.spec(box("one", "hello"), box("two", "hello")))
    assert done.out == b"hello\n"
    lines = done.err.splitlines()
    assert any(line.endswith("one | hello") for line in lines)
    assert any("two · succeeded after" in line for line in lines)
    header = next(line for line in lines if line.startswith("stage "))
    for column in (
        "state",
        "time",
        "image",
        "boot",
        "inputs",
        "program",
        "outputs",
        "exit",
        "boot id",
        "kernel",
    ):
        assert column in header
    rows = [line.split() for line in lines[lines.index(header) + 1 :][:2]]
    assert [row[:2] for row in rows] == [["one", "succeeded"], ["two", "succeeded"]]
    assert any("(pipeline) succeeded in" in line and "2 stages, 2 boxes" in line for line in lines)
    assert "\x1b" not in done.err


async def test_json_is_a_line_per_event_and_one_for_the_result(cli: Cli) -> None:
    done = await cli("--output", "json", "run", cli.spec(box("one", "hello")))
    assert done.err == ""
    *events, result = done.lines
    assert [line["type"] for line in events] == ["event"] * len(events)
    assert result["type"] == "result"
    assert (result["success"], result["output"], result["stages"], result["exit_code"]) == (
        True,
        "hello\n",
        1,
        0,
    )


async def test_each_kind_of_failure_has_its_exit_code(cli: Cli, fakes: Fakes) -> None:
    failed = await cli("run", cli.spec(box("one", "fail"), box("two", "hello")), code=1)
    assert failed.out == b""
    assert "one: failed: exit code 3" in failed.err
    assert "two    skipped" in failed.err
    assert "last \\x1b[31mwords" in failed.err
    await cli("run", cli.spec(box("one", "hang", timeout_secs=1)), code=5)
    await cli("run", cli.spec(box("one", "missing")), code=3)
    fakes.create_error = Exhausted("the host has no room; stop other boxes", reason="HOST_MEMORY")
    assert "the host has no room" in (await cli("run", cli.spec(box("one", "hello")), code=7)).err


async def test_a_killed_box_is_an_infrastructure_failure(cli: Cli, fakes: Fakes) -> None:
    process = await cli.begin("run", cli.spec(box("one", "hang")))
    await fakes.until(lambda: any(b.processes for b in fakes.boxes.values()))
    await fakes.kill_box(fakes.box_of("one").id, "QEMU was killed by signal 9")
    done = await cli.finish(process)
    assert done.code == 4
    assert "QEMU was killed by signal 9" in done.err


async def test_a_run_that_somebody_else_stops_ends_as_cancelled(cli: Cli, fakes: Fakes) -> None:
    process = await cli.begin("run", cli.spec(box("one", "hang")), "--run-id", "mine")
    await fakes.until(lambda: any(b.processes for b in fakes.boxes.values()))
    assert (await cli("stop", "mine")).out == b"mine cancelled\n"
    assert (await cli.finish(process)).code == 6


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_the_first_signal_cancels_and_waits(cli: Cli, fakes: Fakes, number: int, code: int) -> None:
    process = await cli.begin("run", cli.spec(box("one", "hang")))
    await fakes.until(lambda: any(b.processes for b in fakes.boxes.values()))
    process.send_signal(number)
    done = await cli.finish(process)
    assert done.code == code
    assert "cancelling the run" in done.err
    assert fakes.boxes == {}


async def test_the_watch_survives_a_restart_of_the_orchestrator(cli: Cli, fakes: Fakes) -> None:
    go = asyncio.Event()

    async def slow(process: Process) -> int:
        await process.print("before\n")
        await go.wait()
        await process.print("after\n")
        return 0

    fakes.programs["slow"] = slow
    process = await cli.begin("--output", "json", "run", cli.spec(box("one", "slow")))
    await fakes.until(lambda: any(b.processes for b in fakes.boxes.values()))
    await cli.stop()
    await cli.start()
    go.set()
    done = await cli.finish(process)
    assert done.code == 0, done.err
    assert done.lines[-1]["output"] == "before\nafter\n"
    offsets = [int(line["event"].get("offset", 0)) for line in done.lines[:-1]]
    assert offsets == list(range(len(offsets)))


async def test_exec_passes_bytes_and_exit_code_and_leaves_no_run(cli: Cli, fakes: Fakes) -> None:
    data = bytes(range(256)) * 3000
    done = await cli("exec", "--", "cat", stdin=data, code=42)
    assert done.out == data
    assert done.err == f"{len(data)}\n"
    assert fakes.boxes == {}
    assert json.loads((await cli("--output", "json", "ps", "-a")).out) == []


async def test_exec_goes_on_when_the_orchestrator_comes_back(cli: Cli, fakes: Fakes) -> None:
    go = asyncio.Event()

    async def slow(process: Process) -> int:
        await process.print(b"a" * 300_000)
        await go.wait()
        await process.print(b"b" * 300_000)
        return 5

    fakes.programs["slow"] = slow
    process = await cli.begin("exec", "--", "slow")
    assert process.stdout is not None
    first = await process.stdout.readexactly(300_000)
    await cli.stop()
    go.set()
    await cli.start()
    done = await cli.finish(process)
    assert first + done.out == b"a" * 300_000 + b"b" * 300_000
    assert done.code == 5


async def test_exec_that_keeps_its_box_can_be_joined_by_run(cli: Cli, fakes: Fakes) -> None:
    done = await cli("exec", "--keep", "--", "hello")
    run_id = done.err.split("--in ")[1].split()[0]
    assert len(fakes.boxes) == 1
    assert (await cli("exec", "--in", run_id, "--", "cat", stdin=b"x", code=42)).out == b"x"
    (box_id,) = fakes.boxes
    assert (await cli("exec", "--in", box_id, "--", "hello")).out == b"hello\n"
    await cli("rm", "-f", run_id)
    assert fakes.boxes == {}


async def test_a_kept_box_stays_when_nobody_watches_it(
    cli: Cli, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds_of = convert.seconds_of
    # The limit for boxes that nobody watches is 30 s; here it is over before the next command is up.
    monkeypatch.setattr(convert, "seconds_of", lambda value, name: seconds_of(value, name) / 10_000)
    done = await cli("exec", "--keep", "--", "hello")
    run_id = done.err.split("--in ")[1].split()[0]
    await cli("ps")
    assert (await cli("exec", "--in", run_id, "--", "hello")).out == b"hello\n"
    await cli("rm", "-f", run_id)


async def test_logs_show_one_stage_without_its_name(cli: Cli) -> None:
    await cli("run", cli.spec(box("one", "hello"), box("two", "hello")), "--run-id", "r")
    assert (await cli("logs", "r")).out == b"one | hello\ntwo | hello\n"
    assert (await cli("logs", "r", "--stage", "two")).out == b"hello\n"
    assert "it has: one, two" in (await cli("logs", "r", "--stage", "three", code=3)).err


async def test_inspect_shows_a_run_and_a_spec_with_its_defaults(cli: Cli) -> None:
    path = cli.spec(box("one", "hello"))
    await cli("run", path, "--run-id", "r")
    assert b"run r (pipeline) succeeded" in (await cli("inspect", "r")).out
    shown = (await cli("--output", "json", "inspect", path)).lines[0]
    assert shown["sandbox"]["memory_mb"] == 1024
    assert b"memory_mb: 1024" in (await cli("inspect", path)).out


async def test_the_same_run_id_with_another_spec_is_refused(cli: Cli) -> None:
    await cli("run", cli.spec(box("one", "hello")), "--run-id", "r")
    again = await cli("run", cli.spec(box("one", "hello")), "--run-id", "r")
    assert again.out == b"hello\n"
    assert "r" in (await cli("run", cli.spec(box("other", "hello")), "--run-id", "r", code=3)).err
    assert "--run-id" in (await cli("run", cli.spec(box("o", "hello")), "--run-id", "Bad_ID", code=3)).err


async def test_the_input_reaches_the_first_stage_from_text_file_and_pipe(cli: Cli) -> None:
    path = cli.spec(box("one", "cat"))
    (cli.root / "in.txt").write_text("from a file")
    for words, stdin, expected in (
        (("--input", "text"), None, "text"),
        (("--input", "@in.txt"), None, "from a file"),
        (("--input", "@-"), b"from a pipe", "from a pipe"),
    ):
        done = await cli("--output", "json", "run", path, *words, code=1, stdin=stdin)
        output = next(line["event"]["output"] for line in done.lines if "output" in line.get("event", {}))
        assert base64.b64decode(output["data"]).decode() == expected
    assert "none.txt" in (await cli("run", path, "--input", "@none.txt", code=3)).err


async def test_a_reader_that_goes_away_ends_the_command_quietly(cli: Cli) -> None:
    for number in range(3):
        await cli("run", cli.spec(box("one", "hello")), "--run-id", f"r{number}")
    read, write = os.pipe()
    os.close(read)
    process = await cli.begin("ps", "-a", stdout=write)
    os.close(write)
    done = await cli.finish(process)
    assert done.err == ""
    assert done.code == 141


async def test_a_terminal_gets_a_moving_line_per_stage_and_the_outputs_above(cli: Cli) -> None:
    control, terminal = pty.openpty()
    cli.env["TERM"] = "xterm"
    process = await cli.begin("run", cli.spec(box("one", "hello"), box("two", "fail")), stderr=terminal)
    os.close(terminal)
    seen = bytearray()
    loop = asyncio.get_running_loop()
    closed = asyncio.Event()

    def read() -> None:
        try:
            data = os.read(control, 65536)
        except OSError:  # the other end is closed
            data = b""
        seen.extend(data)
        if not data:
            loop.remove_reader(control)
            closed.set()

    loop.add_reader(control, read)
    async with asyncio.timeout(60):
        await closed.wait()
    await process.communicate()
    os.close(control)
    assert process.returncode == 1
    text = seen.decode()
    assert "one | " in text
    assert "✓" in text
    assert "✗" in text
    assert "last \\x1b[31mwords" in text
    assert "\x1b[?25h" in text, "the cursor is shown again"
