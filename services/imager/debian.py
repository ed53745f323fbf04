"""Debian packages without root: resolved, verified, downloaded and unpacked in the cache.

apt does the trusted part (signatures of the archive, hashes of indexes and packages), with
a private state directory instead of the system's. Sources, keyrings and proxy settings
are the system's. Once a set of packages is in the cache, no network is needed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from services.common.errors import Corrupt, Unavailable, WrongState
from services.common.process import CommandFailed, run
from services.imager.lock import locked
from services.imager.progress import Progress, Report, silent

RELEASE = "bookworm"
ARCHITECTURE = "amd64"
_SUITES = frozenset(f"{RELEASE}{suffix}" for suffix in ("", "-updates", "-security", "/updates"))
# Debian's mirrors answer within seconds; apt's own limits add up to many minutes.
_UPDATE_SECONDS = 300
_DOWNLOAD_SECONDS = 1800
_UNPACK_SECONDS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One version of one package, as the signed index describes it."""

    name: str
    version: str
    architecture: str
    sha256: str
    size: int
    depends: str = ""

    @property
    def file_name(self) -> str:
        """What `apt-get download` calls it: an epoch's colon is escaped."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


class Debian:
    """The packages of one cache directory.

    Args:
        cache: Holds `debian/`, which this class owns.
        env: Environment of apt: proxies.
        system: Root of the configuration to read; other than "/" only in tests.
    """

    def __init__(
        self,
        cache: Path,
        *,
        env: Mapping[str, str] | None = None,
        report: Report = silent,
        system: Path = Path("/"),
    ) -> None:
        self._home = cache / "debian"
        self._env = dict(env or {})
        self._report = report
        self._system = system

    async def resolve(self, names: Sequence[str], *, refresh: bool = False) -> tuple[Package, ...]:
        """The candidate version of each of `names`; without network once it was found.

        Args:
            refresh: Ask the mirrors again even if an answer is cached.

        Raises:
            Unavailable: the mirrors cannot be reached and nothing is cached.
            WrongState: apt is missing, or no source of this release is configured.
        """
        kept = self._home / "resolved" / f"{_key(names)}.json"
        if not refresh and (known := _load(kept)) is not None:
            return known
        async with locked(self._home / "lock"):
            if not refresh and (known := _load(kept)) is not None:
                return known
            self._report(Progress(subject="Debian package lists", action="download"))
            config = await self._configure()
            try:
                await run(["apt-get", "update", "-q"], env=config, seconds=_UPDATE_SECONDS)
            except CommandFailed as error:
                raise _unreachable("the package lists", error) from error
            text = await run(["apt-cache", "show", "--no-all-versions", *names], env=config)
            packages = _parse_show(text.decode("utf-8", "replace"), names)
            _write(kept, json.dumps([asdict(package) for package in packages], indent=1).encode())
            return packages

    async def fetch(self, packages: Sequence[Package]) -> None:
        """Bring `packages` into the pool; what is there already is not asked for again.

        Raises:
            Unavailable: a package cannot be downloaded.
            Corrupt: apt delivered something else than the index describes.
        """
        if not self._missing(packages):
            return
        async with locked(self._home / "lock"):
            missing = self._missing(packages)
            if not missing:
                return
            config = await self._configure()
            for leaving in self._home.glob("download-*"):  # of a killed build: this one has the lock
                await asyncio.to_thread(shutil.rmtree, leaving, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix="download-", dir=self._home) as scratch:
                await self._download(missing, Path(scratch), config)
                for package in missing:
                    self._keep(package, Path(scratch, package.file_name))

    def path(self, package: Package) -> Path:
        """Where `fetch` puts the package's file."""
        return self._home / "pool" / f"{package.sha256}.deb"

    async def unpack(self, package: Package) -> Path:
        """The package's files, unpacked once and kept."""
        tree = self._home / "trees" / package.sha256
        if not tree.is_dir():
            await self.unpack_into(package, tree, durable=True)
        return tree

    async def unpack_into(self, package: Package, tree: Path, *, durable: bool = False) -> None:
        """Unpack to `tree`, which appears whole or not at all.

        Args:
            durable: Flush it to the disk first, because it will be trusted after a crash.
        """
        tree.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="unpack-", dir=tree.parent))
        try:
            deb = self.path(package)
            if await asyncio.to_thread(_sha256, deb) != package.sha256:
                deb.unlink()
                raise Corrupt(
                    f"{deb} did not match its digest and was removed; build again to download it anew",
                    reason="BAD_PACKAGE",
                    package=package.name,
                )
            await run(["dpkg-deb", "--extract", deb, scratch], seconds=_UNPACK_SECONDS)
            await asyncio.to_thread(_settle, scratch, tree, durable)
        finally:
            await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)

    def _missing(self, packages: Sequence[Package]) -> list[Package]:
        return [package for package in packages if not self.path(package).is_file()]

    def _keep(self, package: Package, downloaded: Path) -> None:
        if not downloaded.is_file() or _sha256(downloaded) != package.sha256:
            raise Corrupt(
                f"the download of {package.name} {package.version} does not match the signed index",
                reason="BAD_PACKAGE",
                package=package.name,
            )
        _write(self.path(package), downloaded)

    async def _download(self, packages: Sequence[Package], scratch: Path, config: Mapping[str, str]) -> None:
        total = sum(package.size for package in packages)
        subject = f"{len(packages)} Debian packages"
        self._report(Progress(subject=subject, action="download", total=total, unit="bytes"))
        read, write = os.pipe()
        watcher = asyncio.create_task(self._watch(read, subject, total))
        words = [f"{package.name}={package.version}" for package in packages]
        try:
            await run(
                ["apt-get", "download", "-q", "-o", f"APT::Status-Fd={write}", *words],
                cwd=scratch,
                env=config,
                seconds=_DOWNLOAD_SECONDS,
                pass_fds=(write,),
            )
        except CommandFailed as error:
            raise _unreachable("packages", error) from error
        finally:
            os.close(write)
            await watcher
        self._report(Progress(subject=subject, action="download", done=total, total=total, unit="bytes"))

    async def _watch(self, handle: int, subject: str, total: int) -> None:
        """Turn apt's `dlstatus:NUMBER:PERCENT:TEXT` lines into reports until the pipe closes."""
        reader = asyncio.StreamReader()
        pipe = os.fdopen(handle, "rb", buffering=0)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            async for line in reader:
                words = line.decode("utf-8", "replace").split(":")
                if words[0] == "dlstatus" and len(words) > 2 and re.fullmatch(r"\d+(\.\d+)?", words[2]):
                    done = int(min(float(words[2]), 100.0) * total / 100)
                    self._report(
                        Progress(subject=subject, action="download", done=done, total=total, unit="bytes")
                    )
        finally:
            transport.close()

    async def _configure(self) -> dict[str, str]:
        """Write apt's private configuration; the environment that makes apt use it."""
        for program in ("apt-get", "apt-cache", "apt-config", "dpkg-deb"):
            if shutil.which(program) is None:
                raise WrongState(
                    f"{program} is not installed; guest images are built on a Debian system "
                    "(or point VOID_BOX_KERNEL and VOID_BOX_INITRAMFS at ready-made files)",
                    reason="PROGRAM_MISSING",
                    program=program,
                )
        apt = self._home / "apt"
        for part in ("lists/partial", "archives/partial", "empty", "keys"):
            (apt / part).mkdir(parents=True, exist_ok=True)
        (apt / "status").touch()
        sources = tuple(_sources(self._system, apt / "keys"))
        if not sources:
            raise WrongState(
                f"no source of Debian {RELEASE} with component main in /etc/apt/sources.list or "
                "/etc/apt/sources.list.d; add Debian's archive there",
                reason="NO_DEBIAN_SOURCE",
            )
        _write(apt / "sources.list", "".join(f"{line}\n" for line in sources).encode())
        # Other archives may ship a "main" of this release too; only Debian's own counts.
        _write(
            apt / "preferences",
            b"Package: *\nPin: release o=Debian\nPin-Priority: 900\n\n"
            b"Package: *\nPin: release o=*\nPin-Priority: -1\n",
        )
        dump = await run(["apt-config", "dump"], env=self._env)
        _write(apt / "apt.conf", _config(apt, _kept_settings(dump.decode("utf-8", "replace"))).encode())
        return self._env | {"APT_CONFIG": str(apt / "apt.conf")}


def _kept_settings(dump: str) -> list[str]:
    """How the system's apt downloads (proxy, retries, CA), and nothing else of it.

    Hooks, index targets of desktop tools and permissions to skip verification stay out.
    """
    lines = [line for line in dump.splitlines() if re.match(r'Acquire::[\w:./+*-]+ ".*";$', line)]
    return [
        line for line in lines if not re.match(r"Acquire::(IndexTargets|Allow\w*|Languages|Changelogs)", line)
    ]


def _config(apt: Path, settings: Sequence[str]) -> str:
    # Files named by APT_CONFIG are read first, so the directories with more files must be
    # ours (empty); what would loosen verification is set last.
    own = {
        "Dir::Etc::main": "/dev/null",
        "Dir::Etc::parts": str(apt / "empty"),
        "Dir::Etc::sourcelist": str(apt / "sources.list"),
        "Dir::Etc::sourceparts": str(apt / "empty"),
        "Dir::Etc::preferences": str(apt / "preferences"),
        "Dir::Etc::preferencesparts": str(apt / "empty"),
        "Dir::State": str(apt),
        "Dir::State::lists": str(apt / "lists"),
        "Dir::State::status": str(apt / "status"),
        "Dir::Cache": str(apt),
        "Dir::Cache::archives": str(apt / "archives"),
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "APT::Architecture": ARCHITECTURE,
        "APT::Architectures": ARCHITECTURE,
        # The directories are the builder's: apt's unprivileged user could not write there.
        "APT::Sandbox::User": "root",
        "APT::Update::Error-Mode": "any",
        "Acquire::Languages": "none",
        "Acquire::GzipIndexes": "true",
        "Acquire::AllowInsecureRepositories": "false",
        "Acquire::AllowWeakRepositories": "false",
        "Acquire::AllowDowngradeToInsecureRepositories": "false",
    }
    defaults = {"Acquire::Retries": "3", "Acquire::http::Timeout": "20", "Acquire::https::Timeout": "20"}
    lines = [f'{key} "{value}";' for key, value in defaults.items()]
    lines += settings
    lines += [f'{key} "{value}";' for key, value in own.items()]
    return "\n".join(lines) + "\n"


def _sources(system: Path, keys: Path) -> Iterator[str]:
    """This release's sources in apt's one-line form, from both kinds of files."""
    etc = system / "etc/apt"
    for path in (etc / "sources.list", *sorted(etc.glob("sources.list.d/*.list"))):
        if path.is_file():
            yield from _one_line_sources(path.read_text("utf-8", "replace"))
    for path in sorted(etc.glob("sources.list.d/*.sources")):
        if path.is_file():
            yield from _stanza_sources(path.read_text("utf-8", "replace"), keys)


def _one_line_sources(text: str) -> Iterator[str]:
    for line in text.splitlines():
        found = re.match(
            r"\s*deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<rest>.*)", line
        )
        if found is None:
            continue
        signed = re.search(r"signed-by=(\S+)", found["options"] or "")
        components = found["rest"].split("#")[0].split()
        yield from _source(found["uri"], found["suite"], components, signed[1] if signed else "")


def _stanza_sources(text: str, keys: Path) -> Iterator[str]:
    for stanza in re.split(r"\n\s*\n", text):
        fields = _fields("\n".join(line for line in stanza.splitlines() if not line.startswith("#")))
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in (
            "no",
            "false",
        ):
            continue
        signed = fields.get("signed-by", "")
        if "BEGIN PGP" in signed:
            # A key in the stanza itself: lines are indented, an empty one is a dot.
            lines = [line.strip() for line in signed.splitlines()]
            key = "\n".join("" if line == "." else line for line in lines).strip() + "\n"
            path = keys / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.asc"
            _write(path, key.encode())
            signed = str(path)
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield from _source(uri, suite, fields.get("components", "").split(), ",".join(signed.split()))


def _source(uri: str, suite: str, components: Sequence[str], signed_by: str) -> Iterator[str]:
    if suite in _SUITES and "main" in components and not uri.startswith("cdrom:"):
        options = f"[arch={ARCHITECTURE}{f' signed-by={signed_by}' if signed_by else ''}]"
        yield f"deb {options} {uri} {suite} main"


def _fields(stanza: str) -> dict[str, str]:
    """The fields of one RFC 822-like stanza, names in lower case."""
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line[:1] in (" ", "\t") and name:
            fields[name] += "\n" + line.strip()
        elif ":" in line:
            key, _, value = line.partition(":")
            name = key.strip().lower()
            fields[name] = value.strip()
    return fields


def _parse_show(text: str, names: Sequence[str]) -> tuple[Package, ...]:
    found: dict[str, Package] = {}
    for stanza in text.split("\n\n"):
        fields = _fields(stanza)
        name = fields.get("package", "")
        if name not in names or name in found:
            continue
        if (
            not re.fullmatch(r"[0-9a-f]{64}", fields.get("sha256", ""))
            or not fields.get("size", "").isdigit()
        ):
            raise Corrupt(
                f"the index entry of {name} has no SHA-256 or size", reason="BAD_INDEX", package=name
            )
        found[name] = Package(
            name=name,
            version=fields["version"],
            architecture=fields["architecture"],
            sha256=fields["sha256"],
            size=int(fields["size"]),
            depends=fields.get("depends", ""),
        )
    if missing := [name for name in names if name not in found]:
        raise WrongState(
            f"Debian {RELEASE} as configured has no package {', '.join(missing)}",
            reason="NO_PACKAGE",
            packages=" ".join(missing),
        )
    return tuple(found[name] for name in names)


def _unreachable(what: str, error: CommandFailed) -> Unavailable:
    last = [line for line in error.message.splitlines() if line.startswith(("E:", "W:", "Err:"))][-3:]
    return Unavailable(
        f"cannot download {what} from Debian's mirrors; connect to the network (apt's proxy settings are "
        "used) and build again, or copy the cache from a machine that has built: "
        f"{' '.join(last) or error.message}",
        reason="DEBIAN_UNREACHABLE",
    )


def _key(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join((RELEASE, ARCHITECTURE, *names)).encode()).hexdigest()[:16]


def _load(path: Path) -> tuple[Package, ...] | None:
    """What `resolve` kept; None if there is nothing or it is not readable as that."""
    try:
        return tuple(Package(**item) for item in json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def sync_tree(directory: Path) -> None:
    """Flush every file and directory below `directory`, and itself, to the disk."""
    for path in [*directory.rglob("*"), directory]:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            continue
        sync(path)


def sync(path: Path) -> None:
    """Flush one file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _settle(scratch: Path, tree: Path, durable: bool) -> None:
    """Give an unpacked tree its name, unless another builder was first."""
    if durable:
        sync_tree(scratch)
    try:
        scratch.rename(tree)
    except OSError:
        if not tree.is_dir():
            raise


def _sha256(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _write(path: Path, content: bytes | Path) -> None:
    """Put `content` at `path` by fsync and rename; a file as content is moved, not copied."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    if isinstance(content, Path):
        content.rename(scratch)
    else:
        scratch.write_bytes(content)
    with scratch.open("rb") as handle:
        os.fsync(handle.fileno())
    scratch.rename(path)
