"""Python wheels of the guest, downloaded by hash for its platform and read in place."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import Corrupt, Unavailable, WrongState
from services.common.process import CommandFailed, run
from services.imager.lock import locked
from services.imager.progress import Progress, Report, silent

_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_ABIS = ("cp311", "abi3", "none")
_DOWNLOAD_SECONDS = 900
# cygrpc is 17 MB; a wheel that claims more than this for one file is not ours.
_MAX_FILE = 128 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """One downloaded wheel."""

    name: str
    version: str
    sha256: str
    path: Path

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Every file as (path below site-packages, content), in name order.

        Raises:
            Corrupt: a name leaves the directory, or a file is absurdly large.
        """
        with zipfile.ZipFile(self.path) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                parts = info.filename.split("/")
                if info.is_dir():
                    continue
                if any(part in ("", ".", "..") for part in parts) or info.file_size > _MAX_FILE:
                    raise Corrupt(
                        f"{self.path.name} holds {info.filename!r}", reason="BAD_WHEEL", file=self.path
                    )
                yield info.filename, archive.read(info)


async def fetch_wheels(
    lock: Path, cache: Path, *, env: Mapping[str, str] | None = None, report: Report = silent
) -> tuple[Wheel, ...]:
    """The wheels that the requirements file `lock` pins, from the cache or the package index.

    Args:
        lock: A requirements file with hashes; nothing else is accepted.
        env: Environment of pip: proxies, index.

    Raises:
        Unavailable: a wheel cannot be downloaded.
        Corrupt: a cached wheel does not match the lock file.
        WrongState: this Python has no pip.
    """
    content = await asyncio.to_thread(lock.read_bytes)
    hashes = frozenset(re.findall(r"--hash=sha256:([0-9a-f]{64})", content.decode()))
    home = cache / "wheels" / hashlib.sha256(content).hexdigest()[:32]
    if not await asyncio.to_thread(home.is_dir):
        async with locked(cache / "wheels" / "lock"):
            if not await asyncio.to_thread(home.is_dir):
                await _download(lock, home, env or {}, report)
    return await asyncio.to_thread(_read, home, hashes)


async def _download(lock: Path, home: Path, env: Mapping[str, str], report: Report) -> None:
    if importlib.util.find_spec("pip") is None:
        raise WrongState(
            f"{sys.executable} has no pip; install it with `{sys.executable} -m ensurepip`",
            reason="PROGRAM_MISSING",
        )
    report(Progress(subject="Python wheels", action="download"))
    for leaving in home.parent.glob("download-*"):  # of a killed build: this one has the lock
        await asyncio.to_thread(shutil.rmtree, leaving, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix="download-", dir=home.parent))
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    argv += [
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
        "--implementation=cp",
        "--python-version=3.11",
    ]
    argv += [f"--platform={platform}" for platform in _PLATFORMS] + [f"--abi={abi}" for abi in _ABIS]
    argv += [f"--dest={scratch}", f"--requirement={lock}"]
    try:
        await run(argv, env=env, seconds=_DOWNLOAD_SECONDS)
        await asyncio.to_thread(scratch.rename, home)
    except CommandFailed as error:
        last = [line for line in error.message.splitlines() if line.startswith("ERROR:")][-2:]
        raise Unavailable(
            "cannot download the guest's Python wheels; connect to the network (pip's settings are used) "
            "and build again, or copy the cache from a machine that has built: "
            f"{' '.join(last) or error.message}",
            reason="WHEELS_UNREACHABLE",
        ) from error
    finally:
        await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)


def _read(home: Path, hashes: frozenset[str]) -> tuple[Wheel, ...]:
    wheels = []
    for path in sorted(home.glob("*.whl")):
        with path.open("rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        if digest not in hashes:
            shutil.rmtree(home)
            raise Corrupt(
                f"{path} does not match the lock file; the cached wheels were removed, build again",
                reason="BAD_WHEEL",
                file=path,
            )
        name, version = path.name.split("-")[:2]
        wheels.append(Wheel(name=name, version=version, sha256=digest, path=path))
    return tuple(wheels)
