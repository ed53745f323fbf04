"""Builds the slim guest kernel from Debian's kernel source: everything built in, no modules.

`python -m services.imager.slim_kernel` (`make kernel`). The result is kept as
`<cache>/kernel/slim-<version>-<config>/vmlinux`; a guest image of kernel "slim" uses it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.common.errors import Exhausted, Internal, VoidboxError, WrongState
from services.common.paths import Paths, private_dir
from services.common.process import CommandFailed, run
from services.imager.debian import Debian
from services.imager.guest_kernel import (
    GuestKernel,
    load_kernel,
    module_entries,
    save_kernel,
    slim_config,
    slim_home,
)
from services.imager.kernel import extract_vmlinux
from services.imager.lock import locked
from services.imager.progress import Progress, Report, silent
from services.imager.terminal import network_env, printer

SOURCE_PACKAGE = "linux-source-6.1"
# Program or header that the build needs -> the package that has it.
_NEEDS = {
    "bc": "bc",
    "bison": "bison",
    "flex": "flex",
    "gcc": "gcc",
    "ld": "binutils",
    "make": "make",
    "nice": "coreutils",
    "strip": "binutils",
    "tar": "tar",
    "xz": "xz-utils",
}
_HEADERS = {"libelf.h": "libelf-dev", "sys/types.h": "libc6-dev"}
# Unpacked source 1.3 GB and objects 0.5 GB, with room to spare.
_ROOM = 3 << 30
# 8 minutes on 2 cores; a loaded single core may take several times that.
_COMPILE_SECONDS = 7200
_UNPACK_SECONDS = 900
# What the build mentions per file; only the progress line depends on it being about right.
_STEPS = 1370
# The kernel's banner names who built it, where and when: the same for everybody.
_BUILD_ENV = {
    "KBUILD_BUILD_USER": "voidbox",
    "KBUILD_BUILD_HOST": "voidbox",
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970",
    "KBUILD_BUILD_VERSION": "1",
}


async def build_slim_kernel(
    cache: Path,
    *,
    jobs: int,
    progress: Report = silent,
    env: Mapping[str, str] | None = None,
) -> GuestKernel:
    """The slim kernel of Debian's present kernel source, built unless it has been.

    Args:
        cache: The cache directory; the build happens there too.
        jobs: Compilers at once. They run at low priority.
        env: Extra environment of apt, see `terminal.network_env`.

    Raises:
        WrongState: a program for the build is missing; the message has the command that installs it.
        Exhausted: too little disk space.
        Unavailable: the source cannot be downloaded.
        CommandFailed: the kernel does not compile.
    """
    debian = Debian(cache, env=env, report=progress)
    packages = await debian.resolve([SOURCE_PACKAGE])
    home = slim_home(cache, packages[0].version)
    async with locked(cache / "kernel" / "slim.lock"):
        if (kept := await asyncio.to_thread(load_kernel, home)) is not None:
            return kept
        await _check_tools()
        _check_room(home.parent)
        await debian.fetch(packages)
        await asyncio.to_thread(_sweep, home.parent)
        scratch = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="slim-build-", dir=home.parent))
        try:
            progress(Progress(subject=SOURCE_PACKAGE, action="unpack"))
            await debian.unpack_into(packages[0], scratch / "package")
            archive = scratch / "package/usr/src" / f"{SOURCE_PACKAGE}.tar.xz"
            await run(
                ["tar", "--extract", "--xz", f"--file={archive}", f"--directory={scratch}"],
                seconds=_UNPACK_SECONDS,
            )
            vmlinux = await _compile(scratch / SOURCE_PACKAGE, jobs, progress)
            return await asyncio.to_thread(
                save_kernel, home, vmlinux, module_entries(), flavor="slim", packages=packages
            )
        finally:
            await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)


async def _compile(source: Path, jobs: int, progress: Report) -> bytes:
    fragment = source / ".voidbox.config"
    fragment.write_bytes(slim_config())
    await run(["make", f"KCONFIG_ALLCONFIG={fragment}", "allnoconfig"], cwd=source, env=_BUILD_ENV)
    if lost := lost_options(slim_config().decode(), (source / ".config").read_text()):
        raise Internal(
            f"this kernel source does not take these settings of slim.config: {', '.join(lost)}",
            reason="BAD_KERNEL_CONFIG",
        )
    steps = 0

    def count(line: str) -> None:
        nonlocal steps
        if re.match(r"  [A-Z]", line):
            steps += 1
            progress(Progress(subject="slim kernel", action="compile", done=min(steps, _STEPS), total=_STEPS))

    argv = ["nice", "-n", "10", "make", f"-j{jobs}", "vmlinux"]
    await run(argv, cwd=source, env=_BUILD_ENV, seconds=_COMPILE_SECONDS, on_line=count)
    await run(["strip", "--strip-all", "-o", source / "vmlinux.stripped", source / "vmlinux"])
    return await asyncio.to_thread(
        lambda: extract_vmlinux((source / "vmlinux.stripped").read_bytes(), "vmlinux")
    )


def lost_options(wanted: str, got: str) -> list[str]:
    """The lines of the configuration `wanted` that did not end up in the configuration `got`.

    kconfig drops an option without a word when what it depends on is off or it was renamed.
    """
    have = set(got.splitlines())
    lost = []
    for line in wanted.splitlines():
        found = re.match(r"(# )?(CONFIG_\w+)(=.*| is not set)$", line)
        if found is None:
            continue
        # An option that is to be off may as well not exist any more.
        off = found[1] is not None
        if (off and re.search(rf"^{found[2]}=", got, re.MULTILINE)) or (not off and line not in have):
            lost.append(line)
    return lost


async def _check_tools() -> None:
    missing = {package for program, package in _NEEDS.items() if shutil.which(program) is None}
    if "gcc" not in missing:
        for header, package in _HEADERS.items():
            try:
                await run(["gcc", "-E", "-include", header, "-x", "c", "/dev/null", "-o", "/dev/null"])
            except CommandFailed:
                missing.add(package)
    if missing:
        words = " ".join(sorted(missing | ({"libelf-dev"} if "gcc" in missing else set())))
        raise WrongState(
            f"building a kernel needs programs that are not installed; type: sudo apt-get install -y {words}",
            reason="PROGRAM_MISSING",
            packages=words,
        )


def _check_room(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < _ROOM:
        raise Exhausted(
            f"building a kernel needs {_ROOM >> 30} GiB in {directory}; {free >> 20} MiB are free",
            reason="DISK_FULL",
            path=directory,
        )


def _sweep(directory: Path) -> None:
    """Remove what a killed build left; nobody else builds while the lock is held."""
    for path in directory.glob("slim-build-*"):
        shutil.rmtree(path, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Build the slim kernel from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m services.imager.slim_kernel", description="Builds the slim kernel."
    )
    parser.add_argument("--cache", type=Path, help="cache directory (default: by XDG rules)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at once")
    options = parser.parse_args(argv)
    cache = options.cache or Paths.from_env(os.environ).cache
    tty = sys.stderr.isatty()

    def write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    try:
        private_dir(cache)
        kernel = asyncio.run(
            build_slim_kernel(
                cache, jobs=options.jobs, progress=printer(tty, write), env=network_env(os.environ)
            )
        )
    except VoidboxError as error:
        write(f"{chr(10) if tty else ''}slim kernel: {error.message}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    if tty:
        write("\r\x1b[K")
    print(f"kernel {kernel.release} {kernel.vmlinux.stat().st_size / 1e6:.1f} MB")
    print(kernel.vmlinux)
    return 0


if __name__ == "__main__":
    sys.exit(main())
