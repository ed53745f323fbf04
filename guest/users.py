"""Who programs run as, from the user database of the root that they run in."""

from __future__ import annotations

from typing import NamedTuple

from guest.errors import invalid, not_found
from guest.settings import AGENT_ID

_MAX_ID = AGENT_ID - 1


class Account(NamedTuple):
    """A user as far as a program needs it."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str
    home: str
    shell: str


def lookup(user: str, passwd: str, group: str, default_uid: int = 0) -> Account:
    """The account that "name", "uid", "name:group" or "uid:gid" means, as docker reads it.

    A user without an entry gets group 0. The groups that a user is a member of count only where no
    group is named.

    Args:
        user: What the caller asked for.
        passwd: Content of /etc/passwd.
        group: Content of /etc/group.
        default_uid: Who it is if only a group is named.

    Raises:
        AgentError: NOT_FOUND if there is no such name, INVALID_ARGUMENT if an id is out of range.
    """
    name, colon, group_part = user.partition(":")
    if colon and not name:
        name = str(default_uid)
    row = next(
        (row for row in rows(passwd, 7) if row[0] == name or (_is_number(name) and row[2] == name)), None
    )
    if row is not None and _is_number(row[2]) and _is_number(row[3]):
        uid, gid = number(row[2], "user id"), number(row[3], "group id")
    elif _is_number(name):
        uid, gid = number(name, "user id"), 0
    else:
        raise not_found(
            f"there is no user {name!r} in /etc/passwd of the box", reason="USER_NOT_FOUND", user=name
        )
    login = row[0] if row else ""
    named = [one for one in rows(group, 4) if _is_number(one[2])]
    extra = {number(one[2], "group id") for one in named if login and login in one[3].split(",")}
    if group_part:
        found = next((one for one in named if group_part in (one[0], one[2])), None)
        if found is None and not _is_number(group_part):
            raise not_found(
                f"there is no group {group_part!r} in /etc/group of the box", reason="GROUP_NOT_FOUND"
            )
        gid, extra = number(found[2] if found else group_part, "group id"), set()
    return Account(
        uid,
        gid,
        tuple(sorted({gid, *extra})),
        login or str(uid),
        (row[5] if row else "") or "/",
        row[6] if row else "",
    )


def rows(text: str, columns: int) -> list[list[str]]:
    """The well-formed lines of a colon-separated database."""
    return [fields for line in text.splitlines() if len(fields := line.split(":")) == columns]


def _is_number(text: str) -> bool:
    """Whether it is decimal, and short enough to be an id."""
    return text.isascii() and text.isdigit() and len(text) <= 20


def number(text: str, what: str) -> int:
    """A user or group id."""
    value = int(text)
    if value > _MAX_ID:
        raise invalid(f"{what} {text} is out of range")
    return value


def with_sandbox(passwd: str, uid: int, gid: int) -> str:
    """`passwd` with a `sandbox` entry for this id, unless somebody else has the id already."""
    lines = passwd.splitlines()
    entry = f"sandbox:x:{uid}:{gid}:sandbox:/home/sandbox:/bin/sh"
    kept = [line for line in lines if not line.startswith("sandbox:")]
    if any(row[2] == str(uid) for row in rows("\n".join(kept), 7)):
        return passwd
    return "\n".join([*kept, entry]) + "\n"


def with_sandbox_group(group: str, gid: int) -> str:
    """`group` with a `sandbox` entry for this id, unless it has a name already."""
    kept = [line for line in group.splitlines() if not line.startswith("sandbox:")]
    if any(row[2] == str(gid) for row in rows("\n".join(kept), 4)):
        return group
    return "\n".join([*kept, f"sandbox:x:{gid}:"]) + "\n"
