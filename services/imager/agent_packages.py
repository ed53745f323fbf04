"""Which packages hold the agents' programs: one file pins name, version and integrity hash of each."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from services.common.errors import Corrupt, NotFound

PINNED: Final = Path(__file__).with_name("data") / "agents.json"
_SHA512_BYTES: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentPackage:
    """A package of the npm registry that holds an agent for one processor.

    Attributes:
        agent: E.g. "claude-code".
        architecture: In Go's words, e.g. "amd64".
        name: Of the package, with its scope.
        integrity: Subresource integrity of its tarball: "sha512-" and base64.
        root: Directory of the tarball that becomes the root of the disk.
        program: Path of the program below `root`.
    """

    agent: str
    architecture: str
    name: str
    version: str
    integrity: str
    root: str
    program: str

    @property
    def sha512(self) -> bytes:
        """The digest in `integrity`.

        Raises:
            Corrupt: it is none.
        """
        try:
            digest = base64.b64decode(self.integrity.removeprefix("sha512-"), validate=True)
        except binascii.Error:
            digest = b""
        if len(digest) != _SHA512_BYTES or not self.integrity.startswith("sha512-"):
            raise Corrupt(f"{PINNED}: {self.integrity!r} is no sha512 integrity hash", reason="BAD_PIN")
        return digest


def pinned_package(agent: str, architecture: str, pins: Path = PINNED) -> AgentPackage:
    """The package of `agent` for `architecture`.

    Raises:
        NotFound: nothing is pinned for it; the message lists what is.
    """
    document: Mapping[str, Any] = json.loads(pins.read_bytes())
    if agent not in document:
        raise NotFound(
            f"{agent!r} is no agent that has a pinned package; there are: {', '.join(sorted(document))}",
            reason="UNKNOWN_AGENT",
            agent=agent,
        )
    packages = document[agent]["packages"]
    if architecture not in packages:
        raise NotFound(
            f"{agent} has no package for {architecture}; there are: {', '.join(sorted(packages))}",
            reason="NO_SUCH_PLATFORM",
            agent=agent,
        )
    return AgentPackage(
        agent=agent, architecture=architecture, program=document[agent]["program"], **packages[architecture]
    )
