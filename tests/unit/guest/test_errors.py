"""The hand-made encoding of a failure is what googleapis' own messages decode."""

from __future__ import annotations

import errno

from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from guest.errors import AgentError, Code, encode_status, from_os_error

text = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.integers(min_value=0, max_value=16), text, text, st.dictionaries(text, text, max_size=5))
def test_a_status_decodes_to_what_was_encoded(
    code: int, message: str, reason: str, metadata: dict[str, str]
) -> None:
    status = status_pb2.Status.FromString(encode_status(code, message, reason, metadata))
    assert (status.code, status.message) == (code, message)
    [detail] = status.details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == (reason, "voidbox", metadata)


def test_what_goes_into_trailing_metadata_is_bounded() -> None:
    error = AgentError(Code.INTERNAL, "X", "m" * 100_000, path="p" * 100_000)
    assert len(error.trailing()[0][1]) < 8000


def test_an_os_error_names_the_path_and_the_errno() -> None:
    error = from_os_error(OSError(errno.ENOSPC, "No space left on device"), "/a")
    assert (error.code, error.reason) == (Code.RESOURCE_EXHAUSTED, "DISK_FULL")
    assert error.metadata == {"path": "/a", "errno": "ENOSPC"}
    assert error.message == "/a: No space left on device"
    assert from_os_error(OSError(errno.EIO, "x"), "/a").code is Code.INTERNAL
