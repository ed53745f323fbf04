"""The guest's kernel and its modules, prepared once per kernel and kept.

`<cache>/kernel/<name>/` holds `vmlinux`, `modules.cpio` (the modules and their load lists,
ready to be merged into an initramfs) and `kernel.json`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from services.common.errors import Corrupt, InvalidInput, NotFound
from services.imager import cpio
from services.imager.debian import Debian, Package, sync_tree
from services.imager.kernel import (
    MAX_BZIMAGE,
    MAX_VMLINUX,
    Module,
    ModuleTree,
    extract_vmlinux,
    kernel_release,
)
from services.imager.progress import Progress, Report

Flavor = Literal["debian", "slim"]

# Each module costs boot time, so only what answers on vsock is loaded at boot ...
BOOT_MODULES = ("virtio_pci", "vmw_vsock_virtio_transport")
# ... and the rest when something asks for it. crc32c_generic is what ext4 gets from the
# crypto API by name; no .modinfo says so, and the guest has no modprobe to be asked.
LAZY_MODULES: Mapping[str, Sequence[str]] = {
    "9p": ("9pnet_virtio", "9p"),
    "balloon": ("virtio_balloon",),
    "blk": ("virtio_blk",),
    "console": ("virtio_console",),
    "ext4": ("virtio_blk", "crc32c_generic", "ext4"),
    "fuse": ("fuse",),
    "mmio": ("virtio_mmio",),
    "net": ("virtio_net",),
    "overlay": ("overlay",),
    "rng": ("virtio_rng",),
    "virtiofs": ("virtiofs",),
}
LISTS = "lib/modules/voidbox"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestKernel:
    """One prepared kernel.

    Attributes:
        flavor: "debian", "slim" or "file".
        release: What `uname -r` says.
        sha256: Of `vmlinux`.
        packages: The Debian packages it was made from.
    """

    directory: Path
    flavor: str
    release: str
    sha256: str
    packages: tuple[Package, ...] = ()

    @property
    def vmlinux(self) -> Path:
        """The bootable ELF file."""
        return self.directory / "vmlinux"

    @property
    def modules(self) -> Path:
        """An archive with the modules and their load lists."""
        return self.directory / "modules.cpio"


async def debian_kernel_packages(debian: Debian, *, refresh: bool = False) -> tuple[Package, ...]:
    """The package that `linux-image-amd64` stands for today."""
    (meta,) = await debian.resolve(["linux-image-amd64"], refresh=refresh)
    found = re.match(r"(linux-image-[\w.+-]+)\s*(\(= [^)]+\))?$", meta.depends.split(",")[0].strip())
    if found is None:
        raise Corrupt(f"linux-image-amd64 depends on {meta.depends!r}, no kernel", reason="BAD_PACKAGE")
    return await debian.resolve([found[1]], refresh=refresh)


async def debian_kernel(
    packages: Sequence[Package], debian: Debian, cache: Path, report: Report
) -> GuestKernel:
    """Debian's own kernel, unpacked to `vmlinux`, with the modules that a guest may need."""
    (package,) = packages
    recipe = json.dumps([BOOT_MODULES, dict(LAZY_MODULES), package.sha256], sort_keys=True)
    home = cache / "kernel" / f"debian-{package.version}-{_sha256(recipe.encode())[:12]}"
    if (kept := await asyncio.to_thread(load_kernel, home)) is not None:
        return kept
    await debian.fetch(packages)
    report(Progress(subject=f"kernel {package.version}", action="unpack"))
    home.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="unpack-", dir=home.parent))
    try:
        # 400 MB, of which 3 MB are wanted: unpacked here and not kept.
        await debian.unpack_into(package, scratch / "tree")
        return await asyncio.to_thread(_from_tree, scratch / "tree", home, packages)
    finally:
        await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)


def _from_tree(tree: Path, home: Path, packages: Sequence[Package]) -> GuestKernel:
    images = sorted((tree / "boot").glob("vmlinuz-*"))
    if len(images) != 1:
        raise Corrupt(f"{packages[0].name} holds {len(images)} kernels", reason="BAD_PACKAGE")
    release = images[0].name.removeprefix("vmlinuz-")
    vmlinux = extract_vmlinux(images[0].read_bytes(), images[0].name)
    modules = ModuleTree(tree, release)
    boot = modules.closure(BOOT_MODULES)
    at_boot = {module.name for module in boot}
    lazy = {
        name: [module for module in modules.closure(wanted) if module.name not in at_boot]
        for name, wanted in LAZY_MODULES.items()
    }
    return save_kernel(home, vmlinux, module_entries(boot, lazy), flavor="debian", packages=packages)


def module_entries(
    boot: Sequence[Module] = (), lazy: Mapping[str, Sequence[Module]] | None = None
) -> Iterator[cpio.Entry]:
    """The modules and the lists that PID 1 loads by: absolute paths in load order.

    A lazy list leaves out what `boot` has; two lazy lists may share modules, so a loader
    takes "already loaded" for success.
    """
    lists = {"boot": boot, **{f"lazy/{name}": () for name in LAZY_MODULES}}
    lists |= {f"lazy/{name}": modules for name, modules in (lazy or {}).items()}
    for name, modules in lists.items():
        yield cpio.file(f"{LISTS}/{name}", "".join(f"/{module.path}\n" for module in modules).encode())
        for module in modules:
            yield cpio.file(str(module.path), module.content)


def save_kernel(
    home: Path,
    vmlinux: bytes,
    modules: Iterator[cpio.Entry],
    *,
    flavor: str,
    packages: Sequence[Package] = (),
) -> GuestKernel:
    """Keep a kernel at `home`, which appears whole or not at all."""
    home.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{flavor}-save-", dir=home.parent))
    try:
        scratch.chmod(0o755)
        (scratch / "vmlinux").write_bytes(vmlinux)
        with (scratch / "modules.cpio").open("wb") as out:
            cpio.write_archive(modules, out)
        about = {
            "flavor": flavor,
            "release": kernel_release(vmlinux, home.name),
            "sha256": _sha256(vmlinux),
            "packages": [asdict(package) for package in packages],
        }
        (scratch / "kernel.json").write_text(json.dumps(about, indent=1))
        sync_tree(scratch)
        if home.exists():
            shutil.rmtree(home)
        scratch.rename(home)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    kept = load_kernel(home)
    assert kept is not None
    return kept


def load_kernel(home: Path) -> GuestKernel | None:
    """The kernel kept at `home`; None if there is none or it is not whole."""
    try:
        about = json.loads((home / "kernel.json").read_bytes())
        packages = tuple(Package(**package) for package in about.pop("packages"))
        kernel = GuestKernel(directory=home, packages=packages, **about)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return kernel if kernel.vmlinux.is_file() and kernel.modules.is_file() else None


def slim_config() -> bytes:
    """The slim kernel's configuration."""
    return (Path(__file__).parent / "data" / "slim.config").read_bytes()


def slim_home(cache: Path, version: str) -> Path:
    """Where the slim kernel of source version `version` is kept."""
    return cache / "kernel" / f"slim-{version}-{_sha256(slim_config())[:12]}"


def slim_kernel(cache: Path) -> GuestKernel:
    """The slim kernel that has been built last with the present configuration.

    Raises:
        NotFound: none has been built.
    """
    homes = (cache / "kernel").glob(f"slim-*-{_sha256(slim_config())[:12]}")
    for home in sorted(homes, key=lambda home: home.stat().st_mtime, reverse=True):
        if (kept := load_kernel(home)) is not None:
            return kept
    raise NotFound(
        "no slim kernel of the present configuration has been built; type `make kernel` (takes 8 minutes)",
        reason="NO_SLIM_KERNEL",
    )


def file_kernel(path: Path, cache: Path) -> GuestKernel:
    """A kernel that the user names: bzImage or vmlinux with all drivers built in.

    Raises:
        NotFound: there is no such file.
        InvalidInput, Corrupt: it is no kernel that can be booted directly.
    """
    try:
        if not path.is_file():
            raise NotFound(f"{path}: no such kernel file", reason="NO_KERNEL", path=path)
        if path.stat().st_size > max(MAX_VMLINUX, MAX_BZIMAGE):
            raise InvalidInput(f"{path} is too large for a kernel", reason="NOT_A_KERNEL", path=path)
        image = path.read_bytes()
    except OSError as error:
        raise NotFound(f"{path}: {error.strerror}", reason="NO_KERNEL", path=path) from error
    home = cache / "kernel" / f"file-{_sha256(image)[:24]}"
    return load_kernel(home) or save_kernel(
        home, extract_vmlinux(image, str(path)), module_entries(), flavor="file"
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
