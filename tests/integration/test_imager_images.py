"""Images made and unpacked by other tools: ours, mounted, equals theirs file by file.

`umoci unpack` as root is the judge: type, mode, owner, size, mtime, contents, extended attributes
and hard links of every file. The same image in every packing gives the same disk.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from services.common.errors import AlreadyExists, InvalidInput, WrongState
from services.imager.cache import ImageCache
from services.imager.images import CachedImage
from services.imager.prune import Housekeeper
from services.imager.pull import ImageStore
from services.imager.qcow2 import create_overlay
from services.imager.registry import RegistrySettings
from tests.imager_images import (
    check_ext4,
    make_layout,
    make_tar,
    missing,
    mounted,
    need,
    run,
)
from tests.integration.test_imager_ext4 import EVERYTHING
from tests.tree_facts import Facts, facts_below


@pytest.fixture
def images(tmp_path: Path) -> ImageStore:
    """An empty cache."""
    return ImageStore(ImageCache(tmp_path / "cache"), RegistrySettings())


def seen_by_umoci(layout: Path, place: Path, tag: str = "t") -> dict[bytes, Facts]:
    """What `umoci unpack` makes of the image."""
    if os.geteuid() != 0:
        missing("umoci can only keep owners and devices as root")
    run(need("umoci", "umoci"), "unpack", "--image", f"{layout}:{tag}", place / "bundle")
    return facts_below(place / "bundle/rootfs")


def seen_by_us(images: ImageStore, reference: str, place: Path) -> tuple[CachedImage, dict[bytes, Facts]]:
    """What the kernel sees in our disk."""
    image = images.pull(reference)
    disk = images.disk(image)
    check_ext4(disk.path)
    with mounted(disk.path, place / "mnt") as root:
        return image, facts_below(root)


def assert_same(ours: dict[bytes, Facts], theirs: dict[bytes, Facts]) -> None:
    """Compare file by file, so that a failure names the file.

    A directory that no layer describes gets the present time from umoci and 1970 from us.
    """
    assert ours.keys() == theirs.keys()
    for name, facts in sorted(ours.items()):
        implied = facts.kind == "directory" and facts.mtime_ns == 0
        expected = dataclasses.replace(theirs[name], mtime_ns=0) if implied else theirs[name]
        assert facts == expected, name


def beginning(path: Path, length: int = 8 << 20) -> bytes:
    """The first bytes of a file that is mostly a hole."""
    with path.open("rb") as file:
        return file.read(length)


def new_image(layout: Path) -> None:
    """An empty image with the tag `t`, by umoci."""
    run(need("umoci", "umoci"), "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:t")


def test_layers_that_umoci_made_of_changes_are_read_as_umoci_reads_them(
    images: ImageStore, tmp_path: Path
) -> None:
    """Three layers by `umoci repack`: additions, then replacements, whiteouts, links, owners, attributes."""
    layout, bundle = tmp_path / "layout", tmp_path / "work"
    new_image(layout)

    def repack(change: str) -> None:
        shutil.rmtree(bundle, ignore_errors=True)
        run("umoci", "unpack", "--image", f"{layout}:t", bundle)
        run("sh", "-ec", change, cwd=bundle / "rootfs")
        run("umoci", "repack", "--image", f"{layout}:t", bundle)

    repack(
        "mkdir -p usr/bin etc/conf.d var/empty; cp /bin/ls /bin/cat usr/bin/; ln -s usr/bin bin; "
        "echo one > etc/one; echo two > etc/two; ln etc/one etc/one-link; chown 1000:2000 etc/two; "
        "chmod 4755 usr/bin/ls; chmod 1777 var/empty; mkfifo etc/fifo; mknod etc/null c 1 3; "
        "for i in 1 2 3; do echo $i > etc/conf.d/$i; done; touch -d '2001-02-03 04:05:06.789' etc/two"
    )
    setfattr = shutil.which("setfattr")
    repack(
        "rm etc/two; echo new > etc/one-link; rm -r etc/conf.d; mkdir etc/conf.d; echo n > etc/conf.d/new; "
        "rm etc/null; mkdir etc/null; echo x > etc/null/x"
        + ("; setfattr -n user.k -v v usr/bin/cat" if setfattr else "")
    )
    repack(
        "rm -r etc/null; ln -s conf.d etc/null; rm bin; mkdir bin; echo '#!' > bin/tool; ln bin/tool etc/t2"
    )
    _, ours = seen_by_us(images, f"oci:{layout}:t", tmp_path)
    assert_same(ours, seen_by_umoci(layout, tmp_path))


def test_everything_that_a_layer_can_hold_is_as_umoci_unpacks_it(images: ImageStore, tmp_path: Path) -> None:
    """Without what umoci drops (empty attributes) or the file system below it may not hold."""
    skip = {b"tmp/user", b"tmp/many", b"tmp/large-value", b"tmp/far", b"tmp/old"}
    items = [item for item in EVERYTHING if item.name not in skip]
    layout = make_layout(tmp_path / "layout", [make_tar(items)])
    _, ours = seen_by_us(images, f"oci:{layout}:t", tmp_path)
    theirs = seen_by_umoci(layout, tmp_path)
    assert_same(ours, theirs)


def test_a_tree_of_this_machine_inserted_whole(images: ImageStore, tmp_path: Path) -> None:
    """`umoci insert` of a real directory; 0.4.7 writes no end blocks."""
    layout = tmp_path / "layout"
    new_image(layout)
    source = Path(os.__file__).parent / "encodings"
    run("umoci", "insert", "--image", f"{layout}:t", source, "/usr/lib/encodings")
    run("umoci", "insert", "--image", f"{layout}:t", "/etc/alternatives", "/etc/alternatives")
    _, ours = seen_by_us(images, f"oci:{layout}:t", tmp_path)
    assert_same(ours, seen_by_umoci(layout, tmp_path))


def test_buildah_makes_an_image_and_its_config_arrives(images: ImageStore, tmp_path: Path) -> None:
    need("buildah", "buildah")
    storage = (
        "--root",
        str(tmp_path / "storage"),
        "--runroot",
        str(tmp_path / "run"),
        "--storage-driver",
        "vfs",
    )
    container = run("buildah", *storage, "from", "--isolation", "chroot", "scratch").strip().splitlines()[-1]
    try:
        source = tmp_path / "hello"
        source.write_text("hello")
        run("buildah", *storage, "copy", "--chown", "12:34", container, source, "/srv/hello")
        run("buildah", *storage, "config", "--entrypoint", '["/srv/run","--flag"]', "--cmd", "a b",
            "--env", "PATH=/srv:/bin", "--workingdir", "/srv", "--user", "12:34",
            "--label", "purpose=test", container)  # fmt: skip
        layout = tmp_path / "layout"
        run("buildah", *storage, "commit", "--format", "oci", container, f"oci:{layout}:t")
    finally:
        run("buildah", *storage, "rm", container)
    image, ours = seen_by_us(images, f"oci:{layout}:t", tmp_path)
    assert image.config.entrypoint == ("/srv/run", "--flag")
    assert image.config.cmd == ("a", "b")
    assert "PATH=/srv:/bin" in image.config.env
    assert (image.config.working_dir, image.config.user) == ("/srv", "12:34")
    assert image.config.labels["purpose"] == "test"
    assert (ours[b"srv/hello"].uid, ours[b"srv/hello"].gid, ours[b"srv/hello"].size) == (12, 34, 5)
    assert_same(ours, seen_by_umoci(layout, tmp_path))


def test_one_image_in_every_packing_is_one_disk(images: ImageStore, tmp_path: Path) -> None:
    tars = [make_tar(EVERYTHING), make_tar(EVERYTHING[:3])]
    contents = set()
    for compression in ("none", "gzip", "zstd"):
        layout = make_layout(tmp_path / compression, tars, compression=compression)
        contents.add(images.disk(images.pull(f"oci:{layout}:t")).path)
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        run(
            need("skopeo", "skopeo"), "--insecure-policy", "copy", f"oci:{layout}:t", f"oci:{tmp_path}/copy:t"
        )
        contents.add(images.disk(images.pull(f"oci:{tmp_path}/copy:t")).path)
    assert len(contents) == 1
    first = beginning(contents.pop())
    again = ImageStore(ImageCache(tmp_path / "cache2"), RegistrySettings())
    assert beginning(again.disk(again.pull(f"oci:{tmp_path}/gzip:t")).path) == first


def test_a_gzip_of_many_members_is_one_layer(images: ImageStore, tmp_path: Path) -> None:
    """As estargz and pigz write them."""
    tar = make_tar(EVERYTHING)
    layout = make_layout(tmp_path / "layout", [tar], compression="gzip")
    members = b"".join(
        gzip.compress(tar[at : at + 3000], mtime=0) for at in range(0, len(tar), 3000)
    ) + bytes(7)
    index = json.loads((layout / "index.json").read_text())
    blobs = layout / "blobs/sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_text())
    for holder, data in ((manifest["layers"][0], members), (index["manifests"][0], None)):
        data = json.dumps(manifest).encode() if data is None else data
        holder["digest"], holder["size"] = "sha256:" + hashlib.sha256(data).hexdigest(), len(data)
        (blobs / holder["digest"][7:]).write_bytes(data)
    (layout / "index.json").write_text(json.dumps(index))
    _, ours = seen_by_us(images, f"oci:{layout}:t", tmp_path)
    assert len(ours) == len(EVERYTHING)


def test_qemu_agrees_with_the_overlay_and_its_lock_keeps_the_image(
    images: ImageStore, tmp_path: Path
) -> None:
    qemu_img, qemu_io = need("qemu-img", "qemu-utils"), need("qemu-io", "qemu-utils")
    layout = make_layout(tmp_path / "layout", [make_tar(EVERYTHING)])
    image = images.pull(f"oci:{layout}:t")
    base = images.disk(image).path
    overlay = tmp_path / "box.qcow2"
    create_overlay(base, overlay, 3 << 30)
    assert "virtual size: 3 GiB" in run(qemu_img, "info", overlay)
    assert "No errors" in run(qemu_img, "check", overlay)
    assert "identical" in run(qemu_img, "compare", overlay, base)
    before = beginning(base)
    run(qemu_io, "-f", "qcow2", "-c", "write -P 7 4096 65536", "-c", "read -P 7 4096 65536", overlay)
    assert beginning(base) == before
    with pytest.raises(AlreadyExists):
        create_overlay(base, overlay)
    with pytest.raises(InvalidInput, match="as long"):
        create_overlay(base, tmp_path / "small", 512)
    assert struct.unpack(">I", overlay.read_bytes()[4:8]) == (3,)
    keeper = Housekeeper(images.catalog)
    process = subprocess.Popen(
        [qemu_io, "-f", "qcow2", overlay],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"length\n")
        process.stdin.flush()
        process.stdout.readline()
        with pytest.raises(WrongState, match="running box"):
            keeper.delete(image.reference)
        assert keeper.prune(max_size_bytes=1) == ([], 0)
        assert base.exists()
    finally:
        process.communicate(b"quit\n")
    assert keeper.prune(max_size_bytes=1)[0] == [image.reference]
    assert not base.exists()
