"""The stack's plain parts: layout, identities, logs, records, a supervised process."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from voidbox.stack.identity import Identity
from voidbox.stack.layout import Layout
from voidbox.stack.logfile import LogFile, tail
from voidbox.stack.service import MAX_FIRST_STARTS, Service, ServiceState
from voidbox.stack.sweep import processes, read_record, write_record

READY = "import os; os.write(int(os.environ['VOIDBOX_SUPERVISOR_FD']), b'ready\\n');"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(state=tmp_path / "s", cache=tmp_path / "c", runtime=tmp_path / "r")
    made.prepare()
    return made


def test_directories_are_private(layout: Layout) -> None:
    for path in (layout.state, layout.cache, layout.runtime, layout.tmp, layout.state / "log"):
        assert path.stat().st_mode & 0o777 == 0o700


def test_service_command_lines(layout: Layout) -> None:
    run = layout.runtime
    head = [sys.executable, "-P", "-m"]
    assert layout.argv("imager") == [*head, "services.imager", "--listen", f"unix:{run}/imager.sock"]
    assert layout.argv("orchestrator") == [
        *head, "services.orchestrator", "--listen", f"unix:{run}/orchestrator.sock",
        "--imager", f"unix:{run}/imager.sock", "--hypervisor", f"unix:{run}/hypervisor.sock",
    ]  # fmt: skip


def test_services_see_only_what_concerns_them_of_the_environment(layout: Layout) -> None:
    env = {
        "PATH": "/bin", "ANTHROPIC_API_KEY": "k", "VOIDBOX_TOKEN_FILE": "t", "VOIDBOX_ADDRESS": "a",
        "VOID_BOX_KERNEL": "/k", "HTTPS_PROXY": "p", "SSH_AUTH_SOCK": "s", "TMPDIR": "/elsewhere",
    }  # fmt: skip
    passed = layout.service_env(env)
    assert {"ANTHROPIC_API_KEY", "VOIDBOX_TOKEN_FILE", "VOIDBOX_ADDRESS", "SSH_AUTH_SOCK"}.isdisjoint(passed)
    assert passed["VOID_BOX_KERNEL"] == "/k"
    assert passed["HTTPS_PROXY"] == "p"
    assert passed["TMPDIR"] == str(layout.tmp)


def test_an_identity_is_not_taken_over_by_the_next_process_with_its_pid() -> None:
    own = Identity.of(os.getpid())
    assert own is not None
    assert own.alive
    assert Identity.parse(own.to_json()) == own
    assert not dataclasses.replace(own, start_ticks=own.start_ticks + 1).alive
    malformed: list[object] = [None, {}, {"pid": "1"}, {"pid": 1}, []]
    for entry in malformed:
        assert Identity.parse(entry) is None


def test_an_ended_process_counts_as_gone_even_as_a_zombie() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        identity = Identity.of(child.pid)
        assert identity is not None
        assert not identity.wait(0)
        assert identity.end(0)
        assert not identity.alive
        child.kill()
        assert child.stdin is not None
        child.stdin.close()


def test_logs_rotate_by_size_and_keep_three(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "x.log", max_bytes=100, kept=3)
    for number in range(60):
        log.write(f"line {number:04}\n".encode())
    log.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["x.log", "x.log.1", "x.log.2", "x.log.3"]
    assert all(path.stat().st_size <= 100 for path in tmp_path.iterdir())
    assert tail(tmp_path / "x.log", 1) == ["line 0059"]
    assert tail(tmp_path / "none.log") == []


def test_a_damaged_record_is_no_record(layout: Layout) -> None:
    assert read_record(layout) == {}
    layout.record.write_text("{")
    assert read_record(layout) == {}
    write_record(layout, {"supervisor": {"pid": 1, "start_ticks": 2}, "services": {"imager": "junk"}})
    assert list(processes(read_record(layout))) == ["supervisor"]


class Scripted(Layout):
    """A layout whose service is a one-line program."""

    __slots__ = ()
    code = ""

    def argv(self, service: str) -> list[str]:
        return [sys.executable, "-c", type(self).code]


def service(layout: Layout, code: str) -> tuple[Service, asyncio.Condition]:
    kind = type("Once", (Scripted,), {"code": code, "__slots__": ()})
    scripted = kind(state=layout.state, cache=layout.cache, runtime=layout.runtime)
    changed = asyncio.Condition()
    tasks: set[asyncio.Task[None]] = set()

    async def notify() -> None:
        async with changed:
            changed.notify_all()

    def tell() -> None:
        task = asyncio.get_running_loop().create_task(notify())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    return Service("test", scripted, {"PATH": os.environ["PATH"]}, tell), changed


async def until(made: Service, changed: asyncio.Condition, state: ServiceState) -> None:
    async with asyncio.timeout(30), changed:
        await changed.wait_for(lambda: made.state is state)


async def test_a_service_runs_once_it_says_so_and_stops_when_asked(layout: Layout) -> None:
    made, changed = service(layout, "print('hello', flush=True);" + READY + "import time; time.sleep(100)")
    made.start()
    await until(made, changed, ServiceState.RUNNING)
    assert made.identity is not None
    identity = made.identity
    await made.stop()
    assert made.state is ServiceState.STOPPED
    assert not identity.alive
    assert tail(layout.log("test")) == ["hello"]


async def test_a_service_that_ignores_term_is_killed(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("voidbox.stack.service.TERM_SECONDS", 0.2)
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    made, changed = service(layout, ignore + READY + "import time; time.sleep(100)")
    made.start()
    await until(made, changed, ServiceState.RUNNING)
    identity = made.identity
    await made.stop()
    assert identity is not None
    assert not identity.alive


async def test_a_service_that_never_serves_is_given_up_with_the_end_of_its_log(layout: Layout) -> None:
    made, changed = service(layout, "import sys; sys.exit('cannot: no config')")
    made.start()
    await until(made, changed, ServiceState.FAILED)
    described = made.describe()
    assert "exited with code 1" in described["detail"]
    assert described["log_tail"] == ["cannot: no config"] * MAX_FIRST_STARTS
    await made.stop()


async def test_a_service_that_dies_is_started_again_until_it_dies_too_often(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("voidbox.stack.service.FIRST_DELAY_SECONDS", 0.01)
    made, changed = service(layout, READY + "import os; os.kill(os.getpid(), 9)")
    made.start()
    await until(made, changed, ServiceState.FAILED)
    assert made.restarts == 4
    assert "killed by signal 9" in made.detail
    await made.stop()
