"""One embedded stack for all tests that only use it; those that break it make their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.voidbox_cli import Voidbox, spec, stack


@pytest.fixture(scope="session")
def voidbox() -> Iterator[Voidbox]:
    with stack() as running:
        running("up")
        yield running


@pytest.fixture(scope="session")
def address(voidbox: Voidbox) -> str:
    """Address of the orchestrator."""
    return f"unix:{voidbox.runtime}/orchestrator.sock"


@pytest.fixture(scope="module")
def sandbox(voidbox: Voidbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The id of a run that is one box which waits for programs."""
    directory: Path = tmp_path_factory.mktemp("sandbox")
    document = {"api_version": "v1", "kind": "sandbox", "name": "waiting", "sandbox": {"memory_mb": 512}}
    run_id = voidbox("run", spec(directory / "s.json", document), "--detach").text.strip()
    # Returns once the box is there.
    follow = voidbox.popen("--output", "json", "logs", "-f", run_id)
    assert follow.stdout is not None
    for line in follow.stdout:
        if b"STAGE_STATE_RUNNING" in line:
            break
    follow.terminate()
    follow.communicate()
    yield run_id
    voidbox("rm", "-f", run_id)
    assert voidbox.boxes() == []
