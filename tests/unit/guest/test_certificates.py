"""A box's authority becomes trusted by what is in a root, once, and replaces the one before."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest import certificates
from guest.errors import AgentError
from guest.root import Root
from services.hypervisor.egress.ca import BoxAuthority
from services.hypervisor.egress.credential import TRUST_ENV


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    made = Root(str(tmp_path), ())
    yield made
    made.close()


def pem() -> bytes:
    return BoxAuthority.create(["api.test"]).certificate


def system(tmp_path: Path, path: str, content: bytes) -> Path:
    place = tmp_path / path.removeprefix("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return place


def test_an_empty_root_gets_a_bundle_where_variables_point(root: Root, tmp_path: Path) -> None:
    ours = pem()
    certificates.install(ours, root)
    assert (tmp_path / "etc/voidbox/ca.pem").read_bytes() == ours
    for name, path in TRUST_ENV.items():
        assert ours in (tmp_path / path.removeprefix("/")).read_bytes(), name
    assert (tmp_path / "etc/voidbox/ca-bundle.pem").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("path", certificates.SYSTEM_BUNDLES)
def test_the_images_bundle_keeps_what_it_had(root: Root, tmp_path: Path, path: str) -> None:
    theirs, first, second = pem(), pem(), pem()
    place = system(tmp_path, path, theirs)
    certificates.install(first, root)
    certificates.install(second, root)  # as in a copy of the box
    for file in (place, tmp_path / "etc/voidbox/ca-bundle.pem"):
        content = file.read_bytes()
        assert content.startswith(theirs)
        assert content.count(second) == 1
        assert first not in content


def test_a_bundle_that_is_a_link_stays_one(root: Root, tmp_path: Path) -> None:
    real = system(tmp_path, "/usr/share/bundle.pem", pem())
    link = tmp_path / "etc/ssl/certs/ca-certificates.crt"
    link.parent.mkdir(parents=True)
    link.symlink_to("/usr/share/bundle.pem")
    ours = pem()
    certificates.install(ours, root)
    assert link.is_symlink()
    assert ours in real.read_bytes()


def test_openssl_trusts_the_bundle(root: Root, tmp_path: Path) -> None:
    authority = BoxAuthority.create(["api.test"])
    certificates.install(authority.certificate, root)
    leaf = tmp_path / "leaf.pem"
    leaf.write_bytes(authority._leaf("api.test"))
    bundle = tmp_path / "etc/voidbox/ca-bundle.pem"
    argv = ["openssl", "verify", "-verify_hostname", "api.test", "-CAfile", str(bundle), str(leaf)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("OK"), done.stderr
    leaf.write_bytes(authority._leaf("evil.test"))
    assert subprocess.run(argv, capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\n$(x)\n-----END CERTIFICATE-----\n"]
)
def test_what_is_no_certificate_is_refused(root: Root, content: bytes) -> None:
    with pytest.raises(AgentError, match="PEM"):
        certificates.install(content, root)
