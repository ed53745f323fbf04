"""Machines get users of their own where the service has any to give."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.common.errors import InvalidInput
from services.hypervisor.identities import FIRST_MACHINE_UID, MACHINE_UIDS, NOBODY, Identities
from services.hypervisor.inputs import Identity

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has users to give")


@as_root
@pytest.mark.parametrize(
    ("mapping", "first", "count"),
    [
        ("0 0 4294967295", FIRST_MACHINE_UID, MACHINE_UIDS),
        ("0 100000 65536", NOBODY, 1),
        (f"0 0 1000\n{FIRST_MACHINE_UID} 5 {MACHINE_UIDS}", FIRST_MACHINE_UID, MACHINE_UIDS),
        (f"{FIRST_MACHINE_UID} 5 {MACHINE_UIDS - 1}", NOBODY, 1),
    ],
)
def test_users_are_given_if_the_namespace_has_them(
    tmp_path: Path, mapping: str, first: int, count: int
) -> None:
    path = tmp_path / "uid_map"
    path.write_text(mapping + "\n")
    assert Identities.for_service(FIRST_MACHINE_UID, MACHINE_UIDS, path) == Identities(first, count)


@as_root
def test_two_machines_are_two_users() -> None:
    identities = Identities(5000, 100)
    assert identities.of(207) == Identity(5007, 5007)
    assert identities.of(208) == Identity(5008, 5008)


@as_root
@pytest.mark.parametrize(("first", "count"), [(-1, 10), (0, 0), ((1 << 32) - 5, 10)])
def test_users_that_cannot_be_are_refused(first: int, count: int) -> None:
    with pytest.raises(InvalidInput, match="no such users"):
        Identities.for_service(first, count)
