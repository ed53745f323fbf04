"""The host's side of a box's network for tests: servers with certificates, and a gateway in front."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import socket
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from services.common.egress.policy import Decision
from services.common.errors import NotFound
from services.common.process import clean_env
from services.hypervisor.egress.audit import AuditLog
from services.hypervisor.egress.ca import BoxAuthority
from services.hypervisor.egress.flow import Flow
from services.hypervisor.egress.intercept import Answering, EgressInterceptor, Watching
from services.hypervisor.egress.rules import Rule
from services.hypervisor.egress.secret import Secret

SECONDS = 120
_SERVERS = Path(__file__).parent / "egress_servers"


class HostAuthority:
    """The certificate authority that the host trusts, made for one test run."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "the world")])
        self._name = name
        certificate = (
            self._builder(name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = certificate.public_bytes(serialization.Encoding.PEM)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
        )

    def issue(self, *names: str) -> tuple[Path, Path]:
        """Files with a certificate for `names` and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        alternatives = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        certificate = (
            self._builder(subject, key)
            .add_extension(alternatives, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        paths = (self._directory / f"{names[0]}.crt", self._directory / f"{names[0]}.key")
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return paths

    def context(self) -> ssl.SSLContext:
        """What the host checks servers against."""
        context = ssl.create_default_context(cadata=self.pem.decode())
        context.set_alpn_protocols(["h2", "http/1.1"])
        return context

    def context_http1(self) -> ssl.SSLContext:
        """The same for HTTP/1.1."""
        context = ssl.create_default_context(cadata=self.pem.decode())
        context.set_alpn_protocols(["http/1.1"])
        return context


@contextlib.asynccontextmanager
async def api_server(*arguments: str) -> AsyncIterator[int]:
    """The port of a `api.mjs`."""
    child = await asyncio.create_subprocess_exec(
        "node",
        str(_SERVERS / "api.mjs"),
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=clean_env(),
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        async with asyncio.timeout(SECONDS):
            yield int(await child.stdout.readline())
    finally:
        child.stdin.close()
        await child.communicate()


@dataclass
class Vault:
    """Credentials in memory; `given` counts how often each was asked for."""

    secrets: dict[str, Secret]
    given: dict[str, int] = field(default_factory=dict)
    renewed: dict[str, Secret] = field(default_factory=dict)

    async def get(self, rule: str, host: str, rejected: str = "") -> Secret:
        """As CredentialSource."""
        self.given[rule] = self.given.get(rule, 0) + 1
        if rule not in self.secrets:
            raise NotFound(f"there is no credential {rule!r}; set it")
        if rejected and rule in self.renewed:
            self.secrets[rule] = self.renewed[rule]
        return self.secrets[rule]


class Gateway:
    """Accepts a box's connections and has them intercepted.

    Args:
        servers: The port behind each name.
    """

    def __init__(
        self,
        servers: Mapping[str, int],
        host: HostAuthority,
        rules: Sequence[Rule],
        vault: Vault,
        directory: Path,
        *,
        answering: Sequence[Answering] = (),
        watching: Sequence[Watching] = (),
        constraints: Iterable[str] = (),
    ) -> None:
        self._servers = dict(servers)
        self.authority = BoxAuthority.create([*constraints, *(name for rule in rules for name in rule.hosts)])
        self.ca_file = directory / "box-ca.pem"
        self.ca_file.write_bytes(self.authority.certificate)
        self._log_path = directory / "audit.jsonl"
        self._log = os.open(self._log_path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        self.interceptor = EgressInterceptor(
            rules=rules,
            authority=self.authority,
            source=vault,
            audit=AuditLog(self._log, "box"),
            trust=host.context(),
            trust_http1=host.context_http1(),
            answering=answering,
            watching=watching,
            trace="0af7651916cd43dd8448eb211c80319c",
        )
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self.open = 0
        self.dialled = 0

    async def __aenter__(self) -> Gateway:
        self._accepting = asyncio.create_task(self._accept())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._accepting is not None
        tasks = [self._accepting, *self._tasks]
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()
        os.close(self._log)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _accept(self) -> None:
        while True:
            client, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            task = asyncio.create_task(self._serve(client))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            self._tasks.discard(task)

    async def _serve(self, client: socket.socket) -> None:
        with client:
            first = await asyncio.get_running_loop().sock_recv(client, 65536)
            if first:
                await self._intercept(client, first)

    async def _intercept(self, client: socket.socket, first: bytes) -> None:
        tls = first[0] == 0x16
        name = _sni(first) if tls else _host(first)
        flow = Flow(
            box="box",
            source=("10.0.2.15", 40000),
            destination=("192.0.2.1", self.port),
            name=name,
            sni=name if tls else "",
            host="" if tls else name,
            kind="tls" if tls else "http",
            decision=Decision(allowed=True),
        )
        assert self.interceptor.wants(flow), name
        self.open += 1
        try:
            await self.interceptor.intercept(client, first, flow, self._dial)
        finally:
            self.open -= 1

    async def _dial(self, flow: Flow) -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        address = ("127.0.0.1", self._servers[flow.sni or flow.host or flow.name])
        try:
            await asyncio.get_running_loop().sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        self.dialled += 1
        return sock

    def events(self) -> list[dict[str, Any]]:
        """What the audit has."""
        return [json.loads(line) for line in self._log_path.read_bytes().splitlines()]

    def url(self, path: str, host: str = "api.test", scheme: str = "https") -> str:
        """The URL of `path` as a box has it."""
        return f"{scheme}://{host}:{self.port}{path}"

    async def curl(self, path: str, *arguments: str, host: str = "api.test", scheme: str = "https") -> str:
        """What curl prints for `path`."""
        return (await self.curl_bytes(path, *arguments, host=host, scheme=scheme)).decode()

    async def curl_bytes(
        self, path: str, *arguments: str, host: str = "api.test", scheme: str = "https", ok: bool = True
    ) -> bytes:
        """The same as bytes."""
        child = await asyncio.create_subprocess_exec(
            "curl",
            "--silent",
            "--show-error",
            "--max-time",
            str(SECONDS),
            "--cacert",
            str(self.ca_file),
            "--connect-to",
            f"::127.0.0.1:{self.port}",
            *arguments,
            self.url(path, host, scheme),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=clean_env(),
        )
        out, err = await child.communicate()
        if ok:
            assert child.returncode == 0, err.decode()
        return out + (b"" if ok else err)


def _sni(hello: bytes) -> str:
    """The name in a whole ClientHello, by OpenSSL."""
    found: list[str] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    def callback(_: Any, name: str | None, __: Any) -> int:
        found.append(name or "")
        return ssl.ALERT_DESCRIPTION_ACCESS_DENIED

    context.sni_callback = callback
    incoming = ssl.MemoryBIO()
    incoming.write(hello)
    with contextlib.suppress(ssl.SSLError):
        context.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True).do_handshake()
    return found[0] if found else ""


def _host(head: bytes) -> str:
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"host:"):
            return line[5:].strip().decode().partition(":")[0]
    return ""
