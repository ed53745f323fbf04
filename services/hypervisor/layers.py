"""The RAM of a saved machine as layers of files: what has changed lies over what an earlier one has.

A layer's file holds chunks, its `runs` say where they go. A machine that is saved again writes one layer
with the chunks that differ and has the older ones as hard links: none needs another to be there, and what
nobody links to any more is gone. Which chunks differ is told by a file of their digests, so nothing of the
older machine is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK = 64 * 1024
CHUNKS = "chunks"
DIGEST_BYTES = 16
MAX_LAYERS = 16
"""Each is a file to read when the machine is loaded."""
_NOTHING = bytes(DIGEST_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One file of chunks: its name, where (offset, length) its content goes, and its sha256."""

    file: str
    runs: tuple[tuple[int, int], ...]
    digest: str

    @property
    def size(self) -> int:
        """Length of the file."""
        return sum(length for _, length in self.runs)

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"file": self.file, "runs": self.runs, "digest": self.digest}


def from_plain(document: Any, memory_bytes: int) -> Layer:
    """The layer that `Layer.plain` was given.

    Raises:
        ValueError: its runs overlap or leave the memory.
    """
    runs = tuple((int(at), int(length)) for at, length in document["runs"])
    end = 0
    for at, length in runs:
        if at < end or length <= 0 or at + length > memory_bytes:
            raise ValueError("its runs overlap or leave the memory")
        end = at + length
    return Layer(file=str(document["file"]), runs=runs, digest=str(document["digest"]))


def name(number: int) -> str:
    """The name of the layer with `number` below the newest, which is called `ram`."""
    return f"ram-{number}"


@dataclass(slots=True)
class Digests:
    """The digests of all chunks of a memory, in order; of zeros it is zeros."""

    content: bytearray

    @classmethod
    def empty(cls, memory_bytes: int) -> Digests:
        """Those of a memory of zeros."""
        return cls(bytearray(-(-memory_bytes // CHUNK) * DIGEST_BYTES))

    def put(self, at: int, chunk: bytes) -> None:
        """Note the chunk at offset `at`, which is not zeros."""
        digest = hashlib.blake2b(chunk, digest_size=DIGEST_BYTES).digest()
        start = at // CHUNK * DIGEST_BYTES
        self.content[start : start + DIGEST_BYTES] = digest

    def same(self, older: Digests, at: int) -> bool:
        """Whether the chunk at `at` is the same in `older`."""
        start = at // CHUNK * DIGEST_BYTES
        return self.content[start : start + DIGEST_BYTES] == older.content[start : start + DIGEST_BYTES]

    @property
    def data_bytes(self) -> int:
        """What is not zeros, in bytes."""
        found = sum(
            self.content[start : start + DIGEST_BYTES] != _NOTHING
            for start in range(0, len(self.content), DIGEST_BYTES)
        )
        return found * CHUNK


def link(source: Path, target: Path, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Have the layers of the machine at `source` in the directory `target` too, the newest last.

    Raises:
        OSError: a file is gone, or cannot be linked.
    """
    linked = []
    for number, layer in enumerate(layers):
        file = name(number)
        os.link(source / layer.file, target / file, follow_symlinks=False)
        linked.append(Layer(file=file, runs=layer.runs, digest=layer.digest))
    return tuple(linked)


def unlink(directory: Path, layers: Sequence[Layer]) -> None:
    """Undo `link`."""
    for number in range(len(layers)):
        with contextlib.suppress(FileNotFoundError):
            (directory / name(number)).unlink()


def worth_it(layers: Sequence[Layer], now: Digests) -> bool:
    """Whether to build on `layers`: not too many, and not mostly what has been replaced since."""
    held = sum(each.size for each in layers)
    return 0 < len(layers) < MAX_LAYERS and held <= 2 * max(CHUNK, now.data_bytes)
