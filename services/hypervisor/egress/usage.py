"""Tokens that a model's provider says it has counted, read from its answer while that passes by.

Understood are Anthropic's Messages, OpenAI's Chat Completions and Responses, what is compatible with
them, and Ollama's own API; as one JSON document, as server-sent events, and as JSON lines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

# A document, or one event, of a provider. Larger ones pass; what they say is estimated.
MAX_DOCUMENT: Final = 16 << 20
# Characters of a token in English text, by the providers' own rule of thumb; low, so that an
# estimate is rather too high.
_BYTES_PER_TOKEN: Final = 3
# What is around the text in an event of OpenAI's or Anthropic's streams.
_EVENT_BYTES: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one answer.

    Attributes:
        input: Read anew.
        output: Written.
        cache_read: Read from the provider's cache.
        cache_write: Written to it.
    """

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.input + self.output + self.cache_read + self.cache_write


class UsageReader:
    """Reads one answer.

    Args:
        kind: Its content type.
    """

    def __init__(self, kind: bytes) -> None:
        self._lines = b"event-stream" in kind or b"ndjson" in kind or b"jsonl" in kind
        self._buffer = bytearray()
        self._too_long = False
        self._counts: dict[str, int] = {}
        self._cost: float | None = None
        self._bytes = 0
        self._events = 0
        self._final = False
        self.model = ""

    def feed(self, chunk: bytes) -> None:
        """The answer goes on."""
        self._bytes += len(chunk)
        if self._too_long and not self._lines:
            return
        self._buffer += chunk
        if self._lines:
            *lines, rest = self._buffer.split(b"\n")
            for line in lines:
                if not self._too_long:
                    self._line(bytes(line))
                self._too_long = False
            self._buffer = bytearray(rest)
        if len(self._buffer) > MAX_DOCUMENT:
            self._buffer.clear()
            self._too_long = True

    def message(self, data: bytes) -> None:
        """One message of a WebSocket."""
        self._bytes += len(data)
        self._document(data)

    def close(self) -> None:
        """The answer has ended."""
        if self._buffer and not self._too_long:
            if self._lines:
                self._line(bytes(self._buffer))
            else:
                self._document(bytes(self._buffer))
        self._buffer.clear()

    def usage(self) -> Usage | None:
        """What was said; None if nothing was."""
        return Usage(**self._counts) if self._counts else None

    @property
    def cost(self) -> float | None:
        """USD, where the provider itself says so."""
        return self._cost

    @property
    def final(self) -> bool:
        """Whether the provider has said its last word on the output."""
        return self._final

    def estimate_output(self) -> int:
        """Tokens that an answer without a last word had, roughly: one an event, more for longer ones."""
        return self._events + max(0, self._bytes - _EVENT_BYTES * self._events) // _BYTES_PER_TOKEN

    def _line(self, line: bytes) -> None:
        line = line.strip()
        if line.startswith(b"data:"):
            self._events += 1
            line = line[5:].strip()
        if line.startswith(b"{"):
            self._document(line)

    def _document(self, data: bytes) -> None:
        # Most events are pieces of text; only those with numbers are worth parsing.
        if b"usage" not in data and b"eval_count" not in data and b'"model"' not in data:
            return
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return
        if not isinstance(document, dict):
            return
        for part in (document, document.get("message"), document.get("response")):
            if isinstance(part, dict):
                if isinstance(part.get("model"), str):
                    self.model = part["model"][:200]
                if isinstance(part.get("usage"), dict):
                    self._read(part["usage"], document)
        if "eval_count" in document:
            self._note(input=document.get("prompt_eval_count"), output=document.get("eval_count"))
            self._final = True

    def _read(self, usage: Mapping[str, Any], document: Mapping[str, Any]) -> None:
        if "prompt_tokens" in usage:
            cached = _cached(usage.get("prompt_tokens_details"))
            whole = _count(usage.get("prompt_tokens"))
            self._note(input=whole - cached, cache_read=cached, output=usage.get("completion_tokens"))
        else:
            cached = _cached(usage.get("input_tokens_details"))
            self._note(
                input=_count(usage.get("input_tokens")) - cached,
                output=usage.get("output_tokens"),
                cache_read=cached or usage.get("cache_read_input_tokens"),
                cache_write=usage.get("cache_creation_input_tokens"),
            )
        if isinstance(usage.get("cost"), int | float):
            self._cost = max(self._cost or 0.0, float(usage["cost"]))
        # Anthropic's first event counts the input; its output comes with `message_delta`.
        self._final = self._final or document.get("type") != "message_start"

    def _note(self, **counts: object) -> None:
        """Counts in a stream grow, so the largest one is the sum."""
        for key, value in counts.items():
            self._counts[key] = max(self._counts.get(key, 0), _count(value))


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        return 0
    return min(max(value, 0), 1 << 40)


def _cached(details: object) -> int:
    return _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
