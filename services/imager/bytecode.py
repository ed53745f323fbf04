"""Python source to bytecode for the guest, by the guest's own interpreter.

Without bytecode in the image, importing asyncio alone cost 3.8 s under emulation, with it
0.6 s. The interpreter is the one that goes into the image, run on this host with the
image's own libraries, so magic number and marshalling are right whatever Python the
imager runs on. Pycs are of the unchecked-hash kind (PEP 552): no time stamps, and the
import system never reads the source to compare.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.common.process import run
from services.imager.progress import Progress, Report, silent

_COMPILE_SECONDS = 300
_MAGIC_311 = (3495).to_bytes(2, "little") + b"\r\n"

# Runs in the guest's interpreter. A fixed hash seed fixes the order of frozensets in
# constants, and one process that compiles in name order fixes marshal's references.
_SCRIPT = """
import json, py_compile, sys
for source, target, shown in json.load(open(sys.argv[1])):
    py_compile.compile(source, target, shown, doraise=True, optimize=0,
                       invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """A Python of the image, made to run on this host.

    Attributes:
        loader: The image's ld.so.
        libraries: Directories with the shared libraries it needs.
        program: Its `python3.11`.
        home: The prefix whose `lib/python3.11` holds the core of the standard library.
        modules: The directory with the rest of it.
    """

    loader: Path
    libraries: tuple[Path, ...]
    program: Path
    home: Path
    modules: Path

    async def run(self, script: str, *args: Path) -> bytes:
        """Run `script` with `args`, isolated from this host's Python settings."""
        path = ":".join(str(directory) for directory in self.libraries)
        argv = [self.loader, "--library-path", path, self.program, "-S", "-s", "-B", "-c", script, *args]
        env = {
            "PYTHONHOME": str(self.home),
            "PYTHONPATH": f"{self.modules}:{self.modules}/lib-dynload",
            "PYTHONHASHSEED": "0",
            "PYTHONNOUSERSITE": "1",
        }
        return await run([str(word) for word in argv], env=env, seconds=_COMPILE_SECONDS)


async def compile_sources(
    interpreter: Interpreter, sources: Mapping[str, bytes], *, report: Report = silent
) -> dict[str, bytes]:
    """The bytecode of each source, by the same guest path.

    Args:
        sources: Python source by absolute path in the guest, which tracebacks will show.

    Raises:
        CommandFailed: a source does not compile; the message says which and where.
    """
    report(Progress(subject="bytecode", action="compile", total=len(sources), unit="files"))
    with tempfile.TemporaryDirectory(prefix="voidbox-compile-") as scratch:
        jobs = await asyncio.to_thread(_lay_out, Path(scratch), sources)
        await interpreter.run(_SCRIPT, Path(scratch, "jobs.json"))
        return await asyncio.to_thread(_collect, jobs)


def _lay_out(scratch: Path, sources: Mapping[str, bytes]) -> list[tuple[str, str, str]]:
    jobs = []
    for number, (shown, source) in enumerate(sorted(sources.items())):
        path = scratch / f"{number}.py"
        path.write_bytes(source)
        jobs.append((str(path), str(scratch / f"{number}.pyc"), shown))
    (scratch / "jobs.json").write_text(json.dumps(jobs))
    return jobs


def _collect(jobs: list[tuple[str, str, str]]) -> dict[str, bytes]:
    compiled = {}
    for _, target, shown in jobs:
        content = Path(target).read_bytes()
        # Bytes 4 to 8 are PEP 552's flags: hash-based, not checked.
        assert content[:8] == _MAGIC_311 + b"\x01\0\0\0", f"{shown}: not an unchecked-hash pyc of Python 3.11"
        compiled[shown] = content
    return compiled
