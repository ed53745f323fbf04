"""Run the benchmarks and print one table: figure, floor, ratio.

    python -m tests.bench [--runs N] [--disk-runs N]

Every figure is the median of its runs in turn with its floor, on the same machine in the same
minute; single absolute times of a shared machine mean little, the ratios do.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from services.common.errors import VoidboxError
from services.common.paths import Paths
from services.imager.guest_image import build_guest_image
from services.imager.guest_store import GuestImage, load_guest_image
from tests.bench import floor
from tests.bench.disks import disk_rows
from tests.bench.memory import idle_boxes, small_box
from tests.bench.restores import forks, pooled, restores
from tests.bench.row import Row
from tests.vm import Client, HypervisorProcess

MEMORY_MIB = 320
STREAM_MIB = 32
# Limits from the project's requirements: cold boot to first exec, two processors, emulation.
BOOT_LIMIT_SECONDS = {"debian": 8.0, "slim": 4.0}


async def cold_boot(client: Client, image: GuestImage, runs: int, scratch: Path) -> Row:
    """From the request for a box to the exit of its first program; floor: bare QEMU to busybox."""
    tiny = scratch / "floor.cpio"
    tiny.write_bytes(floor.busybox_initramfs(image.initramfs))
    values, floors = [], []
    for number in range(runs):
        floors.append(await floor.boot(image.kernel, tiny, MEMORY_MIB, scratch))
        box = f"bench-{image.flavor}-{number}"
        started = time.monotonic()
        await client.create(
            box,
            kernel_path=str(image.kernel),
            initramfs_path=str(image.initramfs),
            resources={"memory_mib": MEMORY_MIB},
            cold_boot=True,
        )
        ended, _, _ = await client.run(box, "true")
        values.append(time.monotonic() - started)
        assert ended.exit_code == 0
        await client.delete(box)
    return Row(
        what=f"cold boot to first exec, {image.flavor} kernel",
        value=statistics.median(values),
        floor_name="bare QEMU, same kernel, to a busybox init",
        floor=statistics.median(floors),
        unit="s",
        limit=BOOT_LIMIT_SECONDS.get(image.flavor),
    )


async def round_trip(client: Client, box: str, runs: int) -> Row:
    """One program from request to exit, in a running box; floor: the same program inside the guest."""
    values, floors = [], []
    loop = 100
    for _ in range(runs):
        started = time.monotonic()
        await client.run(box, "true")
        values.append((time.monotonic() - started) * 1000)
        started = time.monotonic()
        await client.run(box, "sh", "-c", f"for n in $(seq {loop}); do /bin/busybox true; done")
        floors.append((time.monotonic() - started) * 1000 / loop)
    return Row(
        what="exec round trip",
        value=statistics.median(values),
        floor_name="fork and exec of the same program by a shell in the guest",
        floor=statistics.median(floors),
        unit="ms",
    )


async def throughput(client: Client, box: str, runs: int) -> Row:
    """Standard output through the whole path; floor: the same bytes through a pipe in the guest."""
    values, floors = [], []
    size = STREAM_MIB * 1024 * 1024
    for _ in range(runs):
        started = time.monotonic()
        _, out, _ = await client.run(box, "head", "-c", str(size), "/dev/zero")
        values.append(STREAM_MIB / (time.monotonic() - started))
        assert len(out) == size
        started = time.monotonic()
        await client.run(box, "sh", "-c", f"head -c {size} /dev/zero | cat > /dev/null")
        floors.append(STREAM_MIB / (time.monotonic() - started))
    return Row(
        what="standard output to a client",
        value=statistics.median(values),
        floor_name="the same through a pipe in the guest",
        floor=statistics.median(floors),
        unit="MiB/s",
    )


async def images(cache: Path, console: Console) -> list[GuestImage]:
    """The default guest image, and the slim one if its kernel has been built."""
    default = load_guest_image(cache)
    found = {default.flavor: default}
    for flavor in ("debian", "slim"):
        if flavor in found:
            continue
        try:
            found[flavor] = await build_guest_image(cache, kernel=flavor)
        except VoidboxError as error:
            console.print(f"not measured: {flavor} kernel: {error}")
    if len(found) > 1:
        # Building made another image the default; the user's choice stays.
        await build_guest_image(cache, kernel=default.flavor)  # type: ignore[arg-type]
    return list(found.values())


async def measure(runs: int, console: Console) -> list[Row]:
    """All rows."""
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory(prefix="vb-bench-") as scratch,
        HypervisorProcess(flags=["--ready-size", "1", "--pool-size", "0"]) as hypervisor,
    ):
        async with hypervisor.connected() as client:
            for image in await images(Paths.from_env(os.environ).cache, console):
                rows.append(await cold_boot(client, image, runs, Path(scratch)))
                rows += await restores(hypervisor, client, image, MEMORY_MIB, runs, Path(scratch), console)
                rows += await idle_boxes(client, image, MEMORY_MIB)
                rows.append(await small_box(client, image))
            rows.append(await forks(client, runs, console))
            await client.create("bench")
            rows.append(await round_trip(client, "bench", runs * 4))
            rows.append(await throughput(client, "bench", runs))
            await client.delete("bench")
    rows.append(await pooled(runs, console))
    return rows


def main() -> int:
    """Measure and print; exit code 1 if a figure is over its limit."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="runs of each figure of boxes (default: 20)")
    parser.add_argument("--disk-runs", type=int, default=3, help="runs of each figure of disks (default: 3)")
    options = parser.parse_args()
    runs = options.runs
    console = Console()
    rows = [*asyncio.run(measure(runs, console)), *disk_rows(options.disk_runs)]
    machine = f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}"
    table = Table(title=f"medians of {runs}, of disks {options.disk_runs}; {machine}")
    for column in ("figure", "value", "floor", "ratio", "limit"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for row in rows:
        table.add_row(
            f"{row.what}\n  floor: {row.floor_name}",
            f"{row.value:.2f} {row.unit}",
            f"{row.floor:.2f} {row.unit}",
            f"{row.ratio:.2f}",
            row.goal,
        )
    console.print(table)
    return int(any(row.missed for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
