"""What reaches a terminal: never a box's control characters, always aligned."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from voidbox.cli.screen import duration, safe, size, table


@settings(deadline=None)  # the machine may be busy
@given(st.text())
def test_nothing_that_a_terminal_obeys_passes(text: str) -> None:
    shown = safe(text)
    assert all(char == "\t" or (char.isprintable() or ord(char) > 0x9F) for char in shown)
    for char in "\x1b\r\n\x07\x9b\u202e\u2066":
        assert char not in shown


@settings(deadline=None)  # the machine may be busy
@given(st.text(st.characters(categories=["L", "N"])))
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert safe(text) == text


def test_tables_align_and_show_control_characters() -> None:
    text = table(("A", "LONG"), [("x\x1b[2J", 1), ("yy", 22)], right=(1,))
    assert text.splitlines() == ["A         LONG", "x\\x1b[2J     1", "yy          22"]


def test_durations_and_sizes_are_for_people() -> None:
    assert [duration(s) for s in (0.04, 59.94, 60, 3599.6, 7384)] == [
        "0.0 s",
        "59.9 s",
        "1 min 00 s",
        "1 h 00 min",
        "2 h 03 min",
    ]
    assert [size(n) for n in (0, 1023, 1024, 5 << 20, 3 << 30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 MiB",
        "3.0 GiB",
    ]
