"""Mirrors, other locations, trust and tokens: files that podman and docker obey are obeyed here.

Registries are real HTTP servers on loopback; a mirror that fails in any way is passed over, and a
download that breaks at one goes on at the next.
"""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from services.common.errors import Corrupt, Denied, InvalidInput, NotFound, Unauthenticated, Unavailable
from services.imager.cache import ImageCache
from services.imager.pull import ImageStore
from services.imager.reference import RegistryReference, parse_reference
from services.imager.registries_conf import endpoints
from services.imager.registry_settings import RegistrySettings
from tests.imager_images import make_layout, need, run
from tests.registries import TARS, Answer, Hostile, body, docker_registry, push, send, status

DIGEST = "sha256:" + "0" * 64


@pytest.fixture
def origin() -> Iterator[Hostile]:
    server = Hostile()
    yield server
    server.close()


@pytest.fixture
def mirror() -> Iterator[Hostile]:
    server = Hostile()
    yield server
    server.close()


def reference(text: str) -> RegistryReference:
    """A registry reference."""
    parsed = parse_reference(text)
    assert isinstance(parsed, RegistryReference)
    return parsed


def pull(place: Path, name: str, conf: str = "", **more: Any) -> ImageStore:
    """Pull `name` into a new cache by the settings of `conf`."""
    path = place / "registries.conf"
    path.write_text(conf)
    settings = RegistrySettings(
        **{"attempts": 2, "backoff_seconds": 0.01, "read_seconds": 5, "registries_conf": (path,), **more}
    )
    images = ImageStore(ImageCache(place / "cache"), settings)
    image = images.pull(name)
    assert image.reference == str(reference(name)), "it keeps the name that the user gave"
    images.disk(image)
    return images


def mirrored(origin: Hostile, mirror: Hostile, more: str = "") -> str:
    """A configuration in which `mirror` stands before `origin`."""
    return (
        f'[[registry]]\nlocation = "{origin.host}"\n{more}\n[[registry.mirror]]\nlocation = "{mirror.host}"\n'
    )


def test_a_mirror_is_asked_instead_of_the_registry(origin: Hostile, mirror: Hostile, tmp_path: Path) -> None:
    mirror.serve_image()
    pull(tmp_path, f"{origin.host}/app:t", mirrored(origin, mirror))
    assert origin.requests == []


def test_a_mirror_below_a_path_of_its_own(origin: Hostile, mirror: Hostile, tmp_path: Path) -> None:
    mirror.serve_image("hub/library/app")
    conf = (
        '[[registry]]\nprefix = "docker.io"\nlocation = "docker.io"\n'
        f'[[registry.mirror]]\nlocation = "{mirror.host}/hub"\n'
    )
    pull(tmp_path, "app:t", conf)
    assert mirror.requests[0][0] == "/v2/hub/library/app/manifests/t"


@pytest.mark.parametrize("code", [404, 401, 403, 500])
def test_a_mirror_that_has_it_not_is_passed_over(
    origin: Hostile, mirror: Hostile, tmp_path: Path, code: int
) -> None:
    origin.serve_image()
    mirror.answers["/v2/app/manifests/t"] = status(code)
    pull(tmp_path, f"{origin.host}/app:t", mirrored(origin, mirror))


def test_a_mirror_that_is_gone_or_talks_rubbish_is_passed_over(origin: Hostile, tmp_path: Path) -> None:
    origin.serve_image()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = f"127.0.0.1:{closed.getsockname()[1]}"
        conf = f'[[registry]]\nlocation = "{origin.host}"\n[[registry.mirror]]\nlocation = "{gone}"\n'
        pull(tmp_path, f"{origin.host}/app:t", conf)


def test_a_layer_that_breaks_at_the_mirror_goes_on_at_the_registry(
    origin: Hostile, mirror: Hostile, tmp_path: Path
) -> None:
    path = origin.serve_image()[0]
    mirror.serve_image()
    data = mirror.blobs[path]

    def cut(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:200_000])
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True

    seen: list[str | None] = []

    def once(handler: Any) -> None:
        seen.append(handler.headers.get("Range"))
        (cut if len(seen) == 1 else status(500))(handler)

    mirror.answers[path] = once
    pull(tmp_path, f"{origin.host}/app:t", mirrored(origin, mirror))
    assert seen == [None, "bytes=200000-"]
    assert [headers.get("Range") for asked, headers in origin.requests if asked == path] == ["bytes=200000-"]


def test_a_mirror_cannot_change_what_a_digest_names(origin: Hostile, mirror: Hostile, tmp_path: Path) -> None:
    origin.serve_image()
    mirror.serve_image(tars=[TARS[1]])
    digest = next(key for key in origin.answers if "sha256" in key and "manifests" in key).rpartition("/")[2]
    mirror.answers[f"/v2/app/manifests/{digest}"] = mirror.answers["/v2/app/manifests/t"]
    images = pull(tmp_path, f"{origin.host}/app@{digest}", mirrored(origin, mirror))
    assert images.catalog.list_images()[0].digest == digest
    with pytest.raises(Corrupt):
        pull(tmp_path / ".", f"{mirror.host}/app@{digest}")


def test_the_registrys_own_error_is_told_at_last(origin: Hostile, mirror: Hostile, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=f"{origin.host} has no manifest"):
        pull(tmp_path, f"{origin.host}/app:t", mirrored(origin, mirror))
    assert mirror.requests


def test_the_login_of_the_registry_is_not_sent_to_its_mirror(
    origin: Hostile, mirror: Hostile, tmp_path: Path
) -> None:
    auth = tmp_path / "auth.json"
    auth.write_text(json.dumps({"auths": {origin.host: {"username": "u", "password": "p"}}}))
    mirror.answers["/v2/app/manifests/t"] = status(401, WWW_Authenticate='Basic realm="r"')
    origin.serve_image()
    pull(tmp_path, f"{origin.host}/app:t", mirrored(origin, mirror), auth_files=(auth,))
    assert not any("Authorization" in headers for _, headers in mirror.requests)


NAMES = "[[registry]]\n"


@pytest.mark.parametrize(
    ("conf", "name", "expected"),
    [
        ("", "r.example/a:t", ["r.example/a:t"]),
        (NAMES + 'location = "o.example"', "r.example/a:t", ["r.example/a:t"]),
        (NAMES + 'prefix = "r.example/a"\nlocation = "o.example/b"', "r.example/a/c:t", ["o.example/b/c:t"]),
        (NAMES + 'prefix = "r.example/a"\nlocation = "o.example/b"', "r.example/ab:t", ["r.example/ab:t"]),
        (NAMES + 'prefix = "*.example"\nlocation = "o.test"', "r.example/a:t", ["o.test/a:t"]),
        (NAMES + 'prefix = "*.example"', "r.example:5/a:t", ["r.example:5/a:t"]),
        (NAMES + 'prefix = "*.example"\nlocation = "o.test"', "example/a:t", ["docker.io/example/a:t"]),
        (
            NAMES + 'location = "r.example"\n' + NAMES + 'prefix = "r.example/a"\nlocation = "l.example/b"',
            "r.example/a:t", ["l.example/b:t"],
        ),
        (
            NAMES + 'location = "r.example"\nmirror-by-digest-only = true\n'
            '[[registry.mirror]]\nlocation = "m.example"',
            "r.example/a:t", ["r.example/a:t"],
        ),
        (
            NAMES + 'location = "r.example"\nmirror-by-digest-only = true\n'
            '[[registry.mirror]]\nlocation = "m.example"',
            f"r.example/a@{DIGEST}", [f"m.example/a@{DIGEST}", f"r.example/a@{DIGEST}"],
        ),
        (
            NAMES + 'location = "r.example"\n'
            '[[registry.mirror]]\nlocation = "m.example"\npull-from-mirror = "tag-only"',
            f"r.example/a@{DIGEST}", [f"r.example/a@{DIGEST}"],
        ),
        ('unqualified-search-registries = ["quay.example"]', "a", ["docker.io/library/a:latest"]),
    ],
)  # fmt: skip
def test_places_are_found_as_the_manual_page_says(
    tmp_path: Path, conf: str, name: str, expected: list[str]
) -> None:
    path = tmp_path / "r.conf"
    path.write_text(conf)
    found = endpoints([tmp_path / "absent", path], reference(name), False)
    assert [str(place.reference) for place in found] == [str(reference(text)) for text in expected]


def test_insecure_is_said_for_each_place(tmp_path: Path) -> None:
    path = tmp_path / "r.conf"
    path.write_text(
        '[[registry]]\nlocation = "r.example"\ninsecure = true\n'
        '[[registry.mirror]]\nlocation = "a.example"\n'
        '[[registry.mirror]]\nlocation = "b.example"\ninsecure = true'
    )
    assert [place.insecure for place in endpoints([path], reference("r.example/x"), False)] == [
        False, True, True,
    ]  # fmt: skip
    path.write_text("")
    assert endpoints([path], reference("r.example/x"), True)[0].insecure


def test_a_later_file_replaces_the_rule_of_an_earlier_one(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_text('[[registry]]\nprefix = "r.example"\nblocked = true\n')
    two.write_text('[[registry]]\nprefix = "r.example"\nlocation = "o.example"\n')
    with pytest.raises(Denied, match=f"{one} blocks r.example"):
        endpoints([one], reference("r.example/x"), False)
    assert endpoints([one, two], reference("r.example/x"), False)[0].reference.registry == "o.example"


@pytest.mark.parametrize(
    ("conf", "why"),
    [
        ("[[registry]", "registries.conf"),
        ("registry = 5", "not a list of tables"),
        ("[registry]", "not a list of tables"),
        ("[[registry]]", "neither prefix nor location"),
        ("[[registry]]\nlocation = 5", "location is not a string"),
        ('[[registry]]\nlocation = "localhost:1"\nblocked = "yes"', "not true or false"),
        ('[[registry]]\nlocation = "localhost:1"\n[[registry.mirror]]', "has no location"),
        ('[[registry]]\nlocation = "localhost:1"\n[[registry.mirror]]\nlocation = "../x"', "location '../x'"),
        ('[[registry]]\nlocation = "mirror"\nprefix = "localhost:1"', "names no host"),
        ('[[registry]]\nprefix = "localhost:1/a"\nlocation = "o.example"', "names no host"),
        (
            '[[registry]]\nlocation = "localhost:1"\n'  # noqa: ISC004
            '[[registry.mirror]]\nlocation = "x"\npull-from-mirror = "no"',
            "pull-from-mirror is 'no'",
        ),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, conf: str, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        pull(tmp_path, "localhost:1/a", conf)


# --- tokens --------------------------------------------------------------------------------------


def guard(server: Hostile, wanted: str, challenge: str) -> None:
    """Let requests with the header `wanted` through, and challenge others."""

    def guarded(answer: Answer) -> Answer:
        def check(handler: Any) -> None:
            if handler.headers.get("Authorization") == wanted:
                answer(handler)
            else:
                send(handler, 401, b"{}", WWW_Authenticate=challenge)

        return check

    server.answers = {key: guarded(answer) for key, answer in server.answers.items()}


def test_a_token_is_fetched_once_with_the_login_and_used_by_all_layers(
    origin: Hostile, mirror: Hostile, tmp_path: Path
) -> None:
    """The token server is on another host, as with the largest registries."""
    origin.serve_image()
    challenge = f'Bearer realm="http://{mirror.host}/t",service="s",scope="repository:app:pull"'
    guard(origin, "Bearer t0ken", challenge)
    asked = "/t?service=s&scope=repository%3Aapp%3Apull"
    mirror.answers[asked] = body(b'{"access_token": "t0ken"}')
    basic = "Basic " + base64.b64encode(b"u:p").decode()
    guard(mirror, basic, "Basic")
    auth = tmp_path / "auth.json"
    auth.write_text(json.dumps({"auths": {origin.host: {"username": "u", "password": "p"}}}))
    pull(tmp_path, f"{origin.host}/app:t", auth_files=(auth,))
    assert [path for path, _ in mirror.requests] == [asked]
    assert not any(headers.get("Authorization") == basic for _, headers in origin.requests)


def test_an_identity_token_is_exchanged_for_an_access_token(origin: Hostile, tmp_path: Path) -> None:
    origin.serve_image()
    guard(origin, "Bearer access", f'Bearer realm="http://{origin.host}/t",service="s"')
    forms: list[dict[str, list[str]]] = []

    def exchange(handler: Any) -> None:
        forms.append(parse_qs(handler.rfile.read(int(handler.headers["Content-Length"])).decode()))
        send(handler, 200, b'{"access_token": "access"}')

    origin.posts["/t"] = exchange
    auth = tmp_path / "auth.json"
    auth.write_text(json.dumps({"auths": {origin.host: {"identitytoken": "refresh"}}}))
    pull(tmp_path, f"{origin.host}/app:t", auth_files=(auth,))
    [form] = forms
    assert form["grant_type"] == ["refresh_token"]
    assert form["refresh_token"] == ["refresh"]
    assert (form["service"], form["scope"]) == (["s"], ["repository:app:pull"])


def test_an_identity_token_does_not_follow_a_redirect(
    origin: Hostile, mirror: Hostile, tmp_path: Path
) -> None:
    origin.serve_image()
    guard(origin, "Bearer access", f'Bearer realm="http://{origin.host}/t"')
    origin.posts["/t"] = status(307, Location=f"http://{mirror.host}/t")
    auth = tmp_path / "auth.json"
    auth.write_text(json.dumps({"auths": {origin.host: {"identitytoken": "refresh"}}}))
    with pytest.raises(Unauthenticated):
        pull(tmp_path, f"{origin.host}/app:t", auth_files=(auth,))
    assert mirror.requests == []


def test_an_expired_token_is_renewed(origin: Hostile, tmp_path: Path) -> None:
    path = origin.serve_image()[0]
    layer = origin.answers[path]
    challenge = f'Bearer realm="http://{origin.host}/t"'
    guard(origin, "Bearer one", challenge)
    origin.answers[path] = layer
    guarded = {key: answer for key, answer in origin.answers.items() if key != path}
    guard(origin, "Bearer two", challenge)
    origin.answers |= guarded
    tokens = iter([b'{"token": "one"}', b'{"token": "two"}', b'{"token": "one"}', b'{"token": "two"}'])
    origin.answers["/t?scope=repository%3Aapp%3Apull"] = lambda handler: send(handler, 200, next(tokens))
    pull(tmp_path, f"{origin.host}/app:t", parallel_layers=1)


def test_a_token_server_that_refuses_the_login_says_whose(origin: Hostile, tmp_path: Path) -> None:
    origin.serve_image()
    guard(origin, "Bearer t", f'Bearer realm="http://{origin.host}/t"')
    origin.answers["/t?scope=repository%3Aapp%3Apull"] = status(401)
    auth = tmp_path / "auth.json"
    auth.write_text(json.dumps({"auths": {origin.host: {"username": "somebody", "password": "s3cret"}}}))
    with pytest.raises(Unauthenticated, match=r"refuses the login of somebody; .*docker login") as caught:
        pull(tmp_path, f"{origin.host}/app:t", auth_files=(auth,))
    assert "s3cret" not in caught.value.message


def test_a_helper_that_failed_is_named_when_a_login_is_wanted(origin: Hostile, tmp_path: Path) -> None:
    origin.answers["/v2/app/manifests/t"] = status(401, WWW_Authenticate='Basic realm="r"')
    auth = tmp_path / "config.json"
    auth.write_text(json.dumps({"credsStore": "absent"}))
    with pytest.raises(Unauthenticated, match="docker-credential-absent is not installed"):
        pull(tmp_path, f"{origin.host}/app:t", auth_files=(auth,))


def test_a_helper_is_not_asked_for_a_public_image(origin: Hostile, tmp_path: Path) -> None:
    origin.serve_image()
    helper = tmp_path / "docker-credential-x"
    helper.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n")
    helper.chmod(0o755)
    auth = tmp_path / "config.json"
    auth.write_text(json.dumps({"credsStore": "x"}))
    pull(tmp_path, f"{origin.host}/app:t", auth_files=(auth,), helper_env={"PATH": str(tmp_path)})
    assert not (tmp_path / "asked").exists()


# --- trust ---------------------------------------------------------------------------------------


def certificate(place: Path, name: str, *more: str | Path) -> None:
    """NAME.crt and NAME.key for 127.0.0.1; self-signed unless told otherwise."""
    run(need("openssl", "openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
        "-nodes", "-keyout", place / f"{name}.key", "-out", place / f"{name}.crt", "-days", "2",
        "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", *more)  # fmt: skip


def test_certificates_of_one_registry_come_from_certs_d_also_the_clients(tmp_path: Path) -> None:
    """A real registry that demands a client's certificate too."""
    certificate(tmp_path, "server")
    certificate(tmp_path, "client")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    tls = {"certificate": f"{tmp_path}/server.crt", "key": f"{tmp_path}/server.key"}
    mutual = {**tls, "clientcas": [f"{tmp_path}/client.crt"]}
    data = tmp_path / "registry"
    with docker_registry(data, {"http": {"addr": host, "tls": tls}}):
        push(make_layout(tmp_path / "layout", TARS), f"{host}/app:t")
    mine = tmp_path / "certs.d" / host
    mine.mkdir(parents=True)
    with docker_registry(data, {"http": {"addr": host, "tls": mutual}}):
        for name, why in (("none", "no trusted TLS"), ("server.crt", "certificate required|reset|EOF|alert")):
            if name != "none":
                (mine / name).write_bytes((tmp_path / name).read_bytes())
            with pytest.raises(Unavailable, match=why):
                pull(tmp_path, f"{host}/app:t", certs_dirs=(tmp_path / "certs.d",))
        (mine / "client.cert").write_bytes((tmp_path / "client.crt").read_bytes())
        (mine / "client.key").write_bytes((tmp_path / "client.key").read_bytes())
        pull(tmp_path, f"{host}/app:t", certs_dirs=(tmp_path / "absent", tmp_path / "certs.d"))
        (mine / "server.crt").write_text("rubbish")
        with pytest.raises(InvalidInput, match=r"server.crt cannot be used"):
            pull(tmp_path / ".", f"{host}/app2:t", certs_dirs=(tmp_path / "certs.d",))


def test_a_bundle_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"absent\.pem cannot be used"):
        pull(tmp_path, "registry.invalid/a", ca_bundle=tmp_path / "absent.pem")


def test_a_proxy_is_used_unless_the_host_is_excepted(
    origin: Hostile, mirror: Hostile, tmp_path: Path
) -> None:
    """To a proxy a client sends the whole URL (RFC 9112, 3.2.2)."""
    origin.serve_image()
    for path, answer in list(origin.answers.items()):
        mirror.answers[f"http://{origin.host}{path}"] = answer
    proxies = {"http": f"http://{mirror.host}"}
    pull(tmp_path, f"{origin.host}/app:t", proxies=proxies)
    assert origin.requests == []
    (tmp_path / "b").mkdir()
    before = len(mirror.requests)
    pull(tmp_path / "b", f"{origin.host}/app:t", proxies=proxies, no_proxy="127.0.0.1")
    assert len(mirror.requests) == before
