"""Cancelling a file call: its thread ends before its descriptors are closed, and nothing is lost."""

from __future__ import annotations

import asyncio
import threading

import pytest

from guest.file_service import _blocking


async def test_what_a_cancelled_call_would_have_returned_is_given_back() -> None:
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    undone: list[str] = []

    def work() -> str:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait()
        return "a descriptor"

    call = asyncio.create_task(_blocking("/f", work, undo=undone.append))
    await begun.wait()
    call.cancel()
    await asyncio.sleep(0)
    assert not call.done(), "the thread still runs"
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert undone == ["a descriptor"]


async def test_a_thread_that_fails_after_cancellation_has_nothing_to_give_back() -> None:
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    undone: list[None] = []

    def work() -> None:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait()
        raise FileNotFoundError

    call = asyncio.create_task(_blocking("/f", work, undo=undone.append))
    await begun.wait()
    call.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert undone == []
