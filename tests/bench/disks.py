"""From a registry to a disk: ours, today's chain of tools, the best peer, and the floor.

    python -m tests.bench.disks [--runs N] [--small]

Every process is started anew, ours with its imports; the page cache is warm, every cache of images
is empty. The floor decompresses the layers (by ISA-L, the fastest that Python has) and computes the
two sums that must be checked, in one thread, and does nothing else. The peer is measured if the
environment names its program: VOIDBOX_BENCH_MSB=/path/to/msb (PyPI: microsandbox).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from isal import igzip_lib

from services.imager.cache import ImageCache
from services.imager.disk import DEFAULT_FREE_MIB, disk_key, find_disk
from services.imager.manifest import host_default
from services.imager.pull import ImageStore
from services.imager.qcow2 import create_overlay
from services.imager.registry_settings import RegistrySettings
from tests.bench.disk_images import BenchImage, large_image, layered_image, small_image
from tests.bench.row import Row
from tests.imager_images import need

ROOT: Final = Path(__file__).resolve().parents[2]
CHUNK: Final = 1 << 20
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What processes took.

    Attributes:
        wall: Seconds by the clock.
        cpu: Seconds of processors.
        said: What the last one printed.
    """

    wall: float
    cpu: float
    said: bytes = b""


def timed(*commands: Sequence[str | Path], env: dict[str, str] | None = None) -> Cost:
    """Run commands one after the other.

    Raises:
        RuntimeError: one failed; the message holds what it said.
    """
    wall = cpu = 0.0
    output = b""
    for command in commands:
        with tempfile.TemporaryFile() as said:
            started = time.perf_counter()
            process = subprocess.Popen(
                [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                cwd=ROOT, env={**os.environ, **(env or {})},
            )  # fmt: skip
            _, status, usage = os.wait4(process.pid, 0)
            wall += time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
            said.seek(0)
            output = said.read()
            if process.returncode:
                raise RuntimeError(f"{command} exited with {process.returncode}: {output[-2000:]!r}")
        cpu += usage.ru_utime + usage.ru_stime
    return Cost(wall=wall, cpu=cpu, said=output)


@contextlib.contextmanager
def registry(place: Path) -> Iterator[str]:
    """Debian's docker-registry on a loopback port; yields host:port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = place / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: info, accesslog: {{disabled: true}}}}\nhttp: {{addr: {address}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {place}/registry}}}}\n"
    )
    log = place / "registry.log"
    os.mkfifo(log)
    with open(os.open(log, os.O_RDWR), "rb") as said:
        program = need("docker-registry", "docker-registry")
        process = subprocess.Popen(
            ["/bin/sh", "-c", 'exec "$0" serve "$1" 2>"$2"', program, config, log], stdin=subprocess.DEVNULL
        )
        try:
            for line in said:  # it says so when it listens
                if b"listening on" in line:
                    break
            yield address
        finally:
            process.terminate()
            process.wait(10)


def floor(blobs: Sequence[Path]) -> Cost:
    """Decompress gzip layers and hash both forms."""
    wall, cpu = time.perf_counter(), time.process_time()
    for blob in blobs:
        packed, unpacked = hashlib.sha256(), hashlib.sha256()
        member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        with blob.open("rb", buffering=0) as file:
            while not member.eof:
                data = file.read(CHUNK // 4) if member.needs_input else b""
                packed.update(data)
                unpacked.update(member.decompress(data, CHUNK))
    return Cost(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def chain(image: BenchImage, reference: str, place: Path) -> Cost:
    """`skopeo copy`, `umoci unpack`, `mke2fs -d`."""
    size = image.unpacked_bytes * 13 // 10 // 1024 + 200 * 1024
    return timed(
        ("skopeo", "--insecure-policy", "copy", "-q", "--src-tls-verify=false", f"docker://{reference}",
         f"oci:{place}/layout:t"),
        ("umoci", "unpack", "--image", f"{place}/layout:t", place / "bundle"),
        ("mke2fs", "-q", "-t", "ext4", "-d", place / "bundle/rootfs", place / "disk.ext4", f"{size}k"),
    )  # fmt: skip


def ours(reference: str, cache: Path) -> Cost:
    """A fresh process that pulls and makes the disk."""
    return timed((sys.executable, "-m", "tests.bench.disk_child", cache, reference))


def compare(image: BenchImage, runs: int, *, times_chain: float, floor_most: float | None) -> list[Row]:
    """All ways from the registry to the disk of one image, in turn."""
    layers = f"{len(image.blobs)} layers" if len(image.blobs) > 1 else "one layer"
    size = f"{image.unpacked_bytes / 1e6:.0f} MB in {image.entries:,} files, {layers}"
    peer = os.environ.get("VOIDBOX_BENCH_MSB", "")
    costs: dict[str, list[Cost]] = {
        name: [] for name in ("chain", "ours", "cached", "archive", "peer", "floor")
    }
    with (
        tempfile.TemporaryDirectory(prefix="vb-disks-", dir=ROOT / ".build") as scratch,
        registry(Path(scratch)) as address,
    ):
        place, reference = Path(scratch), f"{address}/bench:t"
        timed(("skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false",
               f"oci:{image.layout}:t", f"docker://{reference}"))  # fmt: skip
        archive = place / "image.tar"
        timed(("tar", "-C", image.layout, "-cf", archive, "blobs", "index.json", "oci-layout"))
        for _ in range(runs):
            work = place / "work"
            work.mkdir()
            costs["floor"].append(floor(image.blobs))
            costs["ours"].append(ours(reference, work / "cache"))
            shutil.rmtree(work / "cache/disks")
            costs["cached"].append(ours(reference, work / "cache"))
            costs["archive"].append(ours(f"oci-archive:{archive}:t", work / "cache2"))
            shutil.rmtree(work)
            work.mkdir()
            costs["chain"].append(chain(image, reference, work))
            shutil.rmtree(work)
            if peer:
                costs["peer"].append(timed((peer, "load", "-q", "-i", archive), env={"HOME": str(work)}))
                shutil.rmtree(work)

    def median(name: str, what: str = "wall") -> float:
        return statistics.median([cost.wall if what == "wall" else cost.cpu for cost in costs[name]])

    def answers(name: str, place: int) -> list[float]:
        return [float(cost.said.split()[place]) for cost in costs[name]]

    rows = []
    for what, unit in (("wall", "s"), ("cpu", "s of processors")):
        own = f"ours, {unit}" if what == "cpu" else "ours"
        rows += [
            Row(
                what=f"registry to disk, {size}: skopeo copy + umoci unpack + mke2fs -d",
                value=median("chain", what),
                floor_name=own,
                floor=median("ours", what),
                unit=unit,
                least=times_chain if what == "wall" else None,
            ),
            Row(
                what=f"registry to disk, {size}: ours",
                value=median("ours", what),
                floor_name="decompressing and hashing alone, one thread",
                floor=median("floor", what),
                unit=unit,
            ),
            Row(
                what=f"cached layers to disk, {size}: ours",
                value=median("cached", what),
                floor_name="decompressing and hashing alone, one thread",
                floor=median("floor", what),
                unit=unit,
            ),
        ]
        if peer:
            rows.append(
                Row(
                    what=f"archive to disk, {size}: msb load",
                    value=median("peer", what),
                    floor_name=f"{own}, from the same archive",
                    floor=median("archive", what),
                    unit=unit,
                    least=2 if image.name != "small" and what == "wall" else None,
                )
            )
    idle = timed((sys.executable, "-m", "tests.bench.disk_child"))
    rows += [
        Row(
            what=f"registry to disk, {size}: ours, in a service that runs",
            value=statistics.median(answers("ours", 0)),
            floor_name="decompressing and hashing alone, one thread",
            floor=median("floor"),
            unit="s",
            most=floor_most,
        ),
        Row(
            what=f"peak memory, {size}: ours",
            value=max(answers("ours", 1)),
            floor_name="the same process with nothing to do",
            floor=float(idle.said.split()[1]),
            unit="MiB",
            limit=300,
        ),
    ]
    return rows


def second_box(image: BenchImage, runs: int) -> Row:
    """A writable disk over one that is there, from the image's name to the overlay's file."""
    values, floors = [], []
    with tempfile.TemporaryDirectory(prefix="vb-disks-", dir=ROOT / ".build") as scratch:
        store = ImageStore(ImageCache(Path(scratch) / "cache"), RegistrySettings())
        reference = f"oci:{image.layout}:t"
        name = store.disk(store.pull(reference)).path
        found_name = store.catalog.list_images()[0].reference
        for number in range(4 * runs):
            started = time.perf_counter()
            cached = store.catalog.find(found_name, host_default())
            assert cached is not None
            disk = find_disk(store.cache, disk_key(cached.config.diff_ids, DEFAULT_FREE_MIB))
            assert disk is not None
            create_overlay(disk.path, Path(scratch) / f"{number}.qcow2")
            values.append((time.perf_counter() - started) * 1000)
            started = time.perf_counter()
            timed((need("qemu-img", "qemu-utils"), "create", "-q", "-f", "qcow2", "-b", name, "-F", "raw",
                   Path(scratch) / f"{number}.floor"))  # fmt: skip
            floors.append((time.perf_counter() - started) * 1000)
    return Row(
        what="a second box's disk, image in the cache",
        value=statistics.median(values),
        floor_name="qemu-img create of the same overlay",
        floor=statistics.median(floors),
        unit="ms",
        limit=30,
    )


def disk_rows(runs: int, *, large: bool = True) -> list[Row]:
    """All figures about disks."""
    for program, package in (("skopeo", "skopeo"), ("umoci", "umoci"), ("mke2fs", "e2fsprogs")):
        need(program, package)
    small = small_image()
    rows = [*compare(small, runs, times_chain=4, floor_most=1.6), second_box(small, runs)]
    if large:
        for image in (large_image(), layered_image()):
            rows += compare(image, runs, times_chain=8, floor_most=None)
    return rows


def main() -> int:
    """Measure and print as a Markdown table; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.disks", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of each figure (default: 5)")
    parser.add_argument("--small", action="store_true", help="leave the large images out")
    options = parser.parse_args()
    rows = disk_rows(options.runs, large=not options.small)
    print("| what | value | against | value | ratio | goal |\n|---|---:|---|---:|---:|---|")
    for row in rows:
        print(
            f"| {row.what} | {row.value:.2f} {row.unit} | {row.floor_name} | {row.floor:.2f} | "
            f"{row.ratio:.2f} | {row.goal}{' **missed**' if row.missed else ''} |"
        )
    return int(any(row.missed for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
