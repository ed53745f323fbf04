"""User names and ids against user databases, which belong to images and may hold anything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest.errors import AgentError, Code
from guest.users import Account, lookup, rows, with_sandbox, with_sandbox_group

PASSWD = """root:x:0:0:root:/root:/bin/bash
# a comment
broken line
web:x:33:44:w:/srv/web:/bin/false
bad:x:notanumber:1::/:
homeless:x:66:66:::/bin/sh
4000:x:77:77::/:
huge:x:4294967295:1::/:
"""
GROUP = "root:x:0:\nwww:x:44:\nextra:x:55:other,web\nmore:x:56:web2\n"


@pytest.mark.parametrize(
    ("user", "account"),
    [
        ("root", Account(0, 0, (0,), "root", "/root", "/bin/bash")),
        ("web", Account(33, 44, (44, 55), "web", "/srv/web", "/bin/false")),
        ("33", Account(33, 44, (44, 55), "web", "/srv/web", "/bin/false")),
        ("web:", Account(33, 44, (44, 55), "web", "/srv/web", "/bin/false")),
        # With a group named, the user's other groups do not count.
        ("web:root", Account(33, 0, (0,), "web", "/srv/web", "/bin/false")),
        ("33:7", Account(33, 7, (7,), "web", "/srv/web", "/bin/false")),
        ("33:55", Account(33, 55, (55,), "web", "/srv/web", "/bin/false")),
        # Without an entry the group is root's.
        ("1234", Account(1234, 0, (0,), "1234", "/", "")),
        ("1234:www", Account(1234, 44, (44,), "1234", "/", "")),
        ("homeless", Account(66, 66, (66,), "homeless", "/", "/bin/sh")),
        # A name of digits comes before an id, if its line comes first.
        ("4000", Account(77, 77, (77,), "4000", "/", "")),
        (":www", Account(33, 44, (44,), "web", "/srv/web", "/bin/false")),
    ],
)
def test_users_are_found(user: str, account: Account) -> None:
    assert lookup(user, PASSWD, GROUP, default_uid=33) == account


@pytest.mark.parametrize(
    ("user", "code"),
    [
        ("nobody", Code.NOT_FOUND),
        ("bad", Code.NOT_FOUND),
        ("web:nogroup", Code.NOT_FOUND),
        ("", Code.NOT_FOUND),
        ("-1", Code.NOT_FOUND),
        ("\u00b2", Code.NOT_FOUND),
        ("9" * 5000, Code.NOT_FOUND),
        ("huge", Code.INVALID_ARGUMENT),
        ("4294967295", Code.INVALID_ARGUMENT),
        ("4294967280", Code.INVALID_ARGUMENT),  # the agent's own
        ("1:4294967295", Code.INVALID_ARGUMENT),
        ("99999999999999999999", Code.INVALID_ARGUMENT),
    ],
)
def test_what_is_no_user_is_refused(user: str, code: Code) -> None:
    with pytest.raises(AgentError) as caught:
        lookup(user, PASSWD, GROUP)
    assert caught.value.code is code


@given(st.text(), st.text(), st.text())
def test_no_database_breaks_a_lookup(user: str, passwd: str, group: str) -> None:
    try:
        account = lookup(user, passwd, group)
    except AgentError:
        return
    assert 0 <= account.uid < 0xFFFFFFF0
    assert account.gid >= 0


def test_the_sandbox_user_takes_the_id_and_leaves_others_alone() -> None:
    passwd = with_sandbox(PASSWD + "sandbox:x:1000:1000::/x:/bin/sh\n", 2000, 2001)
    found = {row[0]: row for row in rows(passwd, 7)}
    assert found["sandbox"][2:6] == ["2000", "2001", "sandbox", "/home/sandbox"]
    assert found["web"] == ["web", "x", "33", "44", "w", "/srv/web", "/bin/false"]
    assert with_sandbox(PASSWD, 33, 33) == PASSWD  # somebody else has it
    assert with_sandbox(passwd, 2000, 2001) == passwd
    assert with_sandbox_group(GROUP, 44) == GROUP
    assert with_sandbox_group("", 7) == "sandbox:x:7:\n"
