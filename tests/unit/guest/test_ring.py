"""A ring is the tail of a byte string: every operation against the plain string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest.ring import Ring

operations = st.lists(
    st.one_of(st.binary(max_size=300), st.integers(min_value=-5, max_value=2000)), max_size=40
)


@given(operations, st.integers(min_value=1, max_value=64))
def test_a_ring_is_the_tail_of_all_that_was_appended(steps: list[bytes | int], size: int) -> None:
    ring, whole, start = Ring(), b"", 0
    for step in steps:
        if isinstance(step, bytes):
            ring.append(step)
            whole += step
        else:
            dropped = ring.drop_before(step)
            assert dropped == max(0, min(step, len(whole)) - start)
            start += dropped
        assert (ring.start, ring.end, len(ring)) == (start, len(whole), len(whole) - start)
    for offset in range(start, len(whole) + 1, 7):
        assert ring.read(offset, size) == whole[offset : offset + size]
    for outside in (start - 1, len(whole) + 1):
        with pytest.raises(IndexError):
            ring.read(outside, 1)
