"""What surrounds a build: names, damage, progress lines, the slim kernel's settings."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path

import pytest

from services.common.errors import Corrupt, InvalidInput, NotFound
from services.imager import guest_image, guest_kernel, guest_store, rootfs, slim_kernel
from services.imager.cpio import Entry
from services.imager.guest_python import shared_libraries
from services.imager.guest_store import load_guest_image, verify_guest_image
from services.imager.progress import Progress
from services.imager.terminal import network_env, printer
from tests.unit.imager.elf_files import bzimage, vmlinux


def image_at(
    cache: Path, *, kernel: bytes = b"kernel", initramfs: bytes = b"initramfs", flavor: str = "debian"
) -> Path:
    """A directory as a build leaves it, made by the digests of its two files."""
    made = cache / "guest" / "made"
    made.mkdir(parents=True)
    (made / "vmlinux").write_bytes(kernel)
    (made / "initramfs.cpio").write_bytes(initramfs)
    sums = [guest_store.file_sha256(made / name) for name in ("vmlinux", "initramfs.cpio")]
    digest = guest_store.image_digest(sums[0], sums[1])
    about = {
        "digest": digest,
        "kernel": {"flavor": flavor, "release": "6.1", "size": len(kernel)},
        "initramfs": {"size": len(initramfs)},
    }
    (made / "manifest.json").write_text(json.dumps(about))
    final = made.rename(made.with_name(digest.removeprefix("sha256:")))
    (cache / "guest/default").symlink_to(final.name)
    return final


def test_an_image_is_found_by_digest_and_by_default(tmp_path: Path) -> None:
    final = image_at(tmp_path)
    for name in ("default", final.name, f"sha256:{final.name}"):
        image = load_guest_image(tmp_path, name)
        assert (image.directory, image.release) == (final, "6.1")
    verify_guest_image(image)


def test_no_image_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="make guest"):
        load_guest_image(tmp_path)


@pytest.mark.parametrize("name", ["../../etc", "", "sha256:", "sha256:" + "A" * 64, "base", "a" * 63])
def test_a_name_that_is_no_digest_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="not the digest"):
        load_guest_image(tmp_path, name)


def test_a_cut_file_is_noticed_when_loading_and_a_changed_one_when_verifying(tmp_path: Path) -> None:
    final = image_at(tmp_path)
    (final / "vmlinux").write_bytes(b"kernEl")
    with pytest.raises(Corrupt, match="does not match its digest"):
        verify_guest_image(load_guest_image(tmp_path))
    os.truncate(final / "vmlinux", 2)
    with pytest.raises(Corrupt, match="damaged; remove it"):
        load_guest_image(tmp_path)
    (final / "manifest.json").write_text("{}")
    with pytest.raises(Corrupt):
        load_guest_image(tmp_path)


def test_only_what_reaches_the_network_is_handed_on() -> None:
    env = {"HTTPS_PROXY": "p", "no_proxy": "n", "PIP_INDEX_URL": "u", "SSL_CERT_FILE": "c", "AWS_SECRET": "s"}
    assert network_env(env) == {key: value for key, value in env.items() if key != "AWS_SECRET"}


def test_a_terminal_gets_one_changing_line_and_a_file_one_line_a_step() -> None:
    steps = [
        Progress(subject="packages", action="download", done=done, total=2_000_000, unit="bytes")
        for done in (0, 1_000_000, 2_000_000)
    ]
    steps.append(Progress(subject="image", action="write"))
    plain: list[str] = []
    terminal: list[str] = []
    for step in steps:
        printer(True, terminal.append)(step)
    report = printer(False, plain.append)
    for step in steps:
        report(step)
    assert plain == ["download packages (2 MB)\n", "write image\n"]
    assert terminal[1] == "\r\x1b[Kdownload packages 1.0/2.0 MB"
    assert not any("\n" in text for text in terminal)


def test_a_library_that_no_package_has_is_named_with_who_needs_it() -> None:
    dynamic = struct.pack("<qQqQqQ", 1, 1, 5, 0x2000, 0, 0)
    strings = b"\0libmissing.so.1\0"
    start = 64 + 2 * 56
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 64, 0, 0
    )
    load = struct.pack("<IIQQQQQQ", 1, 4, start + 48, 0x2000, 0, len(strings), len(strings), 1)
    dyn = struct.pack("<IIQQQQQQ", 2, 4, start, 0, 0, 48, 48, 8)
    with pytest.raises(NotFound, match=r"x\.so needs libmissing\.so\.1"):
        shared_libraries({"x.so": header + load + dyn + dynamic + strings}, [])


def test_the_file_system_has_what_a_boot_and_a_workload_need() -> None:
    by_name: dict[str, Entry] = {entry.name: entry for entry in rootfs.base_entries("12.11")}
    assert by_name["dev/console"].device == (5, 1)
    assert (by_name["workspace"].uid, by_name["workspace"].gid) == (1000, 1000)
    assert by_name["tmp"].mode & 0o7777 == 0o1777
    assert by_name["etc/shadow"].mode & 0o777 == 0o600
    passwd = by_name["etc/passwd"].content
    assert isinstance(passwd, bytes)
    assert b"sandbox:x:1000:1000:" in passwd


def test_a_setting_that_kconfig_dropped_is_noticed() -> None:
    wanted = '# about\nCONFIG_A=y\nCONFIG_B=n\n# CONFIG_C is not set\n# CONFIG_D is not set\nCONFIG_E="x"\n'
    got = 'CONFIG_A=m\n# CONFIG_B is not set\nCONFIG_C=y\nCONFIG_E="x"\n'
    assert slim_kernel.lost_options(wanted, got) == ["CONFIG_A=y", "CONFIG_B=n", "# CONFIG_C is not set"]
    assert slim_kernel.lost_options(got, got) == []


def test_the_slim_kernel_has_everything_built_in() -> None:
    lines = guest_kernel.slim_config().decode().splitlines()
    assert not [line for line in lines if re.match(r"CONFIG_\w+=m|CONFIG_MODULES=y", line)]
    assert "CONFIG_PVH=y" in lines


def test_no_slim_kernel_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="make kernel"):
        guest_kernel.slim_kernel(tmp_path)


def test_a_kernel_file_of_the_user_is_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(vmlinux())
    first = guest_kernel.file_kernel(path, tmp_path / "cache")
    assert (first.release, first.vmlinux.read_bytes()) == ("6.1.0-test", vmlinux())
    assert guest_kernel.file_kernel(path, tmp_path / "cache") == first
    (first.directory / "modules.cpio").unlink()
    assert guest_kernel.load_kernel(first.directory) is None


def test_a_bad_kernel_file_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(b"junk" * 100 + struct.pack("<I", 1000)))
    with pytest.raises(InvalidInput, match=re.escape(str(path))):
        guest_kernel.file_kernel(path, tmp_path / "cache")
    with pytest.raises(NotFound, match="no such kernel file"):
        guest_kernel.file_kernel(tmp_path, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*"))


def test_an_update_keeps_the_kernel_of_the_default_image_while_it_can(tmp_path: Path) -> None:
    assert guest_image._present_flavor(tmp_path, "debian") == "debian"
    image_at(tmp_path, flavor="slim")
    assert guest_image._present_flavor(tmp_path, "debian") == "debian"
    guest_kernel.save_kernel(
        guest_kernel.slim_home(tmp_path, "6.1"), vmlinux(), guest_kernel.module_entries(), flavor="slim"
    )
    assert guest_image._present_flavor(tmp_path, "debian") == "slim"
