"""The health check as containers run it: a process of its own against a real server."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from services.common.address import Address
from services.common.server import serve

NAME = "voidbox.imager.v1.ImagerService"
TOKEN = "a-token-of-many-characters"


async def healthcheck(*words: str) -> tuple[int, str]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.common.healthcheck", *words,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await child.communicate()
    assert child.returncode is not None
    return child.returncode, output.decode()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text(TOKEN)
    return path


async def test_a_serving_unix_socket_is_healthy(tmp_path: Path) -> None:
    address = Address(path=tmp_path / "s/imager.sock")
    async with serve([address], lambda server: None, [NAME]):
        assert await healthcheck(str(address)) == (0, "")
        assert await healthcheck(str(address), "--service", NAME) == (0, "")


async def test_a_service_that_is_not_there_is_unhealthy(tmp_path: Path) -> None:
    address = Address(path=tmp_path / "s/imager.sock")
    async with serve([address], lambda server: None, [NAME]):
        code, output = await healthcheck(str(address), "--service", "voidbox.Nothing")
    assert code == 1
    assert output.startswith(f"{address}: unhealthy: ")


async def test_a_tcp_address_is_healthy_only_for_who_knows_the_token(token_file: Path) -> None:
    async with serve([Address.parse("tcp://127.0.0.1:0")], lambda server: None, [NAME], token=TOKEN) as bound:
        assert await healthcheck(str(bound[0]), "--token-file", str(token_file)) == (0, "")
        code, output = await healthcheck(str(bound[0]))
    assert code == 1
    assert "token" in output


async def test_nobody_listening_is_unhealthy_within_the_time_limit(tmp_path: Path) -> None:
    code, output = await healthcheck(f"unix:{tmp_path}/nobody.sock", "--seconds", "1")
    assert code == 1
    assert output.startswith(f"unix:{tmp_path}/nobody.sock: unhealthy: ")


@pytest.mark.parametrize("address", ["nonsense", "unix:relative", "tcp://:80"])
async def test_a_bad_address_is_a_clear_error(address: str) -> None:
    code, output = await healthcheck(address)
    assert code == 1
    assert "expected" in output or "must be absolute" in output
