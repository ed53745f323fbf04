"""Pushes of images and guest images to a real registry, read back by skopeo and by ourselves.

Where a registry lies or points elsewhere, a small HTTP server takes its place.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.errors import (
    Conflict,
    Corrupt,
    Denied,
    InvalidInput,
    NotFound,
    Unauthenticated,
    Unavailable,
    VoidboxError,
)
from services.imager import guest_artifact, guest_registry
from services.imager.cache import ImageCache
from services.imager.guest_registry import GuestRegistry
from services.imager.guest_store import load_guest_image
from services.imager.limits import Cancel
from services.imager.manifest import OCI_INDEX, OCI_MANIFEST, Platform
from services.imager.pull import ImageStore, PullPolicy
from services.imager.push import open_target, push_image, upload_all
from services.imager.registry import RegistrySettings
from services.imager.registry_push import RegistryTarget
from tests.guest_images import guest_at
from tests.imager_images import Item, make_layout, make_tar, need, run, sha256
from tests.registries import HTPASSWD, docker_registry

TARS = [make_tar([Item(name=b"a", data=os.urandom(300_000))]), make_tar([Item(name=b"empty")])]
FAST = RegistrySettings(connect_seconds=2, read_seconds=5, attempts=2, backoff_seconds=0.01)
AMD64, ARM64 = (Platform(os="linux", architecture=name) for name in ("amd64", "arm64"))


def store(path: Path, settings: RegistrySettings = FAST) -> ImageStore:
    """A store over an own cache."""
    return ImageStore(ImageCache(path / "images"), settings)


def settings_with_login(where: Path, host: str, password: str) -> RegistrySettings:
    """Settings with a login in a file as `docker login` writes it."""
    where.mkdir(exist_ok=True)
    encoded = base64.b64encode(f"user:{password}".encode()).decode()
    (where / "auth.json").write_text(json.dumps({"auths": {host: {"auth": encoded}}}))
    return RegistrySettings(attempts=1, auth_files=(where / "auth.json",))


# --- images --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_a_pushed_image_is_the_same_to_the_byte_for_everybody(
    registry: str, tmp_path: Path, compression: str
) -> None:
    images = store(tmp_path / "one")
    layout = make_layout(tmp_path / "layout", TARS, compression=compression, config={"Cmd": ["/a"]})
    image = images.pull(f"oci:{layout}:t")
    seen: set[tuple[str, int, int]] = set()
    name = f"{registry}/group/{compression}:v1"
    digest = push_image(images, image.reference, name, report=lambda p: seen.add((p.action, p.done, p.total)))
    assert digest == image.digest
    assert {("upload", layer.size, layer.size) for layer in image.layers} <= seen
    assert store(tmp_path / "two").pull(name).digest == image.digest
    found = run(need("skopeo", "skopeo"), "inspect", "--tls-verify=false", f"docker://{name}")
    assert json.loads(found)["Digest"] == image.digest
    # By digest, to a tag that is left out, over what is there already.
    assert push_image(images, image.digest, f"{registry}/group/{compression}") == digest
    assert store(tmp_path / "three").pull(f"{registry}/group/{compression}:latest").digest == digest


@pytest.mark.parametrize(
    ("reference", "error", "why"),
    [
        ("oci:/tmp/x", InvalidInput, "image export"),
        ("localhost:1/a@sha256:" + "0" * 64, InvalidInput, "push to a tag"),
        ("localhost:1/A", InvalidInput, "lower case"),
        ("localhost:1/a:t", Unavailable, "not reachable"),
    ],
)
def test_where_nothing_can_be_pushed_to_is_said(
    tmp_path: Path, reference: str, error: type[VoidboxError], why: str
) -> None:
    images = store(tmp_path)
    image = images.pull(f"oci:{make_layout(tmp_path / 'layout', TARS)}:t")
    with pytest.raises(error, match=why):
        push_image(images, image.reference, reference)
    with pytest.raises(NotFound, match="voidbox image ls"):
        push_image(images, "absent", reference)


def test_a_private_registry_wants_the_right_login(tmp_path: Path) -> None:
    htpasswd = tmp_path / "htpasswd"
    htpasswd.write_text(HTPASSWD)
    layout = make_layout(tmp_path / "layout", TARS)
    more = {"auth": {"htpasswd": {"realm": "Registry", "path": str(htpasswd)}}}
    with docker_registry(tmp_path / "registry", more) as host:
        for password, works in (("", False), ("wrong", False), ("pass:word", True)):
            place = tmp_path / f"cache-{password or 'none'}".replace(":", "")
            settings = settings_with_login(place, host, password) if password else FAST
            images = store(place, settings)
            image = images.pull(f"oci:{layout}:t")
            if works:
                assert push_image(images, image.reference, f"{host}/app:t") == image.digest
                assert images.pull(f"{host}/app:t").digest == image.digest
            else:
                with pytest.raises(Unauthenticated, match=f"docker login {host}"):
                    push_image(images, image.reference, f"{host}/app:t")


def test_a_layer_that_the_cache_lost_is_named_before_anything_is_sent(registry: str, tmp_path: Path) -> None:
    images = store(tmp_path)
    image = images.pull(f"oci:{make_layout(tmp_path / 'layout', TARS)}:t")
    images.cache.blob_path(image.layers[0].digest).unlink()
    with pytest.raises(NotFound, match="not in the cache"):
        push_image(images, image.reference, f"{registry}/lost:t")


# --- registries that misbehave -------------------------------------------------------------------


class Upload:
    """A registry that takes uploads, as far as the arguments let it."""

    def __init__(
        self, elsewhere: str = "", stored: str = "", refuse: int = 0, fail_once: bool = False
    ) -> None:
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.bodies: dict[str, bytes] = {}
        self.failures = int(fail_once)
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            """Answers by the rules of `outer`."""

            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                outer.requests.append((self.command, self.path, dict(self.headers)))
                length = int(self.headers.get("Content-Length") or 0)
                data = self.rfile.read(length)
                status, headers = 404, {}
                if self.path == "/v2/":
                    status = 200
                    if elsewhere or refuse:
                        status = 200 if self.headers.get("Authorization") else 401
                        headers["WWW-Authenticate"] = 'Basic realm="r"'
                elif self.command == "POST":
                    status = refuse or 202
                    headers["Location"] = f"{elsewhere}/upload/x?state=1"
                elif self.path.startswith("/upload"):
                    status = 201
                    if outer.failures:
                        outer.failures -= 1
                        status = 500
                    outer.bodies[self.path] = data
                elif self.command == "PUT":
                    digest = stored or f"sha256:{hashlib.sha256(data).hexdigest()}"
                    status, headers["Docker-Content-Digest"] = 201, digest
                body = b'{"errors": [{"code": "NO", "message": "not you"}]}' if status >= 400 else b""
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Keep quiet."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def pulled(tmp_path: Path, settings: RegistrySettings = FAST) -> tuple[ImageStore, str]:
    """A store with one image."""
    images = store(tmp_path / "cache", settings)
    return images, images.pull(f"oci:{make_layout(tmp_path / 'layout', TARS)}:t").reference


def test_credentials_do_not_follow_an_upload_to_another_host(tmp_path: Path) -> None:
    with Upload() as other, Upload(elsewhere=f"http://{other.host}") as registry:
        images, name = pulled(tmp_path, settings_with_login(tmp_path / "auth", registry.host, "secret"))
        push_image(images, name, f"{registry.host}/app:t")
        assert other.bodies
        assert not [headers for _, _, headers in other.requests if "Authorization" in headers]
        assert [headers for _, _, headers in registry.requests if "Authorization" in headers]


def test_an_upload_that_failed_is_sent_again_whole(tmp_path: Path) -> None:
    with Upload(fail_once=True) as registry:
        images, name = pulled(tmp_path)
        push_image(images, name, f"{registry.host}/app:t")
        assert registry.failures == 0
        for path, data in registry.bodies.items():
            assert path.endswith(f"?state=1&digest={sha256(data)}")
        assert len(registry.bodies) == 3


def test_a_registry_that_stores_something_else_is_found_out(tmp_path: Path) -> None:
    with Upload(stored="sha256:" + "0" * 64) as registry:
        images, name = pulled(tmp_path)
        with pytest.raises(Corrupt, match="stored sha256:0000"):
            push_image(images, name, f"{registry.host}/app:t")


def test_a_refusal_is_told_in_the_registrys_own_words(tmp_path: Path) -> None:
    with Upload(refuse=403) as registry:
        images, name = pulled(tmp_path, settings_with_login(tmp_path / "auth", registry.host, "secret"))
        with pytest.raises(Denied, match=r"does not let this login push.*NO: not you"):
            push_image(images, name, f"{registry.host}/app:t")


# --- guest images --------------------------------------------------------------------------------


def guests(cache: Path, settings: RegistrySettings = FAST) -> GuestRegistry:
    """The guest images of a cache."""
    cache.mkdir(parents=True, exist_ok=True)
    return GuestRegistry(store(cache, settings), cache)


def test_a_guest_image_comes_back_as_it_was_pushed(registry: str, tmp_path: Path) -> None:
    digest = guest_at(tmp_path / "one", default=True)
    name = f"{registry}/guest:v1"
    index = guests(tmp_path / "one").push("default", name)
    assert guests(tmp_path / "one").push(digest, name) == index, "the same image, the same manifest"
    raw = run(need("skopeo", "skopeo"), "inspect", "--raw", "--tls-verify=false", f"docker://{name}")
    document = json.loads(raw)
    assert document["mediaType"] == OCI_INDEX
    assert document["artifactType"] == guest_artifact.ARTIFACT
    assert [entry["platform"] for entry in document["manifests"]] == [
        {"architecture": "amd64", "os": "linux"}
    ]
    other = guests(tmp_path / "two")
    with pytest.raises(NotFound, match="'never'"):
        other.pull(name, policy=PullPolicy.NEVER)
    image = other.pull(name)
    assert (image.digest, image.release, image.flavor) == (digest, "6.1.0-test", "debian")
    original = load_guest_image(tmp_path / "one")
    for file in ("vmlinux", "initramfs.cpio", "manifest.json"):
        assert (image.directory / file).read_bytes() == (original.directory / file).read_bytes()
    assert other.pull(name, policy=PullPolicy.NEVER).digest == digest
    assert list((tmp_path / "two/images/blobs/sha256").iterdir()) == [], "kept unpacked only"
    assert sorted(path.name for path in (tmp_path / "two/guest").iterdir()) == [
        *sorted([digest.removeprefix("sha256:")]), "lock",
    ]  # fmt: skip
    assert not (tmp_path / "two/guest/default").exists(), "pulling changes no default"


def test_a_moved_tag_is_noticed_when_asked_always(registry: str, tmp_path: Path) -> None:
    name = f"{registry}/moving:v1"
    first = guest_at(tmp_path / "one", default=True)
    guests(tmp_path / "one").push("default", name)
    other = guests(tmp_path / "two")
    assert other.pull(name).digest == first
    second = guest_at(tmp_path / "one", filling=2, default=True)
    guests(tmp_path / "one").push("default", name)
    assert other.pull(name).digest == first
    assert other.pull(name, policy=PullPolicy.ALWAYS).digest == second
    assert other.pull(name).digest == second


def test_another_who_pushes_at_the_same_time_is_not_lost(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our look at the tag and our writing it, and once more after that, another writes it."""
    name = f"{registry}/contended:v1"
    guest_at(tmp_path / "amd", 62, default=True)
    guest_at(tmp_path / "arm", 183, default=True)
    put, written = RegistryTarget.put_manifest, []

    def crowded(self: RegistryTarget, name: str, data: bytes, media_type: str) -> str:
        digest = put(self, name, data, media_type)
        if name == "v1":
            written.append(data)
            if len(written) == 1:  # they had looked before: their index does not have ours
                with monkeypatch.context() as patch:
                    patch.setattr(RegistryTarget, "put_manifest", put)
                    patch.setattr(RegistryTarget, "existing", lambda self: None)
                    patch.setattr(guest_registry, "_INDEX_ATTEMPTS", 1)
                    guests(tmp_path / "arm").push("default", registry + "/contended:v1")
        return digest

    monkeypatch.setattr(RegistryTarget, "put_manifest", crowded)
    guests(tmp_path / "amd").push("default", name)
    assert len(written) == 2
    other = guests(tmp_path / "other")
    for platform, place in ((AMD64, "amd"), (ARM64, "arm")):
        assert other.pull(name, platform=platform).digest == load_guest_image(tmp_path / place).digest


def test_a_tag_that_others_never_leave_alone_is_an_error(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest_at(tmp_path / "one", default=True)
    monkeypatch.setattr(RegistryTarget, "existing", lambda self: (b"{}", OCI_INDEX))
    with pytest.raises(Conflict, match="written by others"):
        guests(tmp_path / "one").push("default", f"{registry}/busy:v1")


def test_one_tag_holds_the_guest_images_of_several_architectures(registry: str, tmp_path: Path) -> None:
    name = f"{registry}/multi:v1"
    for place, machine in (("amd", 62), ("arm", 183), ("amd2", 62)):
        guest_at(tmp_path / place, machine, default=True)
        guests(tmp_path / place).push("default", name)
    other = guests(tmp_path / "other")
    expected = {AMD64: "amd2", ARM64: "arm"}
    for platform, place in expected.items():
        assert other.pull(name, platform=platform).digest == load_guest_image(tmp_path / place).digest
    with pytest.raises(NotFound, match="it has: linux/amd64, linux/arm64"):
        other.pull(name, platform=Platform(os="linux", architecture="s390x"))


def test_what_is_no_guest_image_is_refused(registry: str, tmp_path: Path) -> None:
    images, source = pulled(tmp_path)
    name = f"{registry}/noguest:t"
    push_image(images, source, name)
    with pytest.raises(InvalidInput, match="is no guest image"):
        guests(tmp_path / "g").pull(name)
    with pytest.raises(InvalidInput, match="come from registries"):
        guests(tmp_path / "g").pull("oci:/x")


def forged(registry: str, tmp_path: Path, change: str) -> str:
    """A guest image whose every digest is right for the registry, and which lies about its content."""
    cache = tmp_path / "evil"
    guest_at(cache, default=True)
    images = store(cache)
    image = load_guest_image(cache)
    config = json.loads(image.manifest.read_bytes())
    if change == "kernel":
        image.kernel.write_bytes(b"\x7fELF" + os.urandom(100_116))
    elif change == "bomb":
        with image.initramfs.open("wb") as file:
            file.truncate(64 << 20)
    elif change == "digest":
        config["digest"] = "sha256:" + "1" * 64
    elif change == "size":
        config["kernel"]["size"] = -1
    elif change == "shape":
        config["kernel"] = []
    elif change == "release":
        config["kernel"]["release"] = "6.1\x1b[2J"
    image.manifest.write_text(json.dumps(config))
    name = f"{registry}/forged-{change}:t"
    with open_target(images, name, insecure=False, cancel=Cancel()) as (target, tag):
        described, data = guest_artifact.config_descriptor(image)
        (tmp_path / "config").write_bytes(data)
        uploads = [(described, lambda: (tmp_path / "config").open("rb"))]
        layers = []
        for path, kind in (
            (image.kernel, guest_artifact.KERNEL),
            (image.initramfs, guest_artifact.INITRAMFS),
        ):
            packed = tmp_path / path.name
            with packed.open("wb") as out:
                layers.append(guest_artifact.compress(path, out, kind, Cancel()))
            uploads.append((layers[-1], lambda packed=packed: packed.open("rb")))  # type: ignore[misc]
        upload_all(target, uploads, 2, lambda _: None)
        target.put_manifest(tag, guest_artifact.manifest_bytes(described, *layers), OCI_MANIFEST)
    return name


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ("kernel", Corrupt, "not the one that its config describes"),
        ("bomb", Corrupt, "not the one that its config describes"),
        ("digest", InvalidInput, "do not fit each other"),
        ("size", InvalidInput, "the size -1"),
        ("shape", InvalidInput, "malformed"),
        ("release", InvalidInput, "malformed"),
    ],
)
def test_a_guest_image_that_lies_is_refused_and_leaves_nothing(
    registry: str, tmp_path: Path, change: str, error: type[VoidboxError], why: str
) -> None:
    name = forged(registry, tmp_path, change)
    victim = tmp_path / "victim"
    with pytest.raises(error, match=why):
        guests(victim).pull(name)
    left = [path.name for path in (victim / "guest").glob("*")] if (victim / "guest").exists() else []
    assert set(left) <= {"lock"}
    assert list((victim / "images/tmp").iterdir()) == []


def test_a_cancelled_push_ends(registry: str, tmp_path: Path) -> None:
    images, source = pulled(tmp_path)
    cancel = Cancel()
    cancel.cancel()
    with contextlib.suppress(VoidboxError):
        push_image(images, source, f"{registry}/cancelled:t", cancel=cancel)
    with pytest.raises(NotFound):
        store(tmp_path / "other").pull(f"{registry}/cancelled:t")
