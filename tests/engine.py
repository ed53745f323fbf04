"""A real Docker engine for tests: the machine's own if one runs, else a private `dockerd`.

A private engine keeps everything in one directory. When it ends, its process is gone and
the machine's network is as before: `dockerd` itself leaves its bridge and packet filter rules.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

RELEASE = "bookworm"
# A cold engine took 2 s on an idle two-core machine; containerd starts first.
_START_SECONDS = 60
_STOP_SECONDS = 60
_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_SBIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class EngineMissing(Exception):
    """No Docker engine can be had here; the message says why and what to install."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A running engine; `env` is what its clients need, `private` whether it ends with the test."""

    env: Mapping[str, str] = field(repr=False)
    private: bool

    def run(self, *words: str, seconds: float = 900, env: Mapping[str, str] | None = None) -> str:
        """Run `words` with access to the engine and return its stdout.

        Raises:
            AssertionError: it failed; the message holds all of its output.
        """
        done = subprocess.run(
            words,
            env={**self.env, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        shown = f"{' '.join(words)} exited with {done.returncode}\n{done.stdout}{done.stderr}"
        assert done.returncode == 0, shown
        return done.stdout

    def docker(self, *words: str) -> str:
        """Run the `docker` client and return its stdout without the final line break."""
        return self.run("docker", *words).rstrip("\n")

    def inspect(self, name: str) -> dict[str, object]:
        """The engine's description of a container, image, network or volume."""
        found: dict[str, object] = json.loads(self.docker("inspect", name))[0]
        return found

    def compose(self) -> tuple[str, ...]:
        """How compose is called here: the plugin of newer engines, or the program of version 1.

        Raises:
            EngineMissing: neither is installed.
        """
        plugin = ("docker", "compose")
        env = dict(self.env)
        if subprocess.run([*plugin, "version"], env=env, capture_output=True, check=False).returncode == 0:
            return plugin
        if shutil.which("docker-compose"):
            return ("docker-compose",)
        raise EngineMissing("docker compose is not installed; run: apt-get install docker-compose")


@contextlib.contextmanager
def docker_engine(directory: Path) -> Iterator[Engine]:
    """The engine of this machine, or a private one that ends with the block.

    Args:
        directory: An empty directory for a private engine and its clients' settings.

    Raises:
        EngineMissing: none runs, and none can be started.
    """
    if shutil.which("docker") is None:
        raise EngineMissing("docker is not installed; run: apt-get install docker.io docker-compose")
    config = directory / "config"
    config.mkdir(parents=True)
    env = {"PATH": os.environ["PATH"], "HOME": str(config), "DOCKER_CONFIG": str(config), "LC_ALL": "C.UTF-8"}
    address = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if _answers(env | {"DOCKER_HOST": address}):
        yield Engine(env=env | {"DOCKER_HOST": address}, private=False)
        return
    dockerd = shutil.which("dockerd", path=_SBIN)
    if dockerd is None or os.getuid() != 0:
        raise EngineMissing(
            f"no Docker engine answers at {address}, and only root, with dockerd installed, can start one; "
            "start the engine, or run as root: apt-get install docker.io docker-compose"
        )
    with _network_restored(), _private_engine(dockerd, directory, env) as engine:
        yield engine


def _answers(env: Mapping[str, str]) -> bool:
    words = ["docker", "version", "--format", "{{.Server.Version}}"]
    return subprocess.run(words, env=dict(env), capture_output=True, timeout=30, check=False).returncode == 0


@contextlib.contextmanager
def _private_engine(dockerd: str, directory: Path, env: Mapping[str, str]) -> Iterator[Engine]:
    address = f"unix://{directory}/docker.sock"
    argv = [dockerd, "--host", address, "--pidfile", str(directory / "dockerd.pid")]
    argv += ["--data-root", str(directory / "data"), "--exec-root", str(directory / "exec")]
    # The engine tells when it serves by sd_notify(3); a socket that it had made would tell less.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, open(directory / "log", "wb") as log:
        notify.bind(str(directory / "notify"))
        notify.settimeout(_START_SECONDS)
        process = subprocess.Popen(
            argv,
            env={"PATH": _SBIN, "HOME": env["HOME"], "NOTIFY_SOCKET": str(directory / "notify")},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            try:
                while b"READY=1" not in notify.recv(4096):
                    pass
            except TimeoutError:
                tail = (directory / "log").read_text()[-4000:]
                raise EngineMissing(f"dockerd did not get ready in {_START_SECONDS} s:\n{tail}") from None
            yield Engine(env={**env, "DOCKER_HOST": address}, private=True)
        finally:
            _end(process)
    for path in reversed(_mounts(directory)):
        _tool("umount", path)  # dockerd leaves the network namespace that it ran in
    # Images and containers take a gigabyte, and pytest keeps the directories of three runs.
    for name in ("data", "exec"):
        shutil.rmtree(directory / name)


def _mounts(directory: Path) -> list[str]:
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [point for point in points if Path(point).is_relative_to(directory)]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    finally:
        # Only what did not follow the engine is left in its group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _network_restored() -> Iterator[None]:
    """Put packet filter rules, forwarding and bridges back as they were."""
    forwarding = Path("/proc/sys/net/ipv4/ip_forward")
    before = forwarding.read_text()
    rules = _tool("iptables-save")
    bridges = _bridges()
    try:
        yield
    finally:
        for bridge in _bridges() - bridges:
            _tool("ip", "link", "delete", bridge)
        # Tables that were not in use before are not in `rules`: empty the ones that docker fills.
        empty = "".join(f"*{table}\nCOMMIT\n" for table in ("filter", "nat") if f"*{table}" not in rules)
        _tool("iptables-restore", text=rules + empty)
        forwarding.write_text(before)


def _bridges() -> set[str]:
    return {path.parent.name for path in Path("/sys/class/net").glob("*/bridge")}


def _tool(program: str, *words: str, text: str = "") -> str:
    argv = [shutil.which(program, path=_SBIN) or program, *words]
    return subprocess.run(argv, input=text, capture_output=True, text=True, check=True).stdout


def import_base_image(engine: Engine, name: str, kept: Path) -> None:
    """Give `engine` a minimal Debian as image `name`, for places that reach no registry.

    Its trusted certificates are this machine's, so that builds work behind an inspecting proxy.

    Args:
        kept: The archive of the bare system; made by debootstrap if it is not there.

    Raises:
        EngineMissing: debootstrap is not installed, or this is not root.
    """
    if not kept.exists():
        _bootstrap(kept)
    with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
        with kept.open("rb") as bare:
            shutil.copyfileobj(bare, archive)
        archive.flush()
        with tarfile.open(archive.name, "a:") as appended:
            for number, certificate in enumerate(_added_certificates()):
                content = f"{certificate}\n".encode()
                entry = tarfile.TarInfo(f"usr/local/share/ca-certificates/host-{number}.crt")
                entry.size, entry.mode = len(content), 0o644
                appended.addfile(entry, io.BytesIO(content))
        engine.docker("import", archive.name, name)


def _bootstrap(kept: Path) -> None:
    if shutil.which("debootstrap", path=_SBIN) is None or os.getuid() != 0:
        raise EngineMissing(
            "a base image is made by root with debootstrap: run as root: apt-get install debootstrap; "
            "or name an image that the engine has: VOIDBOX_TEST_BASE_IMAGE"
        )
    kept.parent.mkdir(parents=True, exist_ok=True)
    query = ("Created-By: Packages", f"Codename: {RELEASE}", "Component: main")
    mirrors = _tool("apt-get", "indextargets", "--format", "$(REPO_URI)", *query).split()
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        tree, archive = Path(scratch, "tree"), Path(scratch, "base.tar")
        _tool("debootstrap", "--variant=minbase", RELEASE, str(tree), *mirrors[:1])
        _tool(
            "tar",
            "--create",
            f"--file={archive}",
            "--exclude=./var/cache/apt/archives/*.deb",
            f"--directory={tree}",
            ".",
        )
        archive.rename(kept)


def _added_certificates() -> list[str]:
    """Certificates that this machine trusts and Debian's package does not bring."""
    if not _BUNDLE.exists():
        return []
    known = {
        pem
        for path in Path("/usr/share/ca-certificates").rglob("*.crt")
        for pem in _PEM.findall(path.read_text())
    }
    return [pem for pem in _PEM.findall(_BUNDLE.read_text()) if pem not in known]
