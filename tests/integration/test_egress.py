"""Boxes with a network, run by an unprivileged user: they reach what their policy has, and nothing else.

The servers are on this machine's loopback; the boxes resolve names by a name server of the test.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.hypervisor.pidfd import children
from tests.egress_attempts import ATTEMPTS, SOURCE
from tests.egress_world import WORD, World, own_address, world
from tests.other_user import needs_another_user
from tests.vm import Client, HypervisorProcess, guest_image, host_directory
from voidbox.common.v1 import common_pb2 as common
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

pytestmark = pytest.mark.vm

NOBODY = 65534


@pytest.fixture(scope="module")
def tun() -> Iterator[str]:
    """A tun device that everybody may open, as udev makes it; containers have it closed to others."""
    device = Path("/dev/net/tun")
    if os.geteuid() != 0 or (device.exists() and device.stat().st_mode & 0o006 == 0o006):
        yield str(device)
        return
    with tempfile.TemporaryDirectory(prefix="voidbox-tun-") as name:
        path = Path(name) / "tun"
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(10, 200))
        path.chmod(0o666)
        Path(name).chmod(0o755)
        yield str(path)


@contextlib.contextmanager
def unprivileged(tun: str, dns_port: int, *more: str) -> Iterator[tuple[HypervisorProcess, dict[str, str]]]:
    """The service as `nobody` where this test is root, else as we are; and the kernel that it can read."""
    flags = ["--tun-device", tun, "--name-servers", f"127.0.0.1:{dns_port}", "--hosts-file", "/dev/null"]
    flags += more
    if os.geteuid() != 0:
        with HypervisorProcess(flags=flags) as service:
            yield service, {}
        return
    command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
    with host_directory(NOBODY) as home:
        image = guest_image()
        files = {"kernel_path": image.kernel, "initramfs_path": image.initramfs}
        for file in files.values():
            shutil.copy(file, home)
        service = HypervisorProcess(command=command, flags=flags, directory=home)
        service.log.touch()
        with service:
            yield service, {field: str(home / file.name) for field, file in files.items()}


def policy(outside: World, **more: Any) -> common.EgressPolicy:
    """Two names at loopback, and one port of the host."""
    names = ("ok.test", "strict.test", "rebinding.test", "inside.test")
    return common.EgressPolicy(
        enabled=True,
        allow=[
            common.EgressRule(
                host=name,
                ports=[outside.http_port, outside.tls_port],
                addresses=["127.0.0.1/32"] if name in ("ok.test", "strict.test") else [],
                tls=common.EGRESS_TLS_STRICT if name == "strict.test" else common.EGRESS_TLS_UNSPECIFIED,
            )
            for name in names
        ],
        host_ports=[outside.http_port],
        **more,
    )


async def attempts(client: Client, box: str, outside: World, only: list[str]) -> dict[str, str]:
    """What came of each attempt, made in the box."""
    given = {
        "name": "ok.test",
        "port": outside.http_port,
        "tls_port": outside.tls_port,
        "other_port": outside.forbidden_port,
        "host": own_address(),
        "word": WORD,
        "only": only,
    }
    done, out, err = await client.run(box, "python3", "-c", SOURCE, json.dumps(given))
    assert done.exit_code == 0, err.decode()
    found: dict[str, str] = json.loads(out)
    return found


async def events(client: Client, box: str) -> list[common.EgressEvent]:
    """All events of a box so far."""
    request = pb.ReadEgressRequest(box_id=box)
    return [
        event async for answer in client.hypervisor.ReadEgress(request, timeout=60) for event in answer.events
    ]


async def until_event(client: Client, box: str, kind: str, wanted: str) -> common.EgressEvent:
    """The first event of a kind whose reason holds `wanted`."""
    request = pb.ReadEgressRequest(box_id=box, follow=True)
    async for answer in client.hypervisor.ReadEgress(request, timeout=120):
        for event in answer.events:
            if event.kind == kind and wanted in event.reason:
                return event
    raise AssertionError(f"no event {kind} {wanted}")


@needs_another_user
async def test_no_attempt_gets_past_the_gateway_and_what_is_allowed_is_reached(tun: str) -> None:
    async with world() as outside:
        with unprivileged(tun, outside.dns_port) as (service, files):
            async with service.connected() as client:
                await client.create("caged", **files, egress=policy(outside))
                controls = ["control http", "control TLS", "control declared port"]
                found = await attempts(client, "caged", outside, [*controls, *ATTEMPTS])
                assert {name: found.pop(name) for name in controls} == dict.fromkeys(controls, "reached")
                assert set(found) == set(ATTEMPTS)
                assert len(found) >= 40
                print(json.dumps(found, indent=1))
                assert [name for name, how in found.items() if "reached" in how or "answer" in how] == []
                assert outside.forbidden == []
                assert not [name for name in outside.questions if "tunnel" in name or name == "denied.test"]
                heard = await events(client, "caged")
                assert {event.kind for event in heard} >= {"dns", "tcp", "closed", "udp", "icmp", "gateway"}
                denied = [event for event in heard if not event.allowed]
                assert all(event.reason for event in denied)
                await client.delete("caged")


@needs_another_user
async def test_a_gateway_that_is_killed_comes_back_and_each_copy_of_a_box_has_its_own(tun: str) -> None:
    control = ["control http"]
    async with world() as outside:
        with unprivileged(tun, outside.dns_port) as (service, files):
            async with service.connected() as client:
                await client.create("first", **files, egress=policy(outside))
                keeper = json.loads((service.layout.box("first") / "gateway.json").read_text())["pid"]
                (gateway,) = children(keeper)
                assert (await attempts(client, "first", outside, control))["control http"] == "reached"
                os.kill(gateway, signal.SIGKILL)
                event = await until_event(client, "first", "gateway", "has ended (signal 9)")
                assert not event.allowed
                assert (await attempts(client, "first", outside, control))["control http"] == "reached"

                request = pb.ForkBoxRequest(box_id="first", fork_ids=["copy"])
                await client.hypervisor.ForkBox(request, timeout=120)
                for box in ("first", "copy"):
                    found = await attempts(client, box, outside, [*control, "other name"])
                    assert found["control http"] == "reached", box
                    assert found["other name"] == "Name or service not known"
                assert json.loads((service.layout.box("copy") / "gateway.json").read_text())["pid"] != keeper
                names = {event.name for event in await events(client, "copy") if event.kind == "dns"}
                assert "ok.test" in names
                for box in ("first", "copy"):
                    await client.delete(box)
                assert outside.forbidden == []


@needs_another_user
async def test_a_box_that_boots_afresh_has_a_network_and_one_without_a_policy_has_no_device(tun: str) -> None:
    async with world() as outside:
        with unprivileged(tun, outside.dns_port) as (service, files):
            async with service.connected() as client:
                await client.create("cold", **files, egress=policy(outside), cold_boot=True)
                found = await attempts(client, "cold", outside, ["control http", "host by its address"])
                assert found == {"control http": "reached", "host by its address": "403"}
                await client.delete("cold")
                await client.create("plain", **files)
                _, out, _ = await client.run("plain", "ls", "/sys/class/net")
                assert out.split() == [b"lo"]
                assert await events(client, "plain") == []
                await client.delete("plain")
