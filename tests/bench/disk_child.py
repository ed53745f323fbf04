"""Pull an image and make its disk in a fresh process: `python -m tests.bench.disk_child CACHE REFERENCE`.

Prints the seconds from the call to the disk, without what starting Python took, and the peak of its
memory in MiB. Without arguments it does nothing but start.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from services.imager.cache import ImageCache
from services.imager.pull import ImageStore
from services.imager.registry_settings import RegistrySettings


def main() -> None:
    """Pull and build."""
    started = time.perf_counter()
    if len(sys.argv) > 1:
        store = ImageStore(ImageCache(Path(sys.argv[1])), RegistrySettings())
        store.prepare(sys.argv[2])
    seconds = time.perf_counter() - started
    # Not getrusage: its peak is at least that of the process that started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    print(seconds, int(peak[1]) / 1024)


if __name__ == "__main__":
    main()
