"""Images that buildah and umoci made, pushed to a real registry that wants a login and speaks TLS.

What is pulled from there gives the disk that the image gave before it was pushed.
"""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.common.errors import Unauthenticated, Unavailable
from services.imager.cache import ImageCache
from services.imager.pull import ImageStore
from services.imager.registry_settings import RegistrySettings
from tests.imager_images import need, run
from tests.registries import HTPASSWD, docker_registry


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """A registry with TLS and a login."""

    host: str
    certificate: Path
    auth: Path


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    place = tmp_path_factory.mktemp("registry")
    run(need("openssl", "openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
        "-nodes", "-keyout", place / "key.pem", "-out", place / "cert.crt", "-days", "2",
        "-subj", "/CN=registry", "-addext", "subjectAltName=IP:127.0.0.1")  # fmt: skip
    (place / "htpasswd").write_text(HTPASSWD)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    login = base64.b64encode(b"user:pass:word").decode()
    (place / "auth.json").write_text(json.dumps({"auths": {host: {"auth": login}}}))
    (place / "certs").mkdir()
    (place / "certs/ca.crt").write_bytes((place / "cert.crt").read_bytes())
    more = {
        "auth": {"htpasswd": {"realm": "Registry", "path": f"{place}/htpasswd"}},
        "http": {"addr": host, "tls": {"certificate": f"{place}/cert.crt", "key": f"{place}/key.pem"}},
    }
    with docker_registry(place / "store", more):
        yield Guarded(host=host, certificate=place / "cert.crt", auth=place / "auth.json")


def images(registry: Guarded, place: Path, **more: object) -> ImageStore:
    """A store that has the registry's certificate and login, unless told otherwise."""
    settings = {"attempts": 1, "ca_bundle": registry.certificate, "auth_files": (registry.auth,), **more}
    return ImageStore(ImageCache(place), RegistrySettings(**settings))  # type: ignore[arg-type]


def test_what_umoci_made_comes_back_from_the_registry(registry: Guarded, tmp_path: Path) -> None:
    umoci = need("umoci", "umoci")
    layout = tmp_path / "layout"
    run(umoci, "init", "--layout", layout)
    run(umoci, "new", "--image", f"{layout}:t")
    for source in ("/etc/alternatives", "/usr/share/perl5/Debconf", "/etc/default"):
        if Path(source).exists():
            run(umoci, "insert", "--image", f"{layout}:t", source, source)
    run(umoci, "config", "--image", f"{layout}:t", "--config.user", "7:8", "--config.env", "A=b")
    name = f"{registry.host}/umoci/app:t"
    run(need("skopeo", "skopeo"), "--insecure-policy", "copy", "--authfile", registry.auth,
        "--dest-cert-dir", registry.certificate.parent / "certs", f"oci:{layout}:t", f"docker://{name}",
        )  # fmt: skip
    store = images(registry, tmp_path / "cache")
    image = store.pull(name)
    assert image.config.user == "7:8"
    assert store.disk(image).digest == store.disk(store.pull(f"oci:{layout}:t")).digest
    with pytest.raises(Unauthenticated, match=f"docker login {registry.host}"):
        images(registry, tmp_path / "a", auth_files=()).pull(name)
    with pytest.raises(Unavailable, match="no trusted TLS"):
        images(registry, tmp_path / "b", ca_bundle=None).pull(name)


def test_what_buildah_made_and_pushed_itself_comes_back_from_the_registry(
    registry: Guarded, tmp_path: Path
) -> None:
    """In both manifest formats, several layers, one of them with removals."""
    buildah = need("buildah", "buildah")
    storage = ("--root", f"{tmp_path}/s", "--runroot", f"{tmp_path}/r", "--storage-driver", "vfs")
    (tmp_path / "one").write_text("one")
    (tmp_path / "two").write_bytes(bytes(100_000))
    box = run(buildah, *storage, "from", "--isolation", "chroot", "scratch").strip().splitlines()[-1]
    run(buildah, *storage, "copy", "--chown", "12:34", box, tmp_path / "one", tmp_path / "two", "/srv/")
    run(buildah, *storage, "commit", box, "first")
    run(buildah, *storage, "rm", box)
    box = run(buildah, *storage, "from", "--pull-never", "localhost/first").strip().splitlines()[-1]
    try:
        (tmp_path / "one").write_text("changed")
        run(buildah, *storage, "copy", box, tmp_path / "one", "/srv/one")
        run(buildah, *storage, "config", "--entrypoint", '["/srv/one"]', "--label", "a=b", box)
        store = images(registry, tmp_path / "cache")
        for form in ("oci", "docker"):
            name = f"{registry.host}/buildah/app:{form}"
            run(buildah, *storage, "commit", "--format", form, box, f"second-{form}")
            run(buildah, *storage, "push", "--authfile", registry.auth, "--cert-dir",
                registry.certificate.parent / "certs", f"second-{form}", f"docker://{name}")  # fmt: skip
            image = store.pull(name)
            assert image.config.entrypoint == ("/srv/one",)
            assert image.config.labels["a"] == "b"
            assert len(image.layers) == 2
            disk = store.disk(image).digest
            run(buildah, *storage, "push", f"second-{form}", f"docker-archive:{tmp_path}/{form}.tar:app:1")
            assert store.disk(store.pull(f"docker-archive:{tmp_path}/{form}.tar")).digest == disk
    finally:
        run(buildah, *storage, "rm", "--all")
