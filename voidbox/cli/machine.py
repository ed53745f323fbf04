"""`voidbox console`, `pause`, `resume` and `update`: the machine of a box, whatever runs in it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from services.common.errors import InvalidInput
from voidbox.cli.boxes import find_box, state_word
from voidbox.cli.connection import Context
from voidbox.cli.exitcode import ExitCode
from voidbox.cli.interrupts import until_interrupted
from voidbox.cli.screen import safe
from voidbox.cli.terminal import write_all
from voidbox.client import CALL_SECONDS, Client, rpc_errors
from voidbox.hypervisor.v1 import hypervisor_pb2 as hv

# Of a box that has ended the console says why.
_ANY = frozenset(hv.BoxState.values())
_PAUSABLE = frozenset((hv.BOX_STATE_RUNNING, hv.BOX_STATE_PAUSED))


def console_command(context: Context) -> int:
    """Print what the kernel and the agent of a box have printed."""
    return asyncio.run(_console(context))


async def _console(context: Context) -> int:
    stack = await asyncio.to_thread(context.stack)

    async def show() -> None:
        async with stack.connect() as client:
            box = await find_box(client, context.args.box, _ANY)
            request = hv.ReadConsoleRequest(
                box_id=box, offset=-context.args.tail_bytes, follow=context.args.follow
            )
            rest = b""
            with rpc_errors():
                async for piece in client.hypervisor.ReadConsole(request):
                    if context.screen.json:
                        text = piece.data.decode(errors="replace")
                        context.screen.data({"box_id": box, "offset": piece.offset, "data": text})
                        continue
                    *lines, rest = (rest + piece.data).split(b"\n")
                    await _print(lines)
            if rest:
                await _print([rest])

    return await until_interrupted(show())


async def _print(lines: list[bytes]) -> None:
    """A guest's lines, with nothing in them that a terminal would obey."""
    shown = "".join(f"{safe(line.decode(errors='replace').rstrip(chr(13)))}\n" for line in lines)
    await write_all(1, shown.encode())


def pause_command(context: Context) -> int:
    """Stop the processors of boxes."""

    async def pause(client: Client, box: str) -> hv.Box:
        request = hv.PauseBoxRequest(box_id=box)
        return (await client.call(lambda: client.hypervisor.PauseBox(request, timeout=CALL_SECONDS))).box

    return _each(context, pause)


def resume_command(context: Context) -> int:
    """Let the processors of boxes go on."""

    async def resume(client: Client, box: str) -> hv.Box:
        request = hv.ResumeBoxRequest(box_id=box)
        return (await client.call(lambda: client.hypervisor.ResumeBox(request, timeout=CALL_SECONDS))).box

    return _each(context, resume)


def update_command(context: Context) -> int:
    """Change limits, times and labels of boxes."""
    args = context.args
    wanted = hv.UpdateBoxRequest()
    if args.cpus:
        wanted.limits.cpu_millis = max(1, round(args.cpus * 1000))
    if args.processes:
        wanted.limits.processes = args.processes
    if args.memory_mb:
        wanted.resources.memory_mib = args.memory_mb
    for name in ("max_lifetime", "idle_timeout", "auto_pause"):
        if getattr(args, name) is not None:
            getattr(wanted, name).FromNanoseconds(round(getattr(args, name) * 1e9))
    for label in args.label:
        name, _, value = label.partition("=")
        if not name:
            raise InvalidInput(f"--label {label!r} has no name", reason="BAD_OPTION")
        wanted.labels[name] = value
    if not wanted.ByteSize():
        raise InvalidInput("nothing is to be changed; see voidbox update --help", reason="BAD_OPTION")

    async def update(client: Client, box: str) -> hv.Box:
        request = hv.UpdateBoxRequest()
        request.CopyFrom(wanted)
        request.box_id = box
        return (await client.call(lambda: client.hypervisor.UpdateBox(request, timeout=CALL_SECONDS))).box

    return _each(context, update)


def _each(context: Context, action: Callable[[Client, str], Awaitable[hv.Box]]) -> int:
    stack = context.stack()

    async def work() -> list[hv.Box]:
        async with stack.connect() as client:
            # All are found before any is touched.
            boxes = [await find_box(client, name, _PAUSABLE) for name in context.args.boxes]
            return [await action(client, box) for box in boxes]

    boxes = asyncio.run(work())
    context.screen.result(
        "\n".join(f"{box.id} {state_word(box.state)}" for box in boxes),
        [{"box_id": box.id, "state": state_word(box.state)} for box in boxes],
    )
    return ExitCode.OK
