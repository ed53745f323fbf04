"""Image references: what a user may write, checked strictly and normalised.

Grammar of names, tags and digests: github.com/distribution/reference; transports as in
containers-transports(5).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.common.errors import InvalidInput, NotBuilt

DOCKER_HUB: Final = "docker.io"
_HUB_NAMES: Final = {DOCKER_HUB, "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"}
_HUB_HOST: Final = "registry-1.docker.io"
_TRANSPORTS: Final = {
    "oci",
    "oci-archive",
    "docker",
    "docker-archive",
    "docker-daemon",
    "containers-storage",
    "dir",
}
_MAX_NAME: Final = 255
_MAX_REFERENCE: Final = 4096
_HOST: Final = re.compile(
    r"(?:(?:[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]*[A-Za-z0-9])(?:\.(?:[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]*[A-Za-z0-9]))*"
    r"|\[[0-9A-Fa-f:]+\])(?::[0-9]{1,5})?"
)
_COMPONENT: Final = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_OTHER_DIGEST: Final = re.compile(r"[a-z0-9]+(?:[+._-][a-z0-9]+)*:[0-9A-Za-z]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryReference:
    """An image in a registry.

    Attributes:
        registry: Host and optional port as users write it; `docker.io` for Docker Hub.
        repository: E.g. `library/alpine`.
        tag: None only if there is a digest.
        digest: `sha256:<hex>` or None; it wins over the tag.
    """

    registry: str
    repository: str
    tag: str | None
    digest: str | None

    @property
    def host(self) -> str:
        """Where the registry's API is served."""
        return _HUB_HOST if self.registry == DOCKER_HUB else self.registry

    @property
    def is_loopback(self) -> bool:
        """Whether the registry is this machine, so that plain HTTP is harmless."""
        name = (
            self.host.rpartition("]")[0].lstrip("[") if self.host.startswith("[") else self.host.split(":")[0]
        )
        if name in ("localhost", "::1"):
            return True
        parts = name.split(".")
        return len(parts) == 4 and parts[0] == "127" and all(part.isdigit() for part in parts)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.registry}/{self.repository}{tag}{digest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutReference:
    """An image in an OCI layout directory.

    Attributes:
        directory: As written; the caller decides what a relative path is relative to.
        tag: Value of `org.opencontainers.image.ref.name`; None if the layout holds one image.
        digest: Of the manifest or index, or None.
    """

    directory: Path
    tag: str | None
    digest: str | None

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.directory

    def __str__(self) -> str:
        return f"oci:{self.directory}{_suffix(self.tag, self.digest)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveReference:
    """An image in a tar archive of an OCI layout; attributes as those of `LayoutReference`."""

    path: Path
    tag: str | None
    digest: str | None

    def __str__(self) -> str:
        return f"oci-archive:{self.path}{_suffix(self.tag, self.digest)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DockerArchiveReference:
    """An image in an archive that `docker save` wrote.

    Attributes:
        path: As written; the caller decides what a relative path is relative to.
        name: The image's normalised name and tag; None if the archive holds one image.
        index: Its place in the archive, instead of a name.
    """

    path: Path
    name: str | None = None
    index: int | None = None

    def __str__(self) -> str:
        which = self.name if self.index is None else f"@{self.index}"
        return f"docker-archive:{self.path}{f':{which}' if which else ''}"


LocalReference = LayoutReference | ArchiveReference | DockerArchiveReference
Reference = RegistryReference | LocalReference


def _suffix(tag: str | None, digest: str | None) -> str:
    return (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")


def parse_reference(text: str) -> Reference:
    """What `text` refers to.

    Raises:
        InvalidInput: it is malformed; the message says how.
        NotBuilt: a transport that this version does not read.
    """
    text = text.strip()
    if not text:
        raise _bad(text, "it is empty")
    if len(text) > _MAX_REFERENCE:
        raise _bad(text[:60] + "…", f"it is longer than {_MAX_REFERENCE} characters")
    if any(ord(char) < 0x20 or ord(char) == 0x7F for char in text):
        raise _bad(text, "it contains a control character")
    if text.startswith("docker://"):
        return _parse_registry(text, text.removeprefix("docker://"))
    if text.startswith("oci:"):
        return _parse_layout(text, text.removeprefix("oci:"))
    if text.startswith("oci-archive:"):
        return _parse_archive(text, text.removeprefix("oci-archive:"))
    if text.startswith("docker-archive:"):
        return _parse_docker_archive(text, text.removeprefix("docker-archive:"))
    for transport in ("docker-daemon:", "containers-storage:", "dir:"):
        if text.startswith(transport):
            raise NotBuilt(
                f"{text}: {transport} is not built in this version; "
                f"convert it first: skopeo copy {text} oci:DIRECTORY:TAG",
                reason="TRANSPORT_NOT_BUILT",
                reference=text,
            )
    if "://" in text:
        raise _bad(text, "use docker://HOST/NAME, a bare name, oci:, oci-archive: or docker-archive:")
    return _parse_registry(text, text)


def is_digest(text: str) -> bool:
    """Whether `text` is a `sha256:<hex>` digest, the only kind that is read here."""
    return _DIGEST.fullmatch(text) is not None


def _bad(text: str, why: str) -> InvalidInput:
    return InvalidInput(f"{text!r} is not an image reference: {why}", reason="BAD_REFERENCE", reference=text)


def _split_digest(text: str, rest: str) -> tuple[str, str | None]:
    name, at, digest = rest.partition("@")
    if not at:
        return rest, None
    if not is_digest(digest):
        if _OTHER_DIGEST.fullmatch(digest) and not digest.startswith("sha256:"):
            raise _bad(text, f"only sha256 digests are read, not {digest.split(':')[0]}")
        raise _bad(text, "its digest is not sha256: and 64 lower-case hex digits")
    return name, digest


def _parse_registry(text: str, rest: str) -> RegistryReference:
    name, digest = _split_digest(text, rest)
    slash = name.rfind("/")
    colon = name.rfind(":")
    tag: str | None = None
    if colon > slash:
        name, tag = name[:colon], name[colon + 1 :]
        if not _TAG.fullmatch(tag):
            raise _bad(text, f"the tag {tag!r} is not 1 to 128 letters, digits, '_', '.' or '-'")
    host, slash_found, repository = name.partition("/")
    if not slash_found or not (host.lower() == "localhost" or any(char in host for char in ".:[")):
        if slash_found and host.lower() != host:
            # Docker takes it for a host, which in lower case would be a name on Docker Hub.
            raise _bad(text, f"names are lower case: {host.lower()!r}? A host needs a dot or a port")
        host, repository = DOCKER_HUB, name
    if not _HOST.fullmatch(host):
        raise _bad(text, f"{host!r} is not a host name with an optional port")
    port = host.rpartition(":")[2] if not host.endswith("]") and ":" in host else ""
    if port and not 0 < int(port) < 65536:
        raise _bad(text, f"there is no port {port}")
    if host.lower().partition(":")[0] in _TRANSPORTS:
        raise _bad(text, f"a host cannot be called {host.partition(':')[0]!r}: that begins another kind")
    if host.lower() in _HUB_NAMES:
        host = DOCKER_HUB
        repository = repository if "/" in repository else f"library/{repository}"
    if repository != repository.lower():
        raise _bad(text, f"repository names are lower case: {repository.lower()!r}?")
    for component in repository.split("/"):
        if not _COMPONENT.fullmatch(component):
            raise _bad(text, f"{component!r} is not a component of a repository name")
    if len(host) + 1 + len(repository) > _MAX_NAME:
        raise _bad(text, f"its name is longer than {_MAX_NAME} characters")
    if tag is None and digest is None:
        tag = "latest"
    return RegistryReference(registry=host.lower(), repository=repository, tag=tag, digest=digest)


def _parse_layout(text: str, rest: str) -> LayoutReference:
    rest, digest = _split_digest(text, rest) if "@sha" in rest else (rest, None)
    directory, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:
        directory, tag = rest, ""
    if not directory:
        raise _bad(text, "it names no directory")
    if colon and not tag and directory != rest:
        raise _bad(text, "its tag is empty")
    if not tag and ":" in Path(directory).name:
        raise _bad(text, "its directory's name has a colon, so it needs a tag after another one")
    return LayoutReference(directory=Path(directory), tag=tag or None, digest=digest)


def _parse_archive(text: str, rest: str) -> ArchiveReference:
    """The first colon ends the path, as in containers-transports(5): a tag may hold slashes."""
    rest, digest = _split_digest(text, rest) if "@sha" in rest else (rest, None)
    path, colon, tag = rest.partition(":")
    if not path:
        raise _bad(text, "it names no file")
    if colon and not tag:
        raise _bad(text, "its tag is empty")
    return ArchiveReference(path=Path(path), tag=tag or None, digest=digest)


def _parse_docker_archive(text: str, rest: str) -> DockerArchiveReference:
    path, colon, which = rest.partition(":")
    if not path:
        raise _bad(text, "it names no file")
    if not colon:
        return DockerArchiveReference(path=Path(path))
    if which.startswith("@"):
        if not re.fullmatch(r"@[0-9]{1,4}", which, re.ASCII):
            raise _bad(text, "what follows ':@' is not the number of an image, which starts at 0")
        return DockerArchiveReference(path=Path(path), index=int(which[1:]))
    if not which:
        raise _bad(text, "its image name is empty")
    name = _parse_registry(text, which)
    if name.digest is not None:
        raise _bad(text, "images in it have names and tags, not digests")
    return DockerArchiveReference(path=Path(path), name=str(name))
