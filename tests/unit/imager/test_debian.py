"""apt is told to trust what the system trusts, and nothing that loosens it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from services.common.errors import Corrupt, Unavailable, WrongState
from services.imager import debian
from services.imager.debian import Debian, Package

_INLINE_KEY = """\
Types: deb
URIs: http://one.test/debian http://two.test/debian
Suites: bookworm bookworm-backports bookworm-updates
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abcd
 -----END PGP PUBLIC KEY BLOCK-----
"""


def configured(root: Path, **files: str) -> Path:
    etc = root / "etc/apt"
    (etc / "sources.list.d").mkdir(parents=True)
    for name, text in files.items():
        path = etc / (
            "sources.list" if name == "sources_list" else f"sources.list.d/{name.replace('__', '.')}"
        )
        path.write_text(text)
    return root


def sources(root: Path) -> list[str]:
    return list(debian._sources(root, root / "keys"))


def test_one_line_sources_keep_their_keyring_and_only_this_release(tmp_path: Path) -> None:
    root = configured(
        tmp_path,
        sources_list=(
            "# deb http://off.test/debian bookworm main\n"
            "deb-src http://src.test/debian bookworm main\n"
            "deb [arch=amd64 signed-by=/k.gpg] http://m.test/debian bookworm main contrib # note main\n"
            "deb http://m.test/debian-security bookworm-security main\n"
            "deb http://m.test/debian trixie main\n"
            "deb cdrom:[Debian]/ bookworm main\n"
        ),
        other__list="deb https://vendor.test/apt bookworm stable\n",
    )
    assert sources(root) == [
        "deb [arch=amd64 signed-by=/k.gpg] http://m.test/debian bookworm main",
        "deb [arch=amd64] http://m.test/debian-security bookworm-security main",
    ]


def test_stanzas_with_a_key_of_their_own_keep_it(tmp_path: Path) -> None:
    root = configured(tmp_path, debian__sources=_INLINE_KEY)
    (key,) = {line.split("signed-by=")[1].split("]")[0] for line in sources(root)}
    assert Path(key).read_text().splitlines()[1] == ""
    assert [line.split("] ")[1] for line in sources(root)] == [
        f"http://{host}.test/debian {suite} main"
        for host in ("one", "two")
        for suite in ("bookworm", "bookworm-updates")
    ]


def test_a_disabled_stanza_and_trust_without_a_key_are_ignored(tmp_path: Path) -> None:
    root = configured(
        tmp_path,
        a__sources="Enabled: no\n" + _INLINE_KEY,
        sources_list="deb [trusted=yes] http://m.test/debian bookworm main\n",
    )
    assert sources(root) == ["deb [arch=amd64] http://m.test/debian bookworm main"]


def test_only_how_to_download_is_taken_from_the_systems_settings() -> None:
    dump = "\n".join(
        [
            'Acquire::http::Proxy "http://proxy.test:3128";',
            'Acquire::Retries "7";',
            'Acquire::AllowInsecureRepositories "true";',
            'Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "true";',
            'APT::Update::Post-Invoke:: "rm -rf /";',
            'APT::Get::AllowUnauthenticated "true";',
            'DPkg::Pre-Invoke:: "false";',
        ]
    )
    assert debian._kept_settings(dump) == [
        'Acquire::http::Proxy "http://proxy.test:3128";',
        'Acquire::Retries "7";',
    ]


def test_the_last_word_on_verification_is_ours() -> None:
    text = debian._config(Path("/c/apt"), ['Acquire::AllowWeakRepositories "true";'])
    assert text.rindex('AllowWeakRepositories "false"') > text.index('AllowWeakRepositories "true"')
    assert 'Dir::State "/c/apt"' in text


def test_an_index_entry_without_a_digest_is_corrupt_and_a_missing_package_is_named() -> None:
    entry = "Package: a\nVersion: 1:2\nArchitecture: amd64\nSize: 5\n"
    good = entry + f"SHA256: {'0' * 64}\nDescription: x\n more: text\n"
    (package,) = debian._parse_show(good, ["a"])
    assert package.file_name == "a_1%3a2_amd64.deb"
    with pytest.raises(Corrupt, match="no SHA-256"):
        debian._parse_show(entry, ["a"])
    with pytest.raises(WrongState, match="no package b"):
        debian._parse_show(good, ["a", "b"])


async def test_no_source_of_this_release_says_what_to_add(tmp_path: Path) -> None:
    root = configured(tmp_path / "root", sources_list="deb http://m.test/debian trixie main\n")
    with pytest.raises(WrongState, match=r"no source of Debian bookworm.*add Debian's archive"):
        await Debian(tmp_path / "cache", system=root).resolve(["a"])


async def test_unreachable_mirrors_name_the_cure(tmp_path: Path) -> None:
    # Port 1 of loopback refuses at once; a proxy of the machine must not be asked.
    root = configured(tmp_path / "root", sources_list="deb http://127.0.0.1:1/debian bookworm main\n")
    apt = Debian(tmp_path / "cache", system=root, env={"no_proxy": "*"})
    with pytest.raises(Unavailable, match=r"connect to the network.*or copy the cache"):
        await apt.resolve(["a"])
    assert not list((tmp_path / "cache/debian/resolved").glob("*"))


async def test_an_archive_without_a_signature_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "archive/dists/bookworm/main/binary-amd64"
    archive.mkdir(parents=True)
    (archive / "Packages").write_text("Package: a\nVersion: 1\nArchitecture: amd64\nFilename: a.deb\n")
    (tmp_path / "archive/dists/bookworm/Release").write_text("Codename: bookworm\nComponents: main\n")
    root = configured(
        tmp_path / "root", sources_list=f"deb [trusted=yes] file:{tmp_path}/archive bookworm main\n"
    )
    with pytest.raises(Unavailable, match="not signed"):
        await Debian(tmp_path / "cache", system=root).resolve(["a"])


async def test_a_damaged_package_in_the_pool_is_removed_and_reported(tmp_path: Path) -> None:
    package = Package(name="a", version="1", architecture="amd64", sha256="0" * 64, size=3)
    apt = Debian(tmp_path)
    apt.path(package).parent.mkdir(parents=True)
    apt.path(package).write_bytes(b"abc")
    with pytest.raises(Corrupt, match="did not match its digest and was removed"):
        await apt.unpack(package)
    assert not apt.path(package).exists()
    assert not any((tmp_path / "debian/trees").iterdir())


async def test_a_host_without_apt_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(WrongState, match=r"apt-get is not installed.*VOID_BOX_KERNEL"):
        await Debian(tmp_path).resolve(["a"])
