"""Images in tar archives, read where they lie: those of skopeo, buildah and umoci, and hostile ones.

One image gives the same disk from an archive of every kind as from its layout; what a hostile archive
says about other files, or about numbers that do not fit, ends in one clear error.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import zstandard

from services.common.errors import Corrupt, Exhausted, InvalidInput, NotFound, VoidboxError
from services.imager import files
from services.imager.cache import ImageCache
from services.imager.limits import Limits
from services.imager.pull import ImageStore
from services.imager.registry import RegistrySettings
from tests.imager_images import Item, compress, directory, hardlink, make_layout, make_tar, need, run, sha256
from tests.imager_images import symlink as link

TARS = [
    make_tar([directory(b"etc"), Item(name=b"etc/a", data=b"a" * 70_000), Item(name=b"b", data=b"lower")]),
    make_tar([Item(name=b"b", data=b"upper"), Item(name=b"etc/.wh.a")]),
]
CONFIG = {"Entrypoint": ["/bin/sh"], "Env": ["A=b"], "User": "1:2"}


@pytest.fixture
def images(tmp_path: Path) -> ImageStore:
    """An empty cache."""
    return ImageStore(ImageCache(tmp_path / "cache"), RegistrySettings())


def skopeo(*words: str) -> None:
    """`skopeo copy`."""
    run(need("skopeo", "skopeo"), "--insecure-policy", "copy", *words)


def document(tars: list[bytes], **more: Any) -> bytes:
    """An image configuration."""
    rootfs = {"type": "layers", "diff_ids": [sha256(tar) for tar in tars]}
    return json.dumps(
        {"architecture": "amd64", "os": "linux", "config": CONFIG, "rootfs": rootfs, **more}
    ).encode()


def archive(path: Path, members: Mapping[str, bytes | Item]) -> Path:
    """A tar archive."""
    items = [
        item if isinstance(item, Item) else Item(name=name.encode(), data=item)
        for name, item in members.items()
    ]
    path.write_bytes(make_tar(items))
    return path


def saved(
    path: Path, layers: list[bytes | Item], config: bytes | None = None, tags: Any = ("app:1",)
) -> Path:
    """What `docker save` of 1.10 to 24 writes."""
    config = document(TARS) if config is None else config
    name = hashlib.sha256(config).hexdigest() + ".json"
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = [{"Config": name, "RepoTags": list(tags) if tags else None, "Layers": names}]
    return archive(
        path,
        {
            **dict(zip(names, layers, strict=True)),
            name: config,
            "manifest.json": json.dumps(manifest).encode(),
        },
    )


def chained(path: Path, tars: list[bytes]) -> Path:
    """What `docker save` before 1.10 wrote: no manifest, each layer names its parent."""
    members: dict[str, bytes | Item] = {}
    parent = ""
    for number, tar in enumerate(tars):
        name = f"{number:064x}"
        body = {"id": name, "architecture": "amd64", "os": "linux", "config": CONFIG}
        members[f"{name}/json"] = json.dumps(body | ({"parent": parent} if parent else {})).encode()
        members[f"{name}/VERSION"] = b"1.0"
        members[f"{name}/layer.tar"] = tar
        parent = name
    members["repositories"] = json.dumps({"app": {"1": parent}}).encode()
    return archive(path, members)


def disk_of(images: ImageStore, reference: str) -> str:
    """The digest of the image's disk, which names its content."""
    return images.disk(images.pull(reference)).digest


def test_one_image_gives_one_disk_from_every_kind_of_archive(images: ImageStore, tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "layout", TARS, config=CONFIG)
    skopeo(f"oci:{layout}:t", f"oci-archive:{tmp_path}/oci.tar:t")
    skopeo(f"oci:{layout}:t", f"docker-archive:{tmp_path}/docker.tar:app:1")
    saved(tmp_path / "saved.tar", list(TARS))
    chained(tmp_path / "old.tar", TARS)
    saved(tmp_path / "packed.tar", [compress(TARS[0], "gzip"), compress(TARS[1], "zstd")])
    references = [
        f"oci:{layout}:t",
        f"oci-archive:{tmp_path}/oci.tar:t",
        f"oci-archive:{tmp_path}/oci.tar",
        f"docker-archive:{tmp_path}/docker.tar",
        f"docker-archive:{tmp_path}/docker.tar:app:1",
        *(f"docker-archive:{tmp_path}/{name}.tar:app:1" for name in ("saved", "old", "packed")),
        f"docker-archive:{tmp_path}/saved.tar:@0",
    ]
    assert len({disk_of(images, reference) for reference in references}) == 1
    for reference in references:
        image = images.pull(reference)
        assert image.reference.partition(":")[0] == reference.partition(":")[0]
        assert (image.config.entrypoint, image.config.env, image.config.user) == (
            ("/bin/sh",),
            ("A=b",),
            "1:2",
        )
    digests = {images.pull(reference).digest for reference in references[1:3]}
    assert digests == {images.pull(references[0]).digest}, "the manifest is the layout's own"
    assert list((images.cache.root / "tmp").iterdir()) == []
    assert not list((images.cache.root / "partial").iterdir())


def test_what_buildah_and_umoci_made_comes_through_archives(images: ImageStore, tmp_path: Path) -> None:
    umoci, buildah = need("umoci", "umoci"), need("buildah", "buildah")
    run(umoci, "init", "--layout", tmp_path / "made")
    run(umoci, "new", "--image", f"{tmp_path}/made:t")
    run(umoci, "insert", "--image", f"{tmp_path}/made:t", "/etc/alternatives", "/etc/alternatives")
    storage = ("--root", f"{tmp_path}/s", "--runroot", f"{tmp_path}/r", "--storage-driver", "vfs")
    box = run(buildah, *storage, "from", f"oci:{tmp_path}/made:t").strip().splitlines()[-1]
    try:
        for kind in ("oci-archive", "docker-archive"):
            name = ":made:1" if kind == "docker-archive" else ":1"
            run(buildah, *storage, "commit", box, f"{kind}:{tmp_path}/{kind}.tar{name}")
    finally:
        run(buildah, *storage, "rm", box)
    found = {disk_of(images, f"{kind}:{tmp_path}/{kind}.tar") for kind in ("oci-archive", "docker-archive")}
    assert len(found) == 1


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress])
def test_an_archive_compressed_as_a_whole_is_read_too(images: ImageStore, tmp_path: Path, pack: Any) -> None:
    plain = saved(tmp_path / "plain.tar", list(TARS))
    (tmp_path / "packed").write_bytes(pack(plain.read_bytes()))
    assert disk_of(images, f"docker-archive:{tmp_path}/packed") == disk_of(images, f"docker-archive:{plain}")
    (tmp_path / "cut").write_bytes(pack(plain.read_bytes())[:-30])
    with pytest.raises(Corrupt):
        images.pull(f"docker-archive:{tmp_path}/cut")
    small = ImageStore(ImageCache(tmp_path / "c"), RegistrySettings(), Limits(unpacked_bytes=1000))
    with pytest.raises(Exhausted, match="unpacks to more than 1000"):
        small.pull(f"docker-archive:{tmp_path}/packed")
    assert list((small.cache.root / "tmp").iterdir()) == []


def test_layers_that_are_links_to_each_other_are_followed_inside_the_archive(
    images: ImageStore, tmp_path: Path
) -> None:
    """As `docker save` up to 24 wrote layers that several images share."""
    config = document([TARS[0]] * 3)
    layers: list[bytes | Item] = [
        TARS[0], link(b"1/layer.tar", b"../0/layer.tar"), hardlink(b"2/layer.tar", b"0/layer.tar"),
    ]  # fmt: skip
    saved(tmp_path / "a.tar", layers, config)
    image = images.pull(f"docker-archive:{tmp_path}/a.tar")
    assert [layer.digest for layer in image.layers] == [sha256(TARS[0])] * 3


def test_of_several_images_one_must_be_named(images: ImageStore, tmp_path: Path) -> None:
    one, two = document(TARS[:1]), document(TARS[1:])
    entries = [
        {"Config": "1.json", "RepoTags": ["app:1", "<none>:<none>"], "Layers": ["1.tar"]},
        {"Config": "2.json", "RepoTags": ["docker.io/library/app:2"], "Layers": ["2.tar"]},
    ]
    path = archive(
        tmp_path / "a.tar",
        {"1.json": one, "2.json": two, "1.tar": TARS[0], "2.tar": TARS[1],
         "manifest.json": json.dumps(entries).encode()},
    )  # fmt: skip
    with pytest.raises(InvalidInput, match=r"2 images.*library/app:1, .*library/app:2.*@NUMBER"):
        images.pull(f"docker-archive:{path}")
    with pytest.raises(NotFound, match=r"no image docker.io/library/app:3; it has"):
        images.pull(f"docker-archive:{path}:app:3")
    with pytest.raises(NotFound, match="first is @0"):
        images.pull(f"docker-archive:{path}:@2")
    assert [layer.digest for layer in images.pull(f"docker-archive:{path}:app:2").layers] == [sha256(TARS[1])]
    assert [layer.digest for layer in images.pull(f"docker-archive:{path}:@0").layers] == [sha256(TARS[0])]


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({}, "empty archive"),
        ({"x": b"y"}, "neither manifest.json nor repositories"),
        ({"oci-layout": b"{}", "index.json": b"{}"}, "use oci-archive:"),
        ({"manifest.json": b"{}"}, "not a list"),
        ({"manifest.json": b"["}, "not JSON"),
        ({"manifest.json": b"[" * 100_000}, "not JSON"),
        ({"manifest.json": b"[5]"}, "no Config"),
        ({"manifest.json": b'[{"Config": 5}]'}, "no Config"),
        ({"manifest.json": b'[{"Config": "/etc/passwd"}]'}, "no member"),
        ({"manifest.json": b'[{"Config": "../../etc/passwd"}]'}, "no member"),
        ({"manifest.json": b'[{"Config": "c", "Layers": [5]}]', "c": b"{}"}, "lists of strings"),
        ({"manifest.json": b'[{"Config": "c", "Layers": "ab"}]', "c": b"{}"}, "lists of strings"),
        ({"manifest.json": b'[{"Config": "c", "Layers": ["l"]}]', "c": document([])}, "config lists 0"),
        ({"manifest.json": b'[{"Config": "c", "Layers": ["l"]}]', "c": document(TARS[:1])}, "no member 'l'"),
        ({"manifest.json": b"[" + b" " * (5 << 20) + b"]"}, "longer than"),
        ({"manifest.json": b'[{"Config": "c"}]', "c": link(b"c", b"/etc/passwd")}, "no member"),
        ({"manifest.json": b'[{"Config": "c"}]', "c": link(b"c", b"d"), "d": link(b"d", b"c")}, "circle"),
        ({"manifest.json": b'[{"Config": "%s.json"}]' % (b"0" * 64), "0" * 64 + ".json": b"{}"},
         "its name says"),
        ({"repositories": b"[]"}, "not an object"),
        ({"repositories": b'{"a": {"b": 5}}'}, "object of strings"),
        ({"repositories": b'{"a": {"b": "x"}}'}, "no member 'x/json'"),
        ({"repositories": b'{"a": {"b": "x"}}', "x/json": b'{"parent": "x"}'}, "do not end"),
        ({"repositories": b'{"a": {"b": "x"}}', "x/json": b'{"parent": 5}'}, "malformed"),
    ],
)  # fmt: skip
def test_hostile_docker_archives_are_refused(
    images: ImageStore, tmp_path: Path, members: dict[str, Any], why: str
) -> None:
    path = archive(tmp_path / "a.tar", members)
    with pytest.raises(VoidboxError, match=why):
        images.pull(f"docker-archive:{path}")
    assert images.catalog.list_images() == []
    assert not list(images.cache.root.rglob("blobs/sha256/*"))


@pytest.mark.parametrize("scheme", ["oci-archive", "docker-archive"])
@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty archive"),
        (b"x" * 5000, "not a sound tar"),
        (TARS[0][:1000], "not a sound tar"),
        (TARS[0][:-12_000], "not a sound tar"),
        (make_tar([Item(name=b"oci-layout", kind=tarfile.FIFOTYPE)]), "no valid file|neither"),
    ],
)
def test_what_is_no_sound_archive_is_refused(
    images: ImageStore, tmp_path: Path, scheme: str, data: bytes, why: str
) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises((Corrupt, InvalidInput), match=why):
        images.pull(f"{scheme}:{tmp_path}/a.tar")


def test_an_archive_that_is_no_file_is_refused_without_waiting(images: ImageStore, tmp_path: Path) -> None:
    run("mkfifo", tmp_path / "fifo")
    for place, error in (("fifo", InvalidInput), ("", InvalidInput), ("absent", NotFound)):
        with pytest.raises(error):
            images.pull(f"docker-archive:{tmp_path}/{place}")


def test_a_layer_that_is_not_what_the_archive_says_leaves_nothing(images: ImageStore, tmp_path: Path) -> None:
    saved(tmp_path / "a.tar", [TARS[0], TARS[0]])
    with pytest.raises(Corrupt) as caught:
        images.pull(f"docker-archive:{tmp_path}/a.tar")
    assert caught.value.reason in ("WRONG_DIGEST", "WRONG_SIZE")
    assert not list((images.cache.root / "partial").iterdir())
    assert images.catalog.list_images() == []


def test_an_archive_of_too_many_members_is_refused(
    images: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_MAX_MEMBERS", 10)
    path = archive(tmp_path / "a.tar", {f"m{number}": b"" for number in range(11)})
    with pytest.raises(Exhausted, match="more than 10 members"):
        images.pull(f"docker-archive:{path}")


def test_of_members_with_one_name_the_last_counts(images: ImageStore, tmp_path: Path) -> None:
    """As `tar` extracts them, so that an archive cannot show two faces."""
    good = saved(tmp_path / "good.tar", list(TARS)).read_bytes()
    evil = make_tar([Item(name=b"manifest.json", data=b"[]")])
    with tarfile.open(tmp_path / "two.tar", "w") as joined:
        for part in (evil, good):
            with tarfile.open(fileobj=io.BytesIO(part)) as source:
                for member in source:
                    joined.addfile(member, source.extractfile(member))
    assert disk_of(images, f"docker-archive:{tmp_path}/two.tar") == disk_of(
        images, f"docker-archive:{tmp_path}/good.tar"
    )
