"""A saved machine comes back as it was, cannot be changed, and what is damaged is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import Corrupt
from services.hypervisor import layers, saved
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


PER_CHUNK = CHUNK // PAGE


def filled(*numbers: int, content: bytes = b"x") -> dict[int, bytes]:
    """Pages with these numbers."""
    return dict.fromkeys(numbers, content * PAGE)


def check(directory: Path, made: Saved) -> None:
    """What is at `directory` is `made`."""
    back = saved.read(directory)
    assert content(back.memory_fd) == content(made.memory_fd)
    back.close()


def write_chain(directory: Path, *memories: dict[int, bytes]) -> list[Saved]:
    """Machines with these pages, each saved on top of the one before, as 0, 1, 2, …"""
    machines = [make(memory) for memory in memories]
    for number, machine in enumerate(machines):
        older = [directory / str(each) for each in reversed(range(number))]
        saved.write(machine, directory / str(number), older=older)
    return machines


def test_a_machine_that_is_saved_again_writes_what_has_changed(tmp_path: Path) -> None:
    first = filled(*range(320))
    second = first | filled(3, 100, content=b"y") | filled(500)
    machines = write_chain(tmp_path, first, second)
    assert (tmp_path / "0" / saved.RAM).stat().st_size == 320 * PAGE
    assert (tmp_path / "1" / saved.RAM).stat().st_size == 3 * CHUNK
    assert (tmp_path / "1" / "ram-0").stat().st_ino == (tmp_path / "0" / saved.RAM).stat().st_ino
    for number, machine in enumerate(machines):
        check(tmp_path / str(number), machine)
        machine.close()
    together = sum(saved.disk_bytes(tmp_path / str(number)) for number in range(2))
    assert together < 320 * PAGE + 3 * CHUNK + 64 * 1024  # what both have counts once


def test_what_has_become_zero_is_zero(tmp_path: Path) -> None:
    second = filled(*range(PER_CHUNK, 64))
    machines = write_chain(tmp_path, filled(*range(64)), second, {**second, 0: b"back"})
    for number, machine in enumerate(machines):
        check(tmp_path / str(number), machine)
        machine.close()


def test_an_older_one_may_go_and_the_newer_ones_stay_whole(tmp_path: Path) -> None:
    memories = [filled(*range(64)) | filled(number, content=b"z") for number in (1, 30, 60)]
    machines = write_chain(tmp_path, *memories)
    for gone in (0, 1):
        shutil.rmtree(tmp_path / str(gone))
        check(tmp_path / "2", machines[2])
    for machine in machines:
        machine.close()


@pytest.mark.parametrize("name", [layers.CHUNKS, saved.MANIFEST, saved.RAM])
def test_one_that_lacks_a_file_is_not_built_on(tmp_path: Path, name: str) -> None:
    base, machine = make(filled(*range(64))), make(filled(*range(60)))
    saved.write(base, tmp_path / "0", older=[])
    (tmp_path / "0" / name).unlink()
    saved.write(machine, tmp_path / "1", older=[tmp_path / "missing", tmp_path / "0"])
    assert not (tmp_path / "1" / "ram-0").exists()
    check(tmp_path / "1", machine)
    base.close()
    machine.close()


def test_damage_of_what_two_share_is_found_in_both(tmp_path: Path) -> None:
    for machine in write_chain(tmp_path, filled(*range(64)), filled(*range(63))):
        machine.close()
    with (tmp_path / "0" / saved.RAM).open("r+b") as file:
        file.write(b"!")
    for number in range(2):
        with pytest.raises(Corrupt):
            saved.read(tmp_path / str(number))


def test_a_machine_of_another_size_is_not_built_on(tmp_path: Path) -> None:
    small, large = make(filled(1)), saved.empty(4, {})
    os.pwrite(large.memory_fd, b"x" * PAGE, PAGE)
    large.seal()
    saved.write(small, tmp_path / "0", older=[])
    saved.write(large, tmp_path / "1", older=[tmp_path / "0"])
    assert not (tmp_path / "1" / "ram-0").exists()
    small.close()
    large.close()


def test_layers_do_not_pile_up(tmp_path: Path) -> None:
    history = [filled(*range(64)) | filled(number, content=b"q") for number in range(24)]
    machines = write_chain(tmp_path, *history)
    counts = [len(list((tmp_path / str(number)).glob("ram*"))) for number in range(24)]
    assert counts[:2] == [1, 2]
    assert max(counts) <= layers.MAX_LAYERS
    for number, machine in enumerate(machines):
        check(tmp_path / str(number), machine)
        machine.close()


@given(
    st.lists(
        st.dictionaries(st.integers(0, 511), st.binary(min_size=1, max_size=8), max_size=6),
        min_size=2,
        max_size=4,
    )
)
@settings(max_examples=25)
def test_any_history_is_read_back_at_every_point(
    tmp_path_factory: pytest.TempPathFactory, memories: list[dict[int, bytes]]
) -> None:
    directory = tmp_path_factory.mktemp("history")
    for number, machine in enumerate(write_chain(directory, *memories)):
        check(directory / str(number), machine)
        machine.close()
    shutil.rmtree(directory)


@pytest.mark.parametrize(
    "below", [[{"file": "../x", "runs": [], "digest": ""}], [{"file": "ram-1"}], "x", [1]]
)
def test_layers_with_other_names_are_refused(machine: Saved, tmp_path: Path, below: object) -> None:
    saved.write(machine, tmp_path / "m")
    path = tmp_path / "m" / saved.MANIFEST
    whole = json.loads(path.read_bytes())
    whole["content"] = json.dumps(json.loads(whole["content"]) | {"below": below})
    whole["digest"] = hashlib.sha256(whole["content"].encode()).hexdigest()
    path.write_text(json.dumps(whole))
    with pytest.raises(Corrupt):
        saved.read(tmp_path / "m")
