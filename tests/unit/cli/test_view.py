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
    assert describe(stage) == "download 25%"
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
