"""Runs in SQLite: every change of a run is one transaction, its log is append-only.

One connection, used by one thread (`Database`), in WAL mode. A commit survives the death
of this process; the last ones may be lost when the whole machine loses power.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from services.common.errors import AlreadyExists, Corrupt, Exhausted, NotFound, WrongState
from services.common.paths import private_dir
from services.orchestrator import records as r
from services.orchestrator.codec import (
    facts_from_json,
    request_from_json,
    stage_from_json,
    to_json,
)
from services.orchestrator.states import RUN_ENDED, FailureClass, RunState
from voidbox.spec.models import Kind

_P = ParamSpec("_P")
_T = TypeVar("_T")

VERSION: Final = 1
# The check reads the whole file; a larger one is found damaged when the page is read.
_CHECKED_BYTES: Final = 64 << 20

_MIGRATIONS: Final[tuple[str, ...]] = (
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE runs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        name TEXT NOT NULL,
        kind TEXT NOT NULL,
        request TEXT NOT NULL,
        spec BLOB NOT NULL,
        request_digest TEXT NOT NULL,
        generation INTEGER NOT NULL DEFAULT 0,
        state TEXT NOT NULL,
        reason TEXT NOT NULL DEFAULT '',
        failure_class TEXT NOT NULL DEFAULT 'UNSPECIFIED',
        stopping TEXT,
        create_time REAL NOT NULL,
        begin_time REAL NOT NULL,
        end_time REAL NOT NULL DEFAULT 0,
        output BLOB NOT NULL DEFAULT x'',
        output_truncated INTEGER NOT NULL DEFAULT 0,
        event_count INTEGER NOT NULL DEFAULT 0,
        output_event_bytes INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX runs_by_state ON runs (state);
    CREATE TABLE stages (
        run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        position INTEGER NOT NULL,
        name TEXT NOT NULL,
        body TEXT NOT NULL,
        facts TEXT NOT NULL,
        stdout_offset INTEGER NOT NULL DEFAULT 0,
        stderr_offset INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (run_id, position)
    );
    CREATE TABLE events (
        run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        position INTEGER NOT NULL,
        payload BLOB NOT NULL,
        PRIMARY KEY (run_id, position)
    );
    CREATE TABLE artifacts (
        run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        stage TEXT NOT NULL,
        name TEXT NOT NULL,
        digest TEXT NOT NULL,
        size INTEGER NOT NULL,
        tree INTEGER NOT NULL,
        PRIMARY KEY (run_id, stage, name)
    );
    CREATE INDEX artifacts_by_digest ON artifacts (digest);
    CREATE TABLE inputs (
        run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        path TEXT NOT NULL,
        digest TEXT NOT NULL,
        PRIMARY KEY (run_id, path)
    );
    CREATE INDEX inputs_by_digest ON inputs (digest);
    """,
)
assert len(_MIGRATIONS) == VERSION


class Store:
    """The database of one orchestrator. Blocking; `Database` calls it off the event loop."""

    def __init__(self, directory: Path) -> None:
        """Open or make the database in `directory`.

        Raises:
            WrongState: another orchestrator uses it, or it was written by a newer version.
            Corrupt: the file is damaged.
        """
        self.path = private_dir(directory) / "runs.db"
        self._lock = os.open(directory / "orchestrator.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            message = f"another orchestrator uses {directory}; stop it, or set another VOIDBOX_STATE_DIR"
            raise WrongState(message, reason="STATE_IN_USE", path=directory) from error
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            with self._errors():
                self._prepare()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the database and let others have it. Idempotent."""
        self._db.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _prepare(self) -> None:
        self._db.row_factory = sqlite3.Row
        for pragma in (
            "auto_vacuum = FULL",
            "journal_mode = WAL",
            "synchronous = NORMAL",
            "foreign_keys = ON",
        ):
            self._db.execute(f"PRAGMA {pragma}")
        if self.path.stat().st_size <= _CHECKED_BYTES:
            found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise self._damaged(found)
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            message = (
                f"{self.path} was written by a newer voidbox (format {version}, known is {VERSION}); update"
            )
            raise WrongState(message, reason="NEWER_STATE", path=self.path)
        for number in range(version, VERSION):
            script = f"BEGIN IMMEDIATE; {_MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;"
            self._db.executescript(script)
        self._db.execute("INSERT OR IGNORE INTO meta VALUES ('instance', ?)", (secrets.token_hex(8),))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            # The primary code is in the low byte (sqlite.org/rescode.html).
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
            if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
                message = f"{self.path}: {error}; make room or set VOIDBOX_STATE_DIR"
                raise Exhausted(message, reason="DISK_FULL", path=self.path) from error
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise self._damaged(str(error)) from error
            raise

    def _damaged(self, found: str) -> Corrupt:
        text = " ".join(found.split())
        message = f"{self.path} is damaged ({text}); move it away to start without the runs in it"
        return Corrupt(message, reason="STATE_DAMAGED", path=self.path)

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            try:
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @property
    def instance(self) -> str:
        """A name of this database, for labels of boxes."""
        found = self._db.execute("SELECT value FROM meta WHERE key = 'instance'").fetchone()
        return str(found[0])

    def create_run(self, run: r.Run, events: Sequence[bytes]) -> None:
        """Add a run with its stages and first events.

        Raises:
            AlreadyExists: there is one with this id.
        """
        assert run.request is not None
        with self._write() as db:
            try:
                db.execute(
                    "INSERT INTO runs (id, name, kind, request, spec, request_digest, state,"
                    " create_time, begin_time) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        run.id, run.name, run.kind, to_json(run.request), run.request.spec,
                        run.request_digest, run.state, run.create_time, run.begin_time,
                    ),
                )  # fmt: skip
            except sqlite3.IntegrityError as error:
                message = f"there is already a run {run.id!r}"
                raise AlreadyExists(message, reason="RUN_EXISTS", run_id=run.id) from error
            for stage in run.stages:
                db.execute(
                    "INSERT INTO stages (run_id, position, name, body, facts) VALUES (?, ?, ?, ?, ?)",
                    (run.id, stage.position, stage.name, to_json(stage), to_json(stage.facts)),
                )
            for file in run.request.files:
                db.execute(
                    "INSERT OR IGNORE INTO inputs VALUES (?, ?, ?)", (run.id, file.path, file.digest.value)
                )
            self._append(db, run.id, events)

    def save(self, run: r.Run, changed: Sequence[r.Stage], events: Sequence[bytes]) -> None:
        """Store the run's state, the stages in `changed`, and new events, all or nothing."""
        with self._write() as db:
            db.execute(
                "UPDATE runs SET state = ?, reason = ?, failure_class = ?, stopping = ?, begin_time = ?,"
                " end_time = ?, output = ?, output_truncated = ?, generation = ? WHERE id = ?",
                (
                    run.state, run.reason, run.failure_class, run.stopping, run.begin_time, run.end_time,
                    run.output, run.output_truncated, run.generation, run.id,
                ),
            )  # fmt: skip
            for stage in changed:
                db.execute(
                    "UPDATE stages SET body = ?, facts = ? WHERE run_id = ? AND position = ?",
                    (to_json(stage), to_json(stage.facts), run.id, stage.position),
                )
            self._append(db, run.id, events)

    def save_facts(self, run_id: str, position: int, facts: r.Facts) -> None:
        """Store what is known of a stage."""
        with self._write() as db:
            db.execute(
                "UPDATE stages SET facts = ? WHERE run_id = ? AND position = ?",
                (to_json(facts), run_id, position),
            )

    def reset_offsets(self, run_id: str, position: int) -> None:
        """Forget how much output was stored: a new attempt starts."""
        with self._write() as db:
            db.execute(
                "UPDATE stages SET stdout_offset = 0, stderr_offset = 0 WHERE run_id = ? AND position = ?",
                (run_id, position),
            )

    def offsets(self, run_id: str, position: int) -> tuple[int, int]:
        """How much of the standard output and error of the latest attempt is stored."""
        with self._errors():
            row = self._db.execute(
                "SELECT stdout_offset, stderr_offset FROM stages WHERE run_id = ? AND position = ?",
                (run_id, position),
            ).fetchone()
        return row[0], row[1]

    def append(self, run_id: str, events: Sequence[bytes]) -> None:
        """Add events to a run's log."""
        with self._write() as db:
            self._append(db, run_id, events)

    def append_output(
        self,
        run_id: str,
        position: int,
        output: r.Output,
        *,
        events: Sequence[bytes],
        overflow: bytes,
        limit: int,
    ) -> None:
        """Add the events of a piece of output, and note that its stream is stored up to its end.

        When the run's log would hold more than `limit` bytes of output, `overflow` is added
        once instead, and from then on only the offset is noted.
        """
        column = "stdout_offset" if output.stream == r.STDOUT else "stderr_offset"
        with self._write() as db:
            held = db.execute("SELECT output_event_bytes FROM runs WHERE id = ?", (run_id,)).fetchone()[0]
            after = held + len(output.data)
            db.execute(
                f"UPDATE stages SET {column} = ? WHERE run_id = ? AND position = ?",  # noqa: S608 - two constants
                (output.offset + len(output.data), run_id, position),
            )
            db.execute("UPDATE runs SET output_event_bytes = ? WHERE id = ?", (min(after, limit + 1), run_id))
            if after <= limit:
                self._append(db, run_id, events)
            elif held <= limit:
                self._append(db, run_id, [overflow])

    def _append(self, db: sqlite3.Connection, run_id: str, events: Sequence[bytes]) -> None:
        if not events:
            return
        row = db.execute("SELECT event_count FROM runs WHERE id = ?", (run_id,)).fetchone()
        if row is None:
            raise _no_run(run_id)
        rows = [(run_id, row[0] + index, payload) for index, payload in enumerate(events)]
        db.executemany("INSERT INTO events VALUES (?, ?, ?)", rows)
        db.execute("UPDATE runs SET event_count = event_count + ? WHERE id = ?", (len(rows), run_id))

    def events(self, run_id: str, start: int, limit: int) -> tuple[list[tuple[int, bytes]], RunState]:
        """Up to `limit` events from offset `start`, and the run's state at that same moment.

        Raises:
            NotFound: there is no such run.
        """
        with self._errors():
            # Both from one snapshot: a run that has ended has all its events in it.
            self._db.execute("BEGIN")
            try:
                state = self._db.execute("SELECT state FROM runs WHERE id = ?", (run_id,)).fetchone()
                rows = self._db.execute(
                    "SELECT position, payload FROM events WHERE run_id = ? AND position >= ?"
                    " ORDER BY position LIMIT ?",
                    (run_id, start, limit),
                ).fetchall()
            finally:
                self._db.execute("COMMIT")
        if state is None:
            raise _no_run(run_id)
        return [(row[0], row[1]) for row in rows], RunState(state[0])

    def run(self, run_id: str) -> r.Run:
        """A run with its stages.

        Raises:
            NotFound: there is no such run.
        """
        with self._errors():
            row = self._db.execute("SELECT * FROM runs WHERE id = ?", (run_id,)).fetchone()
            if row is None:
                raise _no_run(run_id)
            return self._run(row)

    def _run(self, row: sqlite3.Row) -> r.Run:
        stages = self._db.execute(
            "SELECT body, facts FROM stages WHERE run_id = ? ORDER BY position", (row["id"],)
        ).fetchall()
        return r.Run(
            id=row["id"],
            name=row["name"],
            kind=Kind(row["kind"]),
            state=RunState(row["state"]),
            reason=row["reason"],
            failure_class=FailureClass(row["failure_class"]),
            stopping=RunState(row["stopping"]) if row["stopping"] else None,
            create_time=row["create_time"],
            begin_time=row["begin_time"],
            end_time=row["end_time"],
            stages=tuple(stage_from_json(stage[0], facts_from_json(stage[1])) for stage in stages),
            output=row["output"],
            output_truncated=bool(row["output_truncated"]),
            request=request_from_json(row["request"], row["spec"]),
            request_digest=row["request_digest"],
            generation=row["generation"],
            event_count=row["event_count"],
        )

    def runs(self, limit: int, before: int | None, active: bool) -> list[tuple[int, r.Run]]:
        """Up to `limit` runs with their numbers, newest first, older than number `before`."""
        ended = ", ".join(f"'{state}'" for state in sorted(RUN_ENDED))
        only = f"AND state NOT IN ({ended})" if active else ""
        with self._errors():
            rows = self._db.execute(
                f"SELECT * FROM runs WHERE number < ? {only} ORDER BY number DESC LIMIT ?",  # noqa: S608 - constants
                (before if before is not None else 1 << 62, limit),
            ).fetchall()
            return [(row["number"], self._run(row)) for row in rows]

    def add_artifact(self, run_id: str, artifact: r.Artifact, events: Sequence[bytes]) -> None:
        """Store what a stage has produced, replacing what an earlier attempt has."""
        with self._write() as db:
            db.execute(
                "INSERT OR REPLACE INTO artifacts VALUES (?, ?, ?, ?, ?, ?)",
                (
                    run_id, artifact.stage, artifact.name, artifact.digest.value, artifact.digest.size,
                    artifact.tree,
                ),
            )  # fmt: skip
            self._append(db, run_id, events)

    def artifacts(self, run_id: str, stage: str, after: tuple[str, str], limit: int) -> list[r.Artifact]:
        """Up to `limit` artifacts in order of (stage, name), after `after`; of one stage if named."""
        with self._errors():
            rows = self._db.execute(
                "SELECT * FROM artifacts WHERE run_id = ? AND (? = '' OR stage = ?)"
                " AND (stage, name) > (?, ?) ORDER BY stage, name LIMIT ?",
                (run_id, stage, stage, *after, limit),
            ).fetchall()
        return [_artifact(row) for row in rows]

    def artifact(self, run_id: str, stage: str, name: str) -> r.Artifact | None:
        """One artifact; None if it is not there."""
        with self._errors():
            row = self._db.execute(
                "SELECT * FROM artifacts WHERE run_id = ? AND stage = ? AND name = ?", (run_id, stage, name)
            ).fetchone()
        return _artifact(row) if row else None

    def delete_run(self, run_id: str) -> list[str]:
        """Remove a run with all that belongs to it; returns digests that nothing uses any more."""
        with self._write() as db:
            mine = db.execute(
                "SELECT digest FROM artifacts WHERE run_id = ?"
                " UNION SELECT digest FROM inputs WHERE run_id = ?",
                (run_id, run_id),
            ).fetchall()
            if db.execute("DELETE FROM runs WHERE id = ?", (run_id,)).rowcount == 0:
                raise _no_run(run_id)
            used = self._used(db)
            return [row[0] for row in mine if row[0] not in used]

    def used_digests(self) -> set[str]:
        """Digests that some run refers to."""
        with self._errors():
            return self._used(self._db)

    def _used(self, db: sqlite3.Connection) -> set[str]:
        return {row[0] for row in db.execute("SELECT digest FROM artifacts UNION SELECT digest FROM inputs")}


def _no_run(run_id: str) -> NotFound:
    return NotFound(f"there is no run {run_id!r}; see: voidbox ps --all", reason="NO_RUN", run_id=run_id)


def _artifact(row: sqlite3.Row) -> r.Artifact:
    digest = r.Digest(value=row["digest"], size=row["size"])
    return r.Artifact(stage=row["stage"], name=row["name"], digest=digest, tree=bool(row["tree"]))


class Database:
    """A `Store` off the event loop: one thread of its own, calls in the order they are made."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")

    async def __call__(
        self, method: Callable[Concatenate[Store, _P], _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """`Store.method(...)`; once begun it is carried out, whatever becomes of the caller."""
        loop = asyncio.get_running_loop()
        call: Any = lambda: method(self.store, *args, **kwargs)  # noqa: E731 - typed through Any
        done: _T = await asyncio.shield(loop.run_in_executor(self._thread, call))
        return done

    async def close(self) -> None:
        """Finish what was begun, then close."""
        await asyncio.to_thread(self._thread.shutdown)
        self.store.close()
