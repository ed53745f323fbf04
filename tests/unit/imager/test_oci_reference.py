"""References are normalised as Docker does, and what is malformed is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidInput, NotBuilt, VoidboxError
from services.imager.reference import (
    ArchiveReference,
    DockerArchiveReference,
    LayoutReference,
    RegistryReference,
    is_digest,
    parse_reference,
)

HUB = "docker.io/library/"
DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "normal", "host"),
    [
        ("alpine", "docker.io/library/alpine:latest", "registry-1.docker.io"),
        ("alpine:3.19", "docker.io/library/alpine:3.19", "registry-1.docker.io"),
        ("docker://alpine", "docker.io/library/alpine:latest", "registry-1.docker.io"),
        ("docker.io/alpine", "docker.io/library/alpine:latest", "registry-1.docker.io"),
        ("index.docker.io/a/b", "docker.io/a/b:latest", "registry-1.docker.io"),
        ("registry-1.docker.io/a", "docker.io/library/a:latest", "registry-1.docker.io"),
        ("user/app", "docker.io/user/app:latest", "registry-1.docker.io"),
        ("localhost/app", "localhost/app:latest", "localhost"),
        ("LocalHost/app", "localhost/app:latest", "localhost"),
        ("localhost:5000/app:1", "localhost:5000/app:1", "localhost:5000"),
        ("127.0.0.1:5000/a/b/c", "127.0.0.1:5000/a/b/c:latest", "127.0.0.1:5000"),
        ("[::1]:5000/app", "[::1]:5000/app:latest", "[::1]:5000"),
        ("ghcr.io/o/app@" + DIGEST, "ghcr.io/o/app@" + DIGEST, "ghcr.io"),
        ("ghcr.io/o/app:v1@" + DIGEST, "ghcr.io/o/app:v1@" + DIGEST, "ghcr.io"),
        ("GHCR.io/o/app", "ghcr.io/o/app:latest", "ghcr.io"),
        ("  quay.io/a__b/c-d.e:V1_2.3-x ", "quay.io/a__b/c-d.e:V1_2.3-x", "quay.io"),
    ],
)
def test_names_are_normalised(text: str, normal: str, host: str) -> None:
    reference = parse_reference(text)
    assert isinstance(reference, RegistryReference)
    assert str(reference) == normal
    assert reference.host == host
    assert parse_reference(normal) == reference


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("Alpine", "lower case"),
        ("ghcr.io/Org/app", "lower case"),
        ("Oci:8/2", "begins another kind"),
        ("docker://oci:8/2", "begins another kind"),
        ("Host/app", "A host needs a dot or a port"),
        ("a//b", "not a component"),
        ("a/../b", "not a component"),
        ("/a", "not a"),
        ("a/", "not a component"),
        ("a:", "tag"),
        ("a:" + "t" * 129, "tag"),
        ("a:b:c", "not a component"),
        ("a:ta g", "tag"),
        ("a@sha256:abc", "64 lower-case hex"),
        ("a@" + DIGEST.upper(), "64 lower-case hex"),
        ("a@sha512:" + "0" * 128, "only sha256"),
        ("a@", "64 lower-case hex"),
        ("localhost:99999/a", "no port"),
        ("localhost:0/a", "no port"),
        ("exa_mple.com/a", "not a host"),
        ("http://x/a", "use docker://"),
        ("a\nb", "control"),
        ("a" * 5000, "longer"),
        ("ghcr.io/" + "a" * 300, "longer"),
        ("oci:", "no directory"),
        ("oci:/a:", "tag is empty"),
        ("oci:/a/b:c/", "has a colon"),
        ("oci:/a::/", "has a colon"),
        ("oci:/a@sha256:12", "64 lower-case hex"),
        ("oci-archive:", "no file"),
        ("oci-archive::t", "no file"),
        ("oci-archive:/a:", "tag is empty"),
        ("docker-archive:", "no file"),
        ("docker-archive:/a:", "name is empty"),
        ("docker-archive:/a:@", "number of an image"),
        ("docker-archive:/a:@-1", "number of an image"),
        ("docker-archive:/a:@99999", "number of an image"),
        ("docker-archive:/a:No", "lower case"),
        ("docker-archive:/a:b@" + DIGEST, "not digests"),
    ],
)
def test_malformed_references_are_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        parse_reference(text)


@pytest.mark.parametrize("text", ["containers-storage:a", "docker-daemon:a", "dir:/a"])
def test_transports_that_are_not_built_say_so_and_what_to_do(text: str) -> None:
    with pytest.raises(NotBuilt, match="skopeo copy"):
        parse_reference(text)


@pytest.mark.parametrize(
    ("text", "directory", "tag", "digest"),
    [
        ("oci:/a/b", "/a/b", None, None),
        ("oci:/a/b:v1", "/a/b", "v1", None),
        ("oci:/a:b/c", "/a:b/c", None, None),
        ("oci:rel/dir:x", "rel/dir", "x", None),
        ("oci:/a@" + DIGEST, "/a", None, DIGEST),
        ("oci:/a:t@" + DIGEST, "/a", "t", DIGEST),
    ],
)
def test_layout_references_name_directory_tag_and_digest(
    text: str, directory: str, tag: str | None, digest: str | None
) -> None:
    assert parse_reference(text) == LayoutReference(directory=Path(directory), tag=tag, digest=digest)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("oci-archive:/a.tar", ArchiveReference(path=Path("/a.tar"), tag=None, digest=None)),
        ("oci-archive:a/b.tar:v1", ArchiveReference(path=Path("a/b.tar"), tag="v1", digest=None)),
        ("oci-archive:/a:docker.io/b:1", ArchiveReference(path=Path("/a"), tag="docker.io/b:1", digest=None)),
        ("oci-archive:/a@" + DIGEST, ArchiveReference(path=Path("/a"), tag=None, digest=DIGEST)),
        ("docker-archive:/a.tar", DockerArchiveReference(path=Path("/a.tar"))),
        ("docker-archive:/a:alpine", DockerArchiveReference(path=Path("/a"), name=HUB + "alpine:latest")),
        ("docker-archive:/a:b/c:1", DockerArchiveReference(path=Path("/a"), name="docker.io/b/c:1")),
        ("docker-archive:/a:@0", DockerArchiveReference(path=Path("/a"), index=0)),
    ],
)
def test_archive_references_end_the_path_at_the_first_colon(text: str, reference: object) -> None:
    parsed = parse_reference(text)
    assert parsed == reference
    assert parse_reference(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("localhost/a", True), ("localhost:5000/a", True), ("127.0.0.1/a", True), ("127.9.9.9:1/a", True),
        ("[::1]:5000/a", True), ("alpine", False), ("127.evil.example/a", False),
        ("localhost.example/a", False), ("127.0.0.1.example.com/a", False), ("10.0.0.1/a", False),
    ],
)  # fmt: skip
def test_only_this_machine_is_loopback(text: str, expected: bool) -> None:
    reference = parse_reference(text)
    assert isinstance(reference, RegistryReference)
    assert reference.is_loopback is expected


@given(st.text(max_size=80) | st.text(alphabet="abz09:/@.-_[]sha256", max_size=60))
def test_any_text_is_a_reference_or_a_clear_error(text: str) -> None:
    try:
        reference = parse_reference(text)
    except VoidboxError:
        return
    assert parse_reference(str(reference)) == reference
    if isinstance(reference, RegistryReference):
        assert ".." not in reference.repository.split("/")
        assert reference.tag or reference.digest


def test_digests_are_lower_case_sha256_only() -> None:
    assert is_digest(DIGEST)
    for text in (DIGEST.upper(), DIGEST[:-1], DIGEST + "0", DIGEST + "\n", "sha512:" + "0" * 128, ""):
        assert not is_digest(text)
