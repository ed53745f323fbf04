"""Pulls from registries: a real one, and servers that stall, drip, reset, redirect and lie.

The hostile registry is a small real HTTP server whose answers each test chooses. Nothing that it
does may end in anything but the image or one clear error, and nothing partial may stay.
"""

from __future__ import annotations

import base64
import http.server
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import (
    Cancelled,
    Corrupt,
    Denied,
    InvalidInput,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from services.imager.cache import ImageCache
from services.imager.limits import Cancel, Limits
from services.imager.manifest import Platform
from services.imager.prune import Housekeeper
from services.imager.pull import ImageStore, PullPolicy
from services.imager.registry import RegistrySettings
from tests.imager_images import make_layout, need, run, sha256
from tests.registries import (
    CONFIG,
    HTPASSWD,
    OCI,
    TARS,
    Answer,
    Hostile,
    body,
    described,
    docker_registry,
    first_then,
    push,
    send,
    status,
)

FAST = RegistrySettings(
    connect_seconds=2,
    read_seconds=2,
    attempts=3,
    backoff_seconds=0.01,
    slow_seconds=1,
    slow_bytes_per_second=5000,
)


def store(path: Path, settings: RegistrySettings = FAST, limits: Limits | None = None) -> ImageStore:
    """A store over an own cache."""
    return ImageStore(ImageCache(path), settings, limits)


def assert_nothing_partial(images: ImageStore) -> None:
    """Every blob is what its name says, and no temporary file is left."""
    assert list((images.cache.root / "tmp").iterdir()) == []
    for blob in (images.cache.root / "blobs/sha256").iterdir():
        assert sha256(blob.read_bytes()) == f"sha256:{blob.name}"


# --- a real registry -----------------------------------------------------------------------------


def test_an_image_comes_from_a_real_registry_and_gives_the_same_disk_as_its_layout(tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "layout", TARS, config=CONFIG)
    images = store(tmp_path / "cache")
    with docker_registry(tmp_path / "registry") as host:
        push(layout, f"{host}/group/app:v1")
        push(layout, f"{host}/group/app:schema2", "--format", "v2s2")
        push(layout, f"{host}/group/app:zstd", "--dest-compress-format", "zstd", "--dest-compress")
        seen: list[tuple[str, str, int, int]] = []
        image = images.pull(
            f"{host}/group/app:v1",
            report=lambda p: seen.append((p.subject, p.action, p.done, p.total)),
        )
        assert (image.config.entrypoint, image.config.cmd) == (("/bin/sh",), ("-c", "id"))
        assert (image.config.env, image.config.working_dir, image.config.user) == (("A=b",), "/etc", "1:2")
        for layer in image.layers:
            assert (layer.digest, "download", layer.size, layer.size) in seen
        by_digest = images.pull(f"{host}/group/app@{image.digest}")
        assert by_digest.digest == image.digest
        disks = {
            images.disk(images.pull(reference)).digest
            for reference in (
                *(f"{host}/group/app:{tag}" for tag in ("v1", "schema2", "zstd")),
                f"oci:{layout}:t",
            )
        }  # fmt: skip
        assert len(disks) == 1, "one content, one disk, however it is packed"
        with pytest.raises(NotFound, match="check the name and the tag"):
            images.pull(f"{host}/group/app:absent")
        with pytest.raises(NotFound):
            images.pull(f"{host}/absent")
    assert_nothing_partial(images)
    assert images.pull(f"{host}/group/app:v1").digest == image.digest, (
        "the registry is gone, the cache is not"
    )
    with pytest.raises(Unavailable, match=r"not reachable.*network.*'never'"):
        images.pull(f"{host}/group/app:v1", policy=PullPolicy.ALWAYS)


def test_the_pull_policy_decides_when_a_moved_tag_is_noticed(tmp_path: Path) -> None:
    first = make_layout(tmp_path / "first", TARS[:1])
    second = make_layout(tmp_path / "second", TARS)
    images = store(tmp_path / "cache")
    with docker_registry(tmp_path / "registry") as host:
        name = f"{host}/app:t"
        with pytest.raises(NotFound, match="not in the cache"):
            images.pull(name, policy=PullPolicy.NEVER)
        push(first, name)
        old = images.pull(name)
        push(second, name)
        assert images.pull(name).digest == old.digest
        assert images.pull(name, policy=PullPolicy.NEVER).digest == old.digest
        new = images.pull(name, policy=PullPolicy.ALWAYS)
        assert new.digest != old.digest
        assert images.pull(name, policy=PullPolicy.NEVER).digest == new.digest


def test_a_private_registry_needs_the_login_from_the_auth_file(tmp_path: Path) -> None:
    htpasswd = tmp_path / "htpasswd"
    htpasswd.write_text(HTPASSWD)
    layout = make_layout(tmp_path / "layout", TARS)
    more = {"auth": {"htpasswd": {"realm": "Registry", "path": str(htpasswd)}}}
    with docker_registry(tmp_path / "registry", more) as host:
        push(layout, f"{host}/app:t", "--dest-creds", "user:pass:word")
        with pytest.raises(Unauthenticated, match=f"docker login {host}"):
            store(tmp_path / "none").pull(f"{host}/app:t")
        auth = tmp_path / "auth.json"
        for password, works in (("pass:word", True), ("wrong", False)):
            encoded = base64.b64encode(f"user:{password}".encode()).decode()
            auth.write_text(json.dumps({"auths": {host: {"auth": encoded}}}))
            settings = RegistrySettings(attempts=1, auth_files=(tmp_path / "absent", auth))
            images = store(tmp_path / password.replace(":", ""), settings)
            if works:
                assert images.pull(f"{host}/app:t").layers
            else:
                with pytest.raises(Unauthenticated):
                    images.pull(f"{host}/app:t")


def test_a_registry_with_tls_is_trusted_by_its_certificate_only(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    openssl = need("openssl", "openssl")
    run(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
        "-keyout", key,
        "-out", certificate, "-days", "2", "-subj", "/CN=registry",
        "-addext", "subjectAltName=IP:127.0.0.1")  # fmt: skip
    layout = make_layout(tmp_path / "layout", TARS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tls = {"certificate": str(certificate), "key": str(key)}
    more = {"http": {"addr": f"127.0.0.1:{port}", "tls": tls}}
    with docker_registry(tmp_path / "registry", more):
        name = f"127.0.0.1:{port}/app:t"
        push(layout, name)
        with pytest.raises(Unavailable, match=r"no trusted TLS connection.*--ca-bundle"):
            store(tmp_path / "without").pull(name)
        settings = RegistrySettings(attempts=1, ca_bundle=certificate)
        assert store(tmp_path / "with", settings).pull(name).layers


# --- registries that misbehave -------------------------------------------------------------------


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    server = Hostile()
    yield server
    server.close()


def other_bytes(data: bytes) -> bytes:
    """As long, one bit different."""
    return bytes([data[0] ^ 1]) + data[1:]


def test_a_sound_answer_is_pulled(hostile: Hostile, tmp_path: Path) -> None:
    hostile.serve_image()
    images = store(tmp_path)
    image = images.pull(f"{hostile.host}/app:t")
    assert images.disk(image).path.exists()
    assert all(headers["Accept-Encoding"] == "identity" for _, headers in hostile.requests)
    assert not any("Authorization" in headers for _, headers in hostile.requests)


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(hostile: Hostile, tmp_path: Path, code: int) -> None:
    for path in [*hostile.serve_image(), "/v2/app/manifests/t"]:
        hostile.answers[path] = first_then(2, status(code, Retry_After="0"), hostile.answers[path])
    store(tmp_path).pull(f"{hostile.host}/app:t")


def test_it_is_not_tried_forever(hostile: Hostile, tmp_path: Path) -> None:
    hostile.serve_image()
    hostile.answers["/v2/app/manifests/t"] = status(503)
    with pytest.raises(Unavailable, match="answers 503"):
        store(tmp_path).pull(f"{hostile.host}/app:t")
    assert len(hostile.requests) == FAST.attempts


@pytest.mark.parametrize(
    ("code", "error"), [(403, Denied), (404, NotFound), (401, Unauthenticated), (418, Unavailable)]
)
def test_final_statuses_are_told_apart_and_not_tried_again(
    hostile: Hostile, tmp_path: Path, code: int, error: type[Exception]
) -> None:
    hostile.serve_image()
    hostile.answers["/v2/app/manifests/t"] = status(code)
    with pytest.raises(error):
        store(tmp_path).pull(f"{hostile.host}/app:t")
    assert len(hostile.requests) == 1


def cut(data: bytes, at: int) -> Answer:
    """Announces everything and hangs up early."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:at])
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True

    return answer


def test_a_broken_download_goes_on_where_it_stopped(hostile: Hostile, tmp_path: Path) -> None:
    path = hostile.serve_image()[0]
    data = hostile.blobs[path]
    hostile.answers[path] = first_then(1, cut(data, 200_000), hostile.answers[path])
    store(tmp_path).pull(f"{hostile.host}/app:t")
    ranges = [headers.get("Range") for asked, headers in hostile.requests if asked == path]
    assert ranges == [None, "bytes=200000-"]


def kept(images: ImageStore) -> dict[str, int]:
    """The lengths of the partial blobs by their digests."""
    place = images.cache.root / "partial"
    return {path.name: path.stat().st_size for path in place.iterdir()} if place.exists() else {}


def test_a_pull_that_was_killed_goes_on_where_it_stopped(hostile: Hostile, tmp_path: Path) -> None:
    """A process of its own, killed while a layer arrives; the next asks for the rest only."""
    first, second = hostile.serve_image()
    data = hostile.blobs[first]
    sound = hostile.answers[first]
    hostile.answers[first] = stall(hostile, data[:200_000], len(data))
    script = (
        "import sys\nfrom pathlib import Path\nfrom services.imager.cache import ImageCache\n"
        "from services.imager.pull import ImageStore\nfrom services.imager.registry import RegistrySettings\n"
        "store = ImageStore(ImageCache(Path(sys.argv[1])), RegistrySettings())\n"
        "store.pull(sys.argv[2], report=lambda p: print(f'{p.subject} {p.done}\\n', end='', flush=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "cache", f"{hostile.host}/app:t"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout is not None
    with process:
        whole = f"{sha256(hostile.blobs[second])} {len(hostile.blobs[second])}"
        waited = [f"{sha256(data)} 200000", whole, whole]  # all of it is written, and then it has its name
        for line in process.stdout:
            if line.strip() in waited:
                waited.remove(line.strip())
            if not waited:
                break
        process.kill()
    images = store(tmp_path / "cache")
    assert kept(images) == {sha256(data).removeprefix("sha256:"): 200_000}
    hostile.answers[first] = sound
    hostile.requests.clear()
    images.disk(images.pull(f"{hostile.host}/app:t"))
    assert [headers.get("Range") for path, headers in hostile.requests if path == first] == ["bytes=200000-"]
    assert second not in [path for path, _ in hostile.requests], "a whole layer is not asked for again"
    assert kept(images) == {}
    assert_nothing_partial(images)


@pytest.mark.parametrize("damage", [lambda data: bytes(1000), lambda data: data + b"more", other_bytes])
def test_a_damaged_rest_of_an_earlier_pull_is_brought_again(
    hostile: Hostile, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    """As a power failure leaves it: zeros, or longer than the layer."""
    path = hostile.serve_image()[0]
    images = store(tmp_path)
    (images.cache.root / "partial").mkdir()
    (images.cache.root / "partial" / path.rpartition(":")[2]).write_bytes(damage(hostile.blobs[path]))
    images.disk(images.pull(f"{hostile.host}/app:t"))
    assert kept(images) == {}


def test_what_is_whole_already_is_not_asked_for(hostile: Hostile, tmp_path: Path) -> None:
    path = hostile.serve_image()[0]
    images = store(tmp_path)
    (images.cache.root / "partial").mkdir()
    (images.cache.root / "partial" / path.rpartition(":")[2]).write_bytes(hostile.blobs[path])
    images.disk(images.pull(f"{hostile.host}/app:t"))
    assert path not in [asked for asked, _ in hostile.requests]


@pytest.mark.parametrize(
    "answer",
    [
        lambda data: status(416),
        lambda data: lambda handler: send(handler, 206, data, Content_Range=f"bytes 0-9/{len(data)}"),
        lambda data: lambda handler: send(handler, 206, data[200_000:]),
    ],
)
def test_an_answer_for_another_range_is_not_mixed_in(
    hostile: Hostile, tmp_path: Path, answer: Callable[[bytes], Answer]
) -> None:
    path = hostile.serve_image()[0]
    data, sound = hostile.blobs[path], hostile.answers[path]
    seen = 0

    def by_turns(handler: http.server.BaseHTTPRequestHandler) -> None:
        nonlocal seen
        seen += 1
        {1: cut(data, 200_000), 2: answer(data)}.get(seen, sound)(handler)

    hostile.answers[path] = by_turns
    images = store(tmp_path)
    images.disk(images.pull(f"{hostile.host}/app:t"))
    assert seen == 3


def test_given_up_pulls_leave_nothing_for_ever(hostile: Hostile, tmp_path: Path) -> None:
    path = hostile.serve_image()[0]
    hostile.answers[path] = cut(hostile.blobs[path], 150_000)
    images = store(tmp_path)
    with pytest.raises(Unavailable):
        images.pull(f"{hostile.host}/app:t")
    [name] = kept(images)
    with pytest.raises(NotFound):
        images.pull(f"{hostile.host}/absent:t")
    assert kept(images) == {name: 150_000}, "young, so it may be taken up"
    month_ago = time.time() - 30 * 86400
    os.utime(images.cache.root / "partial" / name, (month_ago, month_ago))
    with pytest.raises(NotFound):
        images.pull(f"{hostile.host}/absent:t")
    assert kept(images) == {}
    with pytest.raises(Unavailable):
        images.pull(f"{hostile.host}/app:t")
    _, freed = Housekeeper(images.catalog).prune()
    assert (kept(images), freed > 100_000) == ({}, True)


def test_a_server_without_ranges_starts_again(hostile: Hostile, tmp_path: Path) -> None:
    path = hostile.serve_image()[0]
    data = hostile.blobs[path]
    hostile.answers[path] = first_then(1, cut(data, 1000), lambda handler: send(handler, 200, data))
    images = store(tmp_path)
    images.pull(f"{hostile.host}/app:t")
    assert_nothing_partial(images)


@pytest.mark.parametrize("keep", [0, 1, 150_000])
def test_a_download_that_always_breaks_ends_and_leaves_nothing(
    hostile: Hostile, tmp_path: Path, keep: int
) -> None:
    path = hostile.serve_image()[0]
    hostile.answers[path] = cut(hostile.blobs[path], keep)
    images = store(tmp_path)
    with pytest.raises(Unavailable, match="not reachable"):
        images.pull(f"{hostile.host}/app:t")
    assert_nothing_partial(images)
    assert images.catalog.list_images() == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_bytes, "WRONG_DIGEST"),
        (lambda data: data + b"x", "WRONG_SIZE"),
    ],
)
def test_wrong_content_is_refused_and_leaves_nothing(
    hostile: Hostile, tmp_path: Path, change: Callable[[bytes], bytes], reason: str
) -> None:
    path = hostile.serve_image()[1]
    hostile.answers[path] = body(change(hostile.blobs[path]))
    images = store(tmp_path)
    with pytest.raises(Corrupt) as caught:
        images.pull(f"{hostile.host}/app:t")
    assert caught.value.reason == reason
    assert path.endswith(caught.value.metadata["digest"])
    assert_nothing_partial(images)


def test_a_manifest_is_checked_against_the_digest_asked_for(hostile: Hostile, tmp_path: Path) -> None:
    hostile.serve_image()
    wanted = "sha256:" + "0" * 64
    hostile.answers[f"/v2/app/manifests/{wanted}"] = hostile.answers["/v2/app/manifests/t"]
    with pytest.raises(Corrupt, match="has the digest"):
        store(tmp_path).pull(f"{hostile.host}/app@{wanted}")


def test_a_manifest_must_match_the_digest_that_the_registry_claims(hostile: Hostile, tmp_path: Path) -> None:
    hostile.serve_image()
    data = b'{"schemaVersion": 2}'
    claimed = "sha256:" + "1" * 64
    hostile.answers["/v2/app/manifests/t"] = lambda handler: send(
        handler, 200, data, Docker_Content_Digest=claimed
    )
    with pytest.raises(Corrupt, match="has the digest"):
        store(tmp_path).pull(f"{hostile.host}/app:t")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not JSON"),
        (b"<html>", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"schemaVersion": 1}', "obsolete"),
        (b'{"schemaVersion": 2}', "config"),
        (b'{"schemaVersion": 2, "config": 5, "layers": []}', "config"),
        (b'{"schemaVersion": 2, "manifests": [5]}', "list of objects"),
        (b'{"schemaVersion": 2, "manifests": [{"digest": "../../x", "size": 1}]}', "not sha256"),
        (
            b'{"schemaVersion": 2, "manifests": [{"digest": "sha256:' + b"0" * 64 + b'", "size": -1}]}',
            "number",
        ),
        (
            b'{"schemaVersion": 2, "manifests": [{"digest": "sha256:' + b"0" * 64 + b'", "size": 9e99}]}',
            "number",
        ),
        (b'{"schemaVersion": 2, "manifests": [], "layers": []}', "at once"),
        (b'{"a": "' + b"x" * (5 << 20) + b'"}', "more than"),
    ],
)
def test_malformed_manifests_are_refused(hostile: Hostile, tmp_path: Path, data: bytes, why: str) -> None:
    hostile.answers["/v2/app/manifests/t"] = body(data, "application/json")
    with pytest.raises(InvalidInput, match=why):
        store(tmp_path).pull(f"{hostile.host}/app:t")


def test_indexes_that_go_in_circles_or_too_deep_end(hostile: Hostile, tmp_path: Path) -> None:
    index = "application/vnd.oci.image.index.v1+json"
    data = b'{"schemaVersion": 2, "manifests": []}'
    for _ in range(10):
        entry = {**described(data, index)}
        hostile.answers[f"/v2/app/manifests/{sha256(data)}"] = body(data, index)
        data = json.dumps({"schemaVersion": 2, "mediaType": index, "manifests": [entry]}).encode()
    hostile.answers["/v2/app/manifests/t"] = body(data, index)
    with pytest.raises(InvalidInput, match="nested"):
        store(tmp_path).pull(f"{hostile.host}/app:t")


def test_a_platform_that_is_not_there_is_named_with_those_that_are(hostile: Hostile, tmp_path: Path) -> None:
    entry = {**described(b"{}", OCI), "platform": {"os": "linux", "architecture": "s390x"}}
    data = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    hostile.answers["/v2/app/manifests/t"] = body(data, "application/vnd.oci.image.index.v1+json")
    with pytest.raises(NotFound, match="no image for linux/amd64; it has: linux/s390x"):
        store(tmp_path).pull(f"{hostile.host}/app:t", platform=Platform(os="linux", architecture="amd64"))


def test_an_artifact_is_no_image(hostile: Hostile, tmp_path: Path) -> None:
    data = json.dumps(
        {
            "schemaVersion": 2,
            "config": described(b"{}", "application/vnd.cncf.helm.config.v1+json"),
            "layers": [],
        }
    ).encode()
    hostile.answers["/v2/app/manifests/t"] = body(data, OCI)
    with pytest.raises(InvalidInput, match="helm"):
        store(tmp_path).pull(f"{hostile.host}/app:t")


def stall(hostile: Hostile, before: bytes, length: int = 1_000_000) -> Answer:
    """Sends the beginning and then nothing until the server ends."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(before)
        handler.wfile.flush()
        hostile.stop.wait(60)
        handler.close_connection = True

    return answer


def test_a_stalling_registry_is_left_after_the_read_timeout(hostile: Hostile, tmp_path: Path) -> None:
    path = hostile.serve_image()[0]
    hostile.answers[path] = stall(hostile, hostile.blobs[path][:1000])
    quick = RegistrySettings(read_seconds=0.3, attempts=2, backoff_seconds=0.01)
    images = store(tmp_path, quick)
    with pytest.raises(Unavailable, match="timed out"):
        images.pull(f"{hostile.host}/app:t")
    assert_nothing_partial(images)


def test_a_registry_that_never_answers_is_left_too(hostile: Hostile, tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        quick = RegistrySettings(read_seconds=0.2, attempts=2, backoff_seconds=0.01)
        with pytest.raises(Unavailable, match="timed out"):
            store(tmp_path, quick).pull(f"127.0.0.1:{silent.getsockname()[1]}/app:t")


def test_a_dripping_registry_is_too_slow(hostile: Hostile, tmp_path: Path) -> None:
    path = hostile.serve_image()[0]
    data = hostile.blobs[path]

    def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        for byte in data:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            if hostile.stop.wait(0.02):
                break
        handler.close_connection = True

    hostile.answers[path] = drip
    slow = RegistrySettings(read_seconds=5, attempts=1, slow_seconds=0.3, slow_bytes_per_second=100_000)
    with pytest.raises(Unavailable, match="only"):
        store(tmp_path, slow).pull(f"{hostile.host}/app:t")


def test_cancelling_wakes_a_download_that_waits(hostile: Hostile, tmp_path: Path) -> None:
    path = hostile.serve_image()[0]
    hostile.answers[path] = stall(hostile, hostile.blobs[path][:1000])
    cancel = Cancel()
    patient = RegistrySettings(read_seconds=60)
    images = store(tmp_path, patient)
    started = time.monotonic()

    def report(progress: Any) -> None:
        if progress.action == "download" and progress.done:
            threading.Timer(0.05, cancel.cancel).start()

    with pytest.raises(Cancelled):
        images.pull(f"{hostile.host}/app:t", cancel=cancel, report=report)
    assert time.monotonic() - started < 10
    assert_nothing_partial(images)


def test_one_bad_layer_ends_the_others(hostile: Hostile, tmp_path: Path) -> None:
    good, bad = hostile.serve_image()
    hostile.answers[good] = stall(hostile, b"")
    hostile.answers[bad] = body(other_bytes(hostile.blobs[bad]))
    images = store(tmp_path, RegistrySettings(read_seconds=60))
    started = time.monotonic()
    with pytest.raises(Corrupt):
        images.pull(f"{hostile.host}/app:t")
    assert time.monotonic() - started < 20
    assert_nothing_partial(images)


def test_credentials_do_not_follow_a_redirect_to_another_host(hostile: Hostile, tmp_path: Path) -> None:
    elsewhere = Hostile()
    try:
        path = hostile.serve_image()[0]
        elsewhere.answers["/cdn"] = body(hostile.blobs[path])
        hostile.answers[path] = status(307, Location=f"http://{elsewhere.host}/cdn")
        wanted = "Basic " + base64.b64encode(b"user:secret").decode()

        def guarded(answer: Answer) -> Answer:
            def check(handler: http.server.BaseHTTPRequestHandler) -> None:
                if handler.headers.get("Authorization") == wanted:
                    answer(handler)
                else:
                    send(handler, 401, b"{}", WWW_Authenticate='Basic realm="r"')

            return check

        hostile.answers = {key: guarded(answer) for key, answer in hostile.answers.items()}
        auth = tmp_path / "auth.json"
        auth.write_text(json.dumps({"auths": {hostile.host: {"username": "user", "password": "secret"}}}))
        settings = RegistrySettings(attempts=1, auth_files=(auth,))
        store(tmp_path / "cache", settings).pull(f"{hostile.host}/app:t")
        assert [asked for asked, _ in elsewhere.requests] == ["/cdn"]
        assert not any("Authorization" in headers for _, headers in elsewhere.requests)
    finally:
        elsewhere.close()


def test_redirects_in_a_circle_end(hostile: Hostile, tmp_path: Path) -> None:
    path = hostile.serve_image()[0]
    hostile.answers[path] = status(307, Location=path)
    with pytest.raises(Unavailable, match="redirects"):
        store(tmp_path).pull(f"{hostile.host}/app:t")


def test_a_bearer_token_is_fetched_and_used(hostile: Hostile, tmp_path: Path) -> None:
    paths = hostile.serve_image()
    for path in [*paths, "/v2/app/manifests/t", *hostile.blobs]:
        answer = hostile.answers[path]

        def guarded(handler: http.server.BaseHTTPRequestHandler, answer: Answer = answer) -> None:
            if handler.headers.get("Authorization") == "Bearer t0ken":
                answer(handler)
            else:
                realm = f'Bearer realm="http://{hostile.host}/token",service="s",scope="repository:app:pull"'
                send(handler, 401, b"{}", WWW_Authenticate=realm)

        if answer.__name__ != "guarded":
            hostile.answers[path] = guarded
    hostile.answers["/token?service=s&scope=repository%3Aapp%3Apull"] = body(b'{"token": "t0ken"}')
    store(tmp_path).pull(f"{hostile.host}/app:t")


@pytest.mark.parametrize("answer", [b"[]", b"5", b'{"token": 5}', b"{}", b"rubbish", b'{"token": "a\\nb"}'])
def test_a_token_server_that_answers_rubbish_is_a_clear_error(
    hostile: Hostile, tmp_path: Path, answer: bytes
) -> None:
    realm = f'Bearer realm="http://{hostile.host}/token",service="s"'
    hostile.answers["/v2/app/manifests/t"] = status(401, WWW_Authenticate=realm)
    hostile.answers["/token?service=s&scope=repository%3Aapp%3Apull"] = body(answer)
    with pytest.raises((Unauthenticated, Unavailable)):
        store(tmp_path).pull(f"{hostile.host}/app:t")


@pytest.mark.parametrize(
    "challenge", ["Bearer", 'Bearer realm=""', 'Bearer realm="file:///etc/passwd"', "Basic", "x"]
)
def test_a_challenge_that_cannot_be_met_is_a_clear_error(
    hostile: Hostile, tmp_path: Path, challenge: str
) -> None:
    hostile.answers["/v2/app/manifests/t"] = status(401, WWW_Authenticate=challenge)
    with pytest.raises((Unauthenticated, Denied)):
        store(tmp_path).pull(f"{hostile.host}/app:t")


def endless(code: int, hostile: Hostile, **headers: str) -> Answer:
    """A body that does not end by itself."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for key, value in {**headers, "Content-Length": str(1 << 40)}.items():
            handler.send_header(key.replace("_", "-"), value)
        handler.end_headers()
        while not hostile.stop.is_set():
            handler.wfile.write(bytes(1 << 16))

    return answer


def test_endless_answers_are_not_read_into_memory(hostile: Hostile, tmp_path: Path) -> None:
    """A redirect, a token, a manifest and a layer that never end."""
    path = hostile.serve_image()[0]
    sound = hostile.answers[path]
    hostile.answers["/elsewhere"] = sound
    hostile.answers[path] = endless(307, hostile, Location="/elsewhere")
    store(tmp_path / "redirect").pull(f"{hostile.host}/app:t")
    hostile.answers[path] = endless(200, hostile)
    with pytest.raises(Corrupt, match="more than"):
        store(tmp_path / "layer").pull(f"{hostile.host}/app:t")
    hostile.answers["/v2/app/manifests/t"] = endless(200, hostile)
    with pytest.raises(InvalidInput, match="more than"):
        store(tmp_path / "manifest").pull(f"{hostile.host}/app:t")
    realm = f'Bearer realm="http://{hostile.host}/token",service="s"'
    hostile.answers["/v2/app/manifests/t"] = status(401, WWW_Authenticate=realm)
    hostile.answers["/token?service=s&scope=repository%3Aapp%3Apull"] = endless(200, hostile)
    with pytest.raises(Unavailable, match="should be short"):
        store(tmp_path / "token").pull(f"{hostile.host}/app:t")


def test_plain_http_is_for_this_machine_or_when_it_is_allowed(tmp_path: Path) -> None:
    """A name that resolves to loopback but is not written as loopback is spoken to by TLS only."""
    server = Hostile()
    try:
        server.serve_image()
        port = server.host.rpartition(":")[2]
        name = f"{socket.gethostname()}.localdomain:{port}/app:t"
        with pytest.raises(Unavailable):
            store(tmp_path / "a").pull(name)
        assert server.requests == []
    finally:
        server.close()


def test_an_unreachable_registry_fails_soon_and_says_what_to_do(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"localhost:1 is not reachable: .*refused.*check its name"):
        ImageStore(ImageCache(tmp_path), RegistrySettings()).pull("localhost:1/app")
    assert time.monotonic() - started < 15


def test_a_login_never_shows_in_errors_or_reprs(hostile: Hostile, tmp_path: Path) -> None:
    hostile.serve_image()
    hostile.answers["/v2/app/manifests/t"] = status(401, WWW_Authenticate='Basic realm="r"')
    auth = tmp_path / "auth.json"
    auth.write_text(json.dumps({"auths": {hostile.host: {"username": "user", "password": "s3cret"}}}))
    with pytest.raises(Unauthenticated) as caught:
        store(tmp_path / "c", RegistrySettings(auth_files=(auth,))).pull(f"{hostile.host}/app:t")
    assert "s3cret" not in repr(caught.value.__dict__) + caught.value.message
    assert shutil.disk_usage(tmp_path).free > 0


def reset(data: bytes) -> Answer:
    """Sends the beginning, then resets the connection (RST instead of FIN)."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:1000])
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        handler.close_connection = True

    return answer


def test_a_reset_connection_is_tried_again(hostile: Hostile, tmp_path: Path) -> None:
    path = hostile.serve_image()[0]
    hostile.answers[path] = first_then(1, reset(hostile.blobs[path]), hostile.answers[path])
    images = store(tmp_path)
    images.disk(images.pull(f"{hostile.host}/app:t"))


@pytest.mark.parametrize("length", [-1, 1])
def test_a_length_that_lies_does_not_change_what_arrives(
    hostile: Hostile, tmp_path: Path, length: int
) -> None:
    """One byte less than the layer has, or one more."""
    path = hostile.serve_image()[0]
    data, sound = hostile.blobs[path], hostile.answers[path]

    def lie(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data) + length))
        handler.end_headers()
        handler.wfile.write(data)
        handler.close_connection = True

    hostile.answers[path] = first_then(1, lie, sound)
    images = store(tmp_path)
    images.disk(images.pull(f"{hostile.host}/app:t"))


def test_a_layer_without_a_length_is_read_to_its_end(hostile: Hostile, tmp_path: Path) -> None:
    path = hostile.serve_image()[0]
    data = hostile.blobs[path]

    def chunked(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for at in range(0, len(data), 100_000):
            piece = data[at : at + 100_000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.wfile.write(b"0\r\n\r\n")

    hostile.answers[path] = chunked
    images = store(tmp_path)
    images.disk(images.pull(f"{hostile.host}/app:t"))


def test_a_giant_index_is_refused(hostile: Hostile, tmp_path: Path) -> None:
    index = "application/vnd.oci.image.index.v1+json"
    entry = {"mediaType": OCI, "digest": "sha256:" + "0" * 64, "size": 1}
    data = json.dumps({"schemaVersion": 2, "mediaType": index, "manifests": [entry] * 5000}).encode()
    hostile.answers["/v2/app/manifests/t"] = body(data, index)
    with pytest.raises(InvalidInput, match="an index of 5000 manifests"):
        store(tmp_path).pull(f"{hostile.host}/app:t")


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1"])
def test_a_redirect_away_from_http_is_not_followed(hostile: Hostile, tmp_path: Path, target: str) -> None:
    path = hostile.serve_image()[0]
    hostile.answers[path] = status(302, Location=target)
    with pytest.raises(Denied, match="not followed"):
        store(tmp_path).pull(f"{hostile.host}/app:t")


def serve_foreign(hostile: Hostile, *urls: str) -> str:
    """An image whose only layer is said to be at `urls`; returns the layer's path in the registry."""
    path = hostile.serve_image(tars=[TARS[0]])[0]
    layer = hostile.blobs[path]
    config = next(blob for name, blob in hostile.blobs.items() if name != path)
    kind = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    manifest = {
        "schemaVersion": 2,
        "config": described(config, "application/vnd.oci.image.config.v1+json"),
        "layers": [{**described(layer, kind), "urls": list(urls)}],
    }
    hostile.answers["/v2/app/manifests/t"] = body(json.dumps(manifest).encode(), OCI)
    return path


def test_a_foreign_layer_is_fetched_from_where_its_maker_keeps_it(hostile: Hostile, tmp_path: Path) -> None:
    """Without the login for the registry."""
    elsewhere = Hostile()
    try:
        path = serve_foreign(hostile, f"http://{elsewhere.host}/gone", f"http://{elsewhere.host}/layer")
        elsewhere.answers["/layer"] = hostile.answers.pop(path)
        images = store(tmp_path)
        images.disk(images.pull(f"{hostile.host}/app:t"))
        assert [asked for asked, _ in elsewhere.requests] == ["/gone", "/layer"]
        assert not any("Authorization" in headers for _, headers in elsewhere.requests)
    finally:
        elsewhere.close()


def test_a_foreign_layer_that_the_registry_has_is_taken_from_it(hostile: Hostile, tmp_path: Path) -> None:
    serve_foreign(hostile, "https://registry.invalid/layer")
    images = store(tmp_path)
    images.disk(images.pull(f"{hostile.host}/app:t"))


def test_a_foreign_layer_at_no_web_address_is_refused(hostile: Hostile, tmp_path: Path) -> None:
    del hostile.answers[serve_foreign(hostile, "file:///etc/passwd")]
    with pytest.raises(Denied, match="not https"):
        store(tmp_path).pull(f"{hostile.host}/app:t")
