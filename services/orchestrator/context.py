"""What the parts of one run share: its request and plan, its log, its stages' facts, its data."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import re
import time
from collections.abc import Sequence
from pathlib import Path

from services.common.errors import NotFound
from services.common.paths import private_dir
from services.orchestrator import records as r
from services.orchestrator.blobs import Blobs
from services.orchestrator.carry import Carried
from services.orchestrator.convert import entry_to_bytes
from services.orchestrator.peers import Peers
from services.orchestrator.plan import Plan, PlannedStage
from services.orchestrator.store import Database, Store

# The result of a stage; `stderr` is what its program wrote there.
RESULT, ERRORS = "output", "stderr"

LABEL_INSTANCE, LABEL_RUN, LABEL_STAGE = "voidbox-orchestrator", "voidbox-run", "voidbox-stage"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of what one run may keep.

    Attributes:
        event_bytes: Output in a run's log; the whole output is an artifact.
        stream_bytes: One stream of one program, on disk.
        artifact_bytes: One file or tree taken out of a box, or uploaded.
    """

    event_bytes: int = 16 << 20
    stream_bytes: int = 256 << 20
    artifact_bytes: int = 1 << 30


class Bell:
    """Wakes all who wait for something new; never misses one who looked before it rang."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        """Wake everybody who waits."""
        self._rung.set()
        self._rung = asyncio.Event()

    def listen(self) -> asyncio.Event:
        """Take this before looking; it is set by the next ring."""
        return self._rung


class RunContext:
    """One run's shared state. Everything that is to survive goes through the database."""

    def __init__(
        self,
        run: r.Run,
        plan: Plan,
        database: Database,
        blobs: Blobs,
        peers: Peers,
        limits: Limits,
        scratch: Path,
    ) -> None:
        assert run.request is not None
        self.run_id = run.id
        self.generation = run.generation
        self.plan = plan
        self.request: r.Request = run.request
        self.database = database
        self.blobs = blobs
        self.peers = peers
        self.limits = limits
        self.bell = Bell()
        self.facts = {stage.name: stage.facts for stage in run.stages}
        self.instance = database.store.instance
        self.scratch = private_dir(scratch / run.id)

    async def log(self, stage: str, *entries: r.Entry) -> None:
        """Add entries to the run's log."""
        await self.database(Store.append, self.run_id, self.encode(stage, entries))
        self.bell.ring()

    @staticmethod
    def encode(stage: str, entries: Sequence[r.Entry]) -> list[bytes]:
        """Entries as they are stored."""
        now = time.time()
        return [entry_to_bytes(now, stage, entry) for entry in entries]

    async def learn(self, planned: PlannedStage, **facts: object) -> None:
        """Store what has become known of a stage."""
        self.facts[planned.name] = dataclasses.replace(self.facts[planned.name], **facts)  # type: ignore[arg-type]
        await self.database(Store.save_facts, self.run_id, planned.position, self.facts[planned.name])

    def box_id(self, stage: str, attempt: int) -> str:
        """The id of a box: readable, and the same again after a restart."""
        key = f"{self.run_id}/{self.generation}/{stage}/{attempt}"
        name = re.sub(r"[^a-z0-9]+", "-", (stage or "shared").lower()).strip("-")[:20].strip("-") or "x"
        return f"{self.run_id[:24].strip('-')}-{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"

    def labels(self, stage: str) -> dict[str, str]:
        """Labels by which the boxes of this run are found again."""
        return {LABEL_INSTANCE: self.instance, LABEL_RUN: self.run_id, LABEL_STAGE: stage}

    def uploaded(self, path: str) -> r.InputFile:
        """The content that the client has sent for `path`."""
        found = next((file for file in self.request.files if file.path == path), None)
        if found is None:
            raise NotFound(f"{path} was not uploaded with the run", reason="NOT_UPLOADED", path=path)
        return found

    async def keep(self, stage: str, name: str, digest: r.Digest, *, tree: bool = False) -> None:
        """Make content an artifact of a stage."""
        artifact = r.Artifact(stage=stage, name=name, digest=digest, tree=tree)
        events = self.encode(stage, [r.Stored(artifact=artifact)])
        await self.database(Store.add_artifact, self.run_id, artifact, events)
        self.bell.ring()

    async def artifact(self, stage: str, name: str) -> Path:
        """The content of an artifact.

        Raises:
            NotFound: there is none.
        """
        found = await self.database(Store.artifact, self.run_id, stage, name)
        if found is None:
            raise NotFound(f"stage {stage!r} has no artifact {name!r}", reason="NO_ARTIFACT", stage=stage)
        return self.blobs.find(found.digest.value)

    async def carried(self, planned: PlannedStage, errors: dict[str, str]) -> list[Carried]:
        """The results that a stage gets, in declared order; `errors` says why one has none."""
        if not planned.carry_from:
            if not self.request.input:
                return []
            digest = await asyncio.to_thread(self.blobs.put, self.request.input.encode())
            return [Carried(name="input", path=self.blobs.find(digest.value))]
        found: list[Carried] = []
        for name in planned.carry_from:
            if name in errors:
                found.append(Carried(name=name, error=errors[name]))
            else:
                found.append(Carried(name=name, path=await self.artifact(name, RESULT)))
        return found
