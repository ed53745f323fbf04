"""A box uses a credential that it does not have: a real machine, its gateway and its broker as `nobody`.

Afterwards what its programs saw and all memory of its machine are searched for the real one.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.egress_host import HostAuthority, api_server
from tests.egress_servers.llm_stub import TEXT, ModelStub
from tests.egress_world import world
from tests.integration.test_egress import events, tun, unprivileged
from tests.other_user import needs_another_user
from voidbox.common.v1 import common_pb2 as common
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

pytestmark = pytest.mark.vm
__all__ = ["tun"]

# In two parts, so that this process's source is not what is found.
SECRET = "sk-ant-" + "the-real-secret-of-the-host-0123456789"
ASK = """
import json, os, sys, urllib.error, urllib.request
def ask(url, body=None, headers={}):
    request = urllib.request.Request(url, body and body.encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return [answer.status, answer.read().decode()]
    except urllib.error.HTTPError as error:
        return [error.code, error.read().decode()]
print(json.dumps({"answers": [ask(*one) for one in json.loads(sys.argv[1])], "env": dict(os.environ)}))
"""

# The guest image's Python has no TLS; the host's, with its own loader and libraries, does.
LOADER = os.path.realpath("/lib64/ld-linux-x86-64.so.2")
PYTHON = [
    "env", "PYTHONHOME=/host", LOADER.replace("/usr", "/host", 1), "--library-path",
    os.path.dirname(LOADER).replace("/usr", "/host", 1), "/host/bin/python3",
]  # fmt: skip


def forms(secret: str) -> list[bytes]:
    raw = secret.encode()
    return [raw, base64.b64encode(raw)[4:-4], raw.hex().encode(), raw.hex().upper().encode()]


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that the service, another user, may read."""
    with tempfile.TemporaryDirectory(prefix="voidbox-shared-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@needs_another_user
async def test_a_box_uses_a_credential_and_a_budget_and_has_neither(
    tun: str, tmp_path: Path, shared: Path
) -> None:
    host = HostAuthority(tmp_path)
    trust = shared / "world.pem"
    trust.write_bytes(host.pem)
    (shared / "secret").write_text(SECRET)
    async with world() as outside, api_server(*map(str, host.issue("ok.test"))) as port:
        with ModelStub(host.issue("strict.test"), key=SECRET) as model:
            with unprivileged(tun, outside.dns_port, "--extra-ca", str(trust)) as (service, files):
                async with service.connected() as client:
                    allow = [
                        common.EgressRule(host=name, ports=[number], addresses=["127.0.0.1/32"])
                        for name, number in (("ok.test", port), ("strict.test", model.port))
                    ]
                    credentials = [
                        pb.Credential(
                            name="api", hosts=["ok.test"], ports=[port], file=str(shared / "secret"),
                            env={"API_TOKEN": "tok-{}"},
                        ),
                        pb.Credential(
                            name="llm", hosts=["strict.test"], ports=[model.port], value=SECRET,
                            header="x-api-key: {}", env={"ANTHROPIC_API_KEY": "{}"},
                        ),
                    ]  # fmt: skip
                    made = await client.create(
                        "keyless", **files, mounts=[common.Mount(host_path="/usr", guest_path="/host")],
                        egress=common.EgressPolicy(enabled=True, allow=allow),
                        credentials=credentials, metered_hosts=["strict.test"],
                        budget=pb.Budget(max_requests=1),
                    )  # fmt: skip
                    assert not any(one.WhichOneof("source") for one in made.config.credentials)
                    body = json.dumps({"model": "claude-sonnet-4-5", "max_tokens": 9, "messages": []})
                    asked = [
                        [f"https://ok.test:{port}/headers", None, {"Authorization": "Bearer tok-x"}],
                        [f"https://ok.test:{port}/leak-body"],
                        [f"https://strict.test:{model.port}/v1/messages", body],
                        [f"https://strict.test:{model.port}/v1/messages", body],
                    ]
                    done, out, err = await client.run("keyless", *PYTHON, "-c", ASK, json.dumps(asked))
                    assert done.exit_code == 0, err.decode()
                    found = json.loads(out)
                    headers, leak, first, second = found["answers"]
                    assert json.loads(headers[1])["headers"]["authorization"] == "Bearer " + "*" * len(SECRET)
                    assert leak[0] == 200
                    assert (first[0], TEXT in first[1]) == (200, True)
                    assert (second[0], "budget of 1 requests" in second[1]) == (403, True)
                    assert len(model.calls("/v1/messages")) == 1
                    assert found["env"]["API_TOKEN"] == "tok-voidbox-placeholder-api"
                    assert found["env"]["ANTHROPIC_API_KEY"] == "voidbox-placeholder-llm"
                    assert not any(form in out for form in forms(SECRET))
                    heard = [
                        event for event in await events(client, "keyless") if event.kind in ("http", "meter")
                    ]
                    assert [event.rule for event in heard if event.kind == "http"][:2] == ["api", "api"]
                    assert any(
                        event.detail["total_tokens"] == "150" for event in heard if event.kind == "meter"
                    )
                    assert not any(
                        form in event.SerializeToString() for event in heard for form in forms(SECRET)
                    )
                    # All of the machine's memory on the host, and what lies in its directory but its record.
                    await asyncio.to_thread(search_memory, made.vmm_pid, forms(SECRET))
                    await client.delete("keyless")


def search_memory(pid: int, wanted: list[bytes]) -> None:
    """Fail if the memory of a process has one of `wanted`."""
    overlap = max(map(len, wanted))
    searched = 0
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            span, rights, _, _, _, *name = line.split()
            if not rights.startswith("rw") or name == ["[vvar]"]:
                continue
            begin, end = (int(part, 16) for part in span.split("-"))
            tail = b""
            for at in range(begin, end, 1 << 20):
                try:
                    memory.seek(at)
                    data = memory.read(min(1 << 20, end - at)) or b""
                except OSError:
                    break
                searched += len(data)
                assert not any(form in tail + data for form in wanted), f"found in {line}"
                tail = data[-overlap:]
    assert searched > 64 << 20
