"""Secrets are found in all their forms, wherever a body is cut, and nothing else is held back."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import AsyncIterator
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.hypervisor.egress.mask import Mask

SECRET = "ghp_A1b2&C3d4/E5f6+G7h8=I9"
RAW = SECRET.encode()


def masked(*pieces: bytes, secret: str = SECRET) -> list[bytes]:
    """What comes out, piece by piece."""
    mask = Mask()
    mask.learn([secret])

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    out: list[bytes] = []
    stream = mask.stream(body())

    def step() -> bool:
        try:
            anext(stream).__await__().send(None)
        except StopIteration as stop:
            out.append(stop.value)
            return True
        except StopAsyncIteration:
            return False
        raise AssertionError("the mask waited for something")

    while step():
        pass
    return out


@pytest.mark.parametrize(
    "form",
    [
        RAW,
        quote(SECRET, safe="").encode(),
        RAW.hex().encode(),
        RAW.hex().upper().encode(),
        json.dumps(SECRET).replace("/", "\\/").encode(),
        html.escape(SECRET).encode(),
        base64.b64encode(RAW),
    ],
)
@pytest.mark.parametrize("cut", range(1, 12))
def test_a_form_is_covered_wherever_the_body_is_cut(form: bytes, cut: int) -> None:
    data = b"before " + form + b" after"
    pieces = [data[at : at + cut] for at in range(0, len(data), cut)]
    out = b"".join(masked(*pieces))
    assert len(out) == len(data)
    assert b"****" in out
    assert form[8:16] not in out
    assert out.startswith(b"before ")
    assert out.endswith(b" after")


@given(before=st.binary(max_size=9), after=st.binary(max_size=9), urlsafe=st.booleans())
def test_base64_of_a_text_with_the_secret_in_it_shows_no_part_of_it(
    before: bytes, after: bytes, urlsafe: bool
) -> None:
    encode = base64.urlsafe_b64encode if urlsafe else base64.b64encode
    out = b"".join(masked(encode(before + RAW + after)))
    shown = base64.b64decode(out.replace(b"*", b"A").replace(b"-", b"+").replace(b"_", b"/"))
    # A byte at each end shares a character with its neighbour.
    assert RAW[1:5] not in shown
    assert RAW[-5:-1] not in shown


@given(st.binary(max_size=300), st.integers(1, 50))
def test_other_bodies_pass_as_they_are(data: bytes, cut: int) -> None:
    pieces = [data[at : at + cut] for at in range(0, len(data), cut)]
    assert b"".join(masked(*pieces)) == data


def test_only_what_may_begin_a_secret_is_held_back() -> None:
    assert masked(b"data: hello\n\n", b"the end gh", b"p_ no") == [
        b"data: hello\n\n",
        b"the end ",
        b"ghp_ no",
    ]


def test_a_secret_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="less than 8"):
        Mask().learn(["short"])
