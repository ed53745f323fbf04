"""An agent's stream is read the same however it is cut, and nothing it holds can break the reader."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.orchestrator import stream_json
from services.orchestrator.records import Said, ToolUsed, Used
from services.orchestrator.stream_json import StreamJson

LINES = [
    {"type": "system", "subtype": "init"},
    {
        "type": "assistant",
        "message": {"content": [{"type": "text", "text": "Grüße ☃ 𐀀"}], "usage": {"input_tokens": 1}},
    },
    {
        "type": "assistant",
        "message": {"content": [{"type": "tool_use", "name": "Bash", "input": {"command": "ls -l"}}]},
    },
    {"type": "result", "result": "fertig ☃", "is_error": False, "num_turns": 3, "total_cost_usd": 1.5},
]
STREAM = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES).encode()


def read(*chunks: bytes) -> tuple[StreamJson, list[Said | ToolUsed | Used]]:
    reader = StreamJson()
    entries = [entry for chunk in chunks for entry in reader.feed(chunk)]
    return reader, entries + reader.finish()


@pytest.mark.parametrize("cut", range(len(STREAM) + 1))
def test_a_cut_at_any_byte_changes_nothing(cut: int) -> None:
    reader, entries = read(STREAM[:cut], STREAM[cut:])
    assert entries == read(STREAM)[1]
    assert reader.result is not None
    assert reader.result.text == "fertig ☃"
    assert reader.result.usage.turns == 3


def test_a_last_line_without_newline_counts() -> None:
    assert read(STREAM[:-1])[0].result is not None


def test_no_result_is_no_result() -> None:
    reader, _ = read(b"".join(STREAM.splitlines(keepends=True)[:-1]))
    assert reader.messages == 3
    assert reader.result is None


def test_an_overlong_line_is_dropped_and_the_next_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_json, "MAX_LINE", 1000)
    reader, _ = read(b'{"type":"assistant","x":"' + b"a" * 900, b"a" * 900, b"a" * 900 + b'"}\n', STREAM)
    assert reader.messages == 4
    assert reader.result is not None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "message", "content", "usage", "input_tokens", "result", "text", "input", "name"]
            ),
            inner | st.sampled_from(["assistant", "result", "text", "tool_use", "system"]),
            max_size=4,
        )
    ),
    max_leaves=10,
)


@given(
    st.lists(st.binary(max_size=60) | _JSON.map(lambda tree: json.dumps(tree).encode() + b"\n"), max_size=6)
)
def test_nothing_breaks_the_reader(chunks: list[bytes]) -> None:
    reader, entries = read(*chunks)
    whole, at_once = read(b"".join(chunks))
    assert entries == at_once
    assert reader.result == whole.result
    for entry in entries:
        if isinstance(entry, Said):
            entry.text.encode()


def test_half_a_surrogate_pair_does_not_reach_the_log() -> None:
    _, entries = read(b'{"type":"assistant","message":{"content":[{"type":"text","text":"a\\ud800b"}]}}\n')
    assert [entry.text for entry in entries if isinstance(entry, Said)] == ["a?b"]
