"""Host directories as overlays: a box writes as it likes, and the host's files stay as they are.

Real boxes, restored from a template, change a directory; what they changed is read, survives the death
of everything that ran, is applied by the host, and is bounded.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.vm import Client, HypervisorProcess, host_directory
from voidbox.common.v1 import common_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

pytestmark = pytest.mark.vm

OWNER = 4242 if os.geteuid() == 0 else os.geteuid()
OVERLAY = common_pb2.MOUNT_MODE_OVERLAY
# Each way to change something, in a directory that has all of it.
CHANGES = """
import os, mmap
os.chdir("/work")
assert open("edited").read() == "edited\\n"
with open("edited", "a") as f:
    f.write("more\\n")
with open("mapped", "r+b") as f, mmap.mmap(f.fileno(), 0) as m:
    m[:3] = b"MAP"
    m.flush()
os.unlink("removed")
os.rename("old-name", "new-name")
os.link("new-name", "second-name")
os.symlink("edited", "link")
os.chmod("script", 0o755)
os.truncate("cut", 2)
for path, _, names in os.walk("tree", topdown=False):
    for name in names:
        os.unlink(f"{path}/{name}")
    os.rmdir(path)
os.mkdir("tree")
open("tree/new", "w").write("new")
os.rename("tree/new", "tree/newer")
open("made", "w").write("made")
os.unlink("made")
print(sorted(os.listdir(".")), sorted(os.listdir("tree")), oct(os.stat("script").st_mode))
"""
EXPECTED = [
    ("modified", "cut"), ("modified", "edited"), ("added", "link"), ("modified", "mapped"),
    ("added", "new-name"), ("deleted", "old-name"), ("deleted", "removed"), ("modified", "script"),
    ("added", "second-name"), ("deleted", "tree/a/b"), ("deleted", "tree/a"), ("deleted", "tree/c"),
    ("added", "tree/newer"),
]  # fmt: skip


@pytest.fixture
def work() -> Iterator[Path]:
    """A directory of a user, with something to change in every way."""
    with host_directory(OWNER) as path:
        names = ("edited", "mapped", "removed", "old-name", "script", "cut", "tree/a/b", "tree/c", "same")
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(f"{name}\n")
        if os.geteuid() == 0:
            for each in path.rglob("*"):
                os.chown(each, OWNER, OWNER)
        let_time_pass(path)
        yield path


def let_time_pass(path: Path) -> None:
    """Return when the clock of files has gone on: what changes in a box's first tick is a conflict."""
    newest = max(each.lstat().st_ctime_ns for each in (path, *path.rglob("*")))
    with tempfile.NamedTemporaryFile(dir=path.parent) as file:
        while os.fstat(file.fileno()).st_ctime_ns <= newest:
            os.utime(file.fileno())


def tree(path: Path) -> dict[str, str]:
    return {
        str(each.relative_to(path)): os.readlink(each) if each.is_symlink() else each.read_text()
        for each in sorted(path.rglob("*"))
        if not each.is_dir()
    }


def overlay(path: Path, guest: str = "/work") -> common_pb2.Mount:
    return common_pb2.Mount(host_path=str(path), guest_path=guest, mode=OVERLAY)


async def changes(client: Client, box_id: str) -> list[tuple[str, str]]:
    stream = client.hypervisor.ReadChanges(pb.ReadChangesRequest(box_id=box_id), timeout=60)
    return [
        (pb.ChangeKind.Name(each.change.kind)[12:].lower(), each.change.path.decode())
        async for each in stream
        if each.WhichOneof("result") == "change"
    ]


async def apply(client: Client, box_id: str, **options: Any) -> list[pb.ApplyChangesResponse]:
    request = pb.ApplyChangesRequest(box_id=box_id, **options)
    stream = client.hypervisor.ApplyChanges(request, timeout=60)
    return [each async for each in stream if each.WhichOneof("result") == "change"]


async def test_a_box_changes_its_view_and_the_host_applies_it(client: Client, work: Path) -> None:
    before = tree(work)
    await client.create("over", mounts=[overlay(work)])
    try:
        exit_, _, error = await client.run("over", "python3", "-c", CHANGES)
        assert exit_.exit_code == 0, error.decode()
        assert tree(work) == before, "the host's files are as they were"
        assert await changes(client, "over") == EXPECTED
    finally:
        await client.delete("over")
    assert await changes(client, "over") == EXPECTED, "they outlive the box"
    (work / "cut").write_text("the user's own edit\n")
    assert [each.change.path for each in await apply(client, "over") if each.change.conflict] == [b"cut"]
    assert (work / "edited").read_text() == "edited\n", "nothing is done if anything conflicts"
    paths = [path.encode() for _, path in EXPECTED if path != "cut"]
    done = await apply(client, "over", paths=paths)
    assert all(each.applied for each in done), done
    assert tree(work) == {
        "cut": "the user's own edit\n",
        "edited": "edited\nmore\n",
        "link": "edited",
        "mapped": "MAPped\n",
        "new-name": "old-name\n",
        "same": "same\n",
        "script": "script\n",
        "second-name": "old-name\n",
        "tree/newer": "new",
    }
    assert (work / "script").stat().st_mode & 0o777 == 0o755
    assert {each.lstat().st_uid for each in work.rglob("*") if each.name != "cut"} == {OWNER}
    assert await changes(client, "over") == [("modified", "cut")]
    await apply(client, "over", force=True)
    assert (work / "cut").read_text() == "cu"
    listed = await client.hypervisor.ListChanges(pb.ListChangesRequest())
    assert "over" not in [each.box_id for each in listed.changes], "nothing is left to keep"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's service sees root's directories as a box's own")
async def test_a_directory_of_root_is_the_box_s_own_in_an_overlay(client: Client, work: Path) -> None:
    for each in (work, *work.rglob("*")):
        os.chown(each, 0, 0)
    (work / "same").chmod(0o600)
    work.chmod(0o700)
    let_time_pass(work)
    before = tree(work)
    await client.create("rooted", mounts=[overlay(work)])
    try:
        script = "cat /work/same && stat -c %u /work/same && id -u"
        _, out, error = await client.run("rooted", "sh", "-c", script)
        content, owner, user = out.decode().split()
        assert (content, owner) == ("same", user), error.decode()
        assert int(user) != 0
        exit_, _, error = await client.run("rooted", "python3", "-c", CHANGES)
        assert exit_.exit_code == 0, error.decode()
    finally:
        await client.delete("rooted")
    assert tree(work) == before
    assert await changes(client, "rooted") == EXPECTED
    done = await apply(client, "rooted")
    assert all(each.applied for each in done), [each for each in done if not each.applied]
    assert {each.lstat().st_uid for each in work.rglob("*")} == {0}
    assert (work / "tree/newer").read_text() == "new"


async def test_changes_are_bounded_and_survive_the_death_of_machine_and_service(work: Path) -> None:
    with HypervisorProcess(flags=("--changes-mib", "4")) as service:
        async with service.connected() as client:
            await client.create("greedy", mounts=[overlay(work)])
            box = await client.create("crash", mounts=[overlay(work)])
            await client.create("idle", mounts=[overlay(work)])
            await client.run("greedy", "sh", "-c", "head -c 3000000 /dev/zero > /work/fine")
            assert (await client.get("greedy")).state == pb.BOX_STATE_RUNNING
            # It is stopped at some moment of this, and the call with it.
            with contextlib.suppress(grpc.aio.AioRpcError, AssertionError):
                await client.run("greedy", "sh", "-c", "head -c 3000000 /dev/zero > /work/more; sleep 1000")
            stopped = await client.until("greedy", pb.BOX_STATE_STOPPED)
            assert "its changes of /work take more than 4 MiB (changes_mib" in stopped.reason
            script = "echo kept > /work/kept; echo torn > /work/tree/c"
            exit_, _, error = await client.run("crash", "sh", "-c", script)
            assert exit_.exit_code == 0, error.decode()
            await client.delete("idle")
            service.kill()
            os.kill(box.vmm_pid, signal.SIGKILL)
        service.restart()
        async with service.connected() as client:
            await client.until("crash", pb.BOX_STATE_FAILED)
            found = [("added", "kept"), ("modified", "tree/c")]
            assert await changes(client, "crash") == found
            await client.delete("crash")
            assert await changes(client, "crash") == found
            listed = await client.hypervisor.ListChanges(pb.ListChangesRequest())
            ids = [each.box_id for each in listed.changes]
            assert ids == ["greedy", "crash"], "a box without changes keeps none"
            await client.delete("greedy")
