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


def lookup(user: str, passwd: str, group: str) -> Account:
    """The account that "name" or "uid[:gid]" means.

    Args:
        user: What the caller asked for.
        passwd: Content of /etc/passwd.
        group: Content of /etc/group.

    Raises:
        AgentError: NOT_FOUND if there is no such name, INVALID_ARGUMENT if an id is out of range.
    """
    name, _, group_part = user.partition(":")
    row = next(
        (row for row in rows(passwd, 7) if row[0] == name or (name.isdigit() and row[2] == name)), None
    )
    if name.isdigit():
        uid = number(name, "user id")
        gid = int(row[3]) if row and row[3].isdigit() else uid
    elif row is not None and row[2].isdigit() and row[3].isdigit():
        uid, gid = int(row[2]), int(row[3])
    else:
        raise not_found(
            f"there is no user {name!r} in /etc/passwd of the box", reason="USER_NOT_FOUND", user=name
        )
    if group_part.isdigit():
        gid = number(group_part, "group id")
    elif group_part:
        found = next((row for row in rows(group, 4) if row[0] == group_part and row[2].isdigit()), None)
        if found is None:
            raise not_found(
                f"there is no group {group_part!r} in /etc/group of the box", reason="GROUP_NOT_FOUND"
            )
        gid = int(found[2])
    login = row[0] if row else ""
    extra = {
        int(one[2]) for one in rows(group, 4) if login and one[2].isdigit() and login in one[3].split(",")
    }
    return Account(
        uid,
        gid,
        tuple(sorted({gid, *extra})),
        login or str(uid),
        row[5] if row else "/",
        row[6] if row else "",
    )


def rows(text: str, columns: int) -> list[list[str]]:
    """The well-formed lines of a colon-separated database."""
    return [fields for line in text.splitlines() if len(fields := line.split(":")) == columns]


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
