"""Which request gets which credential, and what is taken out of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.hypervisor.egress.intercept import check_authority
from services.hypervisor.egress.message import HttpError, Request, end_to_end, get, nothing
from services.hypervisor.egress.rules import Placement, Rule, check_target, find


def request(target: str = "/", *headers: tuple[bytes, bytes], authority: str = "api.test") -> Request:
    return Request(
        method="GET", scheme="https", authority=authority, target=target, headers=[*headers], body=nothing()
    )


def rule(**values: object) -> Rule:
    return Rule(**{"id": "key", "hosts": ("api.test", "*.git.test"), **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "port", "secure", "covered"),
    [
        ("api.test", 443, True, True),
        ("api.test", 8443, True, False),
        ("api.test", 443, False, False),
        ("a.b.git.test", 443, True, True),
        ("git.test", 443, True, False),
        ("evilapi.test", 443, True, False),
        ("api.test.evil", 443, True, False),
    ],
)
def test_a_rule_covers_its_hosts_only(host: str, port: int, secure: bool, covered: bool) -> None:
    assert rule().covers(host, port, secure) is covered


def test_the_longest_path_decides() -> None:
    rules = [rule(id="all"), rule(id="org", paths=("/org",)), rule(id="repo", paths=("/org/repo/",))]
    chosen = {
        path: find(rules, request(path), "api.test", 443)
        for path in ("/x", "/org/x", "/org/repo/x?y", "/orgs")
    }
    assert {path: one.id for path, one in chosen.items() if one} == {
        "/x": "all", "/org/x": "org", "/org/repo/x?y": "repo", "/orgs": "all",
    }  # fmt: skip


def test_whatever_else_carries_a_credential_is_taken_out() -> None:
    sent = request("/", (b"authorization", b"Bearer mine"), (b"x-api-key", b"mine"), (b"accept", b"*/*"))
    rule(name="X-Api-Key", format="{}").apply(sent, "real-secret")
    assert sent.headers == [(b"accept", b"*/*"), (b"x-api-key", b"real-secret")]


def test_a_parameter_replaces_all_of_its_name_however_it_is_spelled() -> None:
    sent = request("/a?%6bey=mine&x=1&key=mine")
    rule(placement=Placement.QUERY, name="key").apply(sent, "real/secret")
    assert sent.target == "/a?x=1&key=real%2Fsecret"


@pytest.mark.parametrize("secret", ["line\r\nbreak", "space here", "nul\0", "ümlaut"])
def test_a_secret_that_would_break_the_head_is_refused(secret: str) -> None:
    with pytest.raises(ValueError, match="characters"):
        rule().apply(request(), secret)


@given(st.text(alphabet="/.%2eE5cC\\;ab", max_size=30))
def test_a_path_that_is_taken_has_no_dots_however_it_is_decoded(path: str) -> None:
    from urllib.parse import unquote

    try:
        check_target("/" + path)
    except HttpError:
        return
    for form in (path, unquote(path), unquote(unquote(path))):
        parts = form.replace("\\", "/").replace(";", "/").split("/")
        assert not {".", ".."} & set(parts)


@pytest.mark.parametrize("authority", ["api.test", "API.test", "api.test.", "api.test:443"])
def test_an_authority_may_be_spelled_in_every_legal_way(authority: str) -> None:
    check_authority(request(authority=authority), "api.test", 443)


@pytest.mark.parametrize(
    "authority",
    ["", "evil.test", "api.test:80", "api.test@evil.test", "evil.test#api.test", "api.test:443:443"],
)
def test_another_authority_is_refused(authority: str) -> None:
    with pytest.raises(HttpError):
        check_authority(request(authority=authority), "api.test", 443)


def test_headers_that_connection_names_stay_behind() -> None:
    sent = [(b"connection", b"X-Hop, close"), (b"x-hop", b"1"), (b"te", b"gzip"), (b"accept", b"*/*")]
    assert end_to_end(sent) == [(b"accept", b"*/*")]
    assert get(sent, b"te") == b"gzip"
