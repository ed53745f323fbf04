"""A saved machine comes back as it was, cannot be changed, and what is damaged is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import Corrupt
from services.hypervisor import saved
from services.hypervisor.saved import CHUNK, Saved

PAGE = 4096


def make(pages: dict[int, bytes], state: bytes = b"devices") -> Saved:
    """A sealed machine of 2 MiB with `pages` at page numbers."""
    made = saved.empty(2, {"made": "here"})
    for number, content in pages.items():
        os.pwrite(made.memory_fd, content, number * PAGE)
    os.pwrite(made.devices_fd, state, 0)
    made.seal()
    return made


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size + 1, 0)


@pytest.fixture
def machine() -> Iterator[Saved]:
    made = make({0: b"first", 100: b"x" * PAGE, 511: b"last" * 1024})
    yield made
    made.close()


def test_a_machine_on_disk_is_read_back_whole(machine: Saved, tmp_path: Path) -> None:
    saved.write(machine, tmp_path / "m")
    back = saved.read(tmp_path / "m")
    assert content(back.memory_fd) == content(machine.memory_fd)
    assert content(back.devices_fd) == b"devices"
    assert back.facts == {"made": "here"}
    back.close()


def test_the_images_below_its_disks_are_held_until_it_is_removed(machine: Saved, tmp_path: Path) -> None:
    base = tmp_path / "cache.ext4"
    base.write_bytes(bytes(1 << 20))
    saved.write(machine, tmp_path / "without")
    saved.write(machine, tmp_path / "m", bases=[base, tmp_path / "absent"])
    assert base.stat().st_nlink == 2
    assert saved.disk_bytes(tmp_path / "m") <= saved.disk_bytes(tmp_path / "without") + 4096
    saved.read(tmp_path / "m").close()
    shutil.rmtree(tmp_path / "m")
    assert base.stat().st_nlink == 1


@given(st.dictionaries(st.integers(0, 511), st.binary(min_size=1, max_size=PAGE), max_size=8))
def test_any_pages_survive_the_way_to_disk_and_back(
    tmp_path_factory: pytest.TempPathFactory, pages: dict[int, bytes]
) -> None:
    directory = tmp_path_factory.mktemp("saved") / "m"
    made = make(pages)
    saved.write(made, directory)
    back = saved.read(directory)
    assert content(back.memory_fd) == content(made.memory_fd)
    for each in (made, back):
        each.close()
    shutil.rmtree(directory)


def test_its_files_are_private_and_zeros_take_no_disk(tmp_path: Path) -> None:
    made = make({7: b"x"})
    saved.write(made, tmp_path / "m")
    made.close()
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()} == {0o600}
    assert (tmp_path / "m" / saved.RAM).stat().st_size == CHUNK


def test_nobody_changes_a_sealed_machine(machine: Saved, tmp_path: Path) -> None:
    saved.write(machine, tmp_path / "m")
    back = saved.read(tmp_path / "m")
    for each in (machine, back):
        for fd in (each.memory_fd, each.devices_fd):
            with pytest.raises(PermissionError):
                os.pwrite(fd, b"!", 0)
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 0)
            again = saved.reopened(fd, os.O_RDWR)
            with pytest.raises(PermissionError):
                os.pwrite(again, b"!", 0)
            os.close(again)
    back.close()


@pytest.mark.parametrize("name", [saved.MANIFEST, saved.RAM, saved.DEVICES])
@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "remove"])
def test_any_damage_is_found(machine: Saved, tmp_path: Path, name: str, damage: str) -> None:
    saved.write(machine, tmp_path / "m")
    path = tmp_path / "m" / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "grow":
        path.write_bytes(data + b"!")
    else:
        path.unlink()
    if damage == "remove" and name == saved.MANIFEST:
        with pytest.raises(FileNotFoundError):
            saved.read(tmp_path / "m")
        return
    with pytest.raises(Corrupt, match=name):
        saved.read(tmp_path / "m")


@pytest.mark.parametrize(
    "runs", [[[0, CHUNK], [0, CHUNK]], [[CHUNK, CHUNK], [0, CHUNK]], [[0, 0]], [[0, 1 << 40]], [[-1, 2]], "x"]
)
def test_runs_that_overlap_or_leave_the_memory_are_refused(
    machine: Saved, tmp_path: Path, runs: object
) -> None:
    saved.write(machine, tmp_path / "m")
    path = tmp_path / "m" / saved.MANIFEST
    whole = json.loads(path.read_bytes())
    inner = json.loads(whole["content"]) | {"runs": runs}
    whole["content"] = json.dumps(inner)
    whole["digest"] = hashlib.sha256(whole["content"].encode()).hexdigest()
    path.write_text(json.dumps(whole))
    with pytest.raises(Corrupt):
        saved.read(tmp_path / "m")


def test_a_write_that_fails_leaves_nothing(machine: Saved, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "in the way").touch()
    with pytest.raises(OSError, match="not empty"):
        saved.write(machine, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_copy_outlives_its_original(machine: Saved) -> None:
    copy = machine.copy()
    before = content(machine.memory_fd)
    machine.close()
    assert content(copy.memory_fd) == before
    copy.close()
    copy.close()
