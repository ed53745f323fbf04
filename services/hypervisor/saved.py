"""A machine at rest: its RAM in a sealed memfd and its devices' state, in memory and on disk.

The memfd cannot be changed by anybody any more (F_SEAL_WRITE), so machines may map it privately
without a way to harm each other, and what has been checked stays checked. On disk a saved machine
is a directory of files, mode 0600:

    saved.json   what it is, the lengths and digests below; without it there is nothing
    ram          the pages that are not zero, or that differ from the layers below (see `layers`)
    ram-N        those layers, the oldest first; hard links to files of older snapshots
    chunks       digests of all chunks of the memory, for a later one; only in snapshots
    devices      the stream of xen-save-devices-state
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from services.common.errors import Corrupt
from services.hypervisor import layers
from services.hypervisor.layers import Digests, Layer
from services.hypervisor.record import full_disk

CHUNK = layers.CHUNK
MANIFEST = "saved.json"
RAM = "ram"
RAM_NAME = "voidbox-ram"
DEVICES = "devices"
_VERSION = 2
log = logging.getLogger(__name__)

_DISK_NAME = re.compile(r"[a-z0-9]{1,20}\.qcow2")
_READ = 1 << 20
_MIB = 1 << 20
# The stream of a machine with forty devices has 60 kB.
MAX_DEVICES_BYTES = 16 * _MIB
_ZEROS = bytes(CHUNK)
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(slots=True, kw_only=True)
class Saved:
    """Descriptors of a saved machine's RAM and device state; `close` lets go of them.

    `facts` says what it was made from and of; it is part of what the digests protect.
    """

    memory_fd: int
    devices_fd: int
    facts: dict[str, Any] = field(default_factory=dict)

    def copy(self) -> Saved:
        """The same with descriptors of its own, to outlive this one."""
        memory = os.dup(self.memory_fd)
        try:
            return Saved(memory_fd=memory, devices_fd=os.dup(self.devices_fd), facts=self.facts)
        except OSError:
            os.close(memory)
            raise

    def close(self) -> None:
        """Let go of it; the memory is given back once no machine uses it. Idempotent."""
        for fd in (self.memory_fd, self.devices_fd):
            if fd >= 0:
                os.close(fd)
        self.memory_fd = self.devices_fd = -1

    def seal(self) -> None:
        """Make it unchangeable; nobody may have the RAM mapped for writing any more.

        Raises:
            OSError: somebody has.
        """
        for fd in (self.memory_fd, self.devices_fd):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)

    @property
    def memory_bytes(self) -> int:
        """What its RAM takes of the host's memory."""
        return os.fstat(self.memory_fd).st_blocks * 512


def empty(memory_mib: int, facts: dict[str, Any] | None = None) -> Saved:
    """A machine with `memory_mib` MiB of zeros and no state, to be filled and sealed."""
    memory = memory_file(RAM_NAME, memory_mib * _MIB)
    try:
        return Saved(memory_fd=memory, devices_fd=memory_file("voidbox-devices", 0), facts=facts or {})
    except OSError:
        os.close(memory)
        raise


def memory_file(name: str, size: int) -> int:
    """A descriptor of a new file in memory that can be sealed."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd


def reopened(fd: int, flags: int) -> int:
    """A descriptor of the same file with a position of its own."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def data_parts(fd: int) -> Iterator[tuple[int, int]]:
    """The parts (offset, length) of a file that are no holes, in whole chunks."""
    end = os.fstat(fd).st_size
    at = 0
    while at < end:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        stop = min(end, -(-os.lseek(fd, start, os.SEEK_HOLE) // CHUNK) * CHUNK)
        start = max(at, start // CHUNK * CHUNK)
        yield start, stop - start
        at = stop


def write(
    saved: Saved,
    directory: Path,
    disks: Sequence[Path] = (),
    bases: Sequence[Path] = (),
    *,
    older: Sequence[Path] | None = None,
) -> None:
    """Write a sealed machine to a new directory, durably. Blocks: a second for 200 MiB.

    Args:
        saved: The machine.
        directory: Where it goes; it appears whole or not at all.
        disks: Files that belong to it and are kept under their own names.
        bases: Read-only images below them, which stay where they are. Each is held by a second name: that
            tells the image cache that somebody needs it. Where no link is possible (another file system)
            it is not held.
        older: Machines that were saved before, the best first: only what differs from the first that can
            be used is written. None: nothing will be built on this one.

    Raises:
        Exhausted: the disk is full; nothing is left.
    """
    partial = directory.with_name(f".{directory.name}.new")
    try:
        _remove(partial)
        partial.mkdir(mode=0o700)
        size = os.fstat(saved.memory_fd).st_size
        below: tuple[Layer, ...] = ()
        chunks = before = None
        if older is not None:
            chunks = _digests(saved.memory_fd)
            below, before = _build_on(older, partial, chunks, size)
            _write_file(partial / layers.CHUNKS, bytes(chunks.content))
        runs, digest = _write_ram(saved.memory_fd, partial / RAM, chunks, before)
        state = os.pread(saved.devices_fd, MAX_DEVICES_BYTES + 1, 0)
        _write_file(partial / DEVICES, state)
        digests = {}
        for disk in disks:
            with disk.open("rb") as source, _create(partial / disk.name) as out:
                digests[disk.name] = _copy(source, out)
        for number, base in enumerate(bases):
            _hold(base, partial / f"base-{number}")
        content = {
            "disks": digests,
            "facts": saved.facts,
            "memory_bytes": size,
            "runs": runs,
            "ram": digest,
            "below": [layer.plain() for layer in below],
            "chunks": hashlib.sha256(chunks.content).hexdigest() if chunks else "",
            "devices": hashlib.sha256(state).hexdigest(),
        }
        text = json.dumps(content, sort_keys=True)
        whole = {"version": _VERSION, "content": text, "digest": hashlib.sha256(text.encode()).hexdigest()}
        _write_file(partial / MANIFEST, json.dumps(whole).encode())
        partial.rename(directory)
    except OSError as error:
        _remove(partial)
        raise full_disk(error, directory.parent) from error
    except BaseException:
        _remove(partial)
        raise


def _hold(base: Path, name: Path) -> None:
    try:
        os.link(base, name)
    except OSError as error:
        log.warning("%s is not held: %s; without it the saved machine cannot start", base, error.strerror)


def _digests(memory_fd: int) -> Digests:
    """The digests of all chunks. Blocks: 0.3 s for 200 MiB."""
    found = Digests.empty(os.fstat(memory_fd).st_size)
    for start, length in data_parts(memory_fd):
        for at in range(start, start + length, CHUNK):
            chunk = os.pread(memory_fd, min(CHUNK, start + length - at), at)
            if chunk != _ZEROS[: len(chunk)]:
                found.put(at, chunk)
    return found


def _build_on(
    bases: Sequence[Path], directory: Path, now: Digests, size: int
) -> tuple[tuple[Layer, ...], Digests | None]:
    """The layers of the first of `bases` that can be used, linked in `directory`, and its chunks' digests."""
    for base in bases:
        with contextlib.suppress(OSError, Corrupt):
            manifest = read_manifest(base)
            content = (base / layers.CHUNKS).read_bytes()
            if manifest.memory_bytes != size or hashlib.sha256(content).hexdigest() != manifest.chunks:
                continue
            if not layers.worth_it(manifest.layers, now):
                continue
            try:
                return layers.link(base, directory, manifest.layers), Digests(bytearray(content))
            except OSError:
                layers.unlink(directory, manifest.layers)
    return (), None


def _write_ram(
    memory_fd: int, path: Path, now: Digests | None, older: Digests | None
) -> tuple[list[list[int]], str]:
    """Write the chunks that are not zero or, with `older`, those that differ from it."""
    runs: list[list[int]] = []
    digest = hashlib.sha256()
    size = os.fstat(memory_fd).st_size
    with _create(path) as out:
        for start, length in data_parts(memory_fd) if older is None else [(0, size)]:
            for at in range(start, start + length, CHUNK):
                if older is not None and now is not None and now.same(older, at):
                    continue
                chunk = os.pread(memory_fd, min(CHUNK, start + length - at), at)
                if older is None and chunk == _ZEROS[: len(chunk)]:
                    continue
                out.write(chunk)
                digest.update(chunk)
                if runs and sum(runs[-1]) == at:
                    runs[-1][1] += len(chunk)
                else:
                    runs.append([at, len(chunk)])
        out.flush()
        os.fsync(out.fileno())
    return runs, digest.hexdigest()


def _copy(source: IO[bytes], out: IO[bytes]) -> str:
    """Copy the rest of a file durably, its long zeros as holes; returns its sha256."""
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        if chunk == _ZEROS[: len(chunk)]:
            out.seek(len(chunk), os.SEEK_CUR)
        else:
            out.write(chunk)
    out.truncate(out.tell())
    out.flush()
    os.fsync(out.fileno())
    return digest.hexdigest()


def copy_disks(directory: Path, into: Path) -> None:
    """Copy a saved machine's disks to the existing directory `into`, checked. Blocks.

    Raises:
        Corrupt: one is damaged.
        Exhausted: the disk is full.
    """
    for name, digest in read_manifest(directory).disks.items():
        try:
            with (directory / name).open("rb") as source, _create(into / name) as out:
                if _copy(source, out) != digest:
                    raise _damaged(directory / name, "its digest is another")
        except FileNotFoundError as error:
            raise _damaged(directory / name, "it is missing") from error
        except OSError as error:
            raise full_disk(error, into) from error


def _create(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb", _READ)


def _write_file(path: Path, data: bytes) -> None:
    with _create(path) as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What saved.json says."""

    facts: dict[str, Any]
    disks: dict[str, str]
    memory_bytes: int
    layers: tuple[Layer, ...]
    chunks: str
    devices: str
    digest: str


def read_manifest(directory: Path) -> Manifest:
    """What a saved machine is, by its own word.

    Raises:
        FileNotFoundError: there is none.
        Corrupt: it is damaged or of another version.
    """
    path = directory / MANIFEST
    try:
        whole = json.loads(path.read_bytes())
        text = whole["content"]
        if whole["version"] != _VERSION or hashlib.sha256(text.encode()).hexdigest() != whole["digest"]:
            raise ValueError("version or digest")
        content = json.loads(text)
        manifest = Manifest(
            facts=content["facts"],
            disks={checked_name(name): str(digest) for name, digest in content["disks"].items()},
            memory_bytes=content["memory_bytes"],
            layers=_layers(content),
            chunks=content["chunks"],
            devices=content["devices"],
            digest=whole["digest"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, "it is not what this version wrote") from error
    return manifest


def _layers(content: dict[str, Any]) -> tuple[Layer, ...]:
    own = {"file": RAM, "runs": content["runs"], "digest": content["ram"]}
    found = tuple(layers.from_plain(each, content["memory_bytes"]) for each in (*content["below"], own))
    for number, layer in enumerate(found[:-1]):
        if layer.file != layers.name(number):
            raise ValueError("its layers have other names")
    return found


def read(directory: Path) -> Saved:
    """Load a saved machine into sealed memory, checked. Blocks: half a second for 200 MiB.

    Raises:
        FileNotFoundError: there is none.
        Corrupt: a file is damaged.
    """
    manifest = read_manifest(directory)
    memory = memory_file(RAM_NAME, manifest.memory_bytes)
    saved = Saved(memory_fd=memory, devices_fd=-1, facts=manifest.facts)
    try:
        saved.devices_fd = memory_file("voidbox-devices", 0)
        for layer in manifest.layers:
            _read_ram(directory / layer.file, layer, memory)
        state = _read_devices(directory / DEVICES)
        if hashlib.sha256(state).hexdigest() != manifest.devices:
            raise _damaged(directory / DEVICES, "its digest is another")
        _write_all(saved.devices_fd, state, 0)
        saved.seal()
    except BaseException:
        saved.close()
        raise
    return saved


def _read_devices(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_DEVICES_BYTES + 1)
    except FileNotFoundError as error:
        raise _damaged(path, "it is missing") from error


def _read_ram(path: Path, layer: Layer, memory: int) -> None:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            for at, length in layer.runs:
                end = at + length
                while at < end:
                    piece = file.read(min(_READ, end - at))
                    if not piece:
                        raise _damaged(path, "it is too short")
                    digest.update(piece)
                    _write_all(memory, piece, at)
                    at += len(piece)
            if file.read(1):
                raise _damaged(path, "it is too long")
    except FileNotFoundError as error:
        raise _damaged(path, "it is missing") from error
    if digest.hexdigest() != layer.digest:
        raise _damaged(path, "its digest is another")


def _write_all(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, at)
        view, at = view[count:], at + count


def checked_name(name: str) -> str:
    """`name` itself, if it is one that a disk of ours has.

    Raises:
        ValueError: it is not.
    """
    if not _DISK_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a disk")
    return name


def disk_bytes(directory: Path) -> int:
    """What a saved machine takes of the disk: its part of what it shares, nothing of images it holds."""
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(directory):
            found = entry.stat(follow_symlinks=False)
            if found.st_nlink == 1 or entry.name.startswith(RAM):
                total += found.st_blocks * 512 // max(1, found.st_nlink)
    return total


def _damaged(path: Path, why: str) -> Corrupt:
    return Corrupt(f"{path} is damaged: {why}; remove it", reason="SAVED_DAMAGED", path=path)
