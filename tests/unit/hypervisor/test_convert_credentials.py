"""Credentials of a box as its message says them: kept, refused where they cannot be, never given back."""

from __future__ import annotations

from typing import Any

import pytest

from services.common.errors import InvalidInput
from services.hypervisor.convert_credentials import read_interceptions, write_interceptions
from services.hypervisor.egress.broker_process import make_source
from services.hypervisor.egress.credential import TRUST_ENV, Interceptions
from voidbox.common.v1 import common_pb2
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

SECRET = "the-secret-value-0123"
LOGIN = pb.CredentialLogin(
    file="/f", layout="claude", token_url="https://login.test/oauth/token", client_id="me"
)


def config(*credentials: pb.Credential, **more: Any) -> pb.BoxConfig:
    more.setdefault("egress", common_pb2.EgressPolicy(enabled=True))
    return pb.BoxConfig(credentials=credentials, **more)


def credential(**fields: Any) -> pb.Credential:
    return pb.Credential(**{"name": "key", "hosts": ["API.test"], "value": SECRET, **fields})


@pytest.mark.parametrize(
    "message",
    [
        config(credential()),
        config(
            credential(header="X-Api-Key: {}", ports=[8443], paths=["/v1"], env={"KEY": "sk-{}"}, plain=True)
        ),
        config(credential(basic_user="git"), credential(name="other", query_parameter="k")),
        config(
            metered_hosts=["*.test"], budget=pb.Budget(max_tokens=5, max_cost_micros=1_500_000, pause=True)
        ),
    ],
)
def test_what_is_told_of_a_box_is_what_was_asked_but_for_the_values(message: pb.BoxConfig) -> None:
    told = pb.BoxConfig()
    write_interceptions(read_interceptions(message), told)
    assert SECRET not in str(told)
    expected = pb.BoxConfig()
    expected.CopyFrom(message)
    expected.ClearField("egress")
    for one in expected.credentials:
        one.ClearField("value")
        one.hosts[:] = ["api.test"]
        if one.WhichOneof("placement") is None:
            one.header = "authorization: Bearer {}"
    assert told == expected


def test_a_box_without_any_keeps_nothing() -> None:
    assert read_interceptions(pb.BoxConfig()) == ""
    assert Interceptions.from_json("").env() == {}


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        ({"value": SECRET}, {"value": SECRET}),
        ({"value": None, "file": "/run/token"}, {"file": "/run/token"}),
        ({"value": None, "command": pb.CredentialCommand(argv=["a", "b"])}, {"command": ["a", "b"]}),
        (
            {"value": None, "keyring": pb.CredentialKeyring(service="s")},
            {"keyring": {"service": "s", "user": ""}},
        ),
    ],
)
def test_each_source_is_one_that_the_broker_takes(source: dict[str, Any], kept: dict[str, Any]) -> None:
    text = read_interceptions(config(credential(**source)))
    (found,) = Interceptions.from_json(text).credentials
    assert found.source == kept
    make_source(found.source)


def test_a_logins_endpoint_is_answered_by_the_gateway() -> None:
    found = Interceptions.from_json(read_interceptions(config(credential(value=None, login=LOGIN))))
    told, grants, certificate = found.prepare(7)
    assert [(one.host, one.path) for one in told.endpoints] == [("login.test", "/oauth/token")]
    assert told.hosts == ("api.test", "login.test")
    assert grants["key"]["hosts"] == ["api.test"]
    assert b"PRIVATE" not in certificate
    make_source(grants["key"]["source"])


def test_programs_get_placeholders_and_where_certificates_are() -> None:
    found = Interceptions.from_json(read_interceptions(config(credential(env={"KEY": "sk-{}"}))))
    assert found.env() == {**TRUST_ENV, "KEY": "sk-voidbox-placeholder-key"}


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (config(credential(), egress=common_pb2.EgressPolicy()), "need a network"),
        (config(credential(), credential()), "two credentials"),
        (config(credential(name="Key")), "not a name"),
        (config(credential(hosts=[])), "name the hosts"),
        (config(credential(hosts=["*"])), "name the hosts"),
        (config(credential(hosts=["192.0.2.1"])), "address"),
        (config(credential(ports=[0])), "not 1 to 65535"),
        (config(credential(paths=["v1"])), "does not begin"),
        (config(credential(env={"A B": ""})), "variable"),
        (config(credential(header="Authorization")), "is not 'Name: value'"),
        (config(credential(header="Authorization: Bearer")), "needs one {}"),
        (config(credential(header="A b: {}")), "no header's name"),
        (config(credential(basic_user="a:b")), "':'"),
        (config(credential(value="")), "empty"),
        (config(credential(value=None)), "Give a source"),
        (config(credential(value=None, file="relative")), "absolute"),
        (config(credential(value=None, command=pb.CredentialCommand())), "which program"),
        (config(credential(value=None, login=pb.CredentialLogin(file="/f", layout="x"))), "layout"),
        (
            config(
                credential(
                    value=None, login=pb.CredentialLogin(file="/f", layout="plain", token_url="http://x")
                )
            ),
            "https",
        ),
        (config(budget=pb.Budget(max_tokens=1)), "metered_hosts"),
        (config(metered_hosts=["a.test"], budget=pb.Budget(max_tokens=-1)), "negative"),
    ],
)
def test_what_cannot_be_is_refused_and_named(message: pb.BoxConfig, named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        read_interceptions(message)
