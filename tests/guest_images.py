"""Guest images that look whole and hold nothing that boots, for tests of how they are kept and sent."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from services.imager.guest_store import file_sha256, image_digest


def guest_at(
    cache: Path, machine: int = 62, filling: int = 1, size: int = 1000, default: bool = False
) -> str:
    """A guest image whose kernel says that it is for `machine`; its digest."""
    made = cache / "guest" / "made"
    made.mkdir(parents=True)
    (made / "vmlinux").write_bytes(b"\x7fELF".ljust(18, b"\0") + struct.pack("<H", machine) + bytes(100_000))
    (made / "initramfs.cpio").write_bytes(bytes([filling]) * 50_000 + os.urandom(size))
    parts = {
        name: {"sha256": file_sha256(made / file), "size": (made / file).stat().st_size}
        for name, file in (("kernel", "vmlinux"), ("initramfs", "initramfs.cpio"))
    }
    digest = image_digest(parts["kernel"]["sha256"], parts["initramfs"]["sha256"])  # type: ignore[arg-type]
    about: dict[str, Any] = {"digest": digest, **parts}
    about["kernel"] |= {"release": "6.1.0-test", "flavor": "debian"}
    (made / "manifest.json").write_text(json.dumps(about))
    final = made.rename(made.with_name(digest.removeprefix("sha256:")))
    if default:
        (cache / "guest/default").unlink(missing_ok=True)
        (cache / "guest/default").symlink_to(final.name)
    return digest
