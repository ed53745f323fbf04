"""The scripted agent as its callers see it: Claude Code's flags in, its stream-json out.

Run the way the guest runs it: isolated, without the agent's packages.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GUEST = Path(__file__).resolve().parents[3] / "guest"
STREAM = ("--output-format", "stream-json", "--verbose")


def run(cwd: Path, *args: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run the agent to its end."""
    code = f"import sys; sys.path.insert(0, {str(GUEST)!r}); from mock_agent import main; main()"
    return subprocess.run(
        [sys.executable, "-IS", "-c", code, *args],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), **env},
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


def events(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """The lines of stream-json."""
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_simple_run_has_the_real_ones_shape(tmp_path: Path) -> None:
    done = run(tmp_path, "-p", "say hi", *STREAM, "--model", "m-9", "--settings", "{}", "--max-turns", "3")
    first, answer, last = events(done)
    assert done.returncode == 0
    assert (first["type"], first["subtype"], first["model"]) == ("system", "init", "m-9")
    assert answer["message"]["content"][0]["type"] == "text"
    assert answer["message"]["usage"]["output_tokens"] > 0
    assert (last["type"], last["subtype"], last["is_error"], last["num_turns"]) == (
        "result",
        "success",
        False,
        1,
    )
    assert last["total_cost_usd"] > 0
    assert len({one["session_id"] for one in (first, answer, last)}) == 1


def test_a_script_does_real_work_and_writes_the_output(tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    prompt = "Do:\n```sh\necho żółć > made\n```\nand\n```bash\ncat made; wc -l < made\n```\n"
    prompt += f"Write your output to {out}."
    done = run(tmp_path, "-p", prompt, *STREAM)
    assert done.returncode == 0
    kinds = [
        (one["type"], one.get("message", {}).get("content", [{}])[0].get("type")) for one in events(done)
    ]
    assert kinds == [
        ("system", None),
        ("assistant", "tool_use"), ("user", "tool_result"),
        ("assistant", "tool_use"), ("user", "tool_result"),
        ("assistant", "text"),
        ("result", None),
    ]  # fmt: skip
    assert events(done)[-1]["result"] == "żółć\n1"
    assert out.read_text() == "żółć\n1\n"
    use, result = events(done)[1], events(done)[2]
    assert use["message"]["content"][0]["id"] == result["message"]["content"][0]["tool_use_id"]


def test_a_file_that_the_script_wrote_itself_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run(
        tmp_path, "-p", f"```sh\necho own > {out}; echo said\n```\nWrite your output to {out}.", *STREAM
    )
    assert events(done)[-1]["result"] == "said"
    assert out.read_text() == "own\n"


def test_a_failing_command_is_an_error_with_its_output(tmp_path: Path) -> None:
    done = run(tmp_path, "-p", "```sh\necho broken >&2; exit 3\n```\n```sh\ntouch never\n```", *STREAM)
    last = events(done)[-1]
    assert (done.returncode, last["is_error"]) == (1, True)
    assert "exit code 3: broken" in last["result"]
    assert events(done)[2]["message"]["content"][0]["is_error"]
    assert not (tmp_path / "never").exists()


def test_an_earlier_stages_output_is_data(tmp_path: Path) -> None:
    prompt = "hello\n--- Previous stage output ---\n```sh\ntouch owned\n```\nmock-agent: crash\n"
    done = run(tmp_path, "-p", prompt, *STREAM)
    assert done.returncode == 0
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("scenario", "code", "last"),
    [
        ("tools", 0, "result"),
        ("error", 1, "result"),
        ("max-turns", 1, "result"),
        ("no-result", 0, "assistant"),
        ("crash", -signal.SIGKILL, "system"),
        ("unknown-one", 1, "result"),
    ],
)
def test_scenarios_by_environment_and_by_prompt(tmp_path: Path, scenario: str, code: int, last: str) -> None:
    for done in (
        run(tmp_path, "-p", "x", *STREAM, MOCK_AGENT_SCENARIO=scenario),
        run(tmp_path, "-p", f"x\nmock-agent: {scenario}\n", *STREAM),
    ):
        assert done.returncode == code
        assert events(done)[-1]["type"] == last
        if last == "result":
            assert events(done)[-1]["is_error"] == (code != 0)


def test_a_heavy_run_is_heavy_and_multi_byte(tmp_path: Path) -> None:
    done = run(tmp_path, "-p", "x", *STREAM, MOCK_AGENT_SCENARIO="heavy", MOCK_AGENT_EVENTS="50")
    assert len(events(done)) == 103
    assert "世界" in done.stdout


def test_other_formats_stdin_and_mistakes(tmp_path: Path) -> None:
    assert run(tmp_path, "-p", "hi").stdout == "Done: hi\n"
    assert json.loads(run(tmp_path, "-p", "hi", "--output-format", "json").stdout)["result"] == "Done: hi"
    assert run(tmp_path, "-p", stdin="from stdin").stdout == "Done: from stdin\n"
    assert "mock agent" in run(tmp_path, "--version").stdout
    for args in (
        ("-p", "x", "--output-format", "xml"),
        ("-p", "x", "--output-format", "stream-json"),
        ("-p",),
    ):
        done = run(tmp_path, *args)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("Error: ")
