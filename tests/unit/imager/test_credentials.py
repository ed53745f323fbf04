"""Logins from credential helpers and tokens: real helper programs, sound, failing, slow and hostile ones."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import select
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.imager.authorization import parse_challenge
from services.imager.credentials import Credentials, Keyring
from services.imager.reference import RegistryReference, parse_reference


def reference(text: str) -> RegistryReference:
    """A registry reference."""
    parsed = parse_reference(text)
    assert isinstance(parsed, RegistryReference)
    return parsed


class Home:
    """A configuration file and helpers on a PATH of their own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.config = place / "config.json"
        self.env = {"PATH": f"{place}:/usr/bin:/bin", "SEEN": str(place / "seen")}

    def helper(self, name: str, script: str) -> None:
        """Install `docker-credential-NAME`, which notes its arguments and input."""
        path = self.place / f"docker-credential-{name}"
        path.write_text(f'#!/bin/sh\nread -r server\necho "$1 $server" >> "$SEEN"\n{script}\n')
        path.chmod(0o755)

    def find(self, image: str, document: dict[str, Any], seconds: float = 20) -> Credentials | None:
        """What is found for `image`."""
        self.config.write_text(json.dumps(document))
        self.keyring = Keyring([self.config], self.env, seconds)
        return self.keyring.find(reference(image))

    @property
    def seen(self) -> list[str]:
        """What helpers were asked."""
        path = Path(self.env["SEEN"])
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


SOUND = """echo '{"ServerURL": "x", "Username": "u", "Secret": "s3cret"}'"""
ABSENT = "echo 'credentials not found in native keychain'; exit 1"


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_a_helper_named_for_the_registry_comes_first_then_the_file_then_the_store(home: Home) -> None:
    home.helper("one", SOUND)
    home.helper("all", SOUND.replace("s3cret", "store"))
    document = {
        "auths": {"r.example": {"auth": encoded("a:file")}, "b.example": {"auth": encoded("b:file")}},
        "credHelpers": {"r.example": "one"},
        "credsStore": "all",
    }
    assert home.find("r.example/x", document) == Credentials("u", "s3cret")
    assert home.find("b.example/x", document) == Credentials("b", "file")
    assert home.find("c.example:5000/x/y", document) == Credentials("u", "store")
    assert home.seen == ["get r.example", "get c.example:5000"]


def test_docker_hub_has_the_name_that_docker_gives_it(home: Home) -> None:
    home.helper("all", SOUND)
    assert home.find("alpine", {"credsStore": "all"}) == Credentials("u", "s3cret")
    assert home.seen == ["get https://index.docker.io/v1/"]


def test_a_token_of_a_helper_is_an_identity_token(home: Home) -> None:
    home.helper("all", SOUND.replace('"u"', '"<token>"'))
    found = home.find("r.example/x", {"credsStore": "all"})
    assert found is not None
    assert (found.user, found.identity_token) == ("", "s3cret")
    assert "s3cret" not in repr(found)


def test_tokens_in_the_file_are_read(home: Home) -> None:
    entry = {"auth": encoded("u:"), "identitytoken": "refresh"}
    found = home.find("r.example/x", {"auths": {"r.example": entry}})
    assert found == Credentials("u", "", identity_token="refresh")
    found = home.find("r.example/x", {"auths": {"r.example": {"registrytoken": "t"}}})
    assert found == Credentials("", "", registry_token="t")


def test_an_old_dockercfg_is_read(tmp_path: Path) -> None:
    path = tmp_path / ".dockercfg"
    path.write_text(json.dumps({"r.example": {"auth": encoded("u:p"), "email": "x"}}))
    assert Keyring([path]).find(reference("r.example/x")) == Credentials("u", "p")


def test_a_helper_without_the_login_is_no_trouble(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    home.helper("all", ABSENT)
    assert home.find("r.example/x", {"credsStore": "all"}) is None
    assert (home.keyring.trouble, caplog.text) == ("", "")


@pytest.mark.parametrize(
    ("name", "script", "why"),
    [
        ("absent", None, "docker-credential-absent is not installed"),
        ("bad", "echo 'no session bus' >&2; exit 3", "no session bus"),
        ("bad", "echo s3cret", "no sound answer"),
        ("bad", """echo '{"Username": "s3cret"}'""", "no sound answer"),
        ("bad", "echo '[]'", "no sound answer"),
        ("../../bin/sh", None, "no name of a credential helper"),
        ("a b", None, "no name of a credential helper"),
        (5, None, "no name of a credential helper"),
    ],
)
def test_a_helper_that_fails_is_told_and_passed_over(
    home: Home, caplog: pytest.LogCaptureFixture, name: Any, script: str | None, why: str
) -> None:
    if script is not None:
        home.helper(name, script)
    with caplog.at_level(logging.WARNING):
        assert home.find("r.example/x", {"credsStore": name}) is None
    assert why in caplog.text
    assert why in home.keyring.trouble
    assert "s3cret" not in caplog.text + home.keyring.trouble


def test_a_helper_that_hangs_is_ended_with_its_children(home: Home) -> None:
    home.helper("slow", 'sleep 1000 & echo $! > "$SEEN.pid"; wait')
    started = time.monotonic()
    assert home.find("r.example/x", {"credsStore": "slow"}, seconds=0.5) is None
    assert time.monotonic() - started < 10
    assert "took longer than 0.5 s" in home.keyring.trouble
    child = int(Path(f"{home.env['SEEN']}.pid").read_text())
    with contextlib.suppress(ProcessLookupError):  # it is gone already
        watch = os.pidfd_open(child)
        try:
            assert select.select([watch], [], [], 10)[0] == [watch], "it lives on"
        finally:
            os.close(watch)


def test_a_helper_sees_the_environment_it_is_given_and_no_other(home: Home) -> None:
    home.helper("env", """printf '{"Username": "u", "Secret": "%s-%s"}' "$GIVEN" "$VOIDBOX_TEST_SECRET" """)
    home.env["GIVEN"] = "yes"
    os.environ["VOIDBOX_TEST_SECRET"] = "leaked"
    try:
        assert home.find("r.example/x", {"credsStore": "env"}) == Credentials("u", "yes-")
    finally:
        del os.environ["VOIDBOX_TEST_SECRET"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("Negotiate", {"negotiate": {}}),
        ("Basic", {"basic": {}}),
        ('Basic realm="a, Bearer b"', {"basic": {"realm": "a, Bearer b"}}),
        ('bearer realm="https://a/t",service=s', {"bearer": {"realm": "https://a/t", "service": "s"}}),
        (
            'Bearer realm="https://a/t",scope="repository:x:pull,push", Basic realm="r"',
            {"bearer": {"realm": "https://a/t", "scope": "repository:x:pull,push"}, "basic": {"realm": "r"}},
        ),
        (r'Basic realm="a\"b"', {"basic": {"realm": 'a"b'}}),
    ],
)
def test_challenges_are_read_as_the_standard_says(text: str, expected: dict[str, Any]) -> None:
    assert parse_challenge(text) == expected


@given(st.text(max_size=200) | st.text(alphabet='Bearbsic ="\\,relmv', max_size=80))
def test_any_challenge_is_read_without_an_error(text: str) -> None:
    for scheme, parameters in parse_challenge(text).items():
        assert scheme == scheme.lower()
        assert all(name == name.lower() for name in parameters)
