"""An audit log that was touched says where."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.hypervisor.egress.chain import Chain, Head, verify


def lines(count: int) -> tuple[list[bytes], Head]:
    chain = Chain("box")
    made = []
    for number in range(count):
        made.append(chain.link({"kind": "http", "number": number, "detail": {"trace": "ab" * 16}}))
        chain.accept(made[-1])
    return made, chain.head


def test_an_untouched_log_is_whole() -> None:
    made, head = lines(5)
    assert verify("box", made, head) == (head, [])
    assert verify("box", [], None)[1] == []


@given(at=st.integers(0, 9), data=st.data())
def test_any_edit_is_found_and_its_record_named(at: int, data: st.DataObject) -> None:
    made, head = lines(10)
    record = json.loads(made[at])
    key = data.draw(st.sampled_from(sorted(set(record) - {"hash", "seq"})))
    record[key] = "forged"
    made[at] = json.dumps(record).encode()
    wrong = verify("box", made, head)[1]
    assert any(f"record {at + 1}: was edited" in one for one in wrong)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda made: made[:3] + made[4:], "record 4: missing before line 4"),
        (lambda made: made[:2] + made[5:], "records 3 to 5: missing before line 3"),
        (lambda made: made[:-2], "records 9 to 10: missing at the end"),
        (lambda made: made[1:], "record 1: missing before line 1"),
        (lambda made: [*made[:4], made[5], made[4], *made[6:]], "record 5: missing before line 5"),
        (lambda made: [*made[:4], b"{}", *made[4:]], "line 5 is not a record"),
        (lambda made: [], "records 1 to 10: missing at the end"),
    ],
)  # fmt: skip
def test_missing_and_moved_records_are_named(change: object, named: str) -> None:
    made, head = lines(10)
    assert named in verify("box", change(made), head)[1]  # type: ignore[operator]


def test_a_log_that_was_made_anew_does_not_have_the_end_that_was_noted() -> None:
    _, head = lines(3)
    chain = Chain("box")
    forged = []
    for number in range(3):
        forged.append(chain.link({"kind": "http", "number": number, "allowed": True}))
        chain.accept(forged[-1])
    assert verify("box", forged, head)[1] == ["record 3: the end is not the one that the run has noted"]
    assert verify("other box", forged)[1] == ["record 1: does not follow the record before it"]


def test_a_record_that_could_not_be_written_leaves_no_gap() -> None:
    chain = Chain("box")
    chain.link({"kind": "lost"})
    line = chain.link({"kind": "kept"})
    chain.accept(line)
    assert verify("box", [line], chain.head)[1] == []


def test_a_chain_goes_on_after_a_fork() -> None:
    chain = Chain("box")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        line = chain.link({"by": "child"})
        chain.accept(line)
        os.write(writer, line)
        os._exit(0)
    os.waitpid(child, 0)
    first = os.read(reader, 4096)
    second = chain.link({"by": "parent"})
    chain.accept(second)
    os.close(reader)
    os.close(writer)
    assert verify("box", [first, second], chain.head) == (chain.head, [])
