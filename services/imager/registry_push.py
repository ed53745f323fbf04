"""Uploads to a registry: blobs it does not have, then manifests (OCI distribution-spec, "Push")."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import BinaryIO, Final
from urllib.parse import urljoin, urlsplit

import requests

from services.common.errors import (
    Corrupt,
    Denied,
    InvalidInput,
    NotFound,
    Unauthenticated,
    Unavailable,
    VoidboxError,
)
from services.imager.limits import Cancel
from services.imager.manifest import Descriptor
from services.imager.registry import RegistrySource
from services.imager.retry import TRANSIENT_STATUSES, Transient, retry_after

_CHUNK: Final = 256 << 10
_MAX_ERROR: Final = 300
Opener = Callable[[], BinaryIO]


class _Body:
    """A request's body that can be sent more than once, and ends when the caller cancels."""

    def __init__(self, open_: Opener, size: int, cancel: Cancel, done: Callable[[int], None]) -> None:
        self._open, self._cancel, self._done = open_, cancel, done
        self.len = size  # where `requests` looks for the length

    def __iter__(self) -> Iterator[bytes]:
        sent = 0
        with self._open() as file:
            while sent < self.len and (data := file.read(min(_CHUNK, self.len - sent))):
                self._cancel.check()
                yield data
                sent += len(data)
                self._done(sent)


class RegistryTarget(RegistrySource):
    """One repository of one registry to write to; a context manager. Safe to use from several threads."""

    def connect(self) -> None:
        """Find out whether the registry answers, and by HTTPS or plain HTTP.

        Raises:
            Unavailable: it does not.
            Unauthenticated: it wants a login.
        """

        def get() -> None:
            with self._request(f"{self._client.prefix}://{self._reference.host}/v2/", {}) as response:
                if response.status_code == 400 and self._client.prefix == "http":
                    self._client.prefix = "https"  # see `_get_manifest`
                    return
                self._check_pushed(response, "its API")

        self._retried(get)

    def cancel(self) -> None:
        """End everything that is under way."""
        self._cancel.cancel()

    def existing(self) -> tuple[bytes, str] | None:
        """The manifest or index that the tag names now, and its media type; None if there is none."""
        try:
            return self.root()
        except (NotFound, Unauthenticated):  # some registries hide what does not exist yet
            return None

    def put_blob(self, descriptor: Descriptor, open_: Opener, done: Callable[[int], None]) -> None:
        """Upload one blob, unless the registry has it.

        Args:
            open_: Opens the content from its start, for each attempt anew.
            done: Told how many bytes have been sent.

        Raises:
            Denied: the login may not push.
            Unavailable: the registry does not answer or fails.
            Cancelled: the caller cancelled.
        """

        def put() -> None:
            if self._has(descriptor):
                return
            url = f"{self._client.prefix}://{self._container.upload_blob_url()}"
            with self._send("POST", url, b"") as response:
                self._check_pushed(response, "an upload")
                location = response.headers.get("Location", "")
            if not location:
                raise Unavailable(
                    f"{self._reference}: {self._reference.registry} opens an upload without saying where",
                    reason="REGISTRY_STATUS",
                )
            target = urljoin(url, location)
            target += f"{'&' if urlsplit(target).query else '?'}digest={descriptor.digest}"
            body = _Body(open_, descriptor.size, self._cancel, done) if descriptor.size else b""
            with self._send("PUT", target, body) as response:
                self._check_pushed(response, f"blob {descriptor.digest}")

        self._retried(put)
        done(descriptor.size)

    def put_manifest(self, name: str, data: bytes, media_type: str) -> str:
        """Upload a manifest or index whose blobs are there, as tag or digest `name`; its digest.

        Raises:
            Corrupt: the registry stored something else.
        """
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        url = f"{self._client.prefix}://{self._container.manifest_url(name)}"

        def put() -> None:
            with self._send("PUT", url, data, {"Content-Type": media_type}) as response:
                self._check_pushed(response, f"manifest {name}")
                stored = response.headers.get("Docker-Content-Digest", digest)
            if stored != digest:
                raise Corrupt(
                    f"{self._reference}: the registry stored {stored} instead of {digest}; "
                    "it or a proxy is broken",
                    reason="WRONG_DIGEST",
                    digest=digest,
                )

        self._retried(put)
        return digest

    def _has(self, descriptor: Descriptor) -> bool:
        with self._send("HEAD", self._blob_url(descriptor), None) as response:
            length = response.headers.get("Content-Length", "")
            return response.status_code == 200 and length in ("", str(descriptor.size))

    def _send(
        self, method: str, url: str, body: bytes | _Body | None, headers: dict[str, str] | None = None
    ) -> contextlib.closing[requests.Response]:
        self._cancel.check()
        headers = {"Content-Type": "application/octet-stream", **(headers or {})}
        here = urlsplit(f"{self._client.prefix}://{self._reference.host}")
        there = urlsplit(url)
        if (there.scheme, there.netloc) == (here.scheme, here.netloc):
            response = self._client.do_request(url, method, data=body, headers=headers, stream=True)
        elif there.scheme == "https" or (there.scheme == "http" and self._client.prefix == "http"):
            # An upload to another host: our login is not its business.
            response = self._session.request(method, url, data=body, headers=headers, stream=True)
        else:
            raise Denied(
                f"{self._reference}: the registry sends uploads to {there.scheme}://{there.hostname}, "
                "which is not https",
                reason="INSECURE_REDIRECT",
            )
        return contextlib.closing(response)

    def _check_pushed(self, response: requests.Response, what: str) -> None:
        status = response.status_code
        if status in (200, 201, 202, 204):
            return
        reference, host = self._reference, self._reference.registry
        if status in TRANSIENT_STATUSES:
            raise Transient(f"it answers {status} for {what}", retry_after(response))
        if status == 401:  # its body is gone: it was asked again with a login, or there is none
            raise Unauthenticated(
                f"{reference}: {host} wants a login to push; log in with: docker login {host}",
                reason="REGISTRY_LOGIN",
                reference=reference,
            )
        said = _said(self._read(response, 64 << 10, what))
        if status == 403:
            raise Denied(
                f"{reference}: {host} does not let this login push there; ask for the right, or log in as "
                f"somebody else: docker login {host}{said}",
                reason="REGISTRY_DENIED",
                reference=reference,
            )
        kinds: dict[int, type[VoidboxError]] = {404: NotFound, 405: InvalidInput, 413: InvalidInput}
        kind = kinds.get(status, InvalidInput if status == 400 else Unavailable)
        raise kind(f"{reference}: {host} answers {status} for {what}{said}", reason="REGISTRY_STATUS")


def _said(body: bytes) -> str:
    """The registry's own words, if it has any (distribution-spec, "Error Codes")."""
    try:
        errors = json.loads(body)["errors"]
        words = "; ".join(f"{error['code']}: {error['message']}" for error in errors)
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" ({words[:_MAX_ERROR]})" if words else ""
