"""Templates: machines that were booted once and saved, for boxes to be restored from.

A template's id is the digest of all that it depends on, so an input that changes makes another
template, and nobody asks whether an old one still fits. The state directory belongs to one service
(`Layout.locked`), so building once per service is building once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.errors import InvalidInput, NotFound, VoidboxError
from services.hypervisor import argv, inputs, saved
from services.hypervisor.argv import MachineConfig
from services.hypervisor.claim import SECRET_BYTES
from services.hypervisor.layout import Layout
from services.hypervisor.model import Accelerator, BoxConfig
from services.hypervisor.programs import Programs
from services.hypervisor.saved import Saved

log = logging.getLogger(__name__)

# Each takes what its guest had touched: some 170 MiB of disk, and as much of memory while it is in use.
KEPT_ON_DISK = 8
KEPT_IN_MEMORY = 3
_READ = 1 << 20

Build = Callable[[Saved], Awaitable[None]]
"""Boots a machine and saves it into the given, which is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What a template depends on (`facts`), by digest (`id`)."""

    id: str
    facts: dict[str, Any]
    kernel_path: str
    initramfs_path: str
    memory_mib: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A template as it is listed. Times are seconds since the epoch."""

    id: str
    kernel_path: str
    initramfs_path: str
    memory_mib: int
    vcpus: int
    create_time: float
    use_time: float
    size_bytes: int


class Digests:
    """Digests of files, remembered as long as a file's inode says that it is the same."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], str] = {}

    def of(self, fd: int) -> str:
        """The sha256 of an open file. Blocks."""
        info = os.fstat(fd)
        name = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        if name not in self._known:
            digest = hashlib.sha256()
            at = 0
            while piece := os.pread(fd, _READ, at):
                digest.update(piece)
                at += len(piece)
            self._known[name] = digest.hexdigest()
        return self._known[name]


def make_key(config: BoxConfig, programs: Programs, accelerator: Accelerator, digests: Digests) -> Key:
    """The key of the template for machines like `config`. Blocks: reads new kernels and initramfs.

    Raises:
        InvalidInput: there is no such kernel or initramfs.
    """
    with contextlib.ExitStack() as stack:
        kernel = inputs.open_kernel(config.kernel_path)
        stack.callback(os.close, kernel)
        initramfs = inputs.open_initramfs(config.initramfs_path)
        stack.callback(os.close, initramfs)
        inputs.check_guest_memory(config.resources.memory_mib, initramfs)
        files = {"kernel": digests.of(kernel), "initramfs": digests.of(initramfs)}
    facts = {
        **files,
        **host_facts(programs, accelerator),
        "machine": _machine(config, accelerator, reclaims=programs.reclaims),
    }
    return Key(
        id=hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24],
        facts=facts,
        kernel_path=config.kernel_path,
        initramfs_path=config.initramfs_path,
        memory_mib=config.resources.memory_mib,
    )


def host_facts(programs: Programs, accelerator: Accelerator) -> dict[str, Any]:
    """What of the host a saved machine depends on: QEMU as it is installed and, on KVM, the processor."""
    info = os.stat(programs.system)
    return {
        "qemu": f"{programs.version} {info.st_size} {info.st_mtime_ns}",
        "accelerator": accelerator.value,
        "gives memory back": programs.reclaims,
        # Emulated processors are the same everywhere.
        "processor": _processor() if accelerator is Accelerator.KVM else "",
    }


def _processor(path: Path = Path("/proc/cpuinfo")) -> str:
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags")
    first = path.read_text().partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return "; ".join(value.strip() for name, _, value in pairs if name.strip() in wanted)


def _machine(config: BoxConfig, accelerator: Accelerator, *, reclaims: bool) -> list[str]:
    """The command line, with numbers for descriptors that are always the same."""
    machine = MachineConfig(
        program="/qemu",
        name="template",
        accelerator=accelerator,
        memory_mib=config.resources.memory_mib,
        vcpus=config.resources.vcpus,
        kernel_fd=3,
        initramfs_fd=4,
        command_line=argv.kernel_command_line(accelerator, config.resources.vcpus),
        console_fd=5,
        memory_fd=6,
        ports=argv.SAVED_PORTS,
        nic_ports=argv.SAVED_NIC_PORTS,
        reclaims=reclaims,
    )
    return argv.build_argv(machine)


class Templates:
    """All templates of a state directory. `close` lets go of their memory."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._live: dict[str, Saved] = {}
        self._building: dict[str, asyncio.Event] = {}
        self._writing: dict[str, asyncio.Task[None]] = {}
        self.digests = Digests()

    def clean(self) -> None:
        """Remove what an interrupted write has left. Blocks."""
        for entry in list(os.scandir(self._layout.templates)):
            if entry.name.startswith("."):
                shutil.rmtree(entry.path, ignore_errors=True)

    async def close(self) -> None:
        """Finish writing and let go of all memory. Idempotent."""
        await asyncio.gather(*self._writing.values(), return_exceptions=True)
        for template in self._live.values():
            template.close()
        self._live.clear()

    async def get(self, key: Key, build: Build) -> Saved:
        """The template `key`, from memory, from disk, or built; the caller closes it.

        Several callers wait for one build. If it fails, each of the others tries in turn: the
        failure may have been that of the first one's box only.

        Raises:
            VoidboxError: it could not be built.
        """
        while True:
            if key.id in self._live:
                self._live[key.id] = template = self._live.pop(key.id)
                self._touch(key.id)
                return template.copy()
            if key.id not in self._building:
                break
            await self._building[key.id].wait()
        self._building[key.id] = done = asyncio.Event()
        try:
            template = await self._load(key) or await self._build(key, build)
            self._live[key.id] = template
            while len(self._live) > KEPT_IN_MEMORY:
                self._live.pop(next(iter(self._live))).close()
            return template.copy()
        finally:
            del self._building[key.id]
            done.set()

    async def _load(self, key: Key) -> Saved | None:
        directory = self._layout.template(key.id)
        try:
            template = await asyncio.to_thread(saved.read, directory)
        except FileNotFoundError:
            return None
        except (VoidboxError, OSError) as error:
            log.warning("template %s is built again: %s", key.id, error)
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
            return None
        if template.facts.get("key") != key.facts:
            log.warning("template %s is built again: it is of something else", key.id)
            template.close()
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
            return None
        self._touch(key.id)
        return template

    async def _build(self, key: Key, build: Build) -> Saved:
        facts = {
            "key": key.facts,
            "kernel_path": key.kernel_path,
            "initramfs_path": key.initramfs_path,
            "vcpus": _vcpus(key.facts),
            "create_time": time.time(),
            # Of nobody: the guest is claimed once before it is saved, and by each box with this one.
            "secret": secrets.token_hex(SECRET_BYTES),
        }
        template = saved.empty(key.memory_mib, facts)
        try:
            await build(template)
            template.seal()
        except BaseException:
            template.close()
            raise
        # Boxes need not wait for the disk.
        task = asyncio.create_task(self._write(key.id, template.copy()), name=f"write template {key.id}")
        self._writing[key.id] = task
        task.add_done_callback(lambda _: self._writing.pop(key.id, None))
        return template

    async def _write(self, template_id: str, template: Saved) -> None:
        try:
            await asyncio.to_thread(self._make_room)
            await asyncio.to_thread(saved.write, template, self._layout.template(template_id))
            log.info("template %s is saved", template_id)
        except (VoidboxError, OSError) as error:
            log.warning("template %s is kept in memory only: %s", template_id, error)
        finally:
            template.close()

    def _make_room(self) -> None:
        found = sorted(self._listed(), key=lambda each: each.use_time)
        for each in found[: max(0, len(found) + 1 - KEPT_ON_DISK)]:
            shutil.rmtree(self._layout.template(each.id), ignore_errors=True)

    def _touch(self, template_id: str) -> None:
        with contextlib.suppress(OSError):
            os.utime(self._layout.template(template_id) / saved.MANIFEST)

    async def discard(self, template_id: str) -> None:
        """Remove a template. Boxes that were made from it go on. Idempotent."""
        if template_id in self._writing:
            await asyncio.gather(self._writing[template_id], return_exceptions=True)
        if template_id in self._live:
            self._live.pop(template_id).close()
        await asyncio.to_thread(shutil.rmtree, self._layout.template(template_id), ignore_errors=True)

    async def delete(self, template_id: str) -> None:
        """Remove a template by its id.

        Raises:
            NotFound: there is none.
            InvalidInput: that is no id of a template.
        """
        if not template_id.isalnum():
            raise InvalidInput(f"{template_id!r} is no id of a template", reason="BAD_TEMPLATE_ID")
        if template_id not in {each.id for each in await self.all()}:
            raise NotFound(f"there is no template {template_id!r}", reason="TEMPLATE_NOT_FOUND")
        await self.discard(template_id)

    async def all(self) -> list[Template]:
        """The templates, oldest first; those being written when this is called included."""
        await asyncio.gather(*self._writing.values(), return_exceptions=True)
        found = await asyncio.to_thread(self._listed)
        return sorted(found, key=lambda each: (each.create_time, each.id))

    def _listed(self) -> list[Template]:
        found = []
        for entry in sorted(os.scandir(self._layout.templates), key=lambda each: each.name):
            directory = Path(entry.path)
            if entry.name.startswith("."):
                continue
            try:
                manifest = saved.read_manifest(directory)
                facts = manifest.facts
                found.append(
                    Template(
                        id=entry.name,
                        kernel_path=facts["kernel_path"],
                        initramfs_path=facts["initramfs_path"],
                        memory_mib=manifest.memory_bytes >> 20,
                        vcpus=facts["vcpus"],
                        create_time=facts["create_time"],
                        use_time=(directory / saved.MANIFEST).stat().st_mtime,
                        size_bytes=saved.disk_bytes(directory),
                    )
                )
            except (VoidboxError, OSError, KeyError) as error:
                log.warning("template %s cannot be read: %s", entry.name, error)
        return found


def _vcpus(facts: dict[str, Any]) -> int:
    machine: list[str] = facts["machine"]
    return int(machine[machine.index("-smp") + 1])
