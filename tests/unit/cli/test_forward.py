"""Which ports `voidbox port-forward` is told to join."""

from __future__ import annotations

import pytest

from services.common.errors import InvalidInput
from voidbox.cli.forward import Forward, parse_forward


@pytest.mark.parametrize(
    ("text", "address", "host", "guest"),
    [
        ("8080:80", "127.0.0.1", 8080, 80),
        ("80", "127.0.0.1", 80, 80),
        ("0:80", "127.0.0.1", 0, 80),
        ("0.0.0.0:1:65535", "0.0.0.0", 1, 65535),
        ("[::1]:8080:80", "::1", 8080, 80),
    ],
)
def test_ports_are_read(text: str, address: str, host: int, guest: int) -> None:
    assert parse_forward(text) == Forward(address=address, host_port=host, guest_port=guest)


@pytest.mark.parametrize(
    "text",
    ["", ":", "0", "80:0", "80:", ":80:", "-1:80", "1:65536", "x:80", "localhost:1:2", "1:2:3:4", "²:1"],
)
def test_what_is_no_port_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidInput, match="for example 8080:80"):
        parse_forward(text)
