"""Between messages and what is known of boxes' changes."""

from __future__ import annotations

from services.hypervisor.changes import ChangeSet, Overlay
from services.hypervisor.changeset import MODE_BITS, Change, FileType, Kind
from services.hypervisor.convert import timestamp
from services.hypervisor.reviews import Selection
from voidbox.hypervisor.v1 import hypervisor_pb2 as pb

_KINDS = {
    Kind.ADDED: pb.CHANGE_KIND_ADDED,
    Kind.MODIFIED: pb.CHANGE_KIND_MODIFIED,
    Kind.DELETED: pb.CHANGE_KIND_DELETED,
}
_TYPES = {
    FileType.FILE: pb.CHANGE_TYPE_FILE,
    FileType.DIRECTORY: pb.CHANGE_TYPE_DIRECTORY,
    FileType.LINK: pb.CHANGE_TYPE_SYMLINK,
    FileType.OTHER: pb.CHANGE_TYPE_OTHER,
}


def selection(request: pb.ReadChangesRequest | pb.ApplyChangesRequest) -> Selection:
    """Which changes are meant.

    Raises:
        InvalidInput: a path that is none.
    """
    return Selection(box_id=request.box_id, guest_path=request.guest_path, paths=tuple(request.paths))


def directory(overlay: Overlay) -> pb.ChangedDirectory:
    """An overlay as clients see it."""
    return pb.ChangedDirectory(guest_path=overlay.guest_path, host_path=overlay.host_path)


def change_set(value: ChangeSet) -> pb.ChangeSet:
    """What is kept of a box."""
    return pb.ChangeSet(
        box_id=value.id,
        labels=value.labels,
        create_time=timestamp(value.create_time),
        directories=map(directory, value.overlays),
        ended=value.ended,
        size_bytes=value.used_bytes,
    )


def change(value: Change) -> pb.Change:
    """A change as clients see it."""
    return pb.Change(
        path=value.path,
        kind=_KINDS[value.kind],
        type=_TYPES[value.type],
        mode=value.mode,
        host_mode=value.before.st_mode & MODE_BITS if value.before is not None else 0,
        size_bytes=value.size,
        host_size_bytes=value.before_size,
        target=value.target,
        conflict=value.conflict,
        held=value.held,
        impossible=value.impossible,
    )


def read_response(value: Overlay | Change | tuple[bool, bytes]) -> pb.ReadChangesResponse:
    """One message of `ReadChanges`."""
    if isinstance(value, Overlay):
        return pb.ReadChangesResponse(directory=directory(value))
    if isinstance(value, Change):
        return pb.ReadChangesResponse(change=change(value))
    host, data = value
    return pb.ReadChangesResponse(content=pb.ChangeContent(host=host, data=data))
