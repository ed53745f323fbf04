"""Decisions about names and addresses: each a policy, something a box tries, and what must come of it."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.egress.addresses import parse_address, special_kind
from services.common.egress.names import matches, normalize, normalize_pattern
from services.common.egress.policy import (
    ALL_PORTS,
    Policy,
    Rule,
    allowed_address,
    decide,
    decide_name,
    make_rule,
)

PUBLIC, OTHER = ip_address("93.184.216.34"), ip_address("1.1.1.1")


def policy(*allow: Rule, deny: tuple[Rule, ...] = (), learn: bool = False) -> Policy:
    return Policy(enabled=True, allow=allow, deny=deny, learn=learn)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("127.0.0.1", "loopback"),
        ("127.255.3.4", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("64:ff9b::7f00:1", "loopback"),
        ("2002:7f00:1::", "loopback"),
        ("::7f00:1", "loopback"),
        ("10.1.2.3", "private"),
        ("172.31.0.1", "private"),
        ("fd12::1", "private"),
        ("169.254.1.1", "link-local"),
        ("169.254.169.254", "the cloud's metadata service"),
        ("64:ff9b::a9fe:a9fe", "the cloud's metadata service"),
        ("fe80::1", "link-local"),
        ("0.0.0.0", "unspecified"),
        ("255.255.255.255", "reserved"),
        ("224.0.0.251", "multicast"),
        ("100.64.0.1", "shared by a provider (CGNAT)"),
        ("8.8.8.8", ""),
        ("2606:4700::1111", ""),
    ],
)
def test_each_special_address_is_known_in_every_spelling(text: str, kind: str) -> None:
    assert special_kind(ip_address(text)) == kind


@pytest.mark.parametrize("text", ["0x7f.1", "2130706433", "127.1", "0177.0.0.1", "fe80::1%eth0", "", "a.b"])
def test_no_address_has_a_second_spelling(text: str) -> None:
    with pytest.raises(ValueError):
        parse_address(text)


def test_nothing_is_reachable_without_a_rule() -> None:
    assert not decide(policy(), PUBLIC, 443).allowed
    assert not decide_name(policy(), "example.com").allowed


def test_a_name_is_reachable_at_the_addresses_that_were_given_for_it_and_at_no_other() -> None:
    box = policy(make_rule(host="a.example"))
    assert decide(box, PUBLIC, 443, names={"a.example"}, claimed="a.example").allowed
    assert decide(box, PUBLIC, 80, names={"a.example"}).allowed
    assert not decide(box, OTHER, 443, names=(), claimed="a.example").allowed
    assert not decide(box, PUBLIC, 443, names=()).allowed


def test_another_name_at_the_same_address_is_refused() -> None:
    box = policy(make_rule(host="a.example"))
    assert not decide(box, PUBLIC, 443, names={"a.example"}, claimed="evil.example").allowed
    assert not decide(box, PUBLIC, 443, names={"a.example", "evil.example"}, claimed="evil.example").allowed


def test_a_port_that_no_rule_has_is_refused_and_the_reason_names_it() -> None:
    found = decide(policy(make_rule(host="a.example")), PUBLIC, 22, names={"a.example"})
    assert not found.allowed
    assert "add a.example:22 to sandbox.network.allow" in found.reason


def test_a_name_cannot_lead_to_a_special_address_unless_its_rule_names_that() -> None:
    inside = ip_address("10.0.0.5")
    plain = policy(make_rule(host="a.example"))
    assert not allowed_address(plain, "a.example", inside).allowed
    assert not decide(plain, inside, 443, names={"a.example"}).allowed
    named = policy(make_rule(host="a.example", addresses=["10.0.0.0/24"]))
    assert decide(named, inside, 443, names={"a.example"}).allowed
    assert not decide(named, ip_address("10.0.1.5"), 443, names={"a.example"}).allowed


def test_all_of_the_internet_does_not_include_the_hosts_own_and_private_addresses() -> None:
    internet = policy(make_rule(host="*", ports=ALL_PORTS), make_rule(cidr="0.0.0.0/0", ports=ALL_PORTS))
    assert decide(internet, PUBLIC, 22).allowed
    assert not decide(internet, PUBLIC, 22, own=True).allowed
    for text in ("127.0.0.1", "10.0.0.1", "169.254.169.254", "192.168.1.1", "100.64.0.1"):
        assert not decide(internet, ip_address(text), 80).allowed
        assert not decide(internet, ip_address(text), 80, names={"a.example"}).allowed


def test_metadata_is_reachable_only_if_it_is_named_by_itself() -> None:
    metadata = ip_address("169.254.169.254")
    assert not decide(policy(make_rule(cidr="169.254.0.0/16")), metadata, 80).allowed
    assert decide(policy(make_rule(cidr="169.254.169.254/32")), metadata, 80).allowed


def test_denials_come_before_allowances() -> None:
    box = policy(make_rule(host="*.example"), deny=(make_rule(host="b.example"),))
    assert decide(box, PUBLIC, 443, names={"a.example"}).allowed
    assert not decide(box, PUBLIC, 443, names={"b.example"}).allowed
    assert not decide(box, PUBLIC, 443, names={"a.example", "b.example"}, claimed="a.example").allowed
    assert not decide_name(box, "b.example").allowed


def test_learning_allows_what_is_public_only() -> None:
    assert decide(policy(learn=True), PUBLIC, 443).allowed
    assert not decide(policy(learn=True), ip_address("127.0.0.1"), 443).allowed


@pytest.mark.parametrize(
    ("pattern", "name", "matched"),
    [
        ("a.example", "a.example", True),
        ("a.example", "b.a.example", False),
        ("*.example", "a.example", True),
        ("*.example", "b.a.example", True),
        ("*.example", "example", False),
        ("*.example", "aexample", False),
        ("*", "anything.at.all", True),
    ],
)
def test_a_pattern_covers_what_is_below_it(pattern: str, name: str, matched: bool) -> None:
    assert matches(normalize_pattern(pattern), normalize(name)) is matched


@pytest.mark.parametrize(
    "text", ["", ".", "a..b", "-a.b", "a b", "a/b", "x" * 64, "1.2.3.4", "*.", "a.*.b", "**.a", "a\0.b"]
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        normalize_pattern(text)


@given(st.text(max_size=80))
def test_a_name_has_one_spelling(text: str) -> None:
    try:
        name = normalize(text)
    except ValueError:
        return
    assert normalize(name) == name
    assert normalize(f"{name.upper()}.") == name


@given(st.ip_addresses(), st.integers(1, 65535))
def test_no_address_is_reachable_without_a_rule_that_covers_it(address: object, port: int) -> None:
    box = policy(make_rule(host="a.example"), make_rule(cidr="198.51.100.7/32"))
    if str(address) != "198.51.100.7":
        assert not decide(box, address, port).allowed  # type: ignore[arg-type]
