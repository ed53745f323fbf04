"""Our disk in a real box, read by the guest's kernel, equals what `umoci unpack` makes as root."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import shutil
from pathlib import Path

import pytest

from services.imager.cache import ImageCache
from services.imager.pull import ImageStore
from services.imager.registry import RegistrySettings
from tests import tree_facts
from tests.imager_images import Item, directory, hardlink, make_layout, make_tar, missing, need, run
from tests.integration.test_imager_ext4 import EVERYTHING
from tests.tree_facts import Facts, facts_below
from tests.vm import Client
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

pytestmark = pytest.mark.vm

# What umoci drops (empty attributes) and the host's file system may not hold (far times, large attributes);
# and a root that is closed to others: in a box, root has no capabilities.
_NOT_COMPARED = {b".", b"tmp/user", b"tmp/many", b"tmp/large-value", b"tmp/far", b"tmp/old"}


def layers() -> list[bytes]:
    """Everything that a layer can hold; then links, replacements and whiteouts across layers."""
    first = [item for item in EVERYTHING if item.name not in _NOT_COMPARED]
    first += [
        directory(b"."),
        directory(b"many"),
        *(Item(name=b"many/%d" % i, data=b"%d" % i) for i in range(1000)),
    ]
    first.append(Item(name=b"tmp/attribute", data=b"x", xattrs={b"user.key": b"value"}))
    second = [
        hardlink(b"etc/across", b"etc/passwd"),
        Item(name=b"etc/.wh.empty"),
        directory(b"many", mode=0o700),
        Item(name=b"many/new", data=os.urandom(300_000)),
        Item(name=b"many/.wh..wh..opq"),
        Item(name=b"etc/one-more", data=b"replaced", mode=0o2755, uid=7, gid=8),
    ]
    return [make_tar(first), make_tar(second)]


async def test_a_disk_in_a_box_is_what_umoci_unpacks_file_by_file(client: Client, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        missing("umoci can only keep owners and devices as root")
    layout = make_layout(tmp_path / "layout", layers())
    run(need("umoci", "umoci"), "unpack", "--image", f"{layout}:t", tmp_path / "bundle")
    theirs = facts_below(tmp_path / "bundle/rootfs")
    store = ImageStore(ImageCache(tmp_path / "cache"), RegistrySettings())
    disk = store.disk(store.pull(f"oci:{layout}:t"))
    # The machine runs as another user, who cannot reach into this test's directory.
    place = Path("/var/tmp") / f"voidbox-test-disk-{os.getpid()}.ext4"
    shutil.copy(disk.path, place)
    try:
        place.chmod(0o644)
        await client.create("compared", disks=[pb.Disk(base_path=str(place), guest_path="/image")])
        try:
            done, out, error = await client.run(
                "compared", "python3", "-c", inspect.getsource(tree_facts), "/image", user="root"
            )
            assert done.exit_code == 0, error.decode(errors="replace")[-2000:]
        finally:
            await client.delete("compared")
    finally:
        place.unlink()
    ours = {}
    for name, *fields, group in ast.literal_eval(out.decode()):
        ours[name] = dataclasses.replace(Facts(*fields), group=frozenset(group))
    assert len(ours) > 20
    assert ours.keys() == theirs.keys()
    for name, facts in sorted(ours.items()):
        assert facts == theirs[name], name
