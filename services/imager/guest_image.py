"""The guest image: kernel and initramfs that every box without files of its own boots.

Built without root from Debian packages, pinned wheels and this project's `guest/`:

    <cache>/guest/<digest>/{vmlinux,initramfs.cpio,manifest.json}
    <cache>/guest/default -> <digest>

The same inputs give the same bytes. A directory appears by fsync and rename once it is
whole; a killed build leaves only a scratch directory that the next one removes.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from services.common.errors import VoidboxError
from services.common.paths import Paths, private_dir
from services.imager import cpio
from services.imager.bytecode import Interpreter, compile_sources
from services.imager.debian import Debian, Package, sync_tree
from services.imager.guest_kernel import (
    Flavor,
    GuestKernel,
    debian_kernel,
    debian_kernel_packages,
    file_kernel,
    slim_kernel,
)
from services.imager.guest_project import project_files, project_root
from services.imager.guest_python import (
    LOADER,
    PRIVATE,
    SITE,
    STDLIB,
    beside_source,
    shared_libraries,
    sourceless,
    stdlib_files,
    wheel_files,
)
from services.imager.guest_store import (
    SCRATCH,
    GuestImage,
    file_sha256,
    image_digest,
    link_or_copy,
    load_guest_image,
    remove,
    settle,
    sweep,
    take_over,
)
from services.imager.lock import locked
from services.imager.progress import Progress, Report, silent
from services.imager.rootfs import base_entries, busybox_entries
from services.imager.terminal import network_env, printer
from services.imager.wheels import Wheel, fetch_wheels

PYTHON = "usr/bin/python3.11"
PACKAGES = (
    "base-files",
    "busybox-static",
    "libbz2-1.0",
    "libc6",
    "libexpat1",
    "libffi8",
    "libgcc-s1",
    "liblzma5",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libstdc++6",
    "python3.11-minimal",
    "zlib1g",
)
# Empty since glibc 2.34 (but libm), and still named by most programs that come on disks, agents' above all.
GLIBC_PARTS = ("libdl.so.2", "libm.so.6", "libpthread.so.0", "librt.so.1")


async def build_guest_image(
    cache: Path,
    *,
    kernel: Flavor | Path = "debian",
    progress: Report = silent,
    env: Mapping[str, str] | None = None,
    source: Path | None = None,
    refresh: bool = False,
    make_default: bool = True,
) -> GuestImage:
    """Build the guest image; what has not changed is not built again.

    Args:
        cache: The cache directory.
        kernel: Debian's kernel, the slim one, or a kernel file with all drivers built in.
        progress: Told of each step.
        env: Extra environment of apt and pip, see `terminal.network_env`.
        source: Directory with `guest/` and `voidbox/`; this project's own if not given.
        refresh: Ask Debian's mirrors for newer packages.
        make_default: Let `default` name it.

    Raises:
        Unavailable: something must be downloaded and cannot be.
        NotFound: `kernel` is "slim" and has not been built, or is no file.
        WrongState: a program is missing on this host; the message says which.
        CommandFailed: a file of `guest/` does not compile.
    """
    home = cache / "guest"
    await asyncio.to_thread(home.mkdir, parents=True, exist_ok=True)
    async with locked(home / "lock"):
        builder = _Builder(cache, source or project_root(), env or {}, progress)
        image = await builder.build(kernel, refresh=refresh)
        await asyncio.to_thread(settle, cache, image, make_default=make_default)
        return image


class _Builder:
    """One build, under the lock."""

    def __init__(self, cache: Path, source: Path, env: Mapping[str, str], report: Report) -> None:
        self._cache = cache
        self._home = cache / "guest"
        self._source = source
        self._env = env
        self._report = report
        self._debian = Debian(cache, env=env, report=report)

    async def build(self, kernel: Flavor | Path, *, refresh: bool) -> GuestImage:
        await asyncio.to_thread(self._sweep)
        packages = await self._debian.resolve(PACKAGES, refresh=refresh)
        prepared = await self._kernel(kernel, refresh)
        project = await asyncio.to_thread(lambda: dict(project_files(self._source)))
        lock = self._source / "guest" / "requirements.lock"
        wheels = await fetch_wheels(lock, self._cache, env=self._env, report=self._report)
        base_key = _fingerprint(_builder_sources(), [p.sha256 for p in packages], [w.sha256 for w in wheels])
        described = [
            (name, mode, hashlib.sha256(content).hexdigest()) for name, (mode, content) in project.items()
        ]
        modules = await asyncio.to_thread(file_sha256, prepared.modules)
        key = _fingerprint(base_key, prepared.sha256, modules, described)
        if (built := await asyncio.to_thread(self._built, key)) is not None:
            return built
        await self._debian.fetch(packages)
        trees = [await self._debian.unpack(package) for package in packages]
        base = await self._base(base_key, trees, wheels)
        entries = [*base, *await self._project_entries(project, trees)]
        self._report(Progress(subject="guest image", action="write"))
        return await asyncio.to_thread(self._write, key, prepared, entries, packages, wheels)

    async def _kernel(self, kernel: Flavor | Path, refresh: bool) -> GuestKernel:
        if kernel == "debian":
            packages = await debian_kernel_packages(self._debian, refresh=refresh)
            return await debian_kernel(packages, self._debian, self._cache, self._report)
        if kernel == "slim":
            return await asyncio.to_thread(slim_kernel, self._cache)
        return await asyncio.to_thread(file_kernel, Path(kernel), self._cache)

    def _sweep(self) -> None:
        """Remove what a killed build left; nobody else builds while the lock is held."""
        sweep(self._home)
        leavings = [(self._cache / "debian/trees").glob("unpack-*")]
        leavings += [
            (self._cache / "kernel").glob(name) for name in ("unpack-*", "debian-save-*", "file-save-*")
        ]
        for path in chain.from_iterable(leavings):
            remove(path)

    def _built(self, key: str) -> GuestImage | None:
        """The image that these inputs gave before."""
        try:
            digest = (self._home / "inputs" / key).read_text()
            return load_guest_image(self._cache, digest)
        except (OSError, VoidboxError):
            return None

    async def _base(self, key: str, trees: Sequence[Path], wheels: Sequence[Wheel]) -> list[cpio.Entry]:
        """Everything but kernel modules and this project's files, kept as an archive by `key`."""
        kept = self._home / "base" / f"{key}.cpio"
        if not await asyncio.to_thread(kept.is_file):
            entries = await self._base_entries(trees, wheels)
            await asyncio.to_thread(_write_base, kept, entries)
        return await asyncio.to_thread(lambda: list(cpio.read_archive(kept.read_bytes())))

    async def _base_entries(self, trees: Sequence[Path], wheels: Sequence[Wheel]) -> list[cpio.Entry]:
        tree = dict(zip(PACKAGES, trees, strict=True))
        debian_version = (tree["base-files"] / "etc/debian_version").read_text().strip()
        entries = [*base_entries(debian_version), *await busybox_entries(tree["busybox-static"])]
        files: dict[str, bytes] = await asyncio.to_thread(
            lambda: (
                {name: path.read_bytes() for name, path in stdlib_files(trees).items()} | wheel_files(wheels)
            )
        )
        interpreter = _interpreter(tree)
        sources = {f"/{name}": content for name, content in files.items() if name.endswith(".py")}
        entries += sourceless(await compile_sources(interpreter, sources, report=self._report))
        entries += (
            cpio.file(name, content, 0o755 if name.endswith(".so") else 0o644)
            for name, content in files.items()
            if not name.endswith(".py")
        )
        programs = {name: content for name, content in files.items() if name.endswith(".so")}
        programs[PYTHON] = interpreter.program.read_bytes()
        entries.append(cpio.file(PYTHON, programs[PYTHON], 0o755))
        entries.append(cpio.symlink("usr/bin/python3", "python3.11"))
        entries.append(cpio.symlink("usr/bin/python", "python3.11"))
        libraries = await asyncio.to_thread(shared_libraries, programs, trees, GLIBC_PARTS)
        entries += (cpio.file(name, path.read_bytes(), 0o755) for name, path in libraries.items())
        entries.append(cpio.file(LOADER, interpreter.loader.read_bytes(), 0o755))
        # A directory of its own permissions for what only the agent may read.
        entries += (cpio.directory(PRIVATE, 0o700), cpio.directory(SITE, 0o700))
        return entries

    async def _project_entries(
        self, project: Mapping[str, tuple[int, bytes]], trees: Sequence[Path]
    ) -> list[cpio.Entry]:
        interpreter = _interpreter(dict(zip(PACKAGES, trees, strict=True)))
        sources = {f"/{name}": content for name, (_, content) in project.items() if name.endswith(".py")}
        compiled = await compile_sources(interpreter, sources, report=self._report)
        entries = [cpio.file(name, content, mode) for name, (mode, content) in project.items()]
        return [*entries, *beside_source(compiled)]

    def _write(
        self,
        key: str,
        kernel: GuestKernel,
        entries: Sequence[cpio.Entry],
        packages: Sequence[Package],
        wheels: Sequence[Wheel],
    ) -> GuestImage:
        scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self._home))
        try:
            scratch.chmod(0o755)
            # Not compressed: by instructions until the agent's libraries are imported (QEMU -icount,
            # Debian's kernel), plain 2.31 G, lz4 2.47 G, zstd 3.04 G, gzip 3.19 G. What lz4 would save
            # (29 MB) is needed only while the archive is unpacked, and free again afterwards.
            with (scratch / "initramfs.cpio").open("wb") as out:
                size = cpio.write_archive([*entries, *cpio.read_archive(kernel.modules.read_bytes())], out)
            link_or_copy(kernel.vmlinux, scratch / "vmlinux")
            initramfs = file_sha256(scratch / "initramfs.cpio")
            digest = image_digest(kernel.sha256, initramfs)
            manifest = {
                "digest": digest,
                "kernel": {
                    "flavor": kernel.flavor,
                    "release": kernel.release,
                    "sha256": kernel.sha256,
                    "size": kernel.vmlinux.stat().st_size,
                },
                "initramfs": {"sha256": initramfs, "size": size, "compression": "none"},
                "packages": [_described(package) for package in (*packages, *kernel.packages)],
                "wheels": [_described(wheel) for wheel in wheels],
            }
            (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            sync_tree(scratch)
            image = take_over(self._cache, scratch, digest)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        _write_text(self._home / "inputs" / key, digest)
        return image


def _interpreter(tree: Mapping[str, Path]) -> Interpreter:
    return Interpreter(
        loader=tree["libc6"] / "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
        libraries=tuple(
            tree[name] / part / "x86_64-linux-gnu" for name in tree for part in ("lib", "usr/lib")
        ),
        program=tree["python3.11-minimal"] / PYTHON,
        home=tree["libpython3.11-minimal"] / "usr",
        modules=tree["libpython3.11-stdlib"] / STDLIB,
    )


def _builder_sources() -> list[str]:
    """Digests of the code that decides what the image holds, so that a change builds anew."""
    names = ("bytecode", "cpio", "guest_image", "guest_project", "guest_python", "rootfs", "wheels")
    return [file_sha256(Path(__file__).with_name(f"{name}.py")) for name in names]


def _write_base(kept: Path, entries: Sequence[cpio.Entry]) -> None:
    kept.parent.mkdir(exist_ok=True)
    scratch = kept.with_suffix(".part")
    with scratch.open("wb") as out:
        cpio.write_archive(entries, out)
        out.flush()
        os.fsync(out.fileno())
    scratch.rename(kept)


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(text)
    scratch.rename(path)


def _described(thing: Package | Wheel) -> dict[str, str]:
    return {"name": thing.name, "version": thing.version, "sha256": thing.sha256}


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def main(argv: Sequence[str] | None = None) -> int:
    """Build the default guest image from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m services.imager.guest_image", description="Builds the guest image."
    )
    parser.add_argument(
        "--kernel", default="debian", help="debian, slim, or the path of a kernel (default: debian)"
    )
    parser.add_argument("--cache", type=Path, help="cache directory (default: by XDG rules)")
    parser.add_argument(
        "--source", type=Path, help="directory with guest/ and voidbox/ (default: this project)"
    )
    parser.add_argument("--refresh", action="store_true", help="look for newer Debian packages")
    parser.add_argument("--no-default", action="store_true", help="leave the default image as it is")
    parser.add_argument(
        "--if-needed",
        action="store_true",
        help="bring the default image up to date with its sources, with the kernel it has",
    )
    options = parser.parse_args(argv)
    cache = options.cache or Paths.from_env(os.environ).cache
    kernel: Flavor | Path = options.kernel if options.kernel in ("debian", "slim") else Path(options.kernel)
    tty = sys.stderr.isatty()

    def write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    try:
        private_dir(cache)
        if options.if_needed:
            kernel = _present_flavor(cache, kernel)
        image = asyncio.run(
            build_guest_image(
                cache,
                kernel=kernel,
                progress=printer(tty, write),
                env=network_env(os.environ),
                refresh=options.refresh,
                source=options.source,
                make_default=not options.no_default,
            )
        )
    except VoidboxError as error:
        write(f"{chr(10) if tty else ''}guest image: {error.message}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    if tty:
        write("\r\x1b[K")
    print(image.digest)
    print(f"kernel {image.release} {_megabytes(image.kernel)}, initramfs {_megabytes(image.initramfs)}")
    print(image.directory)
    return 0


def _present_flavor(cache: Path, otherwise: Flavor | Path) -> Flavor | Path:
    """The kernel of the default image, if it can still be built with; else `otherwise`."""
    try:
        if load_guest_image(cache).flavor == "slim":
            slim_kernel(cache)
            return "slim"
    except VoidboxError:
        pass
    return otherwise


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
