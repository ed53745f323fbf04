"""The real Claude Code and Codex work with a placeholder; the scripted model gets the real key.

They run on the host here, through the interceptor, in an environment of their own. 350 MB to fetch:
`make test-agents` runs them.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from services.hypervisor.egress.audit import AuditLog
from services.hypervisor.egress.budget import Budget
from services.hypervisor.egress.meter import Meter
from services.hypervisor.egress.prices import Prices
from services.hypervisor.egress.rules import Rule
from services.hypervisor.egress.secret import Secret
from services.imager.agent_packages import pinned_package
from tests.egress_host import Gateway, HostAuthority, Vault
from tests.egress_servers.llm_stub import TEXT, ModelStub
from tests.imager_images import need, run

REAL = pytest.mark.skipif(
    not os.environ.get("VOIDBOX_TEST_AGENTS"), reason="fetches 350 MB; `make test-agents` runs it"
)
pytestmark = [REAL, pytest.mark.timeout(900)]

KEY = "sk-ant-the-real-key-of-the-host-0123456789"
PLACEHOLDER = "sk-ant-api03-voidbox-placeholder"
PROMPT = "Make the file, then say the answer."


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The agents' programs, from their pinned packages."""
    place = tmp_path_factory.mktemp("agents")
    found: dict[str, Path] = {}
    for agent, program in (("claude-code", "claude"), ("codex", "bin/codex")):
        package = pinned_package(agent, "amd64")
        tarball = place / run(
            need("npm", "npm"), "pack", "--silent", f"{package.name}@{package.version}",
            f"--pack-destination={place}", cwd=place,
        ).split()[-1]  # fmt: skip
        digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
        assert package.integrity == f"sha512-{digest}"
        (place / agent).mkdir()
        run("tar", "-xzf", tarball, "-C", place / agent)
        tarball.unlink()
        found[agent] = place / agent / package.root / program
    return found


@pytest_asyncio.fixture
async def box(tmp_path: Path) -> AsyncIterator[tuple[Gateway, ModelStub, Meter]]:
    """A gateway in front of a scripted model at the name localhost."""
    host = HostAuthority(tmp_path)
    log = os.open(tmp_path / "meter.jsonl", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    meter = Meter(["localhost"], Budget(tokens=100_000), Prices.load(), AuditLog(log, "box"))
    with ModelStub(host.issue("localhost"), key=KEY) as stub:
        gateway = Gateway(
            {"localhost": stub.port}, host, [], Vault({"llm": Secret(value=KEY)}), tmp_path,
            watching=[meter], constraints=["localhost"],
        )  # fmt: skip
        async with gateway:
            yield gateway, stub, meter
    os.close(log)


def rule(box: Gateway, **placement: str) -> tuple[Rule, ...]:
    return (Rule(id="llm", hosts=("localhost",), ports=(box.port,), **placement),)  # type: ignore[arg-type]


async def work(argv: list[str], home: Path, env: dict[str, str]) -> str:
    """What a program prints, run in `home` with nothing else in its environment."""
    child = await asyncio.create_subprocess_exec(
        *argv, cwd=home, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin", "NO_PROXY": "*", **env},
    )  # fmt: skip
    async with asyncio.timeout(600):
        out, _ = await child.communicate()
    assert child.returncode == 0, out.decode()
    return out.decode()


def check(home: Path, out: str, stub: ModelStub, path: str, meter: Meter) -> None:
    """The work was done, the model had the key, and nothing that the program has or wrote does."""
    assert TEXT in out
    assert (home / "tool.txt").read_text() == "made-by-a-tool\n"
    assert len(stub.calls(path)) >= 2
    for seen, headers, body in stub.seen:
        assert PLACEHOLDER not in json.dumps([headers, body]), seen
        if seen.partition("?")[0].endswith(path):
            assert KEY in (headers.get("x-api-key"), headers.get("authorization", "").removeprefix("Bearer "))
    forms = [KEY.encode(), KEY.encode().hex().encode(), base64.b64encode(KEY.encode())[4:-4]]
    for file in home.rglob("*"):
        if file.is_file() and not file.is_symlink():
            content = file.read_bytes()
            assert not any(form in content for form in forms), file
    assert not any(form.decode() in out for form in forms)
    assert meter.totals.read()[1] >= 2 * 150


async def test_claude_code_works_with_a_placeholder(
    programs: dict[str, Path], box: tuple[Gateway, ModelStub, Meter], tmp_path: Path
) -> None:
    gateway, stub, meter = box
    gateway.interceptor._rules = rule(gateway, name="x-api-key", format="{}")
    home = tmp_path / "home"
    home.mkdir()
    argv = [str(programs["claude-code"]), "-p", PROMPT, "--output-format", "stream-json", "--verbose",
            "--dangerously-skip-permissions", "--model", "claude-sonnet-4-5"]  # fmt: skip
    env = {
        "ANTHROPIC_API_KEY": PLACEHOLDER,
        "ANTHROPIC_BASE_URL": f"https://localhost:{gateway.port}",
        "NODE_EXTRA_CA_CERTS": str(gateway.ca_file),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "IS_SANDBOX": "1",
    }
    check(home, await work(argv, home, env), stub, "/v1/messages", meter)


async def test_codex_works_with_a_placeholder(
    programs: dict[str, Path], box: tuple[Gateway, ModelStub, Meter], tmp_path: Path
) -> None:
    gateway, stub, meter = box
    gateway.interceptor._rules = rule(gateway)
    home = tmp_path / "home"
    (home / ".codex").mkdir(parents=True)
    (home / ".codex/config.toml").write_text(
        f"""
model = "gpt-5"
model_provider = "stub"
[model_providers.stub]
name = "stub"
base_url = "https://localhost:{gateway.port}/v1"
wire_api = "responses"
env_key = "OPENAI_API_KEY"
"""
    )
    argv = [str(programs["codex"]), "exec", "--json", "--skip-git-repo-check",
            "--dangerously-bypass-approvals-and-sandbox", PROMPT]  # fmt: skip
    env = {"OPENAI_API_KEY": PLACEHOLDER, "SSL_CERT_FILE": str(gateway.ca_file)}
    check(home, await work(argv, home, env), stub, "/v1/responses", meter)
