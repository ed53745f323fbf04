"""`mode: overlay` by the command line: run, look at what changed, apply it, throw it away."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.voidbox_cli import MEMORY, Voidbox, pipeline, program_box, spec
from tests.vm import host_directory

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

OWNER = 4242 if os.geteuid() == 0 else os.geteuid()


@pytest.fixture
def work() -> Iterator[Path]:
    with host_directory(OWNER) as path:
        for name in ("notes.txt", "kept.txt", "old.txt"):
            (path / name).write_text(f"{name}\n")
            if os.geteuid() == 0:
                os.chown(path / name, OWNER, OWNER)
        yield path


def test_what_a_program_changes_is_shown_and_applied(voidbox: Voidbox, work: Path) -> None:
    script = "echo more >> notes.txt; rm old.txt; mkdir d; printf new > d/file; ln -s /etc/passwd d/out"
    done = voidbox(
        "exec", *MEMORY, "--mount", f"{work}:/work:overlay", "-w", "/work", "--", "sh", "-c", script
    )
    run = done.stderr.split("voidbox diff ")[1].split(";")[0]
    assert sorted(os.listdir(work)) == ["kept.txt", "notes.txt", "old.txt"]

    patch = voidbox("diff", run).text
    assert "--- a/notes.txt\n+++ b/notes.txt\n@@ -1 +1,2 @@\n notes.txt\n+more\n" in patch
    assert "deleted file mode 100644\n--- a/old.txt\n+++ /dev/null\n" in patch
    assert "# d/out: the link leads out of the directory\n" in patch
    stat = voidbox("diff", "--stat", run).text
    assert " M notes.txt | 1 +\n D old.txt | 1 -\n" in stat
    assert "5 changed, 3 lines added (+), 1 removed (-)" in stat
    (one,) = voidbox("--output", "json", "diff", run, "/work/notes.txt").json["changes"]
    assert (one["path"], one["kind"], one["lines_added"]) == ("notes.txt", "modified", 1)

    assert "would be applied" in voidbox("apply", "--dry-run", run, "notes.txt").stderr
    assert (work / "notes.txt").read_text() == "notes.txt\n"
    assert voidbox("apply", run, "notes.txt").text == "modified notes.txt\n"
    assert (work / "notes.txt").read_text() == "notes.txt\nmore\n"
    (work / "old.txt").write_text("edited meanwhile\n")
    error = voidbox.error("apply", run, code=4)
    assert (error["reason"], "old.txt" in error["message"]) == ("CHANGED_ON_HOST", True)
    assert voidbox.error("apply", "--force", run, code=4)["reason"] == "CHANGES_LEFT"
    assert sorted(os.listdir(work)) == ["d", "kept.txt", "notes.txt"]
    assert os.listdir(work / "d") == ["file"]
    voidbox("apply", "--trust", run)
    assert (work / "d/out").readlink() == Path("/etc/passwd")
    assert voidbox("diff", run).text == ""
    assert "there is nothing to apply" in voidbox("apply", run).stderr
    voidbox("rm", run)
    assert voidbox.error("diff", run, code=3)["reason"] == "NO_CHANGES"


def test_the_boxes_of_a_run_each_keep_what_they_have_changed(
    voidbox: Voidbox, work: Path, tmp_path: Path
) -> None:
    document = pipeline(
        "layers",
        program_box("one", "sh", "-c", "echo one > /work/one; cat /work/kept.txt"),
        program_box("two", "sh", "-c", "ls /work; echo two > /work/two"),
    )
    document["sandbox"]["mounts"] = [{"host": str(work), "guest": "/work", "mode": "overlay"}]
    done = voidbox("run", spec(tmp_path / "s.json", document), "--name", "layers")
    assert done.text == "kept.txt\nnotes.txt\nold.txt\n", "a stage does not see another one's changes"
    assert "voidbox apply layers" in done.stderr
    changes = voidbox("--output", "json", "diff", "layers").json["changes"]
    assert [(one["stage"], one["path"]) for one in changes] == [("one", "one"), ("two", "two")]
    assert voidbox("apply", "layers/two").text == "added two\n"
    assert (work / "two").read_text() == "two\n"
    assert not (work / "one").exists()
    voidbox("discard", "layers/one")
    assert voidbox("diff", "layers").text == ""
    voidbox("rm", "layers")
    assert list((voidbox.state / "hypervisor/changes").iterdir()) == []
