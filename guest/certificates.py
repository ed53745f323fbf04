"""Certificates that programs shall trust besides those of their image.

Programs find certificates in one of the usual bundles, or by a variable that the hypervisor sets to ours.
So the bundles that the image has get ours at their end, between two marks, and `/etc/voidbox` has both a
bundle of all and ours alone. A box that is copied gets others: what is between the marks is replaced.
"""

from __future__ import annotations

import os
import re

from guest.errors import invalid
from guest.identity import replace_file
from guest.root import Root

OURS = "/etc/voidbox/ca.pem"
BUNDLE = "/etc/voidbox/ca-bundle.pem"

# Debian, Alpine and Arch; Fedora and RHEL; openSUSE; older Alpine.
SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)

_BEGIN, _END = "# Added by voidbox: the box's own authority", "# End of what voidbox added"
_ADDED = re.compile(rf"\n?{re.escape(_BEGIN)}\n.*?{re.escape(_END)}\n", re.DOTALL)
_LIMIT = 4 << 20
_PEM = re.compile(rb"(-----BEGIN CERTIFICATE-----\n[A-Za-z0-9+/=\n]+-----END CERTIFICATE-----\n*)+")


def install(pem: bytes, root: Root) -> None:
    """Have the programs in `root` trust `pem`.

    Raises:
        AgentError: it is no certificate.
        OSError: the root cannot be written to.
    """
    if not _PEM.fullmatch(pem):
        raise invalid("trusted_certificates is not PEM")
    ours = pem.decode("ascii").strip() + "\n"
    root.make_directories("/etc/voidbox", 0, 0, 0o755)
    whole = ""
    for path in SYSTEM_BUNDLES:
        before = root.read_text(path, _LIMIT)
        if not before.strip():
            continue
        clean = _ADDED.sub("", before)
        whole = whole or clean
        real = _real(root, path)
        if real:
            replace_file(root, real, joined(clean, ours), 0o644)
    replace_file(root, OURS, ours, 0o644)
    replace_file(root, BUNDLE, joined(whole, ours), 0o644)


def joined(bundle: str, ours: str) -> str:
    """A bundle with ours at its end."""
    gap = "\n" if bundle and not bundle.endswith("\n") else ""
    return f"{bundle}{gap}{_BEGIN}\n{ours}{_END}\n"


def _real(root: Root, path: str) -> str:
    """Where a bundle lies: the usual names are often links, which stay. Empty if that cannot be told."""
    fd = root.open(path, os.O_RDONLY)
    try:
        found = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
    finally:
        os.close(fd)
    prefix = "" if root.path == "/" else root.path
    return found[len(prefix) :] if found.startswith(prefix + "/") else ""
