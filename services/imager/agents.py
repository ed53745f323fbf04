"""Disks of agents' programs, made of their pinned npm packages; read-only, by the packages' hashes.

    <cache>/agents/<key>.ext4, <key>.json

Nothing of a package is run. It comes by `npm pack`, so the user's own npm settings say from where,
or from a file; either way its bytes must have the pinned hash before anything reads them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from services.common.errors import Corrupt, InvalidInput, NotFound, TimedOut, Unavailable, WrongState
from services.common.process import CommandFailed, run
from services.imager.agent_packages import AgentPackage
from services.imager.cache import COLLECT_LOCK, ImageCache
from services.imager.disk import Disk, content_digest, disk_seeds
from services.imager.ext4 import WRITER_VERSION, Ext4Writer, ImageSize
from services.imager.layers import LayerMerger, LayerSource
from services.imager.limits import Cancel, Limits
from services.imager.progress import Progress, Report, silent
from services.imager.tree import Kind, Node, Tree

_DOWNLOAD_SECONDS: Final = 1800.0  # 180 MB on a slow line
_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentDisk:
    """A disk, and the package that it was made of."""

    disk: Disk
    package: AgentPackage


class AgentStore:
    """The agents' disks of one cache. Everything here blocks; use a thread.

    Args:
        env: Extra environment of npm: its settings, proxies, certificates.
    """

    def __init__(self, cache: ImageCache, limits: Limits, env: Mapping[str, str]) -> None:
        self._cache = cache
        self._limits = limits
        self._env = dict(env)

    def disk(
        self,
        package: AgentPackage,
        *,
        tarball: Path | None = None,
        cancel: Cancel | None = None,
        report: Report = silent,
    ) -> AgentDisk:
        """The read-only disk of `package`; built if it is not there yet.

        Args:
            tarball: The package as a file, where npm cannot fetch it.

        Raises:
            NotFound: there is no file `tarball`, or npm does not find the package.
            Unavailable: npm cannot fetch it.
            WrongState: npm is not installed.
            Corrupt: it is another package than the pinned one, or holds no program.
            Exhausted: the disk is full; nothing is left behind.
            Cancelled: the caller cancelled.
        """
        cancel = cancel or Cancel()
        key = agent_key(package)
        with (
            self._cache.lock(COLLECT_LOCK, cancel, shared=True),
            self._cache.lock(f"agent-{key}", cancel),
        ):
            found = self._find(key)
            if found is None and tarball is not None:
                found = self._build(key, package, tarball, cancel, report)
            elif found is None:
                with self._cache.scratch_directory() as place:
                    fetched = self._fetch(package, place, cancel, report)
                    found = self._build(key, package, fetched, cancel, report)
        return AgentDisk(disk=found, package=package)

    def _path(self, key: str) -> Path:
        return self._cache.root / "agents" / f"{key}.ext4"

    def _find(self, key: str) -> Disk | None:
        record = self._cache.read_record("agents", key) or {}
        try:
            size = self._path(key).stat().st_size
            if record.get("size_bytes") != size:
                return None
            os.utime(self._path(key))
        except FileNotFoundError:
            return None
        return Disk(path=self._path(key), digest=f"sha256:{key}", size_bytes=size)

    def _fetch(self, package: AgentPackage, place: Path, cancel: Cancel, report: Report) -> Path:
        """The package's tarball below `place`, by npm."""
        name = f"{package.name}@{package.version}"
        report(Progress(subject=name, action="download"))
        argv = [
            "npm", "pack", name, "--ignore-scripts", "--silent", "--no-update-notifier", "--no-audit",
            f"--cache={place / 'cache'}", f"--pack-destination={place}",
        ]  # fmt: skip
        try:
            _run_in_thread(argv, place, self._env, cancel)
        except WrongState as error:
            raise WrongState(
                f"npm is not installed on the imager's host; install it, or fetch {name} elsewhere with "
                f"`npm pack {name}` and name the file with --package",
                reason="PROGRAM_MISSING",
                program="npm",
            ) from error
        except TimedOut as error:
            raise Unavailable(
                f"npm did not fetch {name} within {_DOWNLOAD_SECONDS:g} s", reason="NPM_TIMEOUT"
            ) from error
        except CommandFailed as error:
            missing = "E404" in error.message or "ETARGET" in error.message
            kind = NotFound if missing else Unavailable
            raise kind(
                f"npm cannot fetch {name}; check the network, the proxy and npm's settings (npm config ls): "
                f"{error.message[-500:]}",
                reason="PACKAGE_NOT_FOUND" if missing else "NPM_FAILED",
            ) from error
        tarballs = list(place.glob("*.tgz"))
        if len(tarballs) != 1:
            raise Corrupt(f"npm pack {name} left {len(tarballs)} files instead of one", reason="NPM_FAILED")
        shutil.rmtree(place / "cache", ignore_errors=True)
        return tarballs[0]

    def _build(self, key: str, package: AgentPackage, tarball: Path, cancel: Cancel, report: Report) -> Disk:
        name = f"{package.agent} {package.version}"
        try:
            blob = tarball.open("rb", buffering=0)
        except OSError as error:
            raise NotFound(
                f"{tarball} cannot be read: {error.strerror}", reason="PACKAGE_NOT_FOUND", path=tarball
            ) from error
        with blob:
            digest, size = _checked(blob, tarball, package, cancel, report)
            source = LayerSource(digest=digest, size=size, diff_id=None, blob=blob)
            report(Progress(subject=name, action="convert", done=0, total=1))
            with self._cache.writing(self._path(key)) as file:
                made = _write(file, key, source, package, self._limits, cancel)
                content = content_digest(file, cancel)
        report(Progress(subject=name, action="convert", done=1, total=1))
        record: dict[str, Any] = {
            "agent": package.agent,
            "architecture": package.architecture,
            "digest": content,
            "integrity": package.integrity,
            "agent_version": package.version,
            "package": f"{package.name}@{package.version}",
            "size_bytes": made.size_bytes,
            "writer": WRITER_VERSION,
        }
        self._cache.write_record("agents", key, record)
        return Disk(path=self._path(key), digest=f"sha256:{key}", size_bytes=made.size_bytes)


def agent_key(package: AgentPackage) -> str:
    """Hex digits that name the disk of a package: its hash, what is taken of it, and the writer's version."""
    inputs = {
        "writer": WRITER_VERSION,
        "integrity": package.integrity,
        "root": package.root,
        "program": package.program,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _checked(
    blob: BinaryIO, tarball: Path, package: AgentPackage, cancel: Cancel, report: Report
) -> tuple[str, int]:
    """SHA-256 and length of a tarball that has the pinned hash; `blob` is at its start again."""
    size = os.fstat(blob.fileno()).st_size
    pinned, sha256, count = hashlib.sha512(), hashlib.sha256(), 0
    while data := blob.read(_CHUNK):
        cancel.check()
        pinned.update(data)
        sha256.update(data)
        count += len(data)
        report(Progress(subject=tarball.name, action="verify", done=count, total=size, unit="bytes"))
    if pinned.digest() != package.sha512:
        raise Corrupt(
            f"{tarball.name} is not {package.name}@{package.version}: its hash is not the pinned one; "
            "the registry, a proxy or the file is wrong",
            reason="WRONG_DIGEST",
            package=package.name,
        )
    blob.seek(0)
    return f"sha256:{sha256.hexdigest()}", count


def _write(
    file: BinaryIO, key: str, source: LayerSource, package: AgentPackage, limits: Limits, cancel: Cancel
) -> ImageSize:
    uuid, hash_seed = disk_seeds(key)
    with Ext4Writer(file, uuid=uuid, hash_seed=hash_seed) as writer:
        merger = LayerMerger(writer, limits, cancel)
        merger.apply(source)
        tree = Tree()
        tree.root = _descend(merger.tree.root, package.root, package)
        program = _descend(tree.root, package.program, package)
        if program.kind is not Kind.FILE:
            raise Corrupt(f"{package.program} of {package.name} is no file", reason="BAD_PACKAGE")
        for _, _, node in tree.walk():
            node.uid = node.gid = 0
            node.mode = node.mode & 0o755 | 0o444 | (0o111 if node.kind is Kind.DIRECTORY else 0)
        program.mode = 0o755
        tree.root.uid = tree.root.gid = 0
        tree.root.mode = 0o755
        return writer.finish(tree, read_only=True)


def _descend(node: Node, path: str, package: AgentPackage) -> Node:
    for part in path.split("/"):
        child = node.children.get(os.fsencode(part))
        if child is None:
            raise Corrupt(f"{package.name}@{package.version} holds no {path}", reason="BAD_PACKAGE")
        node = child
    return node


def _run_in_thread(argv: list[str], cwd: Path, env: Mapping[str, str], cancel: Cancel) -> None:
    """Run a program from a thread that has no loop; cancelling ends it."""

    async def main() -> None:
        task = asyncio.ensure_future(run(argv, cwd=cwd, env=env, seconds=_DOWNLOAD_SECONDS))
        loop = asyncio.get_running_loop()

        def stop() -> None:
            loop.call_soon_threadsafe(task.cancel)

        cancel.on_cancel(stop)
        try:
            await task
        except asyncio.CancelledError:
            cancel.check()
            raise
        finally:
            cancel.forget(stop)

    asyncio.run(main())


def absolute_package(path: str) -> Path | None:
    """The tarball that a request names; None if it names none.

    Raises:
        InvalidInput: its path is relative.
    """
    if not path:
        return None
    if not os.path.isabs(path):
        raise InvalidInput(f"{path!r} must be an absolute path", reason="BAD_PATH", path=path)
    return Path(path)
