"""Memory is promised once, and refusals name numbers and cures."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.common.errors import Exhausted, InvalidInput
from services.hypervisor.admission import (
    OVERHEAD_MIB,
    Host,
    _cgroup_memory,
    check_disk,
    check_resources,
    check_room,
    room,
)
from services.hypervisor.model import BoxConfig, BoxRecord, Resources

HOST = Host(memory_mib=8000, available_mib=7000, cpus=2)


def box(memory: int) -> BoxRecord:
    return BoxRecord(
        id="b",
        config=BoxConfig(kernel_path="/k", initramfs_path="/i", resources=Resources(memory_mib=memory)),
    )


def test_an_empty_host_can_give_what_is_free() -> None:
    assert room(HOST, [], 1.0).memory_mib == 7000


def test_memory_that_a_guest_has_not_touched_yet_is_kept_for_it() -> None:
    need = 1000 + OVERHEAD_MIB
    assert room(HOST, [(box(1000), 0)], 1.0).memory_mib == 7000 - need
    assert room(HOST, [(box(1000), 400)], 1.0).memory_mib == min(8000 - need, 7000 - need + 400)


def test_promises_bound_the_room_even_when_nothing_is_touched() -> None:
    full = [(box(1000), 1000 + OVERHEAD_MIB)] * 6
    assert room(HOST, full, 1.0).memory_mib == 8000 - 6 * (1000 + OVERHEAD_MIB)
    assert room(HOST, full * 2, 1.0).memory_mib == 0
    assert room(HOST, full, 2.0).memory_mib == 7000


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Resources(memory_mib=15), "at least 16"),
        (Resources(memory_mib=8000), "8000 MiB"),
        (Resources(vcpus=0), "1 to 64"),
        (Resources(vcpus=65), "1 to 64"),
        (Resources(disk_mib=-1), "disk_mib"),
    ],
)
def test_what_no_box_can_have_is_bad_input(wanted: Resources, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        check_resources(wanted, HOST)


def test_what_is_not_there_now_is_exhausted() -> None:
    left = room(HOST, [(box(6000), 0)], 1.0)
    check_room(Resources(memory_mib=500), HOST, left, 1.0)
    with pytest.raises(Exhausted, match=r"MEMORY_OVERCOMMIT \(now 1\)"):
        check_room(Resources(memory_mib=1500), HOST, left, 1.0)


def test_the_cgroups_limit_counts(tmp_path: Path) -> None:
    assert _cgroup_memory(tmp_path) == (None, 0)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{5 << 20}\n")
    assert _cgroup_memory(tmp_path) == (None, 5)
    (tmp_path / "memory.max").write_text(f"{512 << 20}\n")
    assert _cgroup_memory(tmp_path) == (512, 5)


def test_this_host_can_be_measured(tmp_path: Path) -> None:
    host = Host.measure()
    assert 0 < host.available_mib <= host.memory_mib
    assert host.cpus > 0
    check_disk(tmp_path)
