"""Images from the command line: pulled, run as their configuration says, removed."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.voidbox_cli import MEMORY, Voidbox, pipeline, program_box, spec, stack
from tests.registries import docker_registry

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


def busybox_root(more: Mapping[str, tuple[bytes, int]]) -> bytes:
    """A tar archive of busybox with the libraries that it needs, and a user database."""
    busybox = shutil.which("busybox")
    assert busybox, "busybox is not installed; run: apt-get install busybox"
    listing = subprocess.run(["ldd", busybox], capture_output=True, text=True, check=False).stdout
    libraries = re.findall(r"(/\S+)", listing)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, data: bytes, mode: int) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            tar.addfile(info, io.BytesIO(data))

        for name in [busybox, *libraries]:
            add("bin/busybox" if name == busybox else name.lstrip("/"), Path(name).read_bytes(), 0o755)
        for applet in ("sh", "cat", "id", "pwd", "echo", "env", "stat"):
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        add("etc/passwd", b"root:x:0:0::/:/bin/sh\nweb:x:123:456::/srv:/bin/sh\n", 0o644)
        add("etc/group", b"root:x:0:\nweb:x:456:\nextra:x:77:root,web\n", 0o644)
        add("srv/marker", b"of the image\n", 0o644)
        for name, (data, mode) in more.items():
            add(name, data, mode)
    return buffer.getvalue()


def layout(
    directory: Path, config: dict[str, Any], more: Mapping[str, tuple[bytes, int]] | None = None
) -> str:
    """An OCI layout with one gzip layer of busybox."""
    blobs = directory / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {
            "mediaType": f"application/vnd.oci.image.{kind}",
            "digest": f"sha256:{digest}",
            "size": len(data),
        }

    layer = busybox_root(more or {})
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": put(json.dumps(document).encode(), "config.v1+json"),
        "layers": [put(gzip.compress(layer, 1), "layer.v1.tar+gzip")],
    }
    index = {"schemaVersion": 2, "manifests": [put(json.dumps(manifest).encode(), "manifest.v1+json")]}
    (directory / "index.json").write_text(json.dumps(index))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return f"oci:{directory}"


def kept_by_its_box(voidbox: Voidbox, reference: str, run_id: str) -> None:
    """While a box has the image as its root, nothing removes it."""
    error = voidbox.error("image", "rm", reference, code=4)
    assert error["reason"] == "IMAGE_IN_USE"
    pruned = voidbox("--output", "json", "image", "prune", "--max-size", "1").json
    assert pruned["references"] == []
    assert voidbox("exec", "--in", run_id, "--", "/bin/cat", "/srv/marker").text == "of the image\n"
    voidbox("rm", "-f", run_id)


def exported_and_verified(voidbox: Voidbox, reference: str, tmp_path: Path) -> None:
    """The image as a file that is written once, and the cache without damage."""
    target = tmp_path / "image.tar"
    done = voidbox("--output", "json", "image", "export", reference, "-o", str(target)).json
    assert (done["path"], done["size_bytes"]) == (str(target), target.stat().st_size)
    with tarfile.open(target) as tar:
        member = tar.extractfile("srv/marker")
        assert member is not None
        assert member.read() == b"of the image\n"
    error = voidbox.error("image", "export", reference, "-o", str(target), code=3)
    assert error["code"] == "ALREADY_EXISTS"
    options = ("--format", "initramfs", "--compression", "gzip", "--force")
    voidbox("image", "export", reference, "-o", str(target), *options)
    assert gzip.decompress(target.read_bytes()).startswith(b"070701")
    assert [path.name for path in tmp_path.glob("*.part")] == []
    found = voidbox("--output", "json", "image", "verify", reference).json
    assert found["checked"] == 4
    assert found["problems"] == []
    error = voidbox.error("image", "push", reference, "127.0.0.1:9/x", code=4)
    assert error["code"] == "UNAVAILABLE"


def test_an_image_is_run_as_its_configuration_says_and_removed(voidbox: Voidbox, tmp_path: Path) -> None:
    script = 'echo "$0 $1 $2"; id -u; id -G; pwd; stat -c "%u %a" .; echo "$HOME $GREETING"; cat /srv/marker'
    reference = layout(
        tmp_path / "l",
        {
            "Entrypoint": ["/bin/sh", "-c", script, "entry"],
            "Cmd": ["from", "image"],
            "Env": ["PATH=/bin", "GREETING=hello"],
            "WorkingDir": "/made/for this",
            "User": "web",
        },
    )
    pulled = voidbox("--output", "json", "image", "pull", reference).json
    assert pulled["digest"]["value"].startswith("sha256:")
    assert [image["reference"] for image in voidbox("--output", "json", "image", "ls").json] == [
        pulled["reference"]
    ]
    assert voidbox("--output", "json", "image", "inspect", reference).json["config"]["user"] == "web"
    done = voidbox("exec", *MEMORY, "--image", reference)
    assert done.text == ("entry from image\n123\n456 77\n/made/for this\n0 755\n/srv hello\nof the image\n")
    # A box's writes go to its own layer: the next box has the image as it was.
    words = ("--user", "0:extra", "--workdir", "/srv", "--env", "GREETING=bye", "--", "ours")
    done = voidbox("exec", *MEMORY, "--image", reference, *words)
    assert done.text == "entry ours \n0\n77\n/srv\n0 755\n/ bye\nof the image\n"
    # A user without an entry is in root's group; another entrypoint does without the image's arguments.
    others = ("--keep", "--entrypoint", "/bin/id", "--user", "1234", "--", "-G")
    kept = voidbox("exec", *MEMORY, "--image", reference, *others)
    assert kept.text == "0\n"
    kept_by_its_box(voidbox, reference, re.findall(r"--in (\S+)", kept.stderr)[0])
    exported_and_verified(voidbox, reference, tmp_path)
    script = "cat /srv/marker; busybox df -m / | busybox tail -n 1"
    document = pipeline("image", program_box("one", "sh", "-c", script))
    document["sandbox"] |= {"image": reference, "disk_mb": 6000}
    run = voidbox("run", spec(tmp_path / "p.json", document))
    marker, usage = run.text.splitlines()
    assert marker == "of the image"
    # The file system has taken all of the disk; what is missing are its own tables.
    assert 5700 < int(usage.split()[1]) <= 6000
    assert voidbox("--output", "json", "image", "rm", reference).json["freed_bytes"] > 0
    assert voidbox("--output", "json", "image", "ls").json == []
    error = voidbox.error("image", "inspect", reference, code=3)
    assert error["code"] == "NOT_FOUND"


def test_a_mount_shows_the_hosts_files_and_refuses_writes(voidbox: Voidbox, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "file").write_text("of the host\n")
    for path in (*reversed(shared.parents), shared):
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o055)
    script = "cat /data/file; echo x > /data/new 2>/dev/null || echo refused"
    done = voidbox("exec", *MEMORY, "--mount", f"{shared}:/data", "--", "sh", "-c", script)
    assert done.text == "of the host\nrefused\n"
    assert [path.name for path in shared.iterdir()] == ["file"]


def test_a_spec_boots_a_guest_image_from_a_registry(voidbox: Voidbox, tmp_path: Path) -> None:
    """One stack pushes the guest image that it has; another, which has none, runs a spec that names it."""
    with docker_registry(tmp_path / "registry") as host:
        name = f"{host}/guest:v1"
        pushed = voidbox("--output", "json", "image", "push", "--guest", "default", name).json
        assert pushed["digest"].startswith("sha256:")
        document = pipeline("guest", program_box("one", "cat", "/etc/os-release"))
        with stack(guest=False) as other:
            other("run", spec(tmp_path / "without.json", document), code=3)
            document["sandbox"]["guest_image"] = name
            run = other("run", spec(tmp_path / "with.json", document))
            assert 'NAME="voidbox guest"' in run.text
            found = other("--output", "json", "image", "verify").json
            assert found == {"checked": 1, "problems": []}
            pulled = other("--output", "json", "image", "pull", name).json
            assert pulled["digest"]["value"] == f"sha256:{Path(pulled['kernel_path']).parent.name}"


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd", "lz4"])
def test_a_kernel_boots_an_exported_initramfs(voidbox: Voidbox, tmp_path: Path, compression: str) -> None:
    init = b"#!/bin/sh\n/bin/busybox mount -t proc proc /proc\n"
    init += b"echo BOOTED $(cat /srv/marker) $(id -u) $(stat -c %a /bin/busybox)\n"
    init += b"echo o > /proc/sysrq-trigger\n"
    reference = layout(tmp_path / "l", {}, {"init": (init, 0o755), "proc/keep": (b"", 0o644)})
    voidbox("image", "pull", reference)
    target = tmp_path / "initramfs"
    voidbox("image", "export", reference, "-o", str(target), "--format", "initramfs",
            "--compression", compression)  # fmt: skip
    kernel = Path(os.path.realpath(voidbox.cache / "guest/default")) / "vmlinux"
    argv = ["qemu-system-x86_64", "-M", "q35,accel=tcg", "-cpu", "max", "-m", "256M", "-nodefaults"]
    argv += ["-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", str(kernel)]
    argv += ["-initrd", str(target), "-append", "console=ttyS0 quiet panic=-1 no_timer_check"]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=True)
    console = done.stdout.decode(errors="replace")
    assert "BOOTED of the image 0 755" in console, console[-3000:]
    voidbox("image", "rm", reference)
