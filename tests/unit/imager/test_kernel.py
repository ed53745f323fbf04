"""A kernel is taken apart within its own bounds, and modules load after what they need."""

from __future__ import annotations

import contextlib
import gzip
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import Corrupt, InvalidInput, NotFound, VoidboxError
from services.imager.kernel import (
    ModuleTree,
    decompress,
    extract_vmlinux,
    kernel_release,
    module_dependencies,
)
from tests.unit.imager.elf_files import bzimage, module, vmlinux


def packed(compress: Callable[[bytes], bytes], content: bytes) -> bytes:
    return compress(content) + struct.pack("<I", len(content))


def xz_image(content: bytes) -> bytes:
    return bzimage(packed(lzma.compress, content))


@pytest.mark.parametrize(
    "image",
    [
        vmlinux(),
        xz_image(vmlinux()),
        bzimage(packed(zstandard.compress, vmlinux())),
        bzimage(gzip.compress(vmlinux())),
        bzimage(
            b"\0" * 100 + packed(lzma.compress, vmlinux()),
            offset=100,
            length=len(packed(lzma.compress, vmlinux())),
        ),
    ],
    ids=["plain", "xz", "zstd", "gzip", "after a stub"],
)
def test_the_kernel_comes_out_of_each_container(image: bytes) -> None:
    assert extract_vmlinux(image) == vmlinux()


def test_the_relocation_table_after_the_elf_file_is_left_out() -> None:
    assert extract_vmlinux(xz_image(vmlinux() + b"\1\2\3\4" * 100)) == vmlinux()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "neither a bzImage nor"),
        (b"#!/bin/sh\n" * 1000, "neither a bzImage nor"),
        (bzimage(packed(lzma.compress, vmlinux()), version=0x0200), "boot protocol"),
        (xz_image(vmlinux(pvh=False)), "no PVH entry"),
        (vmlinux(kind=3), "not a kernel"),
        (bzimage(packed(lambda content: b"\x02\x21\x4c\x18" + content, vmlinux())), "lz4.*supported"),
        (bzimage(packed(lambda content: b"????" + content, vmlinux())), "unknown.*supported"),
    ],
)
def test_what_cannot_be_booted_is_invalid_and_says_why(image: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        extract_vmlinux(image)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (bzimage(packed(lzma.compress, vmlinux()), length=1 << 31), "cut off"),
        (bzimage(packed(lzma.compress, vmlinux()), offset=0xFFFFFFFF), "cut off"),
        (bzimage(b"", length=0), "cut off"),
        (bzimage(lzma.compress(vmlinux()) + b"\xff\xff\xff\xff"), "says it unpacks"),
        (bzimage(lzma.compress(vmlinux()) + struct.pack("<I", 10)), "more than 10 bytes"),
        (bzimage(lzma.compress(vmlinux()) + struct.pack("<I", 100_000)), "not to 100000"),
        (
            bzimage(lzma.compress(vmlinux())[:-40] + b"\0" * 40 + struct.pack("<I", len(vmlinux()))),
            "unpack|decompress",
        ),
        (vmlinux(machine=183), "not for x86-64"),
        (vmlinux()[:100], "cut off"),
        (xz_image(vmlinux()[:-20]), "cut off|segment"),
    ],
)
def test_what_contradicts_itself_is_corrupt_and_says_where(image: bytes, message: str) -> None:
    with pytest.raises(Corrupt, match=message):
        extract_vmlinux(image)


def test_a_compression_bomb_stops_at_the_limit() -> None:
    for bomb in (
        lzma.compress(bytes(50 << 20)),
        zstandard.compress(bytes(50 << 20)),
        gzip.compress(bytes(50 << 20)),
    ):
        with pytest.raises(Corrupt, match="more than 1000 bytes"):
            decompress(bomb, 1000, "bomb")


@given(st.binary(max_size=4000))
def test_any_bytes_are_refused_with_an_error_of_ours(data: bytes) -> None:
    for image in (data, b"\x7fELF\x02\x01" + data, bzimage(data), bzimage(b"\xfd7zXZ\0" + data)):
        with pytest.raises(VoidboxError):
            extract_vmlinux(image)


@given(st.integers(0, len(vmlinux()) - 1), st.integers(0, 255))
def test_one_wrong_byte_is_refused_or_harmless(at: int, value: int) -> None:
    damaged = bytearray(vmlinux())
    damaged[at] = value
    try:
        result = extract_vmlinux(bytes(damaged))
    except VoidboxError:
        return
    assert len(result) <= len(damaged)


@given(st.integers(0, len(module("a,b")) - 1), st.integers(0, 255))
def test_one_wrong_byte_of_a_module_is_refused_or_harmless(at: int, value: int) -> None:
    damaged = bytearray(module("a,b"))
    damaged[at] = value
    with contextlib.suppress(VoidboxError):
        assert len(module_dependencies(bytes(damaged), "m")) <= len(damaged)


def test_the_release_is_read_from_the_banner() -> None:
    assert kernel_release(vmlinux()) == "6.1.0-test"
    with pytest.raises(InvalidInput):
        kernel_release(b"no banner")


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., ModuleTree]:
    def make(built_in: str = "", suffix: str = "", **modules: str) -> ModuleTree:
        base = tmp_path / "lib/modules/6.1"
        for name, depends in modules.items():
            path = base / "kernel/drivers" / f"{name.replace('_', '-')}.ko{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(lzma.compress(module(depends)) if suffix else module(depends))
        (base / "modules.builtin").write_text("".join(f"kernel/{name}.ko\n" for name in built_in.split()))
        return ModuleTree(tmp_path, "6.1")

    return make


def test_modules_come_after_what_they_depend_on_and_once(tree: Callable[..., ModuleTree]) -> None:
    order = tree(a_b="c,d", c="e", d="e", e="").closure(["a-b", "c"])
    assert [module.name for module in order] == ["e", "c", "d", "a_b"]
    assert str(order[-1].path) == "lib/modules/6.1/kernel/drivers/a-b.ko"


def test_what_is_built_in_is_not_loaded(tree: Callable[..., ModuleTree]) -> None:
    assert [module.name for module in tree(built_in="virtio c", a="c").closure(["a", "virtio"])] == ["a"]


def test_compressed_modules_go_in_uncompressed(tree: Callable[..., ModuleTree]) -> None:
    (only,) = tree(suffix=".xz", a="").closure(["a"])
    assert only.content == module("")
    assert only.path.name == "a.ko"


def test_a_missing_module_names_who_wants_it(tree: Callable[..., ModuleTree]) -> None:
    with pytest.raises(NotFound, match=r"no module nope \(wanted by a\)"):
        tree(a="nope").closure(["a"])


def test_a_circle_of_modules_is_corrupt(tree: Callable[..., ModuleTree]) -> None:
    with pytest.raises(Corrupt, match="a > b > a"):
        tree(a="b", b="a").closure(["a"])
