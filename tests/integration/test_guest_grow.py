"""An image of the imager's is made longer and grown; e2fsck and a kernel that fills it judge the result."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from google_crc32c import value as reference_crc32c

from guest.grow import crc32c, fill_device
from tests.imager_images import Item, build_ext4, check_ext4, directory, make_tar, missing, run

MIB = 1 << 20


def image(path: Path, free_mib: int = 0) -> Path:
    items = [directory(b"d"), *(Item(name=b"d/%d" % n, data=os.urandom(n * 100)) for n in range(100))]
    build_ext4(path, [make_tar(items)], free_bytes=free_mib * MIB)
    return path


def grown(path: Path, mib: int) -> int:
    """The file system's length in MiB after its device has `mib`."""
    with path.open("r+b") as file:
        file.truncate(mib * MIB)
    fill_device(str(path))
    fields = dict(line.split(":", 1) for line in run("dumpe2fs", "-h", path).splitlines() if ":" in line)
    length = int(fields["Block count"]) * 4096
    with path.open("r+b") as file:
        file.truncate(length)
    check_ext4(path)
    return length // MIB


@pytest.mark.parametrize(
    ("free", "wanted", "got"),
    [
        (0, 20, 20),  # within the only group
        (0, 128, 128),
        (0, 129, 128),  # the rest is too short for a group
        (0, 500, 500),
        (200, 9000, 9000),  # a second block of descriptors
        (8000, 20_000, 20_000),
        (0, 100_000, 100_000),
    ],
)
def test_a_fresh_image_takes_all_of_its_device(tmp_path: Path, free: int, wanted: int, got: int) -> None:
    assert grown(image(tmp_path / "disk", free), wanted) == got


def test_lengths_at_random_are_sound(tmp_path: Path) -> None:
    chance = random.Random(5)
    for number in range(12):
        path = image(tmp_path / "disk", chance.choice((0, 1, 127, 1024)))
        wanted = chance.randrange(1100, 12_000)
        assert wanted - 8 < grown(path, wanted) <= wanted, number
        path.unlink()


def test_what_is_beyond_the_room_or_not_ours_or_not_fresh_stays_as_it_is(tmp_path: Path) -> None:
    path = image(tmp_path / "disk")
    before = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate((1 << 20) * MIB + 128 * MIB)
    fill_device(str(path))
    os.truncate(path, len(before))
    assert path.read_bytes() == before
    fill_device(str(path))  # nothing to gain
    assert path.read_bytes() == before
    other = tmp_path / "other"
    run("mke2fs", "-q", "-t", "ext4", other, "16M")
    os.truncate(other, 64 * MIB)
    before = other.read_bytes()
    fill_device(str(other))
    assert other.read_bytes() == before
    garbage = tmp_path / "garbage"
    garbage.write_bytes(random.Random(1).randbytes(MIB))
    fill_device(str(garbage))
    (tmp_path / "empty").touch()
    fill_device(str(tmp_path / "empty"))


def test_a_kernel_fills_a_grown_image_to_the_end(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        missing("mounting an image needs root and loop devices")
    path = image(tmp_path / "disk")
    assert grown(path, 700) == 700
    where = tmp_path / "mounted"
    where.mkdir()
    run("mount", "-o", "loop", path, where)
    try:
        fill = where / "fill"
        with pytest.raises(OSError, match="No space left"), fill.open("wb") as file:
            while True:
                file.write(bytes(MIB))
        assert fill.stat().st_size > 650 * MIB
        fill.unlink()
        for number in range(3000):
            (where / f"{number}").mkdir()
    finally:
        run("umount", where)
    check_ext4(path)


def test_the_checksum_is_crc32c_without_inversion() -> None:
    data = random.Random(2).randbytes(1000)
    assert crc32c(0xFFFFFFFF, data) ^ 0xFFFFFFFF == reference_crc32c(data)
