"""Events in, lines and stage states out."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from voidbox.cli.progress import describe, elapsed
from voidbox.cli.view import MAX_LINE, Lines, RunView
from voidbox.orchestrator.v1 import orchestrator_pb2 as pb


@settings(deadline=None)  # the machine may be busy
@given(st.binary(), st.lists(st.integers(0, 200)))
def test_lines_do_not_depend_on_how_the_bytes_were_split(data: bytes, cuts: list[int]) -> None:
    whole = Lines()
    expected = whole.feed(data) + whole.rest()
    split = Lines()
    found, last = [], 0
    for cut in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
        found += split.feed(data[last:cut])
        last = cut
    assert found + split.rest() == expected


def test_a_line_without_end_is_cut_and_a_redrawn_line_shows_its_last_state() -> None:
    lines = Lines()
    assert [len(line) for line in lines.feed(b"x" * (2 * MAX_LINE + 5))] == [MAX_LINE, MAX_LINE]
    assert lines.rest() == ["xxxxx"]
    assert lines.feed(b"10%\r50%\r100%\r\n") == ["100%"]


def event(stage: str, **kind: object) -> pb.Event:
    return pb.Event(stage=stage, **kind)  # type: ignore[arg-type]


def moved(state: int, **more: object) -> pb.Event:
    stage = pb.Stage(name="a", state=pb.StageState.ValueType(state), **more)  # type: ignore[arg-type]
    return event("a", stage_state=pb.StageStateChange(stage=stage))


def test_a_stage_is_followed_through_its_phases() -> None:
    view = RunView(pb.Run(stages=[pb.Stage(name="a"), pb.Stage(name="b")]))
    assert list(view.stages) == ["a", "b"]
    stage = view.stages["a"]
    assert [line.text for line in view.apply(moved(pb.STAGE_STATE_STARTING, attempts=1))] == ["starting"]
    progress = pb.ProgressEvent(subject="image", action="download", done=1, total=4)
    assert [line.text for line in view.apply(event("a", progress=progress))] == ["download image"]
    assert describe(stage) == "download ━━━━━╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌ 25%"
    assert list(view.apply(event("a", progress=progress))) == []
    list(view.apply(moved(pb.STAGE_STATE_RUNNING, attempts=1)))
    assert describe(stage) == "running"
    output = pb.OutputEvent(stream=1, data=b"one\ntw")  # type: ignore[arg-type]
    assert [line.text for line in view.apply(event("a", output=output))] == ["one"]
    assert stage.last_line == "one"
    texts = [line.text for line in view.apply(moved(pb.STAGE_STATE_FAILED, attempts=1, reason="exit code 3"))]
    assert texts == ["tw", "failed: exit code 3"]
    assert elapsed(stage, 5.0) == ""


def test_the_two_streams_do_not_mix_within_a_line() -> None:
    view = RunView(pb.Run(stages=[pb.Stage(name="a")]))
    out = pb.OutputEvent(stream=1, data=b"out-")  # type: ignore[arg-type]
    err = pb.OutputEvent(stream=2, data=b"err\n")  # type: ignore[arg-type]
    assert list(view.apply(event("a", output=out))) == []
    (line,) = view.apply(event("a", output=err))
    assert (line.text, line.stderr) == ("err", True)


def test_layers_that_come_at_once_are_one_bar_and_a_line_each() -> None:
    view = RunView(pb.Run(stages=[pb.Stage(name="a")]))
    list(view.apply(moved(pb.STAGE_STATE_STARTING, attempts=1)))
    texts = []
    for subject, done in (
        ("sha256:" + "a" * 64, 0),
        ("sha256:" + "b" * 64, 1 << 20),
        ("sha256:" + "a" * 64, 1 << 20),
    ):
        progress = pb.ProgressEvent(
            subject=subject, action="download", done=done, total=4 << 20, unit="bytes"
        )
        texts += [line.text for line in view.apply(event("a", progress=progress))]
    assert texts == ["download aaaaaaaaaaaa (4.0 MiB)", "download bbbbbbbbbbbb (4.0 MiB)"]
    assert describe(view.stages["a"]) == "download ━━━━━╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌ 25% 2.0 MiB of 8.0 MiB"
    progress = pb.ProgressEvent(subject="sha256:" + "a" * 64, action="convert", done=1, total=1, unit="bytes")
    assert [line.text for line in view.apply(event("a", progress=progress))] == ["convert aaaaaaaaaaaa (1 B)"]
    assert describe(view.stages["a"]).startswith("convert ━━━━━━━━━━━━━━━━━━━━ 100%")
