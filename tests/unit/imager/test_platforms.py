"""Which image of several is taken: that for the newest processor which this one still is."""

from __future__ import annotations

import pytest

from services.common.errors import InvalidInput, NotFound
from services.imager.convert import platform_from
from services.imager.manifest import OCI_MANIFEST, Descriptor, Index, Platform, select_platform
from voidbox.imager.v1 import imager_pb2 as pb


def platform(text: str) -> Platform:
    """OS, architecture and variant of linux/arm/v7."""
    os, architecture, variant = [*text.split("/"), "", ""][:3]
    return Platform(os=os, architecture=architecture, variant=variant)


def index(*texts: str) -> Index:
    """An index of one manifest for each platform."""
    entries = [
        Descriptor(media_type=OCI_MANIFEST, digest=f"sha256:{n:064x}", size=n, platform=platform(text))
        for n, text in enumerate(texts)
    ]
    return Index(manifests=tuple(entries))


@pytest.mark.parametrize(
    ("wanted", "offered", "chosen"),
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64"], 1),
        ("linux/amd64", ["linux/amd64/v3", "linux/amd64"], 1),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"], 1),
        ("linux/arm64", ["linux/arm/v7", "linux/arm64/v8"], 1),
        ("linux/arm64/v8", ["linux/arm64"], 0),
        ("linux/arm64/v9", ["linux/arm64/v8", "linux/arm64/v8.2", "linux/arm64/v9.1"], 1),
        ("linux/arm", ["linux/arm/v5", "linux/arm/v7", "linux/arm/v6", "linux/arm/v8"], 1),
        ("linux/arm/v6", ["linux/arm/v7", "linux/arm/v5", "linux/arm/v6"], 2),
        ("linux/amd64", ["linux/x86_64"], 0),
        ("linux/arm64", ["linux/aarch64"], 0),
        ("linux/amd64", ["linux/amd64", "linux/amd64"], 0),
        ("linux/ppc64le/power9", ["linux/ppc64le", "linux/ppc64le/power9"], 1),
    ],
)
def test_the_best_that_runs_is_taken(wanted: str, offered: list[str], chosen: int) -> None:
    assert select_platform(index(*offered), platform(wanted), "x").size == chosen


@pytest.mark.parametrize(
    ("wanted", "offered"),
    [
        ("linux/amd64", "linux/amd64/v2"),
        ("linux/arm/v6", "linux/arm"),
        ("linux/arm64", "linux/arm64/v9"),
        ("linux/amd64", "windows/amd64"),
        ("linux/amd64", "linux/386"),
        ("linux/amd64/v2", "linux/amd64/fast"),
        ("linux/ppc64le", "linux/ppc64le/power9"),
    ],
)
def test_what_would_not_run_is_not_taken(wanted: str, offered: str) -> None:
    with pytest.raises(NotFound, match=f"no image for {wanted}; it has: {offered}"):
        select_platform(index(offered), platform(wanted), "x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("linux/x86_64", "linux/amd64"), ("Linux/AArch64/V8", "linux/arm64/v8"),
        ("linux/armhf", "linux/arm/v7"), ("linux/armel", "linux/arm/v6"),
        ("linux/i386", "linux/386"), ("linux/arm/v7", "linux/arm/v7"),
    ],
)  # fmt: skip
def test_other_names_of_platforms_are_understood(text: str, expected: str) -> None:
    found = platform(text)
    message = pb.Platform(os=found.os, architecture=found.architecture, variant=found.variant)
    assert str(platform_from(message)) == expected


@pytest.mark.parametrize(
    "text", ["windows/amd64", "linux/a b", "linux/amd64/../x", "linux/amd64/v\n", "li nux/amd64"]
)
def test_platforms_that_boxes_cannot_have_are_refused(text: str) -> None:
    os, architecture, variant = [*text.split("/", 2), ""][:3]
    with pytest.raises(InvalidInput):
        platform_from(pb.Platform(os=os, architecture=architecture, variant=variant))
