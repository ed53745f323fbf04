"""The shim's configuration and exit record: strict both ways."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.hypervisor.shim_config import ConfigInvalid, ExitRecord, ShimConfig

BASE: dict[str, Any] = {
    "argv": ["/usr/bin/qemu", "-x"],
    "cid": 7,
    "vhost_listen_fd": 5,
    "guest_listen_fd": 6,
}


def parse(**changes: Any) -> ShimConfig:
    content = {key: value for key, value in (BASE | changes).items() if value is not ...}
    return ShimConfig.from_json(json.dumps(content).encode())


def test_a_configuration_survives_json() -> None:
    config = ShimConfig(
        argv=("/usr/bin/qemu", "-name", "é"),
        env={"PATH": "/bin"},
        uid=1000,
        gid=1000,
        groups=(108,),
        pass_fds=(10, 11),
        cid=3,
        vhost_listen_fd=5,
        guest_listen_fd=6,
        console_read_fd=7,
        console_log_fd=8,
        exit_fd=9,
        ready_fd=12,
        term_seconds=1.5,
        connect_seconds=2,
    )
    assert ShimConfig.from_json(config.to_json()) == config
    assert set(config.inherited_fds()) == {5, 6, 7, 8, 9, 10, 11, 12}


def test_defaults_are_filled_in() -> None:
    config = parse()
    assert (config.transport, config.uid, config.pass_fds, config.exit_fd) == ("vhost-user", None, (), None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"colour": 1}, "unknown field 'colour'"),
        ({"cid": ...}, "cid"),
        ({"argv": []}, "argv"),
        ({"argv": "qemu"}, "argv"),
        ({"argv": ["qemu"]}, "absolute"),
        ({"argv": ["/qemu", 1]}, "argv"),
        ({"argv": ["/qemu", "a\0b"]}, "NUL"),
        ({"env": {"A=B": "c"}}, "env"),
        ({"env": {"A": 1}}, "env"),
        ({"env": []}, "env"),
        ({"cid": 2}, "cid"),
        ({"cid": (1 << 32) - 1}, "cid"),
        ({"cid": "3"}, "cid"),
        ({"cid": True}, "cid"),
        ({"uid": 1}, "uid and gid"),
        ({"groups": [1]}, "groups"),
        ({"uid": -1, "gid": 0}, "uid"),
        ({"transport": "tcp"}, "transport"),
        ({"transport": "vhost-vsock"}, "vhost_listen_fd"),
        ({"vhost_listen_fd": None}, "vhost_listen_fd"),
        ({"guest_listen_fd": None}, "guest_listen_fd"),
        ({"guest_listen_fd": 2}, "guest_listen_fd"),
        ({"guest_listen_fd": 5}, "twice"),
        ({"pass_fds": [6]}, "twice"),
        ({"pass_fds": [1]}, "descriptors"),
        ({"pass_fds": 6}, "pass_fds"),
        ({"console_read_fd": 9}, "console"),
        ({"term_seconds": 0}, "term_seconds"),
        ({"term_seconds": "5"}, "term_seconds"),
        ({"connect_seconds": 1e9}, "connect_seconds"),
    ],
)
def test_what_is_wrong_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigInvalid, match=words):
        parse(**changes)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"argv": ["/q"]'])
def test_what_is_not_a_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigInvalid):
        ShimConfig.from_json(data)


def test_an_exit_record_survives_and_a_torn_one_is_none() -> None:
    record = ExitRecord(exit_code=None, signal=9, reason="terminated", detail="x", at=12.5)
    data = record.to_json()
    assert ExitRecord.from_json(data) == record
    for end in range(len(data)):
        assert ExitRecord.from_json(data[:end]) is None
