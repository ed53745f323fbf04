"""What an agent prints with `--output-format stream-json`: one JSON object per line.

Bytes in, messages out, no I/O. Lines are cut at newline bytes before anything is decoded,
so characters that are split between chunks arrive whole. A line that is no JSON object
is noise of the program and is passed over; one longer than `MAX_LINE` is dropped, so a
hostile program cannot fill the memory.

Source: the message shapes of Claude Code's headless mode (system, assistant, user, result).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from services.orchestrator.records import Said, ToolUsed, Usage, Used

MAX_LINE: Final = 16 << 20
MAX_SUMMARY: Final = 400
# A message is an event of the run's log; the whole text is in the agent's output.
MAX_SAID: Final = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The last message: what came of it.

    Attributes:
        text: The agent's answer.
        error: Why it failed; empty if it did not.
    """

    text: str
    error: str
    usage: Usage


class StreamJson:
    """Reads the stream; `result` is None until the agent has said how it ended."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._dropping = False
        self._usage = Usage()
        self._model = ""
        self.messages = 0
        self.result: Result | None = None

    def feed(self, data: bytes) -> list[Said | ToolUsed | Used]:
        """Take the next bytes; returns what they completed."""
        entries: list[Said | ToolUsed | Used] = []
        *lines, rest = data.split(b"\n")
        for line in lines:
            if not self._dropping:
                entries += self._message(bytes(self._line) + line)
            self._line.clear()
            self._dropping = False
        if len(self._line) + len(rest) > MAX_LINE:
            self._line.clear()
            self._dropping = True
        elif not self._dropping:
            self._line += rest
        return entries

    def finish(self) -> list[Said | ToolUsed | Used]:
        """The stream has ended; a last line without a newline counts."""
        return self.feed(b"\n")

    def _message(self, line: bytes) -> Iterator[Said | ToolUsed | Used]:
        try:
            message = json.loads(line.decode())
        except (ValueError, RecursionError):
            return
        if not isinstance(message, dict):
            return
        kind = message.get("type")
        if kind in ("system", "assistant", "user", "result"):
            self.messages += 1
        if kind == "assistant":
            yield from self._assistant(_map(message.get("message")))
        elif kind == "result":
            yield from self._result(message)

    def _assistant(self, message: Mapping[str, Any]) -> Iterator[Said | ToolUsed | Used]:
        usage = _map(message.get("usage"))
        tools = 0
        content = message.get("content")
        for block in content if isinstance(content, list) else []:
            block = _map(block)
            if block.get("type") == "text" and _text(block.get("text")):
                yield Said(text=_text(block["text"])[:MAX_SAID])
            elif block.get("type") == "tool_use":
                tools += 1
                yield ToolUsed(
                    name=_text(block.get("name"))[:100] or "?", summary=_summary(block.get("input"))
                )
        self._usage += Usage(
            input_tokens=_tokens_in(usage),
            output_tokens=_count(usage.get("output_tokens")),
            tool_calls=tools,
        )
        if usage or tools:
            yield Used(usage=self._usage)

    def _result(self, message: Mapping[str, Any]) -> Iterator[Used]:
        usage = _map(message.get("usage"))
        cost = message.get("total_cost_usd")
        self._usage = Usage(
            input_tokens=_tokens_in(usage) or self._usage.input_tokens,
            output_tokens=_count(usage.get("output_tokens")) or self._usage.output_tokens,
            cost_usd=float(cost) if isinstance(cost, (int, float)) and 0 <= cost < 1e9 else 0.0,
            tool_calls=self._usage.tool_calls,
            turns=_count(message.get("num_turns")),
        )
        text = _text(message.get("result"))
        subtype = _text(message.get("subtype"))
        error = ""
        if message.get("is_error") is True or subtype.startswith("error"):
            error = _text(message.get("error")) or text or subtype or "the agent reported an error"
        self.result = Result(text=text, error=error, usage=self._usage)
        yield Used(usage=self._usage)


def _map(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    # JSON may hold half of a surrogate pair, which is no text that could be stored or sent.
    return value.encode(errors="replace").decode() if isinstance(value, str) else ""


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53 else 0


def _tokens_in(usage: Mapping[str, Any]) -> int:
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    return sum(_count(usage.get(name)) for name in names)


def _summary(value: object) -> str:
    fields = _map(value)
    for name in ("command", "file_path", "path", "pattern", "url", "query", "description"):
        if _text(fields.get(name)):
            return _text(fields[name])[:MAX_SUMMARY]
    return json.dumps(fields, ensure_ascii=True)[:MAX_SUMMARY] if fields else ""
