"""Templates, snapshots and forks by the command line, and runs whose boxes start from a snapshot."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.voidbox_cli import MEMORY, Voidbox


def test_a_kept_box_is_copied_saved_restored_and_run_from(voidbox: Voidbox, tmp_path: Path) -> None:
    voidbox("exec", "--keep", *MEMORY, "--", "sh", "-c", "echo prepared > /tmp/state; sleep 1000 & echo $!")
    (parent,) = [box["box_id"] for box in voidbox("--output", "json", "box", "ls").json]
    forked = voidbox(
        "--output", "json", "fork", parent, "--count", "2", "--name", "one", "--name", "two"
    ).json
    assert [box["box_id"] for box in forked["boxes"]] == ["one", "two"]
    assert 0 < forked["pause_seconds"] < 30
    voidbox("exec", "--in", "one", "--", "sh", "-c", "echo changed > /tmp/state")
    script = "cat /tmp/state; uname -n; pidof sleep"
    _, name, sleep = voidbox("exec", "--in", "two", "--", "sh", "-c", script).text.splitlines()
    assert (name, sleep.isdigit()) == ("two", True)
    assert voidbox("exec", "--in", "one", "--", "cat", "/tmp/state").text == "changed\n"

    saved = voidbox("--output", "json", "snapshot", "create", "two", "ready").json
    assert (saved["name"], saved["box_id"]) == ("ready", "two")
    assert voidbox.error("snapshot", "create", "two", "ready", code=3)["reason"] == "SNAPSHOT_EXISTS"
    voidbox("box", "rm", "--force", "one", "two", parent)
    assert voidbox("--output", "json", "box", "ls").json == []
    assert [each["name"] for each in voidbox("--output", "json", "snapshot", "ls").json] == ["ready"]
    assert voidbox("snapshot", "restore", "ready", "--box-id", "again").text == "again\n"
    assert voidbox("exec", "--in", "again", "--", "cat", "/tmp/state").text == "prepared\n"
    voidbox("box", "rm", "-f", "again")

    spec = tmp_path / "spec.json"
    box = {"name": "stage", "run": {"program": "cat", "args": ["/tmp/state"]}}
    spec.write_text(
        json.dumps(
            {
                "api_version": "v1", "kind": "pipeline", "name": "from-snapshot",
                "sandbox": {"snapshot": "ready"}, "pipeline": {"boxes": [box]},
            }
        )
    )  # fmt: skip
    assert voidbox("run", str(spec)).text == "prepared\n"
    voidbox("snapshot", "rm", "ready")
    assert "no snapshot 'ready'" in voidbox("run", str(spec), code=None).stderr
    assert voidbox("run", str(spec), code=None).code != 0

    templates = voidbox("--output", "json", "template", "ls").json
    (ours,) = [each["id"] for each in templates if each["resources"]["memory_mib"] == 512]
    built = voidbox("--output", "json", "template", "build", *MEMORY).json
    assert built["id"] == ours
    voidbox("template", "rm", ours)
    left = voidbox("--output", "json", "template", "ls").json
    assert left == [each for each in templates if each["id"] != ours]
