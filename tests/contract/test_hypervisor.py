"""Every call of HypervisorService, and the forwarding to guests, on the real server with fake machines."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.errors import (
    AlreadyExists,
    Denied,
    Internal,
    InvalidInput,
    NotFound,
    OffsetLost,
    Unavailable,
    VoidboxError,
    WrongState,
)
from services.common.paths import Paths
from services.hypervisor import box as box_module
from services.hypervisor.__main__ import running
from services.hypervisor.config import Config
from services.hypervisor.egress.audit import AuditLog, Event
from services.hypervisor.failure import Remains
from services.hypervisor.layout import EGRESS_FILE, Layout
from tests.contract.hypervisor_fakes import BOOT_ID, FakeGuest
from tests.contract.hypervisor_harness import Harness, harness
from tests.vm import BOX_KEY, refused
from voidbox.common.v1 import common_pb2
from voidbox.guest.v1 import guest_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Harness]:
    async with harness(tmp_path) as made:
        yield made


async def create(service: Harness) -> None:
    box = await service.create("b", labels={"a": "1"}, env={"X": "y"})
    assert (box.id, box.state, box.boot_id, box.origin) == ("b", pb.BOX_STATE_RUNNING, BOOT_ID, "template")
    assert box.config == service.config(
        labels={"a": "1"}, env={"X": "y"}, resources={"memory_mib": 64, "vcpus": 1}
    )
    started = ["prepare", "spawn"]
    template = ["template-spawn", "template-boot", "template-save"]
    assert [phase.name for phase in box.phases] == ["queue", *template, *started, "claim"]
    assert box.create_time.ToNanoseconds() < box.ready_time.ToNanoseconds()
    claim = service.driver.machines["b"].guest.claims[0]
    assert (claim.box_id, claim.hostname, dict(claim.env)) == ("b", "b", {"X": "y"})
    assert (len(claim.secret), len(claim.machine_id), len(claim.entropy)) == (32, 16, 64)
    chosen = await service.create("")
    assert chosen.id.startswith("box-")
    assert [phase.name for phase in chosen.phases] == ["queue", *started, "claim"]
    cold = await service.create("cold", cold_boot=True)
    assert (cold.origin, [phase.name for phase in cold.phases]) == ("boot", ["queue", *started, "boot"])


async def get(service: Harness) -> None:
    assert isinstance(await refused(service.get("b")), NotFound)
    assert isinstance(await refused(service.get("B!")), InvalidInput)
    assert await service.create("b") == await service.get("b")


async def list_boxes(service: Harness) -> None:
    for name in ("c", "a", "b"):
        await service.create(name, labels={"kind": "x"} if name != "a" else {})
    first = await service.hypervisor.ListBoxes(pb.ListBoxesRequest(page_size=2))
    rest = await service.hypervisor.ListBoxes(
        pb.ListBoxesRequest(page_size=2, page_token=first.next_page_token)
    )
    assert [box.id for box in (*first.boxes, *rest.boxes)] == ["c", "a", "b"]
    assert rest.next_page_token == ""
    labelled = await service.hypervisor.ListBoxes(pb.ListBoxesRequest(labels={"kind": "x"}))
    assert [box.id for box in labelled.boxes] == ["c", "b"]
    for bad in (pb.ListBoxesRequest(page_size=-1), pb.ListBoxesRequest(page_token="%%")):
        assert isinstance(await refused(service.hypervisor.ListBoxes(bad)), InvalidInput)


async def watch(service: Harness) -> None:
    await service.create("old")
    seen: list[tuple[str, int, bool]] = []
    stream = service.hypervisor.WatchBoxes(pb.WatchBoxesRequest(), timeout=20)
    changes = aiter(stream)
    change = await anext(changes)
    assert (change.box.id, change.box.state) == ("old", pb.BOX_STATE_RUNNING)
    await service.create("new")
    await service.delete("new")
    async for change in changes:
        seen.append((change.box.id, change.box.state, change.deleted))
        if change.deleted:
            break
    assert ("new", pb.BOX_STATE_RUNNING, False) in seen
    assert seen[-1] == ("new", pb.BOX_STATE_STOPPED, True)
    stream.cancel()

    async def unknown() -> None:
        async for _ in service.hypervisor.WatchBoxes(pb.WatchBoxesRequest(box_id="nobody"), timeout=20):
            pass

    assert isinstance(await refused(unknown()), NotFound)


async def stop(service: Harness) -> None:
    await service.create("b")
    for _ in range(2):
        box = (await service.hypervisor.StopBox(pb.StopBoxRequest(box_id="b"))).box
        assert (box.state, box.reason, box.vmm_pid) == (pb.BOX_STATE_STOPPED, "stopped on request", 0)
        assert box.HasField("end_time")
    request = pb.StopBoxRequest(box_id="b")
    request.grace.FromSeconds(-1)
    assert isinstance(await refused(service.hypervisor.StopBox(request)), InvalidInput)
    assert isinstance(await refused(service.hypervisor.StopBox(pb.StopBoxRequest(box_id="x"))), NotFound)


async def delete(service: Harness) -> None:
    await service.create("b")
    for _ in range(2):
        await service.hypervisor.DeleteBox(pb.DeleteBoxRequest(box_id="b"))
        assert isinstance(await refused(service.get("b")), NotFound)


async def pause(service: Harness) -> None:
    await service.create("b")
    box = (await service.hypervisor.PauseBox(pb.PauseBoxRequest(box_id="b"))).box
    assert box.state == pb.BOX_STATE_PAUSED
    await service.hypervisor.StopBox(pb.StopBoxRequest(box_id="b"))
    error = await refused(service.hypervisor.PauseBox(pb.PauseBoxRequest(box_id="b")))
    assert isinstance(error, WrongState)
    assert "stopped on request" in error.message


async def resume(service: Harness) -> None:
    await service.create("b")
    await service.hypervisor.PauseBox(pb.PauseBoxRequest(box_id="b"))
    for _ in range(2):
        box = (await service.hypervisor.ResumeBox(pb.ResumeBoxRequest(box_id="b"))).box
        assert box.state == pb.BOX_STATE_RUNNING


async def stats(service: Harness) -> None:
    await service.create("b")
    told = await service.hypervisor.GetBoxStats(pb.GetBoxStatsRequest(box_id="b"))
    assert told.resident_bytes > 0
    assert (told.vsock_sent_bytes, told.vsock_received_bytes) == (11, 22)


async def read_console(service: Harness) -> None:
    await service.create("b")

    async def read(offset: int, *, follow: bool = False) -> bytes:
        request = pb.ReadConsoleRequest(box_id="b", offset=offset, follow=follow)
        stream = service.hypervisor.ReadConsole(request, timeout=20)
        return b"".join([piece.data async for piece in stream])

    assert await read(0) == b"hello from the console\n"
    assert await read(-8) == b"console\n"
    assert await read(10**6) == b""
    following = asyncio.create_task(read(6, follow=True))
    service.driver.machines["b"].end(Remains(recorded=True, exit_code=0))
    assert await following == b"from the console\n"


async def read_egress(service: Harness) -> None:
    box = await service.create("b")
    assert not box.config.HasField("egress")
    path = Layout(service.directory / "state").box("b") / EGRESS_FILE

    async def read(offset: int, *, follow: bool = False) -> list[pb.ReadEgressResponse]:
        request = pb.ReadEgressRequest(box_id="b", offset=offset, follow=follow)
        return [answer async for answer in service.hypervisor.ReadEgress(request, timeout=60)]

    assert await read(0) == []
    audit = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    log = AuditLog(audit, "b")
    log.record(Event(kind="dns", allowed=False, name="a.test", reason="no rule"))
    (answer,) = await read(0)
    (event,) = answer.events
    assert (event.kind, event.allowed, event.name, event.reason) == ("dns", False, "a.test", "no rule")
    following = asyncio.create_task(read(answer.next_offset, follow=True))
    log.record(Event(kind="closed", address="192.0.2.1", port=443, sent=1, received=2, duration=0.5))
    os.close(audit)
    service.driver.machines["b"].end(Remains(recorded=True, exit_code=0))
    (answer,) = await following
    assert (answer.events[0].sent_bytes, answer.events[0].received_bytes) == (1, 2)
    assert type(await refused(read(3))) is OffsetLost


async def forward_port(service: Harness) -> None:
    await service.create("b")
    call = service.hypervisor.ForwardPort(timeout=20)
    await call.write(pb.ForwardPortRequest(open=pb.ForwardPortOpen(box_id="b", port=80)))
    answers = aiter(call)
    assert (await anext(answers)).data == b""
    await call.write(pb.ForwardPortRequest(data=b"echo"))
    assert (await anext(answers)).data == b"echo"
    await call.done_writing()
    assert [piece async for piece in answers] == []


async def capabilities(service: Harness) -> None:
    told = await service.hypervisor.GetCapabilities(pb.GetCapabilitiesRequest(refresh=True))
    assert told.host_cpus > 0
    assert 0 < told.available_memory_mib <= told.host_memory_mib
    assert set(told.missing_features) == {"update"}


async def build_template(service: Harness) -> None:
    request = pb.BuildTemplateRequest(config=service.config())
    built = (await service.hypervisor.BuildTemplate(request, timeout=20)).template
    assert built.kernel_path == str(service.kernel)
    assert (built.resources.memory_mib, built.resources.vcpus) == (64, 1)
    assert built.size_bytes > 0
    again = (await service.hypervisor.BuildTemplate(request, timeout=20)).template
    assert (again.id, again.create_time) == (built.id, built.create_time)
    assert len(service.driver.template_plans) == 1
    box = await service.create("b")
    assert [phase.name for phase in box.phases] == ["queue", "prepare", "spawn", "claim"]
    service.driver.refuse = True
    request.config.resources.memory_mib = 128
    assert isinstance(await refused(service.hypervisor.BuildTemplate(request, timeout=20)), WrongState)


async def list_templates(service: Harness) -> None:
    empty = await service.hypervisor.ListTemplates(pb.ListTemplatesRequest())
    assert not empty.templates
    for memory in (64, 65, 66):
        config = service.config(resources={"memory_mib": memory})
        await service.hypervisor.BuildTemplate(pb.BuildTemplateRequest(config=config), timeout=20)
    first = await service.hypervisor.ListTemplates(pb.ListTemplatesRequest(page_size=2))
    rest = await service.hypervisor.ListTemplates(
        pb.ListTemplatesRequest(page_size=2, page_token=first.next_page_token)
    )
    assert [each.resources.memory_mib for each in (*first.templates, *rest.templates)] == [64, 65, 66]


async def delete_template(service: Harness) -> None:
    for name, kind in (("none", NotFound), ("../x", InvalidInput), ("", InvalidInput)):
        call = service.hypervisor.DeleteTemplate(pb.DeleteTemplateRequest(template_id=name))
        assert isinstance(await refused(call), kind)
    request = pb.BuildTemplateRequest(config=service.config())
    built = (await service.hypervisor.BuildTemplate(request, timeout=20)).template
    await service.create("b")
    await service.hypervisor.DeleteTemplate(pb.DeleteTemplateRequest(template_id=built.id))
    assert not (await service.hypervisor.ListTemplates(pb.ListTemplatesRequest())).templates
    assert (await service.get("b")).state == pb.BOX_STATE_RUNNING


async def fork(service: Harness) -> None:
    await service.create("b", labels={"a": "1"})
    request = pb.ForkBoxRequest(box_id="b", fork_ids=["one", "two"])
    answer = await service.hypervisor.ForkBox(request, timeout=20)
    assert [(box.id, box.origin, box.state) for box in answer.boxes] == [
        ("one", "fork", pb.BOX_STATE_RUNNING),
        ("two", "fork", pb.BOX_STATE_RUNNING),
    ]
    assert answer.boxes[0].config.labels == {}
    assert answer.pause.ToNanoseconds() > 0
    parent, one, two = (service.driver.machines[name].guest for name in ("b", "one", "two"))
    assert (parent.frozen, one.frozen, two.frozen) == ([True, False], [False], [False])
    claims = [guest.claims[-1] for guest in (parent, one, two)]
    for field in ("secret", "machine_id", "entropy", "hostname"):
        assert len({getattr(claim, field) for claim in claims}) == 3
    for ids, kind in (([], InvalidInput), (["x", "x"], InvalidInput), (["one"], AlreadyExists)):
        bad = pb.ForkBoxRequest(box_id="b", fork_ids=ids)
        assert isinstance(await refused(service.hypervisor.ForkBox(bad)), kind)
    unknown = pb.ForkBoxRequest(box_id="nobody", fork_ids=["x"])
    assert isinstance(await refused(service.hypervisor.ForkBox(unknown)), NotFound)
    await service.create("keeper", env={"API_KEY": "s3cret"})
    secret = pb.ForkBoxRequest(box_id="keeper", fork_ids=["x"])
    error = await refused(service.hypervisor.ForkBox(secret))
    assert (type(error), error.reason) == (WrongState, "HOLDS_SECRETS")
    assert "s3cret" not in error.message
    secret.allow_secrets = True
    await service.hypervisor.ForkBox(secret, timeout=20)
    await service.create("cold", cold_boot=True)
    cold = pb.ForkBoxRequest(box_id="cold", fork_ids=["y"])
    error = await refused(service.hypervisor.ForkBox(cold))
    assert (type(error), error.reason) == (WrongState, "BOX_BOOTED_COLD")


async def create_snapshot(service: Harness) -> None:
    await service.create("b", env={"TOKEN": "t"})
    request = pb.CreateSnapshotRequest(box_id="b", name="s")
    assert (await refused(service.hypervisor.CreateSnapshot(request))).reason == "HOLDS_SECRETS"
    request.allow_secrets = True
    answer = await service.hypervisor.CreateSnapshot(request, timeout=20)
    assert (answer.snapshot.name, answer.snapshot.box_id, answer.snapshot.has_secrets) == ("s", "b", True)
    assert answer.snapshot.digest.value.startswith("sha256:")
    assert isinstance(await refused(service.hypervisor.CreateSnapshot(request)), AlreadyExists)
    request.name = "../s"
    assert isinstance(await refused(service.hypervisor.CreateSnapshot(request)), InvalidInput)
    config = pb.BoxConfig(snapshot="s", env={"X": "y"})
    created = pb.CreateBoxRequest(box_id="again", config=config)
    box = (await service.hypervisor.CreateBox(created, timeout=20)).box
    assert (box.origin, box.config.kernel_path, dict(box.config.env)) == (
        "snapshot", str(service.kernel), {"X": "y"},
    )  # fmt: skip
    same = (await service.hypervisor.CreateBox(created, timeout=20)).box
    assert same == box
    other = service.config(snapshot="s", resources={"memory_mib": 65})
    error = await refused(service.hypervisor.CreateBox(pb.CreateBoxRequest(box_id="x", config=other)))
    assert (type(error), error.reason) == (InvalidInput, "SNAPSHOT_DIFFERS")


async def get_snapshot(service: Harness) -> None:
    missing = service.hypervisor.GetSnapshot(pb.GetSnapshotRequest(name="s"))
    assert isinstance(await refused(missing), NotFound)
    await service.create("b")
    request = pb.CreateSnapshotRequest(box_id="b", name="s")
    made = (await service.hypervisor.CreateSnapshot(request, timeout=20)).snapshot
    found = (await service.hypervisor.GetSnapshot(pb.GetSnapshotRequest(name="s"))).snapshot
    assert found == made
    assert (found.resources.memory_mib, found.resources.vcpus) == (64, 1)


async def list_snapshots(service: Harness) -> None:
    await service.create("b")
    for name in ("z", "a", "m"):
        request = pb.CreateSnapshotRequest(box_id="b", name=name)
        await service.hypervisor.CreateSnapshot(request, timeout=20)
    first = await service.hypervisor.ListSnapshots(pb.ListSnapshotsRequest(page_size=2))
    rest = await service.hypervisor.ListSnapshots(
        pb.ListSnapshotsRequest(page_size=2, page_token=first.next_page_token)
    )
    assert [each.name for each in (*first.snapshots, *rest.snapshots)] == ["z", "a", "m"]


async def delete_snapshot(service: Harness) -> None:
    await service.create("b")
    await service.hypervisor.CreateSnapshot(pb.CreateSnapshotRequest(box_id="b", name="s"), timeout=20)
    await service.hypervisor.DeleteSnapshot(pb.DeleteSnapshotRequest(name="s"))
    assert isinstance(
        await refused(service.hypervisor.DeleteSnapshot(pb.DeleteSnapshotRequest(name="s"))), NotFound
    )
    config = pb.BoxConfig(snapshot="s")
    gone = service.hypervisor.CreateBox(pb.CreateBoxRequest(box_id="x", config=config))
    assert isinstance(await refused(gone), NotFound)


async def create_volume(service: Harness) -> None:
    made = (await service.hypervisor.CreateVolume(pb.CreateVolumeRequest(name="v", size_mib=64))).volume
    assert (made.name, made.size_mib, made.box_id) == ("v", 64, "")
    assert 0 < made.used_bytes < 4 << 20
    for size in (64, 0):
        same = (await service.hypervisor.CreateVolume(pb.CreateVolumeRequest(name="v", size_mib=size))).volume
        assert same == made
    other = service.hypervisor.CreateVolume(pb.CreateVolumeRequest(name="v", size_mib=65))
    assert isinstance(await refused(other), AlreadyExists)
    for name, size in (("", 64), ("A", 64), ("../v", 64), ("-v", 64), ("w", 63), ("w", -1), ("w", 1 << 25)):
        bad = service.hypervisor.CreateVolume(pb.CreateVolumeRequest(name=name, size_mib=size))
        assert isinstance(await refused(bad), InvalidInput)
    assert len(await volumes(service)) == 1


async def volumes(service: Harness) -> list[pb.Volume]:
    return list((await service.hypervisor.ListVolumes(pb.ListVolumesRequest())).volumes)


async def list_volumes(service: Harness) -> None:
    assert await volumes(service) == []
    requests = [pb.CreateVolumeRequest(name=f"v{number}", size_mib=64) for number in range(3)]
    for request in requests:
        await service.hypervisor.CreateVolume(request)
    page = await service.hypervisor.ListVolumes(pb.ListVolumesRequest(page_size=2))
    rest = await service.hypervisor.ListVolumes(pb.ListVolumesRequest(page_token=page.next_page_token))
    assert {one.name for one in (*page.volumes, *rest.volumes)} == {"v0", "v1", "v2"}
    assert not rest.next_page_token


async def changed_box(service: Harness) -> tuple[Path, Path]:
    """A box with an overlay that it has changed a file of; the host's directory and the overlay's."""
    host = service.kernel.parent / "host"
    host.mkdir()
    for path in (host, *host.parents):
        if path.owner() == "root" and path.is_relative_to(service.kernel.parent):
            path.chmod(0o755)
    (host / "file").write_text("old")
    if os.geteuid() == 0:
        os.chown(host, 1234, 1234)
    mount = common_pb2.Mount(host_path=str(host), guest_path="/w", mode=common_pb2.MOUNT_MODE_OVERLAY)
    await service.create("b", mounts=[mount], labels={"a": "1"})
    (asked,) = service.driver.machines["b"].guest.mounts
    assert asked.mode == common_pb2.MOUNT_MODE_READ_WRITE, "the guest may write to what the host keeps apart"
    [(_, _, _)] = service.driver.plans[-1].overlays
    upper = service.kernel.parent / "state/hypervisor/changes/b/0/upper"
    (upper / "file").write_text("new")
    (upper / "out").symlink_to("/etc")
    return host, upper


async def list_changes(service: Harness) -> None:
    await changed_box(service)
    answer = await service.hypervisor.ListChanges(pb.ListChangesRequest(labels={"a": "1"}))
    [found] = answer.changes
    assert (found.box_id, dict(found.labels), found.ended) == ("b", {"a": "1"}, False)
    assert [each.guest_path for each in found.directories] == ["/w"]
    assert not (await service.hypervisor.ListChanges(pb.ListChangesRequest(labels={"a": "2"}))).changes
    await service.delete("b")
    [found] = (await service.hypervisor.ListChanges(pb.ListChangesRequest())).changes
    assert (found.ended, found.size_bytes) == (True, 8192)
    host = found.directories[0].host_path
    again = common_pb2.Mount(host_path=host, guest_path="/w", mode=common_pb2.MOUNT_MODE_OVERLAY)
    error = await refused(service.create("b", mounts=[again]))
    assert error.reason == "CHANGES_EXIST"


async def read_changes(service: Harness) -> None:
    host, _ = await changed_box(service)
    request = pb.ReadChangesRequest(box_id="b", content=True)
    got = [each async for each in service.hypervisor.ReadChanges(request)]
    assert [each.WhichOneof("result") for each in got] == [
        "directory", "change", "content", "content", "change",
    ]  # fmt: skip
    assert got[0].directory == pb.ChangedDirectory(guest_path="/w", host_path=str(host))
    assert (got[1].change.path, got[1].change.kind) == (b"file", pb.CHANGE_KIND_MODIFIED)
    assert [(each.content.host, each.content.data) for each in got[2:4]] == [(True, b"old"), (False, b"new")]
    assert (got[4].change.target, bool(got[4].change.held)) == (b"/etc", True)
    for bad, kind in (
        (pb.ReadChangesRequest(box_id="c"), NotFound),
        (pb.ReadChangesRequest(box_id="b", guest_path="/x"), NotFound),
        (pb.ReadChangesRequest(box_id="b", paths=[b"../x"]), InvalidInput),
    ):

        async def read(request: pb.ReadChangesRequest = bad) -> None:
            async for _ in service.hypervisor.ReadChanges(request):
                pass

        assert isinstance(await refused(read()), kind)


async def apply_changes(service: Harness) -> None:
    host, _ = await changed_box(service)

    async def apply(**options: Any) -> list[tuple[bytes, bool]]:
        request = pb.ApplyChangesRequest(box_id="b", **options)
        got = [each async for each in service.hypervisor.ApplyChanges(request)]
        return [(each.change.path, each.applied) for each in got[1:]]

    assert await apply(dry_run=True) == [(b"file", True), (b"out", False)]
    assert (host / "file").read_text() == "old"
    assert await apply() == [(b"file", True), (b"out", False)]
    assert (host / "file").read_text() == "new"
    assert await apply(trust=True) == [(b"out", True)]
    assert (host / "out").readlink() == Path("/etc")


async def delete_changes(service: Harness) -> None:
    _, upper = await changed_box(service)
    request = pb.DeleteChangesRequest(box_id="b")
    assert isinstance(await refused(service.hypervisor.DeleteChanges(request)), WrongState)
    await service.delete("b")
    assert upper.exists()
    await service.hypervisor.DeleteChanges(request)
    await service.hypervisor.DeleteChanges(request)
    assert not upper.exists()


async def delete_volume(service: Harness) -> None:
    await service.hypervisor.CreateVolume(pb.CreateVolumeRequest(name="v", size_mib=64))
    disk = pb.Disk(volume="v", guest_path="/data", writable=True)
    await service.create("b", disks=[disk])
    assert [one.box_id for one in await volumes(service)] == ["b"]
    assert (await refused(service.create("c", disks=[disk]))).reason == "VOLUME_IN_USE"
    copy = service.hypervisor.ForkBox(pb.ForkBoxRequest(box_id="b", fork_ids=["f"]), timeout=20)
    assert (await refused(copy)).reason == "HAS_VOLUMES"
    twice = [disk, pb.Disk(volume="v", guest_path="/other", writable=True)]
    assert (await refused(service.create("d", disks=twice))).reason == "BAD_DISK"
    await service.delete("b")
    await service.hypervisor.DeleteVolume(pb.DeleteVolumeRequest(name="v"))
    assert await volumes(service) == []
    for name, kind in (("v", NotFound), ("../x", InvalidInput), ("", InvalidInput)):
        assert isinstance(
            await refused(service.hypervisor.DeleteVolume(pb.DeleteVolumeRequest(name=name))), kind
        )


async def update(service: Harness) -> None:
    await service.create("b", labels={"keep": "1", "drop": "1"}, confinement={"limits": {"processes": 50}})

    def change(**changes: Any) -> pb.UpdateBoxRequest:
        return pb.UpdateBoxRequest(box_id="b", **changes)

    request = change(
        limits={"memory_bytes": 64 << 20, "cpu_millis": 500},
        labels={"drop": "", "new": "x"},
        max_lifetime={"seconds": 500},
    )
    box = (await service.hypervisor.UpdateBox(request)).box
    assert dict(box.config.labels) == {"keep": "1", "new": "x"}
    assert box.config.max_lifetime.seconds == 500
    limits = box.config.confinement.limits
    assert (limits.memory_bytes, limits.cpu_millis, limits.processes) == (64 << 20, 500, 50)
    (told,) = service.driver.machines["b"].guest.limits
    assert told == limits
    # The request that made it still means it, and what it is made of now is no other box's.
    again = await service.create(
        "b", labels={"keep": "1", "drop": "1"}, confinement={"limits": {"processes": 50}}
    )
    assert again.config == box.config
    for changes in ({"resources": {"disk_mib": 5}}, {"resources": {"vcpus": 2}}, {"resources": {"vcpus": -1}},
                    {"resources": {"memory_mib": 65}}, {"limits": {"cpu_millis": -1}}):  # fmt: skip
        error = await refused(service.hypervisor.UpdateBox(change(**changes)))
        assert isinstance(error, InvalidInput), changes
    assert (await service.get("b")).config == box.config
    short = change(max_lifetime={"nanos": 1})
    await service.hypervisor.UpdateBox(short)
    assert "max_lifetime" in (await service.until("b", pb.BOX_STATE_STOPPED)).reason
    error = await refused(service.hypervisor.UpdateBox(short))
    assert isinstance(error, WrongState)


CASES: dict[str, Callable[[Harness], Awaitable[None]]] = {
    "GetCapabilities": capabilities,
    "CreateBox": create,
    "GetBox": get,
    "ListBoxes": list_boxes,
    "WatchBoxes": watch,
    "StopBox": stop,
    "DeleteBox": delete,
    "PauseBox": pause,
    "ResumeBox": resume,
    "GetBoxStats": stats,
    "UpdateBox": update,
    "ReadConsole": read_console,
    "ForwardPort": forward_port,
    "ReadEgress": read_egress,
    "ForkBox": fork,
    "CreateSnapshot": create_snapshot,
    "GetSnapshot": get_snapshot,
    "ListSnapshots": list_snapshots,
    "DeleteSnapshot": delete_snapshot,
    "BuildTemplate": build_template,
    "ListTemplates": list_templates,
    "DeleteTemplate": delete_template,
    "CreateVolume": create_volume,
    "ListVolumes": list_volumes,
    "DeleteVolume": delete_volume,
    "ListChanges": list_changes,
    "ReadChanges": read_changes,
    "ApplyChanges": apply_changes,
    "DeleteChanges": delete_changes,
}
METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["HypervisorService"].methods]


@pytest.mark.parametrize("method", METHODS)
async def test_every_call_does_what_it_says(service: Harness, method: str) -> None:
    await CASES[method](service)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"kernel_path": ""}, InvalidInput, "kernel_path is missing"),
        ({"egress": {"host_ports": [80]}}, InvalidInput, "not enabled"),
        ({"egress": {"enabled": True, "allow": [{"host": "a b"}]}}, InvalidInput, "egress.allow"),
        ({"egress": {"enabled": True, "deny": [{"cidr": "1.2.3.4/8"}]}}, InvalidInput, "egress.deny"),
        ({"egress": {"enabled": True, "host_ports": [0]}}, InvalidInput, "host_ports"),
        ({"snapshot": "s"}, NotFound, "no snapshot 's'"),
        ({"snapshot": "../s"}, InvalidInput, "snapshot name"),
        ({"root_disk": {"volume": "v"}}, InvalidInput, "guest_path"),
        ({"disks": [{"volume": "v", "guest_path": "/d"}]}, InvalidInput, "writable"),
        ({"disks": [{"volume": "../v", "guest_path": "/d", "writable": True}]}, InvalidInput, "../v"),
        ({"disks": [{"volume": "v", "guest_path": "/d", "writable": True}]}, NotFound, "volume create v"),
        ({"accelerator": pb.ACCELERATOR_HVF}, InvalidInput, "ACCELERATOR_HVF"),
        ({"hostname": "a.b"}, InvalidInput, "DNS label"),
        ({"env": {"A=B": "c"}}, InvalidInput, "A=B"),
        ({"root_disk": {"base_path": "/x", "format": "vmdk"}}, InvalidInput, "vmdk"),
        ({"disks": [{"base_path": "/x", "guest_path": "rel"}]}, InvalidInput, "rel"),
        ({"disks": [{"base_path": "/x", "guest_path": "/d"}] * 2}, InvalidInput, "two mounts"),
        ({"disks": [{"base_path": "/x", "guest_path": "/d"}] * 17}, InvalidInput, "at most 16"),
        ({"root_disk": {"base_path": "/x", "base_digest": {"value": "md5:1"}}}, InvalidInput, "sha256"),
        ({"max_lifetime": {"seconds": -1}}, InvalidInput, "max_lifetime"),
        ({"kernel_path": "/etc/hostname"}, InvalidInput, "neither a vmlinux"),
    ],
)
async def test_bad_configurations_are_refused_by_name(
    service: Harness, changes: dict[str, Any], kind: type[VoidboxError], words: str
) -> None:
    error = await refused(service.create("bad", **changes))
    assert type(error) is kind, error
    assert words in error.message
    assert isinstance(await refused(service.get("bad")), NotFound)


async def test_the_secret_is_added_and_never_shown(service: Harness) -> None:
    box = await service.create("b")
    await service.guest.GetGuest(guest_pb2.GetGuestRequest(), metadata=((BOX_KEY, "b"),))
    guest = service.driver.machines["b"].guest
    assert guest.secrets == [guest.claims[0].secret]
    assert guest.claims[0].secret not in box.SerializeToString()
    other = await service.create("c")
    assert service.driver.machines["c"].guest.claims[0].secret != guest.claims[0].secret
    assert other.id == "c"


async def test_health_of_a_box_and_of_the_service_are_two_things(service: Harness) -> None:
    await service.create("b")
    stub: Any = health_pb2_grpc.HealthStub(service.channel)
    own = await stub.Check(health_pb2.HealthCheckRequest())
    assert own.status == health_pb2.HealthCheckResponse.SERVING
    guests = await stub.Check(health_pb2.HealthCheckRequest(service="guest"), metadata=((BOX_KEY, "b"),))
    assert guests.status == health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("method", ["Claim", "Mount", "ConfigureNetwork"])
async def test_reserved_calls_are_denied(service: Harness, method: str) -> None:
    await service.create("b")
    request = getattr(guest_pb2, f"{method}Request")()
    error = await refused(getattr(service.guest, method)(request, metadata=((BOX_KEY, "b"),)))
    assert isinstance(error, Denied)


@pytest.mark.parametrize(
    "item", ["hostname_set", "machine_id_set", "clock_set", "entropy_added", "root_disk_mounted"]
)
async def test_a_guest_that_does_not_confirm_an_item_is_not_served(service: Harness, item: str) -> None:
    class Lax(FakeGuest):
        def __init__(self) -> None:
            super().__init__()
            self.confirm = {item: False}

    service.driver.guest = Lax
    error = await refused(service.create("b"))
    assert isinstance(error, Internal)
    assert error.reason == "CLAIM_UNCONFIRMED"
    assert isinstance(await refused(service.get("b")), NotFound)


async def test_a_start_that_fails_leaves_nothing_and_may_be_tried_again(
    service: Harness, tmp_path: Path
) -> None:
    service.driver.refuse = True
    assert isinstance(await refused(service.create("b")), WrongState)
    assert list((tmp_path / "state/hypervisor/boxes").iterdir()) == []
    service.driver.refuse = False
    assert (await service.create("b")).state == pb.BOX_STATE_RUNNING


async def test_the_same_request_from_many_callers_makes_one_box(service: Harness) -> None:
    boxes = await asyncio.gather(*(service.create("b") for _ in range(10)))
    assert len({box.create_time.ToNanoseconds() for box in boxes}) == 1
    assert len(service.driver.plans) == 1
    error = await refused(service.create("b", labels={"x": "y"}))
    assert isinstance(error, AlreadyExists)


async def test_mounts_are_checked_and_mounted_after_the_claim(service: Harness, tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir(mode=0o755)
    tmp_path.chmod(0o755)
    mount = common_pb2.Mount(host_path=str(share), guest_path="/mnt/a")
    box = await service.create("b", mounts=[mount])
    assert [phase.name for phase in box.phases][-1] == "mount"
    (asked,) = service.driver.machines["b"].guest.mounts
    assert (asked.source, asked.type, asked.path) == ("m0", guest_pb2.MOUNT_TYPE_9P, "/mnt/a")
    assert asked.mode == common_pb2.MOUNT_MODE_READ_ONLY
    missing = common_pb2.Mount(host_path=str(tmp_path / "none"), guest_path="/mnt/a")
    error = await refused(service.create("c", mounts=[missing]))
    assert isinstance(error, InvalidInput)
    assert "c" not in service.driver.machines


async def test_calls_of_a_box_that_dies_end_with_its_reason(service: Harness) -> None:
    await service.create("b")
    call = service.guest.Exec(metadata=((BOX_KEY, "b"),), timeout=20)
    await call.write(guest_pb2.ExecRequest(start=guest_pb2.ExecStart(program="x")))
    events = aiter(call)
    assert (await anext(events)).event.HasField("started")
    service.driver.machines["b"].end(Remains(recorded=True, exit_signal=9))
    error = await refused(anext(events))
    assert isinstance(error, Unavailable)
    assert error.reason == "BOX_DIED"
    assert error.metadata["box"] == "b"
    assert "SIGKILL" in error.metadata["end_reason"]
    box = await service.get("b")
    assert box.state == pb.BOX_STATE_FAILED
    later = await refused(service.guest.GetGuest(guest_pb2.GetGuestRequest(), metadata=((BOX_KEY, "b"),)))
    assert isinstance(later, WrongState)
    assert "SIGKILL" in later.message


async def test_a_tunnel_of_a_box_that_dies_ends_with_its_reason(service: Harness) -> None:
    await service.create("b")
    call = service.hypervisor.ForwardPort(timeout=20)
    await call.write(pb.ForwardPortRequest(open=pb.ForwardPortOpen(box_id="b", port=80)))
    answers = aiter(call)
    await anext(answers)
    service.driver.machines["b"].end(Remains(recorded=True, exit_signal=9))
    error = await refused(anext(answers))
    assert error.reason == "BOX_DIED"
    call.cancel()


async def test_what_the_guest_says_is_unavailable_is_not_taken_for_the_boxs_end(
    service: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(box_module, "END_NOTICE_SECONDS", 3600.0)  # it would be waited for
    await service.create("b")
    service.driver.machines["b"].guest.broken = Unavailable("nobody listens", reason="PORT_CLOSED")
    call = service.guest.GetGuest(guest_pb2.GetGuestRequest(), metadata=((BOX_KEY, "b"),))
    async with asyncio.timeout(120):
        error = await refused(call)
    assert (type(error), error.reason) == (Unavailable, "PORT_CLOSED")


async def test_a_guest_that_powers_off_unasked_has_failed_and_asked_has_stopped(service: Harness) -> None:
    await service.create("a")
    await service.create("b")
    service.driver.machines["a"].guest.on_shutdown()
    await service.guest.Shutdown(guest_pb2.ShutdownRequest(), metadata=((BOX_KEY, "b"),))
    failed = await service.until("a", pb.BOX_STATE_FAILED)
    assert "powered itself off" in failed.reason
    stopped = await service.until("b", pb.BOX_STATE_STOPPED)
    assert "as asked" in stopped.reason


async def test_max_lifetime_and_idle_timeout_end_a_box(service: Harness) -> None:
    await service.create("old", max_lifetime={"nanos": 300_000_000})
    await service.create("idle", idle_timeout={"nanos": 200_000_000})
    assert "max_lifetime" in (await service.until("old", pb.BOX_STATE_STOPPED)).reason
    assert "idle_timeout" in (await service.until("idle", pb.BOX_STATE_STOPPED)).reason


async def test_a_box_in_use_is_not_idle(service: Harness) -> None:
    await service.create("b", idle_timeout={"nanos": 200_000_000})
    call = service.guest.Exec(metadata=((BOX_KEY, "b"),), timeout=20)
    await call.write(guest_pb2.ExecRequest(start=guest_pb2.ExecStart(program="x")))
    events = aiter(call)
    assert (await anext(events)).event.HasField("started")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await service.driver.machines["b"].ended.wait()
    call.cancel()
    assert "idle_timeout" in (await service.until("b", pb.BOX_STATE_STOPPED)).reason


async def test_one_state_directory_has_one_owner(service: Harness, tmp_path: Path) -> None:
    paths = Paths(state=tmp_path / "state", cache=tmp_path / "cache", runtime=tmp_path / "other")
    with pytest.raises(WrongState, match="another hypervisor owns"):
        async with running(Config(), paths):
            pass


@pytest.mark.parametrize("operation", ["pause", "resume", "snapshot", "fork"])
async def test_a_machine_that_dies_of_what_it_is_asked_is_said_to_have_died(
    service: Harness, operation: str
) -> None:
    await service.create("b")
    if operation == "resume":
        await service.hypervisor.PauseBox(pb.PauseBoxRequest(box_id="b"))
    service.driver.machines["b"].dies_when_asked = True
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "pause": lambda: service.hypervisor.PauseBox(pb.PauseBoxRequest(box_id="b"), timeout=60),
        "resume": lambda: service.hypervisor.ResumeBox(pb.ResumeBoxRequest(box_id="b"), timeout=60),
        "snapshot": lambda: service.hypervisor.CreateSnapshot(
            pb.CreateSnapshotRequest(box_id="b", name="s"), timeout=60
        ),
        "fork": lambda: service.hypervisor.ForkBox(pb.ForkBoxRequest(box_id="b", fork_ids=["c"]), timeout=60),
    }
    error = await refused(calls[operation]())
    assert (type(error), error.reason) == (Unavailable, "BOX_DIED")
    assert "SIGKILL" in error.message
    assert (await service.get("b")).state == pb.BOX_STATE_FAILED
    listed = await service.hypervisor.ListSnapshots(pb.ListSnapshotsRequest())
    assert not listed.snapshots
    assert isinstance(await refused(service.get("c")), NotFound)
