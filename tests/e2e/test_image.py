"""Images from the command line: pulled, run as their configuration says, removed."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.voidbox_cli import MEMORY, Voidbox, pipeline, program_box, spec

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


def busybox_root() -> bytes:
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
    return buffer.getvalue()


def layout(directory: Path, config: dict[str, Any]) -> str:
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

    layer = busybox_root()
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
    found = voidbox("--output", "json", "image", "verify").json
    assert found["checked"] >= 4
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
    others = ("--entrypoint", "/bin/id", "--user", "1234", "--", "-G")
    assert voidbox("exec", *MEMORY, "--image", reference, *others).text == "0\n"
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
