"""A box's requests with a credential: real curl through the interceptor to a real HTTP/2 and HTTP/1.1 server.

The server reflects the credential in every way it can; the client must never see it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from services.hypervisor.egress.rules import Placement, Rule
from services.hypervisor.egress.secret import Secret
from tests.egress_host import Gateway, HostAuthority, Vault, api_server

SECRET = "sk-real/secret+value=0123456789ABCDEF"
PLACEHOLDER = "sk-voidbox-placeholder"
VERSIONS = ["--http1.1", "--http2"]


@pytest.fixture
def host(tmp_path: Path) -> HostAuthority:
    return HostAuthority(tmp_path)


Make = Callable[..., Awaitable[Gateway]]


@pytest_asyncio.fixture
async def gateway(host: HostAuthority, tmp_path: Path) -> AsyncIterator[Make]:
    """Makes a gateway with one rule in front of an API server."""
    async with AsyncExitStack() as stack:

        async def make(**rule: object) -> Gateway:
            port = await stack.enter_async_context(
                api_server(*map(str, host.issue("api.test", "other.test")))
            )
            plain = await stack.enter_async_context(api_server("plain")) if rule.get("plain") else 0
            servers = {"api.test": port, "other.test": port, "plain.test": plain}
            made = Gateway(
                servers,
                host,
                [],
                Vault({"key": Secret(value=SECRET)}),
                tmp_path,
                constraints=["api.test", "other.test"],
            )
            # Its port is known only now.
            one = Rule(id="key", hosts=("api.test", "plain.test"), ports=(made.port,), **rule)  # type: ignore[arg-type]
            other = Rule(id="other", hosts=("other.test",), ports=(made.port,), paths=("/has",))
            made.interceptor._rules = (one, other)
            return await stack.enter_async_context(made)

        yield make


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_placeholder_becomes_the_credential_on_the_way(gateway: Make, version: str) -> None:
    box = await gateway()
    text = await box.curl(
        "/headers", version, "-H", f"Authorization: Bearer {PLACEHOLDER}", "-w", "%{http_version}"
    )
    seen = json.loads(text[: text.rindex("}") + 1])
    # What the server reflects of the credential is covered; that it had it, its length shows.
    assert seen["headers"]["authorization"] == "Bearer " + "*" * len(SECRET)
    assert seen["version"] == "2.0"
    assert text.endswith("}2") if version == "--http2" else text.endswith("}1.1")
    assert PLACEHOLDER not in text


@pytest.mark.parametrize("placement", Placement)
async def test_a_credential_goes_where_the_rule_says(gateway: Make, placement: Placement) -> None:
    names = {Placement.HEADER: "X-Api-Key", Placement.BASIC: "x-access-token", Placement.QUERY: "key"}
    box = await gateway(placement=placement, name=names[placement], format="{}")
    seen = json.loads(await box.curl("/headers?a=1&key=mine", "-H", "X-Api-Key: mine", "-u", "me:mine"))
    if placement is Placement.QUERY:
        assert seen["url"].startswith("/headers?a=1&key=***")
        assert "x-api-key" not in seen["headers"]
    elif placement is Placement.HEADER:
        assert seen["headers"]["x-api-key"] == "*" * len(SECRET)
        assert "authorization" not in seen["headers"]
    else:
        value = seen["headers"]["authorization"]
        real = base64.b64encode(f"x-access-token:{SECRET}".encode()).decode()
        assert len(value) == len(f"Basic {real}")
        assert real[20:30] not in value
    kept = {name: value for name, value in seen["headers"].items() if not name.startswith(":")}
    assert "mine" not in json.dumps(kept)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", ["body", "header", "split", "gzip", "location"])
async def test_a_server_that_reflects_the_credential_does_not_leak_it(
    gateway: Make, version: str, path: str
) -> None:
    box = await gateway()
    text = await box.curl(f"/leak-{path}", version, "-i")
    raw = SECRET.encode()
    for form in (
        SECRET,
        raw.hex(),
        "sk-real%2F",
        "secret%2Bvalue",
        base64.b64encode(b"x" + raw)[4:-4].decode(),
        base64.b64encode(raw)[4:-4].decode(),
    ):
        assert form not in text
    assert "****" in text


async def test_the_credential_cannot_be_had_in_ranges(
    gateway: Make,
) -> None:
    box = await gateway()
    text = await box.curl("/leak-range", "-r", "12-15")
    assert text == "0123456789" + "*" * len(SECRET) + "0123456789"


async def test_an_unreadable_coding_is_refused(gateway: Make) -> None:
    box = await gateway()
    text = await box.curl("/leak-brotli", "-w", "%{http_code}")
    assert "compressed" in text
    assert text.endswith("502")


async def test_a_redirect_to_another_host_loses_the_credential(
    gateway: Make,
) -> None:
    box = await gateway()
    target = box.url("/headers", "other.test").replace(":", "%3A").replace("/", "%2F")
    text = await box.curl(
        f"/redirect?to={target}", "-L", "--location-trusted", "-H", "Authorization: Bearer x" + PLACEHOLDER
    )
    headers = json.loads(text)["headers"]
    assert "*" not in headers.get("authorization", "")


async def test_events_arrive_when_they_are_sent(gateway: Make) -> None:
    box = await gateway()
    child = await asyncio.create_subprocess_exec(
        "curl", "-sN", "--cacert", str(box.ca_file), "--connect-to", f"::127.0.0.1:{box.port}",
        box.url("/events/a"), stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert child.stdout is not None
    async with asyncio.timeout(60):
        assert await child.stdout.readline() == b"data: first\n"
        await box.curl("/go/a")
        assert b"data: second" in await child.stdout.read()
        await child.wait()


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_client_that_goes_away_frees_the_server(gateway: Make, version: str) -> None:
    box = await gateway()
    child = await asyncio.create_subprocess_exec(
        "curl", "-sN", version, "--cacert", str(box.ca_file), "--connect-to", f"::127.0.0.1:{box.port}",
        box.url("/events/b"), stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert child.stdout is not None
    async with asyncio.timeout(60):
        assert await child.stdout.readline() == b"data: first\n"
        child.kill()
        await child.wait()
        await box.curl("/gone/b")


@pytest.mark.parametrize("version", VERSIONS)
async def test_large_bodies_arrive_whole_in_both_directions(
    gateway: Make, version: str, tmp_path: Path
) -> None:
    box = await gateway()
    data = hashlib.shake_128(b"seed").digest(5 << 20)
    (tmp_path / "data").write_bytes(data)
    out = await box.curl_bytes("/echo", version, "--data-binary", f"@{tmp_path / 'data'}")
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("version", VERSIONS)
async def test_many_requests_share_a_connection(gateway: Make, version: str) -> None:
    box = await gateway()
    first = box.url("/headers")
    await box.curl("/headers", version, *[first] * 9)
    assert box.dialled == 1
    events = [event for event in box.events() if event["kind"] == "http"]
    assert len(events) == 10
    assert all(event["rule"] == "key" and event["detail"]["status"] == 200 for event in events)


async def test_the_audit_has_no_secret(gateway: Make) -> None:
    box = await gateway()
    await box.curl("/leak-body?x=1", "-d", "abc")
    (event,) = box.events()
    assert event["detail"] == {
        "method": "POST", "path": "/leak-body", "status": 200, "trace": "0af7651916cd43dd8448eb211c80319c",
    }  # fmt: skip
    assert event["sent"] == 3
    assert SECRET not in json.dumps(event)


@pytest.mark.parametrize(
    ("arguments", "path", "status"),
    [
        (("-H", "Host: other.test"), "/headers", "421"),
        (("-H", "Host: API.test.", "--http1.1"), "/headers", "421"),
        (("-X", "TRACE"), "/headers", "405"),
        (("--path-as-is",), "/a/../headers", "400"),
        (("--path-as-is",), "/a/%2e%2e/headers", "400"),
        (("--path-as-is",), "/a/%252e%252e/headers", "400"),
        (("--path-as-is",), "/a/..%5cheaders", "400"),
    ],
)  # fmt: skip
async def test_requests_that_servers_understand_differently_are_refused(
    gateway: Make, arguments: tuple[str, ...], path: str, status: str
) -> None:
    box = await gateway()
    text = await box.curl(path, *arguments, "-w", "%{http_code}", "-o", "/dev/null")
    assert text == status
    assert box.dialled == 0
    assert not box.events()[0]["allowed"]


async def test_a_credential_is_not_sent_without_tls_unless_the_rule_says_so(
    gateway: Make,
) -> None:
    box = await gateway(plain=True)
    seen = json.loads(await box.curl("/headers", host="plain.test", scheme="http"))
    assert seen["headers"]["authorization"].startswith("Bearer ***")
    assert not Rule(id="key", hosts=("plain.test",), ports=(box.port,)).covers("plain.test", box.port, False)


async def test_a_path_outside_the_rule_gets_no_credential(
    gateway: Make,
) -> None:
    box = await gateway()
    seen = json.loads(await box.curl("/headers", host="other.test"))
    assert "authorization" not in seen["headers"]
    # That credential does not exist: the error says so and names it.
    assert "there is no credential 'other'" in await box.curl("/has/it", host="other.test")


async def test_a_server_with_a_foreign_certificate_is_refused(host: HostAuthority, tmp_path: Path) -> None:
    (tmp_path / "false").mkdir()
    false = HostAuthority(tmp_path / "false")
    async with api_server(*map(str, false.issue("api.test"))) as port:
        vault = Vault({"key": Secret(value=SECRET)})
        async with Gateway({"api.test": port}, host, [], vault, tmp_path, constraints=["api.test"]) as box:
            box.interceptor._rules = (Rule(id="key", hosts=("api.test",), ports=(box.port,)),)
            text = await box.curl("/headers", "-w", "%{http_code}")
    assert text.endswith("502")
    assert "certificate does not count" in text


async def test_the_box_authority_vouches_for_no_other_name(host: HostAuthority, tmp_path: Path) -> None:
    async with Gateway({}, host, [], Vault({}), tmp_path, constraints=["api.test"]) as box:
        box.interceptor._rules = (Rule(id="key", hosts=("evil.test",), ports=(box.port,)),)
        text = await box.curl_bytes("/", host="evil.test", ok=False)
    assert b"permitted subtree violation" in text


async def test_a_renewed_token_is_tried_once_after_a_refusal(host: HostAuthority, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(api_server(*map(str, host.issue("api.test"))))
        vault = Vault(
            {"key": Secret(value=SECRET, renewable=True)}, renewed={"key": Secret(value=SECRET + "2")}
        )
        box = Gateway({"api.test": port}, host, [], vault, tmp_path, constraints=["api.test"])
        await stack.enter_async_context(box)
        box.interceptor._rules = (Rule(id="key", hosts=("api.test",), ports=(box.port,)),)
        assert await box.curl("/status/401", "-d", "x", "-w", "%{http_code}") == "401"
        assert vault.given == {"key": 2}
        assert box.events()[0]["detail"]["renewed"] is True


async def test_a_client_that_speaks_no_http_is_told(gateway: Make) -> None:
    box = await gateway()
    context = ssl.create_default_context(cafile=str(box.ca_file))

    def talk() -> bytes:
        with contextlib.closing(socket.create_connection(("127.0.0.1", box.port), 60)) as sock:
            with context.wrap_socket(sock, server_hostname="api.test") as tls:
                tls.sendall(b"\x00\x01nonsense\r\n\r\n")
                return tls.recv(4096)

    assert (await asyncio.to_thread(talk)).startswith(b"HTTP/1.1 400 ")
