"""Messages to dataclasses and back, pages, watchers, and the directory that holds the boxes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidInput, WrongState
from services.hypervisor import convert
from services.hypervisor.identities import Identities
from services.hypervisor.layout import Layout
from services.hypervisor.model import BoxConfig, BoxRecord, check_box_id
from services.hypervisor.prepare import attachments, choose_cid
from services.hypervisor.watch import Watchers
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

CONFIG = BoxConfig(kernel_path="/k", initramfs_path="/i")


def test_a_configuration_comes_back_as_it_was_asked_for() -> None:
    values: dict[str, Any] = {
        "kernel_path": "/k",
        "initramfs_path": "/i",
        "resources": {"memory_mib": 256, "vcpus": 2, "disk_mib": 64},
        "root_disk": {"base_path": "/r", "base_digest": {"value": "sha256:" + "a" * 64}, "format": "raw"},
        "disks": [
            {"base_path": "/d", "base_digest": {}, "format": "qcow2", "guest_path": "/x", "writable": True}
        ],
        "mounts": [{"host_path": "/h", "guest_path": "/g", "mode": "MOUNT_MODE_OVERLAY"}],
        "env": {"A": "1"},
        "accelerator": pb.ACCELERATOR_TCG,
        "max_lifetime": {"seconds": 5},
        "idle_timeout": {"nanos": 500_000_000},
        "labels": {"l": "v"},
        "hostname": "host",
    }
    message = pb.BoxConfig(**values)
    record = BoxRecord(id="b", config=convert.read_config(message))
    assert convert.box(record).config == message
    assert [(each.source, each.path, each.disk) for each in attachments(record.config)] == [
        ("disk1", "/x", True),
        ("m0", "/g", False),
    ]


def test_empty_fields_get_their_defaults() -> None:
    mounts: Any = [{"host_path": "/h", "guest_path": "/g"}]
    config = convert.read_config(pb.BoxConfig(kernel_path="/k", initramfs_path="/i", mounts=mounts))
    assert (config.resources.memory_mib, config.resources.vcpus) == (1024, 1)
    assert config.mounts[0].mode.value == "ro"


@given(st.integers(0, 10**8), st.integers(0, 999_999_999))
def test_durations_keep_their_microseconds(whole: int, nanos: int) -> None:
    message = convert.duration(whole + nanos / 1e9)
    assert abs(convert.seconds(message, "x") - (whole + nanos / 1e9)) < 1e-6
    assert 0 <= message.nanos < 10**9


@given(st.sets(st.integers(0, 50), max_size=20), st.integers(1, 7))
def test_pages_are_complete_and_in_order(times: set[int], size: int) -> None:
    records = [BoxRecord(id=f"b{n}", config=CONFIG, create_time=float(n // 3)) for n in times]
    seen: list[BoxRecord] = []
    token = ""
    while True:
        page, token = convert.page(records, size, token)
        assert len(page) <= size
        seen += page
        if not token:
            break
    assert seen == sorted(records, key=lambda each: (each.create_time, each.id))


@pytest.mark.parametrize("box_id", ["", "A", "1a", "a_b", "a/b", "..", "a" * 64, "a-", "-a", "ä"])
def test_ids_that_are_no_safe_names_are_refused(box_id: str) -> None:
    with pytest.raises(InvalidInput):
        check_box_id(box_id)


def test_a_cid_is_never_given_twice() -> None:
    taken: set[int] = set()
    for _ in range(100):
        taken.add(choose_cid(taken, Identities(1000, 110)))
    assert len(taken) == len({cid % 110 for cid in taken}) == 100
    assert choose_cid(taken, Identities(1000, 1)) not in taken
    assert min(taken) > 2


async def test_a_slow_watcher_sees_the_newest_state_of_each_box() -> None:
    watchers = Watchers()
    a, b = (BoxRecord(id=name, config=CONFIG) for name in "ab")
    stream = watchers.follow([a], "")
    assert await anext(stream) == (a, False)
    late = BoxRecord(id="b", config=CONFIG, reason="late")
    for change in (b, late):
        watchers.changed(change)
    watchers.deleted(a)
    assert await anext(stream) == (late, False)
    assert await anext(stream) == (a, True)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    watchers.changed(b)
    assert await waiting == (b, False)


def test_a_directory_vanishes_whole_and_an_interrupted_removal_is_finished(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.make()
    (layout.box("b") / "deep").mkdir(parents=True)
    (layout.boxes / ".trash-old").mkdir()
    assert layout.box_ids() == ["b"]
    layout.remove("b")
    layout.remove("b")
    layout.empty_trash()
    assert list(layout.boxes.iterdir()) == []


def test_the_boxes_have_one_owner_at_a_time(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with layout.locked():
        with pytest.raises(WrongState, match="another hypervisor"):
            with layout.locked():
                pass
    with layout.locked():
        pass
