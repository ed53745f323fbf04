"""Runs survive in the database: whole transactions, dense offsets, clear errors for damage."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.errors import AlreadyExists, Corrupt, NotFound, WrongState
from services.orchestrator import records as r
from services.orchestrator.engine import StageStatus
from services.orchestrator.states import FailureClass, RunState, StageState
from services.orchestrator.store import VERSION, Store
from voidbox.spec.models import Kind, Mount, MountMode

DIGEST = r.Digest(value="sha256:" + "a" * 64, size=3)


def run(run_id: str = "r", **changes: object) -> r.Run:
    request = r.Request(
        spec=b"\xffkind",
        filename="s.yaml",
        input="ä",
        env={"A": "b"},
        files=(r.InputFile(path="/x", digest=DIGEST, tree=True),),
        mounts=(Mount(host="/h", guest="/g", mode=MountMode.READ_WRITE),),
        base_directory="/b",
        options=r.Options(orphan_seconds=1.5, max_parallel=2, timeout_seconds=3),
    )
    stage = r.Stage(name="a", position=0, group=0, depends_on=())
    made = r.Run(
        id=run_id, name="n", kind=Kind.PIPELINE, state=RunState.PENDING, create_time=1.0, begin_time=1.0,
        stages=(stage,), request=request, request_digest="d",
    )  # fmt: skip
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "s")
    yield opened
    opened.close()


def test_a_run_is_read_as_it_was_written(store: Store) -> None:
    store.create_run(run(), [b"e0"])
    assert store.run("r") == dataclasses.replace(run(), event_count=1)
    status = StageStatus(
        state=StageState.RETRYING, attempts=2, first_attempt=1, reason="☃",
        failure_class=FailureClass.TIMEOUT, exit_code=3, open=True, due=True,
    )  # fmt: skip
    facts = r.Facts(box_id="b", phases=(("boot", 1.5),), usage=r.Usage(input_tokens=1, cost_usd=0.5))
    stage = dataclasses.replace(run().stages[0], status=status, facts=facts)
    changed = run(
        state=RunState.CANCELLING, reason="x", stopping=RunState.TIMED_OUT, end_time=9.0, output=b"\0",
        output_truncated=True, generation=4, stages=(stage,),
    )  # fmt: skip
    store.save(changed, [stage], [b"e1", b"e2"])
    assert store.run("r") == dataclasses.replace(changed, event_count=3)
    assert store.events("r", 1, 10) == ([(1, b"e1"), (2, b"e2")], RunState.CANCELLING)


def test_an_id_is_taken_once(store: Store) -> None:
    store.create_run(run(), [])
    with pytest.raises(AlreadyExists):
        store.create_run(run(), [])
    with pytest.raises(NotFound):
        store.run("other")


def test_a_failed_transaction_leaves_nothing(store: Store) -> None:
    store.create_run(run(), [b"e0"])
    with pytest.raises(sqlite3.Error):
        store.save(run(state=RunState.RUNNING), [], [b"e1", object()])  # type: ignore[list-item]
    assert store.run("r").state is RunState.PENDING
    assert store.events("r", 0, 10)[0] == [(0, b"e0")]
    store.append("r", [b"e1"])
    assert store.events("r", 0, 10)[0] == [(0, b"e0"), (1, b"e1")]


def test_output_beyond_the_limit_is_told_once_and_offsets_go_on(store: Store) -> None:
    store.create_run(run(), [])
    for at in range(0, 100, 10):
        output = r.Output(stream=r.STDOUT, offset=at, data=b"0123456789")
        store.append_output("r", 0, output, events=[b"o"], overflow=b"full", limit=35)
    assert [payload for _, payload in store.events("r", 0, 99)[0]] == [b"o", b"o", b"o", b"full"]
    assert store.offsets("r", 0) == (100, 0)
    store.reset_offsets("r", 0)
    assert store.offsets("r", 0) == (0, 0)


def test_deleting_gives_back_only_what_nobody_else_uses(store: Store) -> None:
    store.create_run(run("r1"), [b"e"])
    store.create_run(run("r2"), [])
    own = r.Digest(value="sha256:" + "b" * 64, size=1)
    store.add_artifact("r1", r.Artifact(stage="a", name="output", digest=own), [b"x"])
    assert store.delete_run("r1") == [own.value]
    assert store.delete_run("r2") == [DIGEST.value]
    assert store.used_digests() == set()
    assert store.runs(10, None, False) == []


def test_the_database_is_private_and_has_one_owner(store: Store) -> None:
    assert store.path.stat().st_mode & 0o777 == 0o600
    assert store.path.parent.stat().st_mode & 0o777 == 0o700
    with pytest.raises(WrongState, match="another orchestrator uses") as caught:
        Store(store.path.parent)
    assert caught.value.reason == "STATE_IN_USE"


def test_a_damaged_database_is_named_with_its_cure(tmp_path: Path) -> None:
    first = Store(tmp_path)
    for number in range(50):
        first.create_run(run(f"r{number}"), [b"x" * 4000])
    first.close()
    data = bytearray(first.path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    first.path.write_bytes(data)
    with pytest.raises(Corrupt, match=r"is damaged .*move it away") as caught:
        Store(tmp_path)
    assert caught.value.metadata["path"] == str(first.path)
    first.path.write_bytes(b"not a database at all, but longer than a header" * 100)
    with pytest.raises(Corrupt):
        Store(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "runs.db") as database:
        database.execute(f"PRAGMA user_version = {VERSION + 1}")
    database.close()
    with pytest.raises(WrongState, match="newer voidbox"):
        Store(tmp_path)


def test_what_was_committed_is_there_after_reopening(tmp_path: Path) -> None:
    first = Store(tmp_path)
    first.create_run(run(), [b"e0"])
    instance = first.instance
    first.close()
    second = Store(tmp_path)
    assert second.run("r").event_count == 1
    assert second.instance == instance
    second.close()
