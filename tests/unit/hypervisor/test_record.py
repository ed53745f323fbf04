"""A box's record survives the disk, and what is damaged is said to be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import Corrupt, Exhausted
from services.hypervisor import record
from services.hypervisor.model import (
    Accelerator,
    BoxConfig,
    BoxRecord,
    Disk,
    Mount,
    MountMode,
    Phase,
    Resources,
    Transport,
)
from services.hypervisor.states import BoxState

TEXT = st.text(max_size=20)
CONFIGS = st.builds(
    BoxConfig,
    kernel_path=TEXT,
    initramfs_path=TEXT,
    resources=st.builds(Resources, memory_mib=st.integers(0, 1 << 20), vcpus=st.integers(1, 64)),
    root_disk=st.none() | st.builds(Disk, base_path=TEXT, writable=st.booleans()),
    disks=st.lists(st.builds(Disk, base_path=TEXT), max_size=2).map(tuple),
    mounts=st.lists(
        st.builds(Mount, host_path=TEXT, guest_path=TEXT, mode=st.sampled_from(MountMode)), max_size=2
    ).map(tuple),
    env=st.dictionaries(TEXT, TEXT, max_size=3),
    accelerator=st.none() | st.sampled_from(Accelerator),
    max_lifetime=st.floats(0, 1e9),
    labels=st.dictionaries(TEXT, TEXT, max_size=3),
)
RECORDS = st.builds(
    BoxRecord,
    id=TEXT,
    config=CONFIGS,
    state=st.sampled_from(BoxState),
    reason=TEXT,
    create_time=st.floats(0, 1e12),
    transport=st.sampled_from(Transport),
    phases=st.lists(st.builds(Phase, name=TEXT, seconds=st.floats(0, 1e3)), max_size=3).map(tuple),
)


@given(RECORDS)
def test_a_record_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, before: BoxRecord) -> None:
    directory = tmp_path_factory.mktemp("box")
    record.save(directory, before)
    assert record.load(directory) == before
    assert [entry.name for entry in directory.iterdir()] == ["state.json"]
    assert (directory / "state.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "[]", '{"version": 2, "box": {}}', '{"version": 1, "box": {}}',
        '{"version": 1, "box": {"id": 3}}', '{"version": 1, "box": {"id": "x", "config": {}, "more": 1}}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(Corrupt, match=r"state\.json is damaged"):
        record.load(tmp_path)


def test_a_full_disk_is_said_to_be_full_and_the_old_file_stays(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("old")
    (tmp_path / ".state.json.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match="Too many levels"):
        record.write_atomically(tmp_path / "state.json", b"new")
    assert (tmp_path / "state.json").read_text() == "old"
    error = record.full_disk(OSError(28, os.strerror(28)), tmp_path)
    assert isinstance(error, Exhausted)
    assert str(tmp_path) in error.message
