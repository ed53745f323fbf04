"""How the time to make a disk grows: 1,000 to 100,000 files, and 0.1 to 4 GB.

    python -m tests.bench.growth [--runs N] [--write]

The layer is in the cache; a fresh process makes the disk. Times are seconds of processors, which
another load of the machine disturbs least. `--write` puts table and plot into `docs/`.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from tests.bench.disk_images import KEPT, BenchImage, open_layout, write_layout
from tests.bench.disks import ROOT, timed

FILES: Final = (1_000, 10_000, 100_000)
GIGABYTES: Final = (0.1, 1.0, 4.0)
FILE_BYTES: Final = 2_000  # of each of the many files
FILES_OF_BYTES: Final = 40  # that share the many bytes
DOCUMENT: Final = ROOT / "docs/benchmarks.md"
PLOT: Final = ROOT / "docs/benchmarks-growth.svg"
_BEGIN, _END = "<!-- growth: begin -->", "<!-- growth: end -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One image: what it has, and the medians of processor seconds and peak memory."""

    entries: int
    unpacked_bytes: int
    cpu: float
    peak_mib: float


def _text(generator: random.Random, size: int) -> bytes:
    """Bytes that compress to about half, as programs and texts do."""
    noise = generator.randbytes(size // 2 + 1)
    return b"".join(noise[at : at + 64] + noise[at // 2 : at // 2 + 64] for at in range(0, len(noise), 64))[
        :size
    ]


def _member(name: str, data: bytes) -> tuple[tarfile.TarInfo, BinaryIO]:
    member = tarfile.TarInfo(name)
    member.size, member.mtime = len(data), 1_700_000_000
    return member, io.BytesIO(data)


def _many_files(count: int) -> Iterator[tuple[tarfile.TarInfo, BinaryIO | None]]:
    generator = random.Random(count)
    for number in range(count):
        yield _member(f"srv/{number // 100}/file-{number}", _text(generator, FILE_BYTES))


def _many_bytes(gigabytes: float) -> Iterator[tuple[tarfile.TarInfo, BinaryIO | None]]:
    block = _text(random.Random(7), 8 << 20)
    size = int(gigabytes * 1e9) // FILES_OF_BYTES
    for number in range(FILES_OF_BYTES):
        yield _member(f"srv/file-{number}", (block * (size // len(block) + 1))[:size])


def _made(name: str, members: Iterator[tuple[tarfile.TarInfo, BinaryIO | None]]) -> BenchImage:
    layout = KEPT / name
    if not layout.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as scratch:
            write_layout(Path(scratch) / "layout", [members], level=1)
            (Path(scratch) / "layout").rename(layout)
    return open_layout(name, layout)


def measure(image: BenchImage, runs: int) -> Point:
    """Medians over runs; the layer is in the cache before the first."""
    cpu, peaks = [], []
    with tempfile.TemporaryDirectory(prefix="vb-growth-", dir=KEPT) as scratch:
        cache = Path(scratch) / "cache"
        command = (sys.executable, "-m", "tests.bench.disk_child", cache, f"oci:{image.layout}:t")
        idle = timed(command[:3])
        timed(command)
        for _ in range(runs):
            shutil.rmtree(cache / "disks")
            cost = timed(command)
            cpu.append(cost.cpu - idle.cpu)
            peaks.append(float(cost.said.split()[1]))
    return Point(
        entries=image.entries,
        unpacked_bytes=image.unpacked_bytes,
        cpu=statistics.median(cpu),
        peak_mib=max(peaks),
    )


def table(files: list[Point], sizes: list[Point]) -> str:
    """Both series as Markdown."""
    lines = [
        "| image | processor time | per file | per MB | peak memory |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {point.entries:,} files of {FILE_BYTES:,} bytes | {point.cpu:.2f} s | "
        f"{point.cpu / point.entries * 1e6:.0f} µs | | {point.peak_mib:.0f} MiB |"
        for point in files
    ]
    lines += [
        f"| {point.unpacked_bytes / 1e9:.1f} GB in {point.entries} files | {point.cpu:.2f} s | | "
        f"{point.cpu / point.unpacked_bytes * 1e9:.2f} ms | {point.peak_mib:.0f} MiB |"
        for point in sizes
    ]
    return "\n".join(lines)


def plot(files: list[Point], sizes: list[Point]) -> str:
    """Both series as bars of cost per unit: flat is good."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 250">',
        "<style>text { font: 12px sans-serif }</style>",
        '<rect width="640" height="250" fill="white"/>',
    ]
    series = [
        ("µs per file", [(f"{p.entries:,}", p.cpu / p.entries * 1e6) for p in files]),
        ("ms per MB", [(f"{p.unpacked_bytes / 1e9:.1f} GB", p.cpu / p.unpacked_bytes * 1e9) for p in sizes]),
    ]
    for panel, (title, bars) in enumerate(series):
        left = 20 + 320 * panel
        parts.append(f'<text x="{left}" y="22" font-weight="bold">Processor time, {title}</text>')
        top = max(value for _, value in bars)
        for number, (label, value) in enumerate(bars):
            height, x = 150 * value / top, left + 90 * number
            parts += [
                f'<rect x="{x}" y="{205 - height:.1f}" width="60" height="{height:.1f}" fill="#4878a8"/>',
                f'<text x="{x + 30}" y="{199 - height:.1f}" text-anchor="middle">{value:.3g}</text>',
                f'<text x="{x + 30}" y="224" text-anchor="middle">{label}</text>',
            ]
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.growth", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="runs of each figure (default: 3)")
    parser.add_argument("--write", action="store_true", help=f"put table and plot into {DOCUMENT.parent}")
    options = parser.parse_args()
    files = [measure(_made(f"files-{n}", _many_files(n)), options.runs) for n in FILES]
    sizes = [measure(_made(f"bytes-{n}", _many_bytes(n)), options.runs) for n in GIGABYTES]
    text = table(files, sizes)
    print(text)
    if options.write:
        before, _, rest = DOCUMENT.read_text().partition(_BEGIN)
        after = rest.partition(_END)[2]
        note = f"Medians of {options.runs}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}."
        DOCUMENT.write_text(f"{before}{_BEGIN}\n{text}\n\n{note}\n{_END}{after}")
        PLOT.write_text(plot(files, sizes))


if __name__ == "__main__":
    main()
