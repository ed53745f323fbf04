"""A disk that is made while its layers arrive is the disk that is made after them, or is not there."""

from __future__ import annotations

import http.server
import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import Cancelled, Corrupt, VoidboxError
from services.imager.cache import ImageCache
from services.imager.disk import Disk
from services.imager.layers import LayerMerger
from services.imager.limits import Cancel
from services.imager.pull import ImageStore
from services.imager.registry import RegistrySettings
from tests.imager_images import sha256
from tests.registries import Answer, Hostile, body, send

PATIENT = RegistrySettings(read_seconds=120, attempts=2, backoff_seconds=0.01)


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    """A registry that does what it is told."""
    server = Hostile()
    yield server
    server.close()


def store(path: Path) -> ImageStore:
    """A store over an own cache."""
    return ImageStore(ImageCache(path), PATIENT)


def expected(hostile: Hostile, tmp_path: Path) -> bytes:
    """The disk as it is made after the pull."""
    images = store(tmp_path / "expected")
    return images.disk(images.pull(f"{hostile.host}/app:t"), free_mib=8).path.read_bytes()


def prepared(images: ImageStore, hostile: Hostile, **more: Any) -> Disk:
    """The disk, made during the pull."""
    _, disk = images.prepare(f"{hostile.host}/app:t", free_mib=8, **more)
    assert_nothing_partial(images)
    return disk


def assert_nothing_partial(images: ImageStore) -> None:
    """No thread, no temporary file, and every blob is what its name says."""
    assert not [thread for thread in threading.enumerate() if thread.name == "early-disk"]
    assert list((images.cache.root / "tmp").iterdir()) == []
    for blob in (images.cache.root / "blobs/sha256").iterdir():
        assert sha256(blob.read_bytes()) == f"sha256:{blob.name}"


def nothing_is_left(images: ImageStore) -> bool:
    """Whether there is no disk either."""
    assert_nothing_partial(images)
    return list((images.cache.root / "disks").iterdir()) == []


def after(event: threading.Event, then: Answer) -> Answer:
    """`then`, but not before `event`."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        assert event.wait(120), "the disk is not made while layers arrive"
        then(handler)

    return answer


@pytest.fixture
def first_applied(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a layer has been merged into a disk."""
    event, apply = threading.Event(), LayerMerger.apply

    def watched(self: LayerMerger, layer: Any) -> None:
        apply(self, layer)
        event.set()

    monkeypatch.setattr(LayerMerger, "apply", watched)
    return event


def test_the_first_layer_is_in_the_disk_before_the_last_has_come(
    hostile: Hostile, tmp_path: Path, first_applied: threading.Event
) -> None:
    _, last = hostile.serve_image()
    wanted = expected(hostile, tmp_path)
    first_applied.clear()
    hostile.answers[last] = after(first_applied, hostile.answers[last])
    disk = prepared(store(tmp_path / "cache"), hostile)
    assert disk.path.read_bytes() == wanted


def test_bytes_that_come_one_by_one_make_the_same_disk(hostile: Hostile, tmp_path: Path) -> None:
    first, _ = hostile.serve_image()
    wanted = expected(hostile, tmp_path)
    data = hostile.blobs[first]

    def dripping(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        for at in range(0, len(data), 997):
            handler.wfile.write(data[at : at + 997])
            handler.wfile.flush()

    hostile.answers[first] = dripping
    assert prepared(store(tmp_path / "cache"), hostile).path.read_bytes() == wanted


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: bytes(1000),
        lambda data: data + b"more",
        lambda data: data[:100_000] + bytes([data[100_000] ^ 1]) + data[100_001:],
        lambda data: data[:150_000],
        lambda data: data,
    ],
)
def test_the_rest_of_an_earlier_pull_sound_or_not_makes_the_same_disk(
    hostile: Hostile, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    first, _ = hostile.serve_image()
    wanted = expected(hostile, tmp_path)
    images = store(tmp_path / "cache")
    (images.cache.root / "partial").mkdir()
    (images.cache.root / "partial" / first.rpartition(":")[2]).write_bytes(damage(hostile.blobs[first]))
    assert prepared(images, hostile).path.read_bytes() == wanted


def test_a_server_that_begins_again_with_other_bytes_makes_the_same_disk(
    hostile: Hostile, tmp_path: Path
) -> None:
    """It hangs up after wrong bytes, and then knows no ranges: what was read of them is forgotten."""
    first, _ = hostile.serve_image()
    wanted = expected(hostile, tmp_path)
    data, seen = hostile.blobs[first], []

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        seen.append(handler.path)
        if len(seen) > 1:
            send(handler, 200, data)
            return
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:50_000] + bytes(50_000))
        handler.close_connection = True

    hostile.answers[first] = answer
    assert prepared(store(tmp_path / "cache"), hostile).path.read_bytes() == wanted
    assert len(seen) == 2


def test_a_wrong_layer_is_the_error_and_no_disk_is_left(hostile: Hostile, tmp_path: Path) -> None:
    first, last = hostile.serve_image()
    for path in (first, last):
        sound = hostile.answers[path]
        data = hostile.blobs[path]
        hostile.answers[path] = body(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
        images = store(tmp_path / path.rpartition(":")[2])
        with pytest.raises(Corrupt) as caught:
            prepared(images, hostile)
        assert caught.value.reason == "WRONG_DIGEST"
        assert nothing_is_left(images)
        hostile.answers[path] = sound


def test_a_layer_that_is_not_what_the_image_says_is_an_error_after_the_pull(
    hostile: Hostile, tmp_path: Path
) -> None:
    """The blobs are sound, the configuration names other tars: the image is there, its disk is not."""
    hostile.serve_image()
    [config_path] = [path for path, blob in hostile.blobs.items() if blob[:1] == b"{"]
    config = json.loads(hostile.blobs[config_path])
    config["rootfs"]["diff_ids"][1] = f"sha256:{'0' * 64}"
    changed = json.dumps(config).encode()
    manifest = _body_of(hostile, "/v2/app/manifests/t")
    manifest["config"].update(digest=sha256(changed), size=len(changed))
    hostile.answers[f"/v2/app/blobs/{sha256(changed)}"] = body(changed)
    hostile.answers["/v2/app/manifests/t"] = body(json.dumps(manifest).encode(), manifest["mediaType"])
    images = store(tmp_path)
    with pytest.raises(VoidboxError) as caught:
        prepared(images, hostile)
    assert caught.value.reason == "WRONG_DIFF_ID"
    assert nothing_is_left(images)
    assert [image.reference for image in images.catalog.list_images()] == [f"{hostile.host}/app:t"]


def _body_of(hostile: Hostile, path: str) -> Any:
    """What the registry answers now, read as JSON."""
    with urllib.request.urlopen(f"http://{hostile.host}{path}") as answer:
        return json.loads(answer.read())


def test_cancelling_ends_a_disk_that_waits_for_its_layer(
    hostile: Hostile, tmp_path: Path, first_applied: threading.Event
) -> None:
    _, last = hostile.serve_image()
    cancel = Cancel()

    def stalling(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(hostile.blobs[last])))
        handler.end_headers()
        handler.wfile.write(hostile.blobs[last][:10])
        handler.wfile.flush()
        first_applied.wait(120)
        cancel.cancel()
        hostile.stop.wait(120)
        handler.close_connection = True

    hostile.answers[last] = stalling
    images = store(tmp_path)
    with pytest.raises(Cancelled):
        prepared(images, hostile, cancel=cancel)
    assert nothing_is_left(images)


def test_two_at_once_make_one_disk(hostile: Hostile, tmp_path: Path) -> None:
    hostile.serve_image()
    wanted = expected(hostile, tmp_path)
    found: list[Path] = []
    errors: list[BaseException] = []

    def one() -> None:
        try:
            _, disk = store(tmp_path / "cache").prepare(f"{hostile.host}/app:t", free_mib=8)
            found.append(disk.path)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(set(found)) == 1
    assert found[0].read_bytes() == wanted
