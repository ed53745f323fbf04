"""The programs that boxes use, each trusting the box's authority in its way: Node, Python, git, WebSockets.

And the whole as a box has it: settings as plain data, a broker in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import websockets

from services.common.process import clean_env, run
from services.hypervisor.egress.assembly import build
from services.hypervisor.egress.audit import AuditLog
from services.hypervisor.egress.broker_config import BrokerConfig
from services.hypervisor.egress.budget import Budget
from services.hypervisor.egress.ca import BoxAuthority
from services.hypervisor.egress.interception import Interception
from services.hypervisor.egress.rules import Placement, Rule
from services.hypervisor.egress.secret import Secret
from tests.egress_host import Gateway, HostAuthority, Vault, api_server
from tests.egress_servers.git_stub import GitStub

SECRET = "ghp_TheRealTokenOfTheHost0123456789"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def host(tmp_path: Path) -> HostAuthority:
    return HostAuthority(tmp_path)


def gateway(host: HostAuthority, tmp_path: Path, port: int, **rule: Any) -> Gateway:
    """In front of the server at `port`, under the name localhost."""
    made = Gateway(
        {"localhost": port},
        host,
        [],
        Vault({"key": Secret(value=SECRET)}),
        tmp_path,
        constraints=["localhost"],
    )
    made.interceptor._rules = (Rule(id="key", hosts=("localhost",), ports=(made.port,), **rule),)
    return made


CLIENTS = {
    "python": (
        [
            sys.executable,
            "-c",
            "import sys,urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())",
        ],
        "SSL_CERT_FILE",
    ),
    "requests": (
        [sys.executable, "-c", "import sys,requests; print(requests.get(sys.argv[1]).text)"],
        "REQUESTS_CA_BUNDLE",
    ),
    "node": (
        ["node", "--input-type=module", "-e", "console.log(await (await fetch(process.argv[1])).text())"],
        "NODE_EXTRA_CA_CERTS",
    ),
}


@pytest.mark.parametrize("client", CLIENTS)
async def test_programs_trust_the_boxs_authority_by_a_variable(
    host: HostAuthority, tmp_path: Path, client: str
) -> None:
    argv, variable = CLIENTS[client]
    async with api_server(*map(str, host.issue("localhost"))) as port:
        async with gateway(host, tmp_path, port) as box:
            url = box.url("/headers", "localhost")
            out = await run([*argv, url], env={variable: str(box.ca_file), "no_proxy": "*"}, seconds=120)
    assert json.loads(out)["headers"]["authorization"] == "Bearer " + "*" * len(SECRET)


async def test_git_clones_and_pushes_with_a_token_it_never_has(host: HostAuthority, tmp_path: Path) -> None:
    env = {
        "GIT_CONFIG_NOSYSTEM": "1", "HOME": str(tmp_path), "GIT_TERMINAL_PROMPT": "0", "no_proxy": "*",
        "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
        "GIT_SSL_CAINFO": str(tmp_path / "box-ca.pem"),
    }  # fmt: skip
    bare = tmp_path / "repos/project.git"
    await run(["git", "init", "-q", "--bare", "-b", "main", str(bare)], env=env)
    await run(["git", "-C", str(bare), "config", "http.receivepack", "true"], env=env)
    with GitStub(host.issue("localhost"), tmp_path / "repos", "x-access-token", SECRET) as stub:
        async with gateway(
            host,
            tmp_path,
            stub.port,
            placement=Placement.BASIC,
            name="x-access-token",
            paths=("/project.git",),
        ) as box:
            copy = tmp_path / "copy"
            await run(
                ["git", "clone", "-q", box.url("/project.git", "localhost"), str(copy)], env=env, seconds=120
            )
            (copy / "file").write_bytes(os.urandom(300_000))
            await run(["git", "-C", str(copy), "add", "file"], env=env)
            await run(["git", "-C", str(copy), "commit", "-q", "-m", "one"], env=env)
            await run(["git", "-C", str(copy), "push", "-q", "origin", "HEAD:main"], env=env, seconds=120)
            again = tmp_path / "again"
            await run(
                ["git", "clone", "-q", box.url("/project.git", "localhost"), str(again)], env=env, seconds=120
            )
    assert (again / "file").read_bytes() == (copy / "file").read_bytes()
    assert stub.refused == 0
    for file in [*copy.rglob("*"), *again.rglob("*")]:
        assert not file.is_file() or SECRET.encode() not in file.read_bytes()


async def test_websockets_get_the_credential_and_do_not_give_it_back(
    host: HostAuthority, tmp_path: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*host.issue("localhost"))
    seen: list[str | None] = []

    async def serve(connection: websockets.ServerConnection) -> None:
        assert connection.request is not None
        seen.append(connection.request.headers.get("authorization"))
        async for message in connection:
            if message == "leak":
                # A secret in fragments, text and bytes.
                await connection.send([SECRET[:7], SECRET[7:]])
                await connection.send(SECRET.encode())
            else:
                await connection.send(message)

    trusted = ssl.create_default_context()
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            websockets.serve(serve, "127.0.0.1", 0, ssl=context, max_size=None)
        )
        box = await stack.enter_async_context(
            gateway(host, tmp_path, next(iter(server.sockets)).getsockname()[1])
        )
        trusted.load_verify_locations(str(box.ca_file))
        url = box.url("/", "localhost").replace("https", "wss")
        async with (
            asyncio.timeout(120),
            websockets.connect(url, ssl=trusted, proxy=None, max_size=None) as client,
        ):
            await client.send("hello")
            assert await client.recv() == "hello"
            await client.send(b"\0" * 3_000_000)
            assert await client.recv() == b"\0" * 3_000_000
            await client.send("leak")
            assert await client.recv() == "*" * len(SECRET)
            assert await client.recv() == b"*" * len(SECRET)
            await (await client.ping())
    assert seen == [f"Bearer {SECRET}"]


async def test_a_box_is_put_together_from_plain_data_and_served_by_a_broker_process(
    host: HostAuthority, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(SECRET + "\n")
    authority = BoxAuthority.create(["localhost"])
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(api_server(*map(str, host.issue("localhost"))))
        box = Gateway({"localhost": port}, host, [], Vault({}), tmp_path)
        machine = await asyncio.create_subprocess_exec("cat", stdin=asyncio.subprocess.PIPE, env=clean_env())
        pidfd = os.pidfd_open(machine.pid)
        ours, theirs = socket.socketpair()
        broker_config = BrokerConfig(
            machine_fd=pidfd, socket_fd=theirs.fileno(), token="the-boxs-token",
            grants={"key": {"hosts": ["localhost"], "source": {"file": str(tmp_path / "token")}}},
        )  # fmt: skip
        read, write = os.pipe()
        os.write(write, broker_config.to_json())
        os.close(write)
        broker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.hypervisor.egress.broker_process", "--config-fd", str(read),
            stdin=asyncio.subprocess.DEVNULL, pass_fds=(read, pidfd, theirs.fileno()),
            cwd=ROOT, env=clean_env(),
        )  # fmt: skip
        for fd in (read, pidfd):
            os.close(fd)
        theirs.close()
        log = os.open(tmp_path / "audit2.jsonl", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        stack.callback(os.close, log)
        interception = Interception(
            authority=authority.dump().decode(), token="the-boxs-token", broker_fd=ours.detach(),
            rules=(Rule(id="key", hosts=("localhost",), ports=(box.port,)),
                   Rule(id="none", hosts=("localhost",), ports=(box.port,), paths=("/none",))),
            metered=("localhost",), budget=Budget(requests=5), extra_ca=host.pem.decode(),
        )  # fmt: skip
        again = Interception.from_json(json.loads(json.dumps(interception.to_json())))
        assert again == interception
        assert SECRET not in repr(again)
        box.interceptor = build(again, AuditLog(log, "box"))
        box.ca_file.write_bytes(authority.certificate)
        await stack.enter_async_context(box)
        text = await box.curl("/headers", host="localhost")
        assert json.loads(text)["headers"]["authorization"] == "Bearer " + "*" * len(SECRET)
        assert "may not use" in await box.curl("/none", host="localhost")
        machine.kill()
        await machine.wait()
        async with asyncio.timeout(60):
            assert await broker.wait() == 0
        assert "credentials cannot be had" in await box.curl("/headers", host="localhost")
        await box.interceptor._source.close()  # type: ignore[attr-defined]
