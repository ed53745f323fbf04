"""Addresses, directories and tokens: what is accepted, and what each refusal says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.common.address import Address
from services.common.auth import check_token, read_token
from services.common.errors import InvalidInput, Unauthenticated, WrongState
from services.common.paths import Paths, private_dir


@pytest.mark.parametrize("text", ["unix:/run/x.sock", "unix:///run/x.sock"])
def test_a_unix_address_is_an_absolute_path(text: str) -> None:
    assert Address.parse(text) == Address(path=Path("/run/x.sock"))
    assert str(Address.parse(text)) == "unix:/run/x.sock"


@pytest.mark.parametrize(
    ("text", "host", "port"), [("tcp://127.0.0.1:80", "127.0.0.1", 80), ("tcp://[::1]:0", "[::1]", 0)]
)
def test_a_tcp_address_is_host_and_port(text: str, host: str, port: int) -> None:
    assert Address.parse(text) == Address(host=host, port=port)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("unix:run/x", "absolute"),
        ("unix:/" + "x" * 107, "longer than 107"),
        ("tcp://host", "tcp://host:port"),
        ("tcp://host:99999", "tcp://host:port"),
        ("tcp://:80", "tcp://host:port"),
        ("localhost:80", "expected unix:"),
        ("", "expected unix:"),
    ],
)
def test_another_address_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        Address.parse(text)


def test_directories_follow_the_environment() -> None:
    paths = Paths.from_env({"HOME": "/h", "XDG_STATE_HOME": "/s", "VOIDBOX_CACHE_DIR": "/c"})
    assert paths == Paths(
        state=Path("/s/voidbox"), cache=Path("/c"), runtime=Path(f"/tmp/voidbox-{os.getuid()}")
    )
    assert Paths.from_env({"HOME": "/h"}).state == Path("/h/.local/state/voidbox")
    assert Paths.from_env({"HOME": "/h", "XDG_RUNTIME_DIR": "/run/user/1"}).runtime == Path(
        "/run/user/1/voidbox"
    )


def test_a_private_directory_is_closed_to_others(tmp_path: Path) -> None:
    wide = tmp_path / "a"
    wide.mkdir(mode=0o755)
    assert private_dir(wide).stat().st_mode & 0o777 == 0o700
    assert private_dir(tmp_path / "b/c").stat().st_mode & 0o777 == 0o700


def test_a_link_in_place_of_a_private_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(WrongState, match="not a directory owned by"):
        private_dir(tmp_path / "link")


def test_a_token_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("s3cret-" * 4 + "\n")
    path.chmod(0o600)
    assert read_token(path) == "s3cret-" * 4


@pytest.mark.parametrize(
    ("text", "mode", "why"),
    [
        ("x" * 32, 0o644, "chmod 600"),
        ("short", 0o600, "16 or more"),
        ("two words of some length", 0o600, "one word"),
    ],
)
def test_a_bad_token_file_is_refused_with_the_cure(tmp_path: Path, text: str, mode: int, why: str) -> None:
    path = tmp_path / "token"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(InvalidInput, match=why):
        read_token(path)


def test_a_missing_token_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no-such-file"):
        read_token(tmp_path / "no-such-file")


def test_only_the_right_bearer_token_passes() -> None:
    check_token("t" * 16, [("other", b"x"), ("authorization", "Bearer " + "t" * 16)])
    for metadata in ([], [("authorization", "Bearer wrong")], [("authorization", "t" * 16)]):
        with pytest.raises(Unauthenticated):
            check_token("t" * 16, metadata)
