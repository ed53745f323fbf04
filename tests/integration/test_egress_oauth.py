"""A rotating token has one owner: a real token endpoint, real processes, one renewal.

The endpoint revokes the login when a refresh token is used twice, as real ones do; a single mistake
fails everybody.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from services.common.errors import Denied, NotFound, Unauthenticated, Unavailable
from services.common.process import run
from services.hypervisor.egress.broker import Broker, BrokerClient, Grant
from services.hypervisor.egress.oauth import Endpoint, OAuthOwner, digest
from services.hypervisor.egress.rules import TokenEndpoint
from services.hypervisor.egress.secret import Secret
from services.hypervisor.egress.sources import CommandSource, FileSource, ValueSource
from services.hypervisor.egress.token_endpoint import TokenEndpoints
from services.hypervisor.egress.token_file import Layout, TokenFile
from tests.egress_host import Gateway, HostAuthority, Vault, api_server
from tests.egress_servers.token_stub import TokenStub

ROOT = Path(__file__).parents[2]
OLD = {"access_token": "access-0-of-the-host", "refresh_token": "refresh-0-of-the-host"}


@pytest.fixture
def host(tmp_path: Path) -> HostAuthority:
    return HostAuthority(tmp_path)


@pytest.fixture
def stub(host: HostAuthority) -> Iterator[TokenStub]:
    with TokenStub(host.issue("localhost")) as stub:
        yield stub


@pytest.fixture
def login(tmp_path: Path) -> Callable[..., Path]:
    """Makes the file of a login whose token has expired, and which is not new."""

    def make(**fields: object) -> Path:
        path = tmp_path / "login.json"
        path.write_text(json.dumps({**OLD, "expires_at": time.time() - 60, **fields}))
        path.chmod(0o600)
        old = time.time() - 3600
        os.utime(path, (old, old))
        return path

    return make


def owner(path: Path, stub: TokenStub, host: HostAuthority, layout: Layout = "plain") -> OAuthOwner:
    return OAuthOwner(
        TokenFile(path, layout), Endpoint(url=stub.url, client_id="voidbox"), host.context_http1()
    )


async def test_fifty_processes_renew_one_token_once(
    stub: TokenStub, host: HostAuthority, login: Callable[..., Path], tmp_path: Path
) -> None:
    trust = tmp_path / "world.pem"
    trust.write_bytes(host.pem)
    argv = [sys.executable, "-m", "tests.egress_servers.many_boxes", "50", str(login()), stub.url, str(trust)]
    answers = [json.loads(line) for line in (await run(argv, cwd=ROOT, seconds=240)).splitlines()]
    assert len(answers) == 50
    assert {answer.get("token") for answer in answers} == {"access-1-of-the-host"}, answers
    assert all(answer["same"] for answer in answers)
    assert sum(answer["renewals"] for answer in answers) == 1
    assert (stub.asked, stub.reused, stub.revoked) == (1, 0, False)
    stored = json.loads((tmp_path / "login.json").read_text())
    assert stored["refresh_token"] == "refresh-1-of-the-host"
    assert (tmp_path / "login.json").stat().st_mode & 0o777 == 0o600


async def test_fifty_gateways_renew_one_token_once_through_the_broker(
    stub: TokenStub, host: HostAuthority, login: Callable[..., Path]
) -> None:
    broker = Broker()
    grant = {"llm": Grant(hosts=("api.test",), source=owner(login(), stub, host))}
    clients = []
    for _ in range(50):
        ours, theirs = socket.socketpair()
        broker.serve(ours)
        clients.append(BrokerClient(theirs, broker.admit(grant)))
    try:
        secrets = await asyncio.gather(*(client.get("llm", "api.test") for client in clients))
        assert {secret.value for secret in secrets} == {"access-1-of-the-host"}
        assert stub.asked == 1
        # All of them see the new token refused at once, but it is young: another would be no better.
        await asyncio.gather(*(client.get("llm", "api.test", "access-1-of-the-host") for client in clients))
        assert stub.asked == 1
    finally:
        for client in clients:
            await client.close()
        await broker.close()


async def test_a_refused_token_is_renewed_once(
    stub: TokenStub, host: HostAuthority, login: Callable[..., Path]
) -> None:
    one = owner(login(expires_at=time.time() + 3600), stub, host)
    assert (await one.get()).value == OLD["access_token"]
    secrets = await asyncio.gather(*(one.get(digest(OLD["access_token"])) for _ in range(10)))
    assert {secret.value for secret in secrets} == {"access-1-of-the-host"}
    assert stub.asked == 1


async def test_a_login_that_ended_says_how_to_log_in_and_is_not_tried_again(
    stub: TokenStub, host: HostAuthority, login: Callable[..., Path]
) -> None:
    one = owner(login(), stub, host)
    stub.revoked = True
    for _ in range(3):
        with pytest.raises(Unauthenticated, match="get a new token") as caught:
            await one.get()
        assert "refresh-0" not in str(caught.value)
    assert stub.asked == 1


async def test_a_login_that_somebody_else_renewed_is_taken(
    stub: TokenStub, host: HostAuthority, login: Callable[..., Path]
) -> None:
    path = login()
    one, other = owner(path, stub, host), owner(path, stub, host)
    await one.get()
    assert (await other.get()).value == "access-1-of-the-host"
    assert stub.asked == 1


async def test_an_endpoint_that_is_down_does_not_end_a_login(
    stub: TokenStub, host: HostAuthority, login: Callable[..., Path]
) -> None:
    stub.failing = 503
    with pytest.raises(Unavailable, match="503"):
        await owner(login(), stub, host).get()
    # A token that counts for another minute is used meanwhile.
    assert (await owner(login(expires_at=time.time() + 60), stub, host).get()).value == OLD["access_token"]
    stub.failing = 0
    assert (await owner(login(), stub, host).get()).value == "access-1-of-the-host"


@pytest.mark.parametrize("layout", ["claude", "codex"])
async def test_the_files_of_the_agents_own_programs_are_renewed_in_place(
    stub: TokenStub, host: HostAuthority, tmp_path: Path, layout: Layout
) -> None:
    past = int(time.time() - 60)
    path = tmp_path / "auth.json"
    document: dict[str, Any]
    if layout == "claude":
        part = {
            "accessToken": "access-0-of-the-host",
            "refreshToken": "refresh-0-of-the-host",
            "expiresAt": past * 1000,
        }
        document = {"claudeAiOauth": {**part, "subscriptionType": "max"}, "mcpOAuth": {"x": 1}}
    else:
        claims = _jwt({"exp": past})
        part = {"id_token": "id", "access_token": claims, "refresh_token": "refresh-0-of-the-host"}
        document = {
            "auth_mode": "chatgpt",
            "tokens": {**part, "account_id": "acct-1"},
            "last_refresh": "2020",
        }
    path.write_text(json.dumps(document))
    path.chmod(0o600)
    secret = await owner(path, stub, host, layout).get()
    assert secret.value == "access-1-of-the-host"
    stored = json.loads(path.read_text())
    if layout == "claude":
        assert stored["claudeAiOauth"]["refreshToken"] == "refresh-1-of-the-host"
        assert stored["claudeAiOauth"]["subscriptionType"] == "max"
        assert stored["claudeAiOauth"]["expiresAt"] > (time.time() + 3000) * 1000
        assert stored["mcpOAuth"] == {"x": 1}
    else:
        assert stored["tokens"]["refresh_token"] == "refresh-1-of-the-host"
        assert stored["auth_mode"] == "chatgpt"
        assert stored["last_refresh"] > "2026"
        assert secret.headers == {"chatgpt-account-id": "acct-1"}


async def test_without_a_login_the_error_says_how_to_get_one(
    stub: TokenStub, host: HostAuthority, tmp_path: Path
) -> None:
    with pytest.raises(NotFound, match="claude auth login"):
        await owner(tmp_path / "none.json", stub, host, "claude").get()


async def test_a_box_gets_only_what_it_was_granted(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-a-file-0123\n")
    broker = Broker()
    mine = broker.admit(
        {
            "git": Grant(hosts=("*.git.test",), source=FileSource(tmp_path / "token")),
            "run": Grant(hosts=("api.test",), source=CommandSource(["printf", "from-a-command\n"])),
        }
    )
    other = broker.admit({"llm": Grant(hosts=("api.test",), source=ValueSource("the-other-box's"))})
    ours, theirs = socket.socketpair()
    broker.serve(ours)
    client = BrokerClient(theirs, mine)
    try:
        assert (await client.get("git", "a.git.test")).value == "from-a-file-0123"
        assert (await client.get("run", "api.test")).value == "from-a-command"
        for rule, host in (("llm", "api.test"), ("git", "api.test"), ("git", "evil-git.test")):
            with pytest.raises(Denied, match="may not use"):
                await client.get(rule, host)
        with pytest.raises(Denied):
            await broker.get("guessed", "llm", "api.test", b"")
        assert (await broker.get(other, "llm", "api.test", b"")).value == "the-other-box's"
        broker.dismiss(mine)
        with pytest.raises(Denied):
            await client.get("git", "a.git.test")
    finally:
        await client.close()
        await broker.close()


async def test_a_secret_shows_in_no_repr() -> None:
    assert "hidden" not in repr(Secret(value="hidden-value", headers={"a": "hidden"}))


@pytest_asyncio.fixture
async def box(host: HostAuthority, tmp_path: Path) -> AsyncIterator[Gateway]:
    """A gateway that answers a token endpoint's calls itself."""
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(api_server(*map(str, host.issue("login.test"))))
        endpoint = TokenEndpoint(
            host="login.test",
            path="/oauth/token",
            placeholder="placeholder-a",
            refresh_placeholder="placeholder-r",
        )
        gateway = Gateway(
            {"login.test": port}, host, [], Vault({}), tmp_path,
            answering=[TokenEndpoints([endpoint])], constraints=["login.test"],
        )  # fmt: skip
        yield await stack.enter_async_context(gateway)


@pytest.mark.parametrize(
    "arguments",
    [
        (
            "-H",
            "Content-Type: application/json",
            "-d",
            '{"grant_type":"refresh_token","refresh_token":"placeholder-r"}',
        ),
        ("-d", "grant_type=refresh_token&refresh_token=placeholder-r"),
    ],
)
async def test_a_boxs_own_renewal_gets_a_placeholder_from_nobody(
    box: Gateway, arguments: tuple[str, ...]
) -> None:
    answer = json.loads(await box.curl("/oauth/token", *arguments, host="login.test"))
    assert answer["access_token"] == "placeholder-a"
    assert answer["refresh_token"] == "placeholder-r"
    assert box.dialled == 0


@pytest.mark.parametrize(
    "arguments", [("-d", "grant_type=authorization_code&code=x"), ("-X", "GET"), ("-d", "nonsense")]
)
async def test_a_box_cannot_log_in_in_the_hosts_name(box: Gateway, arguments: tuple[str, ...]) -> None:
    text = await box.curl("/oauth/token", *arguments, "-w", "%{http_code}", host="login.test")
    assert text.endswith("403")
    assert box.dialled == 0


def _jwt(claims: dict[str, object]) -> str:
    import base64

    parts = [json.dumps(part).encode() for part in ({"alg": "none"}, claims)]
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts) + ".x"
