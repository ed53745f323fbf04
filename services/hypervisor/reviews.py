"""Looking at what boxes have changed in overlays, and bringing it to the host's directories."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import stat
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from services.common.errors import InvalidInput, NotFound
from services.hypervisor import apply, beneath, changeset
from services.hypervisor.changes import ChangeSet, ChangeStore, Layers, Overlay
from services.hypervisor.changeset import Change, FileType, Kind

CONTENT_BYTES = 256 << 10
PIECE_BYTES = 64 << 10
_BATCH = 64
_MAX_PATHS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which changes of a box are meant; everything, unless an overlay or paths in it are named."""

    box_id: str
    guest_path: str = ""
    paths: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if len(self.paths) > _MAX_PATHS:
            raise InvalidInput(f"{len(self.paths)} paths; at most {_MAX_PATHS}", reason="TOO_MANY_PATHS")
        for path in self.paths:
            parts = path.split(b"/")
            if len(path) > beneath.PATH_LIMIT or b"\0" in path or {b"", b".", b".."} & set(parts):
                raise InvalidInput(
                    f"{path[:80]!r} is no path relative to a mount, without '.' and '..'", reason="BAD_PATH"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a change."""

    change: Change
    applied: bool


class Reviews:
    """The changes that are kept in `store`."""

    def __init__(self, store: ChangeStore) -> None:
        self._store = store
        self._applying = asyncio.Lock()

    def _chosen(self, selection: Selection) -> tuple[ChangeSet, list[Overlay]]:
        changes = self._store.get(selection.box_id)
        wanted = selection.guest_path.rstrip("/")
        found = [one for one in changes.overlays if wanted in ("", one.guest_path.rstrip("/"))]
        if not found:
            raise NotFound(
                f"box {selection.box_id} has no overlay at {wanted}; it has: "
                f"{', '.join(one.guest_path for one in changes.overlays)}",
                reason="NO_OVERLAY",
                box=selection.box_id,
            )
        return changes, found

    async def read(
        self, selection: Selection, *, content: bool
    ) -> AsyncIterator[Overlay | Change | tuple[bool, bytes]]:
        """An overlay, its changes, and after each the pieces of content: (whether the host's, data).

        Raises:
            NotFound: nothing is kept of such a box, or it has no such overlay.
            WrongState: the host's directory is gone.
        """
        changes, found = await asyncio.to_thread(self._chosen, selection)
        for overlay in found:
            yield overlay
            with contextlib.ExitStack() as stack:
                layers = await asyncio.to_thread(stack.enter_context, self._store.opened(changes, overlay))
                listed = _listed(layers, selection, content=content)
                while batch := await asyncio.to_thread(list, itertools.islice(listed, _BATCH)):
                    for each in batch:
                        yield each

    async def apply(
        self, selection: Selection, *, dry_run: bool, force: bool, trust: bool
    ) -> list[tuple[Overlay, list[Outcome]]]:
        """Bring changes to the host's directories; nothing at all if one conflicts, unless `force`.

        Raises:
            NotFound: nothing is kept of such a box, or it has no such overlay.
            WrongState: the host's directory is gone.
        """
        async with self._applying:
            # Not to be left half done because the caller goes away.
            return await asyncio.shield(
                asyncio.ensure_future(self._apply(selection, dry_run=dry_run, force=force, trust=trust))
            )

    async def _apply(
        self, selection: Selection, *, dry_run: bool, force: bool, trust: bool
    ) -> list[tuple[Overlay, list[Outcome]]]:
        changes, found = await asyncio.to_thread(self._chosen, selection)
        done = []
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(self._store.opened(changes, overlay)) for overlay in found]
            listed = [await asyncio.to_thread(_scanned, layers, selection) for layers in opened]
            stop = not force and any(each.conflict for scanned in listed for each in scanned)
            for layers, scanned in zip(opened, listed, strict=True):
                can = [each for each in scanned if not each.impossible and (trust or not each.held)]
                if stop:
                    can = []
                elif not dry_run and can:
                    can = await asyncio.to_thread(apply.apply, can, layers)
                    await asyncio.to_thread(self._store.note_applied, changes, layers)
                done.append((layers.overlay, _outcomes(scanned, can)))
            left = changes.ended and not dry_run and not stop and await asyncio.to_thread(_nothing, opened)
        if left and len(found) == len(changes.overlays) and not selection.paths:
            await self._store.remove(changes.id)
        return done


def _outcomes(scanned: Sequence[Change], tried: Sequence[Change]) -> list[Outcome]:
    """All changes in order; `tried` are those that were applied or could not be."""
    became = iter(tried)
    following = next(became, None)
    found = []
    for change in scanned:
        if following is not None and (following.path, following.kind) == (change.path, change.kind):
            found.append(Outcome(change=following, applied=not following.impossible))
            following = next(became, None)
        else:
            found.append(Outcome(change=change, applied=False))
    return found


def _scanned(layers: Layers, selection: Selection) -> list[Change]:
    return [each for each in changeset.scan(layers) if changeset.wanted(each.path, selection.paths)]


def _nothing(opened: Sequence[Layers]) -> bool:
    return not any(next(changeset.scan(layers), None) for layers in opened)


def _listed(
    layers: Layers, selection: Selection, *, content: bool
) -> Iterator[Overlay | Change | tuple[bool, bytes]]:
    for change in changeset.scan(layers):
        if changeset.wanted(change.path, selection.paths):
            yield change
            if content and max(change.size, change.before_size) <= CONTENT_BYTES:
                yield from _content(layers, change)


def _content(layers: Layers, change: Change) -> Iterator[tuple[bool, bytes]]:
    """Pieces of the host's file, then of the box's; what cannot be read is left out."""
    if change.before is not None and stat.S_ISLNK(change.before.st_mode):
        with contextlib.suppress(OSError):
            yield True, beneath.read_link(layers.lower, change.path)
    if change.before is not None and stat.S_ISREG(change.before.st_mode):
        yield from ((True, piece) for piece in _pieces(layers.lower, change.path))
    if change.kind is not Kind.DELETED and change.type is FileType.FILE:
        yield from ((False, piece) for piece in _pieces(layers.upper, change.path, ours=True))


def _pieces(root: int, path: bytes, *, ours: bool = False) -> Iterator[bytes]:
    with contextlib.suppress(OSError), changeset.open_file(root, path, ours=ours) as file:
        left = CONTENT_BYTES
        while left > 0 and (piece := file.read(min(left, PIECE_BYTES))):
            yield piece
            left -= len(piece)
