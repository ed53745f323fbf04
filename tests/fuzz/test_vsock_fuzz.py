"""Hostile bytes against the vsock device: the corpus is replayed, hypothesis adds to it.

The invariant is in `vsock_target`. A failing input that hypothesis prints belongs into the corpus:
write its bytes to `vsock_corpus/<what-it-shows>`.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import vsock_target as target

CORPUS = sorted(Path(__file__).with_name("vsock_corpus").iterdir())


def test_there_is_a_corpus() -> None:
    assert len(CORPUS) >= 20


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_the_corpus_holds(path: Path) -> None:
    target.run(path.read_bytes())


SMALL = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@SMALL
@given(st.binary(max_size=400))
def test_any_bytes_hold(data: bytes) -> None:
    target.run(data)


def numbers(*sizes: int) -> st.SearchStrategy[bytes]:
    """Little-endian numbers of these sizes, the edges more often than the rest."""

    def one(size: int) -> st.SearchStrategy[bytes]:
        top = (1 << 8 * size) - 1
        edges = st.sampled_from([0, 1, 2, top, top >> 1, (top >> 1) + 1, min(top, 0x1000), min(top, 0x5000)])
        return (edges | st.integers(0, top)).map(lambda value: value.to_bytes(size, "little"))

    return st.tuples(*map(one, sizes)).map(b"".join)


def kind(step: int, rest: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """A step of this kind."""
    return rest.map(lambda data: bytes([step]) + data)


def packets() -> st.SearchStrategy[bytes]:
    """Packets that reach a stream: `vsock_target.packet` without stray fields, with one of each kind."""

    def encode(length: int, port: int, op: int, flags: int) -> bytes:
        head = bytes([target.STEP_PACKET]) + struct.pack("<H", length) + b"p" * length
        return head + bytes([0, port, op, flags])

    return st.builds(encode, st.integers(0, 2900), st.integers(0, 6), st.integers(0, 8), st.integers(0, 4))


STEPS = st.one_of(
    packets(),
    st.just(bytes([target.STEP_DIAL])),
    st.just(bytes([target.STEP_COLLECT])),
    kind(target.STEP_CLIENT, numbers(1, 1, 2)),
    kind(target.STEP_RAW_PACKET, st.binary(min_size=45, max_size=60).map(lambda d: bytes([len(d)]) + d)),
    kind(target.STEP_DESCRIBE, numbers(1, 1, 8, 4, 2, 2)),
    kind(target.STEP_OFFER, numbers(1, 2, 1, 2)),
    kind(target.STEP_POKE, numbers(1, 1, 2, 1, 8)),
    kind(target.STEP_MESSAGE, numbers(1, 1, 4, 4, 8, 8, 1, 1)),
    kind(target.STEP_RAW_MESSAGE, numbers(1, 4, 4, 4, 1)),
    st.just(bytes([target.STEP_RESET])),
    st.just(bytes([target.STEP_PAUSE])),
    st.just(bytes([target.STEP_REPLUG])),
)


@SMALL
@given(st.lists(STEPS, max_size=60).map(b"".join))
def test_any_order_of_steps_holds(data: bytes) -> None:
    target.run(data)


@SMALL
@given(
    st.lists(
        st.one_of(
            packets(),
            st.just(bytes([target.STEP_DIAL])),
            st.just(bytes([target.STEP_COLLECT])),
            kind(target.STEP_CLIENT, numbers(1, 1, 2)),
        ),
        max_size=100,
    ).map(b"".join)
)
def test_any_order_of_packets_and_client_calls_holds(data: bytes) -> None:
    target.run(data)
