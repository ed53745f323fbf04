"""A run is recorded, then served from the recording without a server; a request that differs is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.errors import Corrupt
from services.hypervisor.egress.recording import Recorder, Replayer
from services.hypervisor.egress.rules import Rule
from services.hypervisor.egress.secret import Secret
from tests.egress_host import Gateway, HostAuthority, Vault, api_server

SECRET = "sk-the-real-secret-0123456789"


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "recording.jsonl", os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
    yield fd
    os.close(fd)


async def record(tmp_path: Path, fd: int) -> list[str]:
    """Answers to some requests, recorded."""
    host = HostAuthority(tmp_path)
    async with api_server(*map(str, host.issue("api.test"))) as port:
        vault = Vault({"key": Secret(value=SECRET)})
        async with Gateway(
            {"api.test": port}, host, [], vault, tmp_path, watching=[Recorder(fd)], constraints=["*"]
        ) as box:
            box.interceptor._rules = (Rule(id="key", hosts=("api.test",), ports=(box.port,)),)
            return await ask(box)


async def ask(box: Gateway) -> list[str]:
    body = {"question": "what?", "metadata": {"session": str(os.getpid())}, "id": os.urandom(16).hex()}
    return [
        await box.curl("/echo", "-d", "same"),
        await box.curl("/leak-body", "-H", "Cookie: mine"),
        await box.curl("/leak-split"),
        await box.curl("/status/404", "-d", json.dumps(body), "-w", "%{http_code}"),
    ]


async def test_a_replay_answers_as_the_server_did_without_it(recording: int, tmp_path: Path) -> None:
    before = await record(tmp_path, recording)
    content = (tmp_path / "recording.jsonl").read_text()
    assert SECRET not in content
    assert SECRET.encode().hex() not in content
    assert "mine" not in content
    host = HostAuthority(tmp_path)
    replayer = Replayer(recording)
    async with Gateway({}, host, [], Vault({}), tmp_path, answering=[replayer], constraints=["*"]) as box:
        assert await ask(box) == before
        assert replayer.left == 0
        # Once more is more often than it was recorded.
        assert "less often" in await box.curl("/echo", "-d", "same")
        assert box.dialled == 0


@pytest.mark.parametrize(
    ("path", "arguments", "named"),
    [
        ("/echo", ("-d", "other"), "another body"),
        ("/status/404", ("-d", '{"question":"why?","id":"x"}'), "first difference: /"),
        ("/leak-body?x=1", (), "another query"),
        ("/unheard-of", (), "was not recorded"),
    ],
)
async def test_a_request_that_diverges_is_refused_and_says_how(
    recording: int, tmp_path: Path, path: str, arguments: tuple[str, ...], named: str
) -> None:
    await record(tmp_path, recording)
    async with Gateway(
        {},
        HostAuthority(tmp_path),
        [],
        Vault({}),
        tmp_path,
        answering=[Replayer(recording)],
        constraints=["*"],
    ) as box:
        text = await box.curl(path, *arguments, "-w", "%{http_code}")
        assert named in text
        assert text.endswith("403")
        assert box.dialled == 0
        assert box.events()[-1]["detail"]["error"] == "REPLAY_DIVERGED"


async def test_a_recording_that_was_cut_off_serves_what_it_has(recording: int, tmp_path: Path) -> None:
    await record(tmp_path, recording)
    os.truncate(tmp_path / "recording.jsonl", (tmp_path / "recording.jsonl").stat().st_size - 20)
    assert Replayer(recording).left == 4


@pytest.mark.parametrize("content", [b"", b"nonsense\n", b'{"voidbox_recording":9}\n', b'{"exchange":1}\n'])
def test_what_is_no_recording_is_refused(recording: int, content: bytes) -> None:
    os.write(recording, content)
    with pytest.raises(Corrupt):
        Replayer(recording)
