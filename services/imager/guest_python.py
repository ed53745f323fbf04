"""The guest's Python: which of Debian's files and of the wheels go in, and as what.

Everything in an initramfs is RAM of every box, so what neither the agent nor a usual
script needs stays out, and a library goes in as bytecode without its source. Measured for
Python 3.11 and grpcio 1.85 (MB): interpreter 6.8, standard library as bytecode 10.1 (its
sources would be 8.9 more), extension modules 1.0, cygrpc 17.1 (it has no symbols to
strip), other wheels 2.5, shared libraries 6.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from services.common.errors import NotFound
from services.imager import cpio
from services.imager.elf import Elf
from services.imager.wheels import Wheel

STDLIB = "usr/lib/python3.11"
# Root's alone: workloads have no business in the agent's libraries.
PRIVATE = "usr/lib/voidbox"
SITE = f"{PRIVATE}/site"
LIBRARIES = "lib/x86_64-linux-gnu"
LOADER = "lib64/ld-linux-x86-64.so.2"

# Not useful in a box (no display, no packaging tools, no terminal UI), or only with
# shared libraries that cost more than they give: OpenSSL alone is 5.7 MB, and a box without
# a network has no use for it; hashlib has its own code for every guaranteed algorithm.
_STDLIB_OUT = (
    "__phello__*", "_aix_support.py", "_bootsubprocess.py", "_osx_support.py", "antigravity.py",
    "config-3.11-*", "curses/*", "dbm/*", "distutils/*", "ensurepip/*", "idlelib/*", "lib2to3/*", "msilib/*",
    "nturl2path.py", "pydoc*", "sitecustomize.py", "sqlite3/*", "ssl.py", "test/*",
    "this.py", "tkinter/*", "turtle*", "turtledemo/*", "venv/*", "xdrlib.py", "LICENSE.txt",
    "lib-dynload/*test*", "lib-dynload/_codecs_*", "lib-dynload/_crypt.*", "lib-dynload/_curses*",
    "lib-dynload/_dbm.*", "lib-dynload/_hashlib.*", "lib-dynload/_sqlite3.*", "lib-dynload/_ssl.*",
    "lib-dynload/_tkinter.*", "lib-dynload/_uuid.*", "lib-dynload/_xxsubinterpreters.*",
    "lib-dynload/nis.*", "lib-dynload/ossaudiodev.*", "lib-dynload/readline.*", "lib-dynload/xxlimited*",
)  # fmt: skip
_STDLIB_STILL_IN = ("lib-dynload/_codecs_iso2022.*",)
_WHEELS_IN = (
    "google/protobuf/*", "google/_upb/*", "google/rpc/*_pb2.py", "grpc/*", "grpc_channelz/*", "grpc_health/*",
    "grpc_reflection/*", "typing_extensions.py",
)  # fmt: skip
_WHEELS_OUT = (
    "google/protobuf/compiler/*",
    "google/rpc/context/*",
    "grpc/_cython/_credentials/*",
    "*.pyi",
    "*.pyx*",
)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def stdlib_files(trees: Iterable[Path]) -> dict[str, Path]:
    """The standard library's files that go in, by path in the guest."""
    files: dict[str, Path] = {}
    for tree in trees:
        base = tree / STDLIB
        for path in sorted(base.rglob("*")):
            name = path.relative_to(base).as_posix()
            out = _matches(name, _STDLIB_OUT) and not _matches(name, _STDLIB_STILL_IN)
            if path.is_file() and "__pycache__" not in path.parts and not out:
                files[f"{STDLIB}/{name}"] = path
    return files


def wheel_files(wheels: Iterable[Wheel]) -> dict[str, bytes]:
    """The wheels' files that go in, by path in the guest."""
    files: dict[str, bytes] = {}
    for wheel in wheels:
        for name, content in wheel.files():
            if _matches(name, _WHEELS_IN) and not _matches(name, _WHEELS_OUT):
                files[f"{SITE}/{name}"] = content
    return files


def sourceless(compiled: Mapping[str, bytes]) -> Iterator[cpio.Entry]:
    """Bytecode in place of its source, which the import system takes as a module's file."""
    for shown, content in compiled.items():
        yield cpio.file(shown.lstrip("/") + "c", content)


def beside_source(compiled: Mapping[str, bytes]) -> Iterator[cpio.Entry]:
    """Bytecode where Python looks for it when the source is there too."""
    for shown, content in compiled.items():
        parent, _, name = shown.lstrip("/").rpartition("/")
        yield cpio.file(f"{parent}/__pycache__/{name.removesuffix('.py')}.cpython-311.pyc", content)


def shared_libraries(
    programs: Mapping[str, bytes], trees: Iterable[Path], also: Iterable[str] = ()
) -> dict[str, Path]:
    """Every shared library that `programs` need, directly or not, by path in the guest; and those in `also`.

    All go to one directory, the first that the loader looks in.

    Raises:
        NotFound: a program needs a library that no package of the image has.
    """
    homes = [tree / home for tree in trees for home in (LIBRARIES, f"usr/{LIBRARIES}")]
    found: dict[str, Path] = {}
    wanted = [
        (name, needer)
        for needer, content in sorted(programs.items())
        for name in Elf(content, needer).needed()
    ]
    wanted += [(name, "the guest image") for name in also]
    while wanted:
        name, needer = wanted.pop()
        if name in found or LOADER.endswith(f"/{name}"):
            continue
        path = next((home / name for home in homes if (home / name).is_file()), None)
        if path is None or not re.fullmatch(r"[\w.+-]+", name):
            raise NotFound(
                f"{needer} needs {name}, which no package of the guest image has",
                reason="NO_LIBRARY",
                library=name,
            )
        found[name] = path
        wanted += [(needed, name) for needed in Elf(path.read_bytes(), name).needed()]
    return {f"{LIBRARIES}/{name}": path for name, path in sorted(found.items())}
