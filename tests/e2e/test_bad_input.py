"""Wrong input, one case after the other: the message names the place and the cure, and nothing is left."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.voidbox_cli import MEMORY, Voidbox, pipeline, program_box, spec, stack

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def nothing_left(voidbox: Voidbox) -> Iterator[None]:
    """A refused request leaves no box, and no run that still goes on."""
    yield
    status = voidbox.status()
    assert status["runs"] == []
    assert voidbox.boxes() == []
    assert list((voidbox.state / "tmp").iterdir()) == []


def yaml_spec(path: Path, box: str, *, head: str = "") -> str:
    path.write_text(
        f"api_version: v1\nkind: pipeline\nname: bad\n{head}pipeline:\n  boxes:\n    - name: one\n{box}\n"
    )
    return str(path)


@pytest.mark.parametrize(
    ("box", "head", "place", "words"),
    [
        ("      run: {program: 'true'}", "sandbox: {memroy_mb: 512}\n", "4:11", ("memroy_mb", "memory_mb")),
        ("      run: {program: 'true'}", "sandbox: {memory_mb: lots}\n", "4:22", ("memory_mb", "lots")),
        ("      run: {program: 'true'}", "sandbox: {memory_mb: 4}\n", "4:22", ("memory_mb", "16")),
        ("      prompt: hi", "llm: {provider: cluade}\n", "4:17", ("cluade", "claude")),
        ("      run: {program: 'true'}\n      inputs: [{from: nothing}]", "", "8:23", ("nothing",)),
        ("      run: {program: 'true'}\n      inputs: [{file: x, guest: /a/../../etc}]", "", "8:33", ("..",)),
        ("      run: {program: 'true'", "", "", ("invalid yaml",)),
    ],
    ids=["unknown key", "bad type", "out of range", "unknown provider", "dangling name", "escape", "no yaml"],
)
def test_a_wrong_spec_is_told_with_line_and_column(
    voidbox: Voidbox, tmp_path: Path, box: str, head: str, place: str, words: tuple[str, ...]
) -> None:
    path = yaml_spec(tmp_path / "bad.yaml", box, head=head)
    for command in ("validate", "run"):
        done = voidbox(command, path, code=3)
        assert f"{path}:{place}" in done.stderr, done.stderr
        for word in words:
            assert word in done.stderr, done.stderr
    problems = voidbox.error("run", path, code=3)["problems"]
    assert problems[0]["file"] == path
    assert not place or f"{problems[0]['line']}:{problems[0]['column']}" == place


def test_a_missing_input_file_is_named_with_its_line(voidbox: Voidbox, tmp_path: Path) -> None:
    box = "      run: {program: 'true'}\n      inputs:\n        - {file: data/none.txt}"
    path = yaml_spec(tmp_path / "bad.yaml", box)
    done = voidbox("run", path, code=3)
    assert f"{path}:9:18" in done.stderr
    assert str(tmp_path / "data/none.txt") in done.stderr
    assert "create it" in done.stderr


def test_a_missing_spec_is_named(voidbox: Voidbox, tmp_path: Path) -> None:
    assert "none.yaml: cannot be read" in voidbox("run", str(tmp_path / "none.yaml"), code=3).stderr


def test_a_variable_that_is_not_set_is_named(voidbox: Voidbox, tmp_path: Path) -> None:
    path = yaml_spec(
        tmp_path / "bad.yaml", "      run: {program: 'true'}", head="sandbox: {env: {NOT_SET_HERE: ''}}\n"
    )
    assert "NOT_SET_HERE" in voidbox("run", path, code=3).stderr


def refused(voidbox: Voidbox, document: dict[str, Any], tmp_path: Path, code: int) -> str:
    done = voidbox("run", spec(tmp_path / "bad.json", document), code=code)
    return done.stderr


def test_a_kernel_that_is_none_is_named(voidbox: Voidbox, tmp_path: Path) -> None:
    document = pipeline("bad", program_box("one", "true"))
    kernel, initramfs = tmp_path / "vmlinux", tmp_path / "initramfs"
    document["sandbox"] |= {"kernel": str(kernel), "initramfs": str(initramfs)}
    assert str(kernel) in refused(voidbox, document, tmp_path, 3)
    kernel.write_bytes(b"no kernel at all")
    initramfs.write_bytes(b"nor this")
    assert str(kernel) in refused(voidbox, document, tmp_path, 3)


def test_more_memory_than_the_host_has_is_refused(voidbox: Voidbox, tmp_path: Path) -> None:
    document = pipeline("bad", program_box("one", "true"))
    document["sandbox"]["memory_mb"] = 8_000_000
    text = refused(voidbox, document, tmp_path, 3)
    assert "8000000" in text
    assert "memory" in text


def test_a_network_of_nonsense_is_refused_by_its_rule(voidbox: Voidbox, tmp_path: Path) -> None:
    document = pipeline("bad", program_box("one", "true"))
    document["sandbox"]["network"] = {"allow": ["a b"]}
    assert "sandbox.network.allow[0]" in refused(voidbox, document, tmp_path, 3)


def test_a_registry_that_does_not_answer_is_named(voidbox: Voidbox) -> None:
    error = voidbox.error("image", "pull", "127.0.0.1:1/none/image:1", code=4)
    assert "127.0.0.1:1" in error["message"]
    done = voidbox("exec", *MEMORY, "--image", "127.0.0.1:1/none/image:1", "--", "true", code=125)
    assert "127.0.0.1:1" in done.stderr


def layout(directory: Path, layer: bytes, *, claimed: bytes | None = None) -> str:
    """An OCI layout with one layer; `claimed` is what its digest is made of."""
    blobs = directory / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, name: bytes | None = None) -> dict[str, Any]:
        digest = hashlib.sha256(data if name is None else name).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(claimed or layer).hexdigest()}"]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json"}
        | put(json.dumps(config).encode()),
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar"} | put(layer, claimed)],
    }
    index = {
        "schemaVersion": 2,
        "manifests": [
            {"mediaType": "application/vnd.oci.image.manifest.v1+json"} | put(json.dumps(manifest).encode())
        ],
    }
    (directory / "index.json").write_text(json.dumps(index))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return f"oci:{directory}"


def test_content_that_does_not_match_its_digest_is_refused(voidbox: Voidbox, tmp_path: Path) -> None:
    reference = layout(tmp_path / "l", bytes(10240), claimed=bytes(20480))
    error = voidbox.error("image", "pull", reference, code=4)
    assert error["code"] == "DATA_LOSS"
    assert "sha256:" in error["message"]
    assert voidbox("--output", "json", "image", "ls").json == []


def test_a_layer_that_is_no_tar_archive_is_refused(voidbox: Voidbox, tmp_path: Path) -> None:
    reference = layout(tmp_path / "l", b"this is no archive" * 1000)
    done = voidbox("exec", *MEMORY, "--image", reference, "--", "true", code=125)
    assert "tar" in done.stderr or "header" in done.stderr, done.stderr
    digest = hashlib.sha256(b"this is no archive" * 1000).hexdigest()
    assert digest[:12] in done.stderr, done.stderr
    for image in voidbox("--output", "json", "image", "ls").json:
        voidbox("image", "rm", image["reference"])


@pytest.mark.parametrize(
    ("words", "mentions"),
    [
        (("rnu",), "'run'"),
        (("run", "--detatch", "x.yaml"), "--detach"),
        (("image", "pul", "x"), "'pull'"),
        (("exec", "--memory-mb", "much", "--", "true"), "'much'"),
        (("--output", "xml", "ps"), "human"),
    ],
)
def test_wrong_usage_is_one_line_with_what_was_meant(
    voidbox: Voidbox, words: tuple[str, ...], mentions: str
) -> None:
    done = voidbox(*words, code=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert mentions in line


@pytest.mark.parametrize(
    ("words", "mentions"),
    [
        (
            (
                "--mount",
                "/no/such/dir:/data",
            ),
            "/no/such/dir",
        ),
        (
            (
                "--mount",
                "/tmp:data",
            ),
            "GUEST absolute",
        ),
        (
            (
                "--mount",
                "/tmp:/data:rx",
            ),
            "'rx'",
        ),
        (
            (
                "--env",
                "1A=2",
            ),
            "NAME=VALUE",
        ),
        (("-t",), "terminal"),
        (
            (
                "--in",
                "no-such-box",
            ),
            "no-such-box",
        ),
    ],
)
def test_wrong_options_of_exec_are_refused_before_a_box_is_made(
    voidbox: Voidbox, words: tuple[str, ...], mentions: str
) -> None:
    done = voidbox("exec", *words, "--", "true", code=125)
    assert mentions in done.stderr


def test_without_qemu_the_message_says_what_to_install(voidbox: Voidbox) -> None:
    with stack() as own:
        own.env["PATH"] = str(own.root)
        done = own("exec", *MEMORY, "--", "true", code=125)
        assert "qemu" in done.stderr.lower()
        assert "install" in done.stderr
        checks = {check["name"]: check for check in own("--output", "json", "doctor", code=4).json["checks"]}
        assert checks["qemu"]["level"] == "failed"
        assert "apt-get install" in checks["qemu"]["cure"]


def test_a_full_disk_is_told_and_leaves_no_partial_file(voidbox: Voidbox, tmp_path: Path) -> None:
    with stack(guest=False) as own:
        own.state.mkdir(mode=0o700)
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", str(own.state)]
        assert os.getuid() == 0, "this test mounts a small file system; run the tests as root"
        subprocess.run(mount, check=True)
        try:
            (tmp_path / "big").write_bytes(os.urandom(8 << 20))
            document = pipeline("big", program_box("one", "true", inputs=[{"file": "big"}]))
            error = own.error("run", spec(tmp_path / "p.json", document), code=7)
            assert "disk" in error["message"] or "space" in error["message"], error
            own("down")
            assert sum(path.stat().st_size for path in own.state.rglob("*") if path.is_file()) < 1 << 20
        finally:
            own("down")
            subprocess.run(["umount", str(own.state)], check=True)
