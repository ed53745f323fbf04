"""What specs may say of a network, what policy that is, and how it is explained."""

from __future__ import annotations

import pytest

from services.common.egress.policy import ALL_PORTS
from services.common.egress.text import parse_rule
from voidbox.cli.egress import line
from voidbox.cli.policy import explain, needed
from voidbox.common.v1 import common_pb2
from voidbox.orchestrator.v1 import orchestrator_pb2
from voidbox.spec import SpecError, parse_spec
from voidbox.spec.network import policy_of

HEAD = "kind: sandbox\nname: n\n"


def network(text: str, head: str = HEAD) -> object:
    return parse_spec(f"{head}sandbox:\n  network: {text}\n", "s.yaml", "/base")


def policy(text: str, head: str = HEAD):  # type: ignore[no-untyped-def]
    spec = parse_spec(f"{head}sandbox:\n  network: {text}\n", "s.yaml", "/base")
    return policy_of(spec.sandbox.network, spec.llm)


def test_no_network_is_the_default_and_can_be_said() -> None:
    spec = parse_spec(HEAD, "s.yaml", "/base")
    assert policy_of(spec.sandbox.network) is None
    assert policy("false") is None
    assert not explain(None, "https://example.com").allowed


def test_true_is_all_of_the_public_internet_and_nothing_private() -> None:
    found = policy("true")
    assert explain(found, "https://anything.example/x").allowed
    assert explain(found, "tcp://8.8.8.8:5000").allowed
    assert explain(found, "udp://8.8.8.8:53").allowed
    for url in ("http://127.0.0.1", "http://169.254.169.254", "http://192.168.0.1", "http://10.0.2.2:80"):
        assert not explain(found, url).allowed


def test_rules_on_one_line_and_as_maps_mean_the_same() -> None:
    short = policy('{allow: ["a.test:8443", "10.1.0.0/16:5432", "udp://ntp.test:123", "[2001:db8::1]:80"]}')
    long = policy(
        "{allow: [{host: a.test, ports: [8443]}, {cidr: 10.1.0.0/16, ports: [5432]}, "
        '{host: ntp.test, ports: [123], protocol: udp}, {cidr: "2001:db8::1", ports: [80]}]}'
    )
    assert short == long
    assert explain(short, "https://a.test:8443").allowed
    assert not explain(short, "https://a.test").allowed
    assert explain(short, "tcp://10.1.2.3:5432").allowed


def test_presets_add_to_the_rules_and_denials_come_first() -> None:
    found = policy('{preset: packages, allow: ["a.test"], deny: ["*.githubusercontent.com"]}')
    assert explain(found, "https://pypi.org/simple/").allowed
    assert explain(found, "ssh://github.com").allowed
    assert explain(found, "http://a.test").allowed
    assert not explain(found, "https://raw.githubusercontent.com/x").allowed
    assert not explain(found, "https://example.com").allowed


@pytest.mark.parametrize(
    ("llm", "url"),
    [
        ("{provider: claude}", "https://api.anthropic.com/v1/messages"),
        ("{provider: codex}", "https://api.openai.com/v1/responses"),
        ("{provider: openrouter}", "https://openrouter.ai/api"),
        ("{provider: ollama}", "http://10.0.2.2:11434"),
        ("{provider: lm-studio}", "http://host.voidbox.internal:1234"),
        (
            "{provider: custom, base_url: 'https://llm.corp.example:8443/v1'}",
            "https://llm.corp.example:8443/v1",
        ),
        ("{provider: custom, base_url: 'http://localhost:9000'}", "http://10.0.2.2:9000"),
    ],
)
def test_the_preset_llm_is_just_the_provider(llm: str, url: str) -> None:
    found = policy("{preset: llm}", f"{HEAD}llm: {llm}\n")
    assert explain(found, url).allowed
    assert not explain(found, "https://example.com").allowed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1", "expected true or false or a map"),
        ("{preset: all}", "unknown value"),
        ("{alow: []}", "did you mean 'allow'"),
        ('{allow: ["https://a.test/x"]}', "is a URL"),
        ('{allow: ["a b"]}', "sandbox.network.allow[0]"),
        ('{allow: ["a.test:99999"]}', "65535"),
        ('{allow: ["a.test:"]}', "no port"),
        ("{allow: [{ports: [1]}]}", "needs a host or a cidr"),
        ("{allow: [{host: a.test, cidr: 1.2.3.4}]}", "not both"),
        ("{deny: [{cidr: 1.2.3.4/8}]}", "host bits"),
        ("{allow: [{cidr: 1.2.3.4, addresses: [10.0.0.1]}]}", "addresses belong to a host"),
        ("{allow: [{host: a.test, addresses: [x]}]}", "does not appear to be"),
        ("{host_ports: [0]}", "host_ports[0]"),
        ("{limits: {connections: 0}}", "too small"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(text: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        network(text)
    assert words in str(caught.value)
    assert "s.yaml:" in str(caught.value)


def test_a_rule_for_all_ports_is_a_star() -> None:
    assert parse_rule("a.test:*")["ports"] == ALL_PORTS
    assert parse_rule("2001:db8::/32") == {"cidr": "2001:db8::/32", "ports": (), "protocol": "tcp"}


def test_what_a_run_needed_becomes_rules() -> None:
    event = common_pb2.EgressEvent
    rules, ports = needed(
        [
            event(kind="dns", name="a.test"),
            event(kind="tcp", name="a.test", address="1.2.3.4", port=443),
            event(kind="tcp", name="a.test", address="1.2.3.4", port=80),
            event(kind="tcp", address="9.9.9.9", port=853),
            event(kind="udp", name="n.test", address="1.1.1.1", port=123),
            event(kind="tcp", address="10.0.2.2", port=11434),
            event(kind="closed", name="b.test", port=1),
        ]
    )
    assert rules == ["9.9.9.9:853", "a.test:80,443", "udp://n.test:123"]
    assert ports == [11434]
    assert all(parse_rule(rule) for rule in rules)


def test_a_line_of_the_log_says_what_was_decided_and_why() -> None:
    event = orchestrator_pb2.Event(stage="s")
    event.egress.MergeFrom(
        common_pb2.EgressEvent(
            kind="tcp", name="a.test", address="1.2.3.4", port=443, reason="no rule allows a.test"
        )
    )
    assert "DENIED" in line(event)
    assert "a.test [1.2.3.4] port 443" in line(event)
    assert "no rule allows a.test" in line(event)
