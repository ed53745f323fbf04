"""`voidbox diff`, `apply` and `discard`: what boxes have changed in overlays of host directories."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import grpc

from services.common.errors import Conflict, InvalidInput, NotFound, VoidboxError, WrongState, from_rpc_error
from voidbox.cli.connection import Context
from voidbox.cli.exitcode import ExitCode
from voidbox.cli.patch import Compared, counts, patch
from voidbox.cli.screen import safe
from voidbox.client import CALL_SECONDS, Client
from voidbox.hypervisor.v1 import hypervisor_pb2 as hv

# Comparing or copying a tree of many files.
_SECONDS = 3600.0
_WIDTH = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """One overlay of one box; `stage` is empty if a box was named."""

    box_id: str
    stage: str
    directory: hv.ChangedDirectory


Command = Callable[[Context, Client], Awaitable[int]]


def diff_command(context: Context) -> int:
    """Show what a box or the boxes of a run have changed."""
    return _run(context, _diff)


def apply_command(context: Context) -> int:
    """Bring it to the host's directories."""
    return _run(context, _apply)


def discard_command(context: Context) -> int:
    """Throw it away."""
    return _run(context, _discard)


def _run(context: Context, command: Command) -> int:
    stack = context.stack()

    async def work() -> int:
        async with stack.connect() as client:
            return await command(context, client)

    return asyncio.run(work())


async def _sets(client: Client, name: str) -> list[tuple[str, hv.ChangeSet]]:
    """What is kept of the boxes that `name` means, with the names of their stages.

    Raises:
        NotFound: there is neither such a run nor anything kept of such a box.
    """
    pages = client.pages(client.hypervisor.ListChanges, hv.ListChangesRequest())
    kept = {each.box_id: each async for page in pages for each in page.changes}
    if name in kept:
        return [("", kept[name])]
    run_id, slash, stage = name.partition("/")
    try:
        run = await client.get_run(run_id)
    except (NotFound, InvalidInput):
        raise NotFound(
            f"there is neither a run {name!r} nor anything that a box of that name has changed; "
            "list runs: voidbox ps -a",
            reason="NO_CHANGES",
        ) from None
    named = [one for one in run.stages if not slash or one.name == stage]
    if not named:
        names = ", ".join(one.name for one in run.stages)
        raise NotFound(f"run {run.id} has no stage {stage!r}; it has: {names}", reason="STAGE_NOT_FOUND")
    # Stages of a workflow share one box.
    boxes = dict.fromkeys(one.box_id for one in named)
    stages = {box: next(one.name for one in named if one.box_id == box) for box in boxes}
    return [(stages[box], kept[box]) for box in boxes if box in kept]


async def tell_kept(context: Context, client: Client, run_id: str) -> bool:
    """Say so if boxes of a run have changed overlays; whether any has."""
    try:
        found = await _sets(client, run_id)
    except VoidboxError:
        return False
    if not any(kept.size_bytes or not kept.ended for _, kept in found):
        return False
    context.screen.note(
        f"changes of overlays are kept; look at them: voidbox diff {run_id}; bring them to the host: "
        f"voidbox apply {run_id}"
    )
    return True


def _paths(directory: hv.ChangedDirectory, words: Sequence[str]) -> list[bytes] | None:
    """`words` relative to the directory; None if none of them lies in it.

    Raises:
        InvalidInput: a path with `..`.
    """
    found = []
    for word in words:
        path = os.path.normpath(word)
        if path.startswith("/"):
            guest = directory.guest_path.rstrip("/")
            if path == guest:
                return []
            if not path.startswith(guest + "/"):
                continue
            path = path[len(guest) + 1 :]
        if path == ".":
            return []
        if path == ".." or path.startswith("../"):
            raise InvalidInput(f"{word}: paths are relative to the mount, or the box's", reason="BAD_PATH")
        found.append(os.fsencode(path))
    return found if found or not words else None


async def _read(
    client: Client, stage: str, kept: hv.ChangeSet, words: Sequence[str]
) -> AsyncIterator[_Place | Compared]:
    for directory in kept.directories:
        paths = _paths(directory, words)
        if paths is None:
            continue
        yield _Place(box_id=kept.box_id, stage=stage, directory=directory)
        request = hv.ReadChangesRequest(
            box_id=kept.box_id, guest_path=directory.guest_path, paths=paths, content=True
        )
        change: hv.Change | None = None
        content: dict[bool, bytes] = {}
        try:
            async for answer in client.hypervisor.ReadChanges(request, timeout=_SECONDS):
                if answer.WhichOneof("result") == "change":
                    if change is not None:
                        yield Compared(change=change, before=content.get(True), after=content.get(False))
                    change, content = answer.change, {}
                elif answer.WhichOneof("result") == "content":
                    host = answer.content.host
                    content[host] = content.get(host, b"") + answer.content.data
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        if change is not None:
            yield Compared(change=change, before=content.get(True), after=content.get(False))


async def _diff(context: Context, client: Client) -> int:
    args, screen = context.args, context.screen
    found = await _sets(client, args.target)
    several = sum(len(kept.directories) for _, kept in found) > 1
    data: list[dict[str, object]] = []
    place: _Place | None = None
    total: list[tuple[int, int]] = []
    for stage, kept in found:
        async for each in _read(client, stage, kept, args.paths):
            if isinstance(each, _Place):
                place = each
                if several and not screen.json:
                    _print(f"# {_title(place)}\n".encode())
                continue
            assert place is not None
            lines = counts(each) if each.change.type in _COUNTED else (0, 0)
            total.append(lines or (0, 0))
            if screen.json:
                data.append(_data(place, each.change) | _counted(lines) | _patched(each, stat=args.stat))
            elif args.stat:
                _print(_stat(each.change, lines))
            else:
                _print(_remarks(each.change) + patch(each))
    if screen.json:
        screen.data({"changes": data})
    elif args.stat and total:
        added, removed = (sum(one[at] for one in total) for at in (0, 1))
        _print(f" {len(total)} changed, {added} lines added (+), {removed} removed (-)\n".encode())
    return ExitCode.OK


_COUNTED = (hv.CHANGE_TYPE_FILE, hv.CHANGE_TYPE_SYMLINK)


def _print(data: bytes) -> None:
    """Write to standard output: as it is, but to a terminal nothing that it would obey."""
    if sys.stdout.isatty():
        text = data.decode(errors="replace")
        data = "".join(safe(line) + "\n" for line in text.split("\n")[:-1]).encode()
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _title(place: _Place) -> str:
    who = f"stage {place.stage}, " if place.stage else ""
    return f"{who}box {place.box_id}: {place.directory.host_path} (in the box: {place.directory.guest_path})"


def _word(kind: hv.ChangeKind.ValueType) -> str:
    return hv.ChangeKind.Name(kind).removeprefix("CHANGE_KIND_").lower()


def _type(change: hv.Change) -> str:
    return hv.ChangeType.Name(change.type).removeprefix("CHANGE_TYPE_").lower()


def _shown(path: bytes) -> str:
    return safe(path.decode(errors="backslashreplace"))


def _remarks(change: hv.Change) -> bytes:
    """What git does not take: as lines that it skips."""
    name = _shown(change.path)
    lines = []
    if change.type == hv.CHANGE_TYPE_DIRECTORY and change.kind != hv.CHANGE_KIND_MODIFIED:
        lines.append(f"# {_word(change.kind)} directory {name}")
    elif change.type == hv.CHANGE_TYPE_DIRECTORY:
        lines.append(f"# mode of directory {name}: {change.host_mode:o} to {change.mode:o}")
    lines += [f"# {name}: {why}" for why in (change.conflict, change.held, change.impossible) if why]
    return "".join(f"{line}\n" for line in lines).encode()


def _stat(change: hv.Change, lines: tuple[int, int] | None) -> bytes:
    name = _shown(change.path) + ("/" if change.type == hv.CHANGE_TYPE_DIRECTORY else "")
    if lines is None:
        amount = f"{change.host_size_bytes} -> {change.size_bytes} bytes"
    else:
        added, removed = lines
        scale = min(1.0, _WIDTH / max(1, added + removed))
        amount = f"{added + removed} " + "+" * round(added * scale) + "-" * round(removed * scale)
    marks = "".join(f"  ({why})" for why in (change.conflict, change.held, change.impossible) if why)
    return f" {_word(change.kind)[0].upper()} {name} | {amount.rstrip()}{marks}\n".encode()


def _data(place: _Place, change: hv.Change) -> dict[str, object]:
    return {
        "box_id": place.box_id,
        "stage": place.stage,
        "guest_path": place.directory.guest_path,
        "host_path": place.directory.host_path,
        "path": change.path.decode(errors="backslashreplace"),
        "kind": _word(change.kind),
        "type": _type(change),
        "mode": f"{change.mode:04o}",
        "size_bytes": change.size_bytes,
        "host_size_bytes": change.host_size_bytes,
        "target": change.target.decode(errors="backslashreplace"),
        "conflict": change.conflict,
        "held": change.held,
        "impossible": change.impossible,
    }


def _counted(lines: tuple[int, int] | None) -> dict[str, object]:
    return {"lines_added": lines[0], "lines_removed": lines[1]} if lines else {}


def _patched(each: Compared, *, stat: bool) -> dict[str, object]:
    return {} if stat else {"patch": patch(each).decode(errors="backslashreplace")}


async def _apply(context: Context, client: Client) -> int:
    args, screen = context.args, context.screen
    data: list[dict[str, object]] = []
    conflicts: list[str] = []
    left: list[str] = []
    done = 0
    for stage, kept in await _sets(client, args.target):
        for directory in kept.directories:
            paths = _paths(directory, args.paths)
            if paths is None:
                continue
            place = _Place(box_id=kept.box_id, stage=stage, directory=directory)
            request = hv.ApplyChangesRequest(
                box_id=kept.box_id,
                guest_path=directory.guest_path,
                paths=paths,
                dry_run=args.dry_run,
                force=args.force,
                trust=args.trust,
            )
            try:
                async for answer in client.hypervisor.ApplyChanges(request, timeout=_SECONDS):
                    if answer.WhichOneof("result") != "change":
                        continue
                    change = answer.change
                    data.append(_data(place, change) | {"applied": answer.applied})
                    name = _shown(change.path)
                    done += answer.applied
                    if change.conflict and not args.force:
                        conflicts.append(name)
                    conflict = "" if args.force else change.conflict
                    why = conflict or change.impossible or ("" if args.trust else change.held)
                    if why:
                        left.append(name)
                        screen.note(f"{_word(change.kind)} {name}: left: {why}")
                    elif answer.applied and not screen.json:
                        print(f"{_word(change.kind)} {name}", flush=True)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error
            if conflicts:
                break
        if conflicts:
            break
    if screen.json:
        screen.data({"dry_run": args.dry_run, "applied": done, "changes": data})
    if conflicts:
        raise Conflict(
            f"{len(conflicts)} of the changed files have been changed on the host too, so nothing is applied "
            f"there: {', '.join(conflicts[:5])}{', …' if len(conflicts) > 5 else ''}; apply others by naming "
            "them, or all with --force",
            reason="CHANGED_ON_HOST",
        )
    if left:
        raise WrongState(
            f"{len(left)} of {len(data)} changes were left, {done} applied; what is held back is applied "
            "with --trust",
            reason="CHANGES_LEFT",
        )
    if not screen.json:
        verb = "would be applied" if args.dry_run else "applied"
        screen.note(f"{done} changes {verb}" if data else "there is nothing to apply")
    return ExitCode.OK


async def _discard(context: Context, client: Client) -> int:
    boxes = [kept.box_id for _, kept in await _sets(client, context.args.target)]
    for box_id in boxes:
        request = hv.DeleteChangesRequest(box_id=box_id)
        await client.call(partial(client.hypervisor.DeleteChanges, request, timeout=CALL_SECONDS))
    context.screen.result("\n".join(boxes), {"discarded": boxes})
    return ExitCode.OK
