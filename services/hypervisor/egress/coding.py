"""Bodies that a server has compressed although it was asked not to."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator

import zstandard

from services.hypervisor.egress.message import Body, HttpError, Response, close_body, get, without
from services.hypervisor.egress.stream import CHUNK, StreamError


def decoded(response: Response) -> Response:
    """`response` with a body that can be read.

    Raises:
        HttpError: its coding is unknown.
    """
    coding = (get(response.headers, b"content-encoding") or b"").strip().lower()
    if coding in (b"", b"identity"):
        return response
    encoded = response.body
    if coding in (b"gzip", b"x-gzip"):
        body = _inflate(response.body, zlib.MAX_WBITS | 16)
    elif coding == b"deflate":
        body = _inflate(response.body, zlib.MAX_WBITS)
    elif coding == b"zstd":
        body = _unzstd(response.body)
    else:
        raise HttpError(
            502,
            f"the server compressed its answer with {coding.decode('latin-1')!r}, which was not asked for "
            "and cannot be searched for secrets",
            reason="CODING",
        )
    response.headers = without(response.headers, b"content-encoding", b"content-length")
    response.body = Body(body, lambda _: close_body(encoded))
    return response


async def _inflate(body: AsyncIterator[bytes], wbits: int) -> AsyncIterator[bytes]:
    state = zlib.decompressobj(wbits)
    async for piece in body:
        chunk = piece
        while chunk:
            try:
                if data := state.decompress(chunk, CHUNK):
                    yield data
            except zlib.error as error:
                raise StreamError(f"the server's compressed answer is damaged: {error}") from error
            chunk = state.unconsumed_tail
            if state.eof and state.unused_data:  # gzip members may follow each other
                chunk, state = state.unused_data, zlib.decompressobj(wbits)
    while data := state.decompress(b"", CHUNK):  # what did not fit into the last piece
        yield data
    if not state.eof:
        raise StreamError("the server's compressed answer is cut off")


async def _unzstd(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    # RFC 9659: windows for HTTP have at most 8 MiB.
    state = zstandard.ZstdDecompressor(max_window_size=8 << 20).decompressobj(write_size=CHUNK)
    async for chunk in body:
        # Small pieces, as one of them may become a thousand times as much at once.
        for at in range(0, len(chunk), 1024):
            try:
                if data := state.decompress(chunk[at : at + 1024]):
                    yield data
            except zstandard.ZstdError as error:
                raise StreamError(f"the server's compressed answer is damaged: {error}") from error
