"""A scripted agent that looks like Claude Code from outside; no model, no network.

Takes Claude Code's flags and prints its `stream-json`, `json` or `text` output. What it
does is its *scenario*, from the environment or the prompt:

    MOCK_AGENT_SCENARIO=NAME       or a line `mock-agent: NAME` in the prompt

| scenario    | does                                                                       |
|-------------|----------------------------------------------------------------------------|
| `script`    | runs each fenced ```sh block of the prompt as a Bash tool call             |
| `simple`    | one answer, no tools                                                       |
| `tools`     | three tool calls that really happen, then an answer                        |
| `heavy`     | MOCK_AGENT_EVENTS (1000) tool calls with 1 KiB of multi-byte output each   |
| `error`     | ends with an error result and exit code 1                                  |
| `max-turns` | ends with subtype `error_max_turns` and exit code 1                        |
| `no-result` | stops without a result, exit code 0                                        |
| `crash`     | kills itself after the first event                                         |
| `hang`      | goes silent after the first event                                          |

Without a scenario: `script` if the prompt has a ```sh block, else `simple`.
MOCK_AGENT_DELAY=SECONDS waits before every event. If the prompt says
`Write your output to FILE.`, the answer is written there unless a tool has.
Runs alone: nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

VERSION = "1.0.0"
MODEL = "mock-1"
_FENCE = re.compile(r"^```(?:sh|bash|shell)[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_OUTPUT = re.compile(r"^Write your output to (/\S*?[^\s.])\.?\s*$", re.MULTILINE)
_DIRECTIVE = re.compile(r"^mock-agent:\s*([a-z-]+)\s*$", re.MULTILINE)
_CARRY = "--- Previous stage output ---"
_RESULT_LIMIT = 30000  # characters of a tool's output that are passed on, like the real one
_SWITCHES = (
    "--verbose", "--dangerously-skip-permissions", "--continue", "-c", "--include-partial-messages",
    "--strict-mcp-config", "--debug", "-d", "--ide", "--fork-session", "--replay-user-messages",
    "--no-session-persistence",
)  # fmt: skip
_INPUT_PRICE, _OUTPUT_PRICE = 3e-6, 15e-6  # dollars a token; any plausible price will do


class Usage(Exception):
    """The command line is wrong."""


class Options:
    """The flags that matter here."""

    def __init__(self, argv: list[str]) -> None:
        self.prompt = ""
        self.format = "text"
        self.model = MODEL
        self.verbose = False
        self.printing = False
        words = iter(argv)
        for word in words:
            name, equals, value = word.partition("=")
            if word in ("-p", "--print"):
                self.printing = True
            elif word == "--verbose":
                self.verbose = True
            elif word in ("--version", "-v"):
                print(f"{VERSION} (voidbox mock agent)")
                raise SystemExit(0)
            elif word == "--":
                self.prompt = " ".join(words)
            elif name == "--output-format":
                self.format = value if equals else next(words, "")
            elif name == "--model":
                self.model = value if equals else next(words, MODEL)
            elif word in _SWITCHES:
                pass
            elif word.startswith("--") and not equals:
                next(words, None)  # a flag of the real agent that takes a value
            elif not word.startswith("-") or " " in word or "\n" in word:
                self.prompt = word
        if self.format not in ("text", "json", "stream-json"):
            raise Usage(f"--output-format {self.format!r} is not text, json or stream-json")
        if self.format == "stream-json" and self.printing and not self.verbose:
            raise Usage("When using --print, --output-format=stream-json requires --verbose")


class Agent:
    """One run."""

    def __init__(self, options: Options, env: Mapping[str, str]) -> None:
        self._options = options
        self._env = env
        self._delay = float(env.get("MOCK_AGENT_DELAY", "0"))
        self._session = _uuid()
        self._started = time.monotonic()
        self._turns = 0
        self._input_tokens = _tokens(options.prompt)
        self._output_tokens = 0
        self._wanted = _OUTPUT.search(options.prompt)
        self._last: dict[str, Any] = {}

    def run(self) -> int:
        """Play the scenario; the exit code."""
        scenario = self._scenario()
        self._emit(
            {
                "type": "system",
                "subtype": "init",
                "cwd": os.getcwd(),
                "tools": ["Bash", "Read", "Write"],
                "mcp_servers": [],
                "model": self._options.model,
                "permissionMode": "bypassPermissions",
                "slash_commands": [],
                "apiKeySource": "none",
                "claude_code_version": VERSION,
            }
        )
        play = {
            "script": self._script,
            "simple": self._simple,
            "tools": self._tools,
            "heavy": self._heavy,
            "error": lambda: self._fail("error_during_execution", "the scenario asked for an error"),
            "max-turns": lambda: self._fail("error_max_turns", ""),
            "no-result": self._no_result,
            "crash": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "hang": self._hang,
        }.get(scenario)
        if play is None:
            return self._fail("error_during_execution", f"there is no scenario {scenario!r}")
        return play() or 0

    def _scenario(self) -> str:
        if name := self._env.get("MOCK_AGENT_SCENARIO"):
            return name
        own = self._own_prompt()
        if found := _DIRECTIVE.search(own):
            return found.group(1)
        return "script" if _FENCE.search(own) else "simple"

    def _own_prompt(self) -> str:
        """The prompt without what an earlier stage has put into it, which is data."""
        return self._options.prompt.partition(_CARRY)[0]

    def _script(self) -> int:
        answer = ""
        for block in _blocks(self._own_prompt()):
            code, answer = self._bash(block)
            if code != 0:
                return self._fail(
                    "error_during_execution", f"a command failed with exit code {code}: {answer.strip()}"
                )
        return self._succeed(answer.strip() or "done")

    def _simple(self) -> int:
        first = self._own_prompt().strip().split("\n", 1)[0]
        return self._succeed(f"Done: {first}" if first else "Done.")

    def _tools(self) -> int:
        _, listing = self._bash("pwd; ls")
        self._tool(
            "Write", {"file_path": "mock-agent.txt", "content": listing}, *_write("mock-agent.txt", listing)
        )
        self._bash("wc -c < mock-agent.txt")
        return self._succeed("I looked around and wrote mock-agent.txt.")

    def _heavy(self) -> int:
        count = int(self._env.get("MOCK_AGENT_EVENTS", "1000"))
        line = "z\u00fcgig \u4e16\u754c \U0001f680 "
        text = (line * (1024 // len(line.encode()) + 1))[:900]
        for number in range(count):
            self._tool("Read", {"file_path": f"/workspace/{number}"}, text, failed=False)
        return self._succeed(f"read {count} files")

    def _no_result(self) -> int:
        self._say("I shall stop without a result.")
        return 0

    def _hang(self) -> NoReturn:
        self._say("I shall think for ever.")
        while True:
            signal.pause()

    def _bash(self, command: str) -> tuple[int, str]:
        import subprocess

        done = subprocess.run(  # noqa: S602 - running shell blocks is what this program is for
            command,
            shell=True,
            executable="/bin/sh",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        output = done.stdout.decode(errors="replace")
        self._tool("Bash", {"command": command.strip()}, output, failed=done.returncode != 0)
        return done.returncode, output

    def _say(self, text: str) -> None:
        self._turns += 1
        self._assistant({"type": "text", "text": text}, _tokens(text))

    def _tool(self, name: str, arguments: dict[str, str], output: str, failed: bool) -> None:
        self._turns += 1
        tool_id = f"toolu_{os.urandom(12).hex()}"
        use = {"type": "tool_use", "id": tool_id, "name": name, "input": arguments}
        self._assistant(use, _tokens(json.dumps(arguments)))
        shown = output if len(output) <= _RESULT_LIMIT else output[:_RESULT_LIMIT] + "\n(cut)"
        self._input_tokens += _tokens(shown)
        result = {"type": "tool_result", "tool_use_id": tool_id, "content": shown, "is_error": failed}
        self._emit(
            {"type": "user", "message": {"role": "user", "content": [result]}, "parent_tool_use_id": None}
        )

    def _assistant(self, block: dict[str, Any], tokens: int) -> None:
        self._output_tokens += tokens
        message = {
            "id": f"msg_{os.urandom(12).hex()}",
            "type": "message",
            "role": "assistant",
            "model": self._options.model,
            "content": [block],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(self._input_tokens, tokens),
        }
        self._emit({"type": "assistant", "message": message, "parent_tool_use_id": None})

    def _succeed(self, answer: str) -> int:
        self._say(answer)
        if self._wanted and not _written_since(self._wanted.group(1), self._started):
            problem, failed = _write(self._wanted.group(1), answer + "\n")
            if failed:
                return self._fail("error_during_execution", problem)
        self._result("success", answer, failed=False)
        return 0

    def _fail(self, subtype: str, text: str) -> int:
        self._result(subtype, text, failed=True)
        return 1

    def _result(self, subtype: str, text: str, *, failed: bool) -> None:
        spent = int((time.monotonic() - self._started) * 1000)
        self._emit(
            {
                "type": "result",
                "subtype": subtype,
                "is_error": failed,
                "duration_ms": spent,
                "duration_api_ms": spent,
                "num_turns": self._turns,
                "result": text,
                "total_cost_usd": round(
                    self._input_tokens * _INPUT_PRICE + self._output_tokens * _OUTPUT_PRICE, 6
                ),
                "usage": _usage(self._input_tokens, self._output_tokens),
                "permission_denials": [],
            }
        )
        if self._options.format == "text":
            print(text)
        elif self._options.format == "json":
            print(json.dumps(self._last))

    def _emit(self, event: dict[str, Any]) -> None:
        if self._delay:
            time.sleep(self._delay)
        self._last = event | {"session_id": self._session, "uuid": _uuid()}
        if self._options.format == "stream-json":
            # Not escaped to ASCII: readers must cope with characters that are split between reads.
            print(json.dumps(self._last, ensure_ascii=False), flush=True)


def _blocks(prompt: str) -> Iterator[str]:
    for found in _FENCE.finditer(prompt):
        yield found.group(1)


def _write(path: str, text: str) -> tuple[str, bool]:
    """Write a file; what the tool says, and whether it failed."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        return f"cannot write {path}: {error.strerror}", True
    return f"wrote {len(text.encode())} bytes to {path}", False


def _written_since(path: str, started: float) -> bool:
    try:
        changed = os.stat(path).st_mtime
    except OSError:
        return False
    # A coarse clock stamps files up to a tick early.
    return changed >= time.time() - (time.monotonic() - started) - 0.02


def _usage(input_tokens: int, output_tokens: int) -> dict[str, int]:
    return {
        "input_tokens": input_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": output_tokens,
    }


def _tokens(text: str) -> int:
    return len(text) // 4 + 1


def _uuid() -> str:
    text = os.urandom(16).hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def main() -> NoReturn:
    """Entry point of `voidbox-mock-agent`."""
    # A prompt that is no UTF-8 comes in as surrogates.
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    try:
        options = Options(sys.argv[1:])
        if not options.prompt and not sys.stdin.isatty():
            options.prompt = sys.stdin.read()
        if not options.prompt:
            raise Usage(
                "Input must be provided either through stdin or as a prompt argument when using --print"
            )
    except Usage as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(Agent(options, os.environ).run())
