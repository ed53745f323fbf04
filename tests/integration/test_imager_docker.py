"""An image that a real Docker engine built: pushed to and pulled from a real registry, and saved to a file.

`make test-compose` runs it, since it needs an engine, this machine's or a private one that root starts,
and a base system by debootstrap. Every way gives the same disk, file by file what `umoci unpack` makes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.errors import Unauthenticated
from services.imager.cache import ImageCache
from services.imager.pull import ImageStore
from services.imager.registry_settings import RegistrySettings
from tests.engine import Engine, EngineMissing, docker_engine, import_base_image
from tests.imager_images import run
from tests.integration.test_imager_images import assert_same, seen_by_umoci, seen_by_us
from tests.registries import HTPASSWD, docker_registry

ROOT = Path(__file__).resolve().parents[2]
BASE = "voidbox-test-base"
DOCKERFILE = f"""
FROM {BASE}
LABEL purpose=test
RUN mkdir -p /srv/app && echo one > /srv/app/one && ln /srv/app/one /srv/app/link && chmod 4755 /srv/app/one
RUN rm -r /usr/share/doc && mkdir /usr/share/doc && mknod /srv/null c 1 3 && chown 1000:2000 /srv/app
COPY Dockerfile /srv/app/
ENV GREETING=hello
WORKDIR /srv/app
USER 1000:2000
ENTRYPOINT ["/bin/sh", "-c"]
CMD ["id"]
"""

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not os.environ.get("VOIDBOX_TEST_COMPOSE"), reason="needs an engine; `make test-compose` runs it"
    ),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    try:
        with docker_engine(tmp_path_factory.mktemp("engine")) as found:
            if not os.environ.get("VOIDBOX_TEST_BASE_IMAGE"):
                import_base_image(found, BASE, ROOT / ".build/compose-base.tar")
            else:
                found.docker("tag", os.environ["VOIDBOX_TEST_BASE_IMAGE"], BASE)
            yield found
    except EngineMissing as missing:
        pytest.skip(f"no Docker engine: {missing}")


def test_an_image_of_a_docker_engine_is_the_same_from_a_registry_and_from_a_file(
    engine: Engine, tmp_path: Path
) -> None:
    (tmp_path / "context").mkdir()
    (tmp_path / "context/Dockerfile").write_text(DOCKERFILE)
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    login = {"auth": {"htpasswd": {"realm": "Registry", "path": f"{tmp_path}/htpasswd"}}}
    with docker_registry(tmp_path / "registry", login) as host:
        name = f"{host}/group/app:1"
        engine.docker("build", "--quiet", "--tag", name, f"{tmp_path}/context")
        try:
            engine.docker("login", "--username", "user", "--password", "pass:word", host)
            engine.docker("push", name)
            engine.docker("save", "--output", f"{tmp_path}/saved.tar", name)
        finally:
            engine.docker("rmi", "--force", name)
        config = Path(engine.env["DOCKER_CONFIG"]) / "config.json"
        assert host in json.loads(config.read_text())["auths"], "docker itself wrote the login"
        with pytest.raises(Unauthenticated):
            ImageStore(ImageCache(tmp_path / "other"), RegistrySettings()).pull(name)
        images = ImageStore(ImageCache(tmp_path / "cache"), RegistrySettings(auth_files=(config,)))
        image, ours = seen_by_us(images, name, tmp_path)
    assert image.config.entrypoint == ("/bin/sh", "-c")
    assert image.config.cmd == ("id",)
    assert "GREETING=hello" in image.config.env
    assert (image.config.working_dir, image.config.user) == ("/srv/app", "1000:2000")
    assert image.config.labels["purpose"] == "test"
    saved = images.pull(f"docker-archive:{tmp_path}/saved.tar:{name}")
    assert saved.config.diff_ids == image.config.diff_ids
    assert images.disk(saved).path == images.disk(image).path
    run("skopeo", "--insecure-policy", "copy", f"docker-archive:{tmp_path}/saved.tar", f"oci:{tmp_path}/l:t")
    before = time.time_ns()
    theirs = seen_by_umoci(tmp_path / "l", tmp_path)
    for path, facts in theirs.items():
        # The base has files whose new directories no entry describes; umoci gives those, and what they
        # are in, the present time.
        if facts.kind == "directory" and facts.mtime_ns > before:
            theirs[path] = dataclasses.replace(facts, mtime_ns=ours[path].mtime_ns)
    assert_same(ours, theirs)
