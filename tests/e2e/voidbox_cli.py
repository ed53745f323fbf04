"""The real command line against a real embedded stack in directories of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from services.common.paths import Paths

ROOT = Path(__file__).resolve().parents[2]
# Long enough for a cold boot under emulation on a machine that does other things too.
SECONDS = 240.0
MEMORY = ("--memory-mb", "512")


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A command that has ended."""

    code: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        """Standard output as text."""
        return self.stdout.decode()

    @property
    def json(self) -> Any:
        """Standard output as one JSON document."""
        return json.loads(self.stdout)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Standard output as JSON lines."""
        return [json.loads(line) for line in self.stdout.splitlines()]


class Voidbox:
    """`voidbox` with directories below `root`.

    Args:
        root: A directory with a short path; everything is below it.
        guest: Whether the machine's guest image is available.
    """

    def __init__(self, root: Path, *, guest: bool = True) -> None:
        self.root = root
        self.state, self.cache, self.runtime = root / "s", root / "c", root / "r"
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(root),
            "VOIDBOX_STATE_DIR": str(self.state),
            "VOIDBOX_CACHE_DIR": str(self.cache),
            "VOIDBOX_RUNTIME_DIR": str(self.runtime),
            "XDG_CONFIG_HOME": str(root / "config"),
        }
        self.cache.mkdir(mode=0o700)
        if guest:
            found = Paths.from_env(os.environ).cache / "guest"
            assert (found / "default").exists(), f"no guest image in {found}; build it: make guest"
            (self.cache / "guest").symlink_to(found)

    def popen(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command; its streams are pipes unless told otherwise."""
        options = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        } | options
        argv = [sys.executable, "-P", "-m", "voidbox", *words]
        return cast("subprocess.Popen[bytes]", subprocess.Popen(argv, env=self.env, **options))

    def __call__(
        self, *words: str, code: int | None = 0, stdin: bytes | None = None, cwd: Path | None = None
    ) -> Done:
        """Run a command to its end; `code` is the exit code that it must have."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "voidbox", *words],
            env=self.env,
            cwd=cwd,
            stdin=subprocess.DEVNULL if stdin is None else None,
            input=stdin,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
        error = done.stderr.decode(errors="replace")
        assert "Traceback" not in error, error
        assert code is None or done.returncode == code, (
            f"voidbox {' '.join(words)} exited with {done.returncode}, not {code}:\n"
            f"{done.stdout.decode(errors='replace')}\n{error}\n{self.logs()}"
        )
        return Done(code=done.returncode, stdout=done.stdout, stderr=error)

    def error(self, *words: str, code: int) -> dict[str, Any]:
        """The error object of a command that must fail with `code`."""
        done = self("--output", "json", *words, code=code)
        error: dict[str, Any] = json.loads(done.stderr.splitlines()[-1])["error"]
        assert error["exit_code"] == code
        return error

    def status(self) -> dict[str, Any]:
        """What `voidbox status` says."""
        found: dict[str, Any] = json.loads(self("--output", "json", "status", code=None).stdout)
        return found

    def service_pid(self, name: str) -> int:
        """The process id of a service."""
        services = self.status()["stack"]["services"]
        return next(int(service["pid"]) for service in services if service["name"] == name)

    def boxes(self) -> list[dict[str, Any]]:
        """Boxes that have not ended."""
        ended = ("BOX_STATE_STOPPED", "BOX_STATE_FAILED")
        return [box for box in self.status()["boxes"] if box["state"] not in ended]

    def logs(self) -> str:
        """The ends of the services' logs, for the message of a failed test."""
        directory = self.state / "log"
        names = sorted(directory.glob("*.log")) if directory.is_dir() else []
        return "\n".join(f"== {name.name}\n{name.read_text(errors='replace')[-3000:]}" for name in names)

    def leftovers(self) -> list[str]:
        """Processes, mounts and sockets that belong to this stack."""
        mark = str(self.root).encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                if mark in command or mark in (entry / "environ").read_bytes():
                    found.append(f"process {entry.name}: {command.replace(bytes(1), b' ').decode()}")
        found += [
            f"mount {line}"
            for line in Path("/proc/mounts").read_text().splitlines()
            if str(self.root) in line
        ]
        for directory in (self.runtime, self.state / "tmp"):
            if directory.exists():
                found += [f"file {path}" for path in directory.rglob("*")]
        boxes = self.state / "boxes"
        found += [f"box {path}" for path in boxes.iterdir()] if boxes.exists() else []
        return found


@contextlib.contextmanager
def stack(*, guest: bool = True) -> Iterator[Voidbox]:
    """A stack of its own, which leaves nothing behind."""
    root = Path(tempfile.mkdtemp(prefix="vb", dir="/tmp"))
    voidbox = Voidbox(root, guest=guest)
    try:
        yield voidbox
    finally:
        try:
            voidbox("down", code=0)
            assert voidbox.leftovers() == []
        finally:
            shutil.rmtree(root)


def interrupt(process: subprocess.Popen[bytes], number: int = signal.SIGINT) -> None:
    """Send a signal to a command."""
    process.send_signal(number)


def read_until(process: subprocess.Popen[bytes], mark: bytes, *, stream: str = "stderr") -> bytes:
    """What a command prints, up to and with the line that holds `mark`."""
    pipe: IO[bytes] = getattr(process, stream)
    seen = b""
    for line in pipe:
        seen += line
        if mark in line:
            return seen
    raise AssertionError(f"{mark!r} never came; instead: {seen.decode(errors='replace')}")


def finish(process: subprocess.Popen[bytes], seconds: float = SECONDS) -> Done:
    """Wait for a command and take the rest of its output."""
    out, err = process.communicate(timeout=seconds)
    return Done(code=process.returncode, stdout=out or b"", stderr=(err or b"").decode(errors="replace"))


def spec(path: Path, document: dict[str, Any]) -> str:
    """A spec file of the document."""
    path.write_text(json.dumps(document))
    return str(path)


def program_box(name: str, *words: str, **more: Any) -> dict[str, Any]:
    """A box of a pipeline that runs a program."""
    return {"name": name, "run": {"program": words[0], "args": list(words[1:])}, **more}


def pipeline(name: str, *boxes: dict[str, Any], stages: Sequence[Any] = ()) -> dict[str, Any]:
    """A pipeline of small boxes."""
    document: dict[str, Any] = {
        "api_version": "v1",
        "kind": "pipeline",
        "name": name,
        "sandbox": {"memory_mb": 512},
        "pipeline": {"boxes": list(boxes)},
    }
    if stages:
        document["pipeline"]["stages"] = list(stages)
    return document
