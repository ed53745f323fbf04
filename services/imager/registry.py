"""Pulls from a registry by `oras`, of which only the transport is used.

What oras 0.2.43 lacks is added here: time limits, bounded retries, verification of digest and
size while streaming, resumption, limits on what is read into memory. Its unpacking is not used.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable
from typing import Any, Final, Self
from urllib.parse import urlsplit

import oras.container
import oras.provider
import requests

from services.common.errors import Denied, InvalidInput, NotFound, Unauthenticated, Unavailable
from services.imager.authorization import Authorizer
from services.imager.credentials import Keyring
from services.imager.limits import Cancel, Limits
from services.imager.manifest import MANIFEST_TYPES, Descriptor
from services.imager.reference import RegistryReference
from services.imager.registry_settings import RegistrySettings
from services.imager.retry import TRANSIENT_STATUSES, Retries, Transient, retry_after
from services.imager.session import Session
from services.imager.sources import BlobSink, check_content, check_digest

__all__ = ["RegistrySettings", "RegistrySource"]

log = logging.getLogger(__name__)

_CHUNK: Final = 1 << 18
_FOREIGN: Final = re.compile(r"\.(?:foreign|nondistributable)\.")


class _Oras(oras.provider.Registry):  # type: ignore[misc]
    """oras's client with one request per call, and authentication when it is asked for."""

    def __init__(self, host: str, *, plain: bool, session: Session, authorizer: Authorizer) -> None:
        super().__init__(hostname=host, insecure=plain, auth_backend="token")
        self.session: Session = session
        self.auth.session = session
        self._authorizer = authorizer

    def do_request(  # replaces oras's own, which retries everything for two minutes
        self,
        url: str,
        method: str = "GET",
        data: Any = None,
        headers: dict[str, str] | None = None,
        json: Any = None,
        stream: bool = False,
    ) -> requests.Response:
        headers = dict(headers or {})
        authorization = self._authorizer.header
        for attempt in (1, 2):
            if authorization:
                headers["Authorization"] = authorization
            response: requests.Response = self.session.request(
                method, url, data=data, headers=headers, json=json, stream=stream
            )
            if response.status_code != 401 or attempt == 2:
                break
            challenge = response.headers.get("Www-Authenticate", "")
            try:
                authorization = self._authorizer.answer(challenge, authorization)
            except BaseException:
                response.close()
                raise
            if not authorization:
                break
            response.close()
        return response


class RegistrySource:
    """One image in one registry; a context manager. Safe to use from several threads.

    Args:
        reference: The image.
        insecure: Allow plain HTTP although the host is not loopback.
        settings: How to talk to registries.
        limits: What is read into memory at most.
        cancel: Ends everything that waits.
    """

    def __init__(
        self,
        reference: RegistryReference,
        *,
        insecure: bool,
        settings: RegistrySettings,
        limits: Limits,
        cancel: Cancel,
    ) -> None:
        self._reference = reference
        self._settings, self._limits, self._cancel = settings, limits, cancel
        plain = self._plain = insecure or reference.is_loopback
        if insecure and not reference.is_loopback:
            log.warning("%s: plain HTTP is allowed; anybody on the way can replace the image", reference)
        self._session = Session(settings, plain)
        self._keyring = Keyring(settings.auth_files, settings.helper_env, settings.helper_seconds)
        authorizer = Authorizer(
            self._session, reference, plain=plain, find_login=lambda: self._keyring.find(reference)
        )
        self._client = _Oras(reference.host, plain=plain, session=self._session, authorizer=authorizer)
        self._retried = Retries(reference, settings, cancel)
        self._container = oras.container.Container(f"{reference.host}/{reference.repository}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def root(self) -> tuple[bytes, str]:
        """The manifest or index that the reference names."""
        reference = self._reference
        name = reference.digest or reference.tag or "latest"
        data, media_type, claimed = self._retried(lambda: self._get_manifest(name))
        what = f"{reference}: manifest"
        if reference.digest is not None:
            check_digest(data, reference.digest, what)
        elif claimed.startswith("sha256:"):
            check_digest(data, claimed, what)
        return data, media_type

    def manifest(self, descriptor: Descriptor) -> bytes:
        """A manifest or index, verified."""
        data, _, _ = self._retried(lambda: self._get_manifest(descriptor.digest))
        return check_content(data, descriptor, f"{self._reference}: manifest")

    def small_blob(self, descriptor: Descriptor) -> bytes:
        """A blob, verified, in memory."""

        def get() -> bytes:
            with self._request(self._blob_url(descriptor), {}) as response:
                self._check_status(response, f"blob {descriptor.digest}")
                return self._read(response, descriptor.size + 1, f"blob {descriptor.digest}")

        return check_content(self._retried(get), descriptor, f"{self._reference}: blob")

    def fetch(self, descriptor: Descriptor, sink: BlobSink) -> None:
        """Bring `sink` the rest of a blob; a broken download goes on where it stopped."""

        try:
            self._fetch(descriptor, sink, lambda headers: self._request(self._blob_url(descriptor), headers))
        except NotFound:
            if not descriptor.urls or not _FOREIGN.search(descriptor.media_type):
                raise
            self._fetch_foreign(descriptor, sink)

    def _fetch_foreign(self, descriptor: Descriptor, sink: BlobSink) -> None:
        """A layer that its maker alone hands out: without our login, whatever the address."""
        for number, url in enumerate(descriptor.urls):
            scheme = urlsplit(url).scheme
            if scheme != "https" and not (scheme == "http" and self._plain):
                raise Denied(
                    f"{self._reference}: layer {descriptor.digest} is at {url[:200]!r}, which is not https",
                    reason="INSECURE_REDIRECT",
                )
            try:
                self._fetch(
                    descriptor,
                    sink,
                    lambda headers, url=url: self._session.request("GET", url, headers=headers, stream=True),  # type: ignore[misc]
                )
                return
            except (NotFound, Denied, Unauthenticated, Unavailable):
                if number == len(descriptor.urls) - 1:
                    raise

    def _fetch(
        self,
        descriptor: Descriptor,
        sink: BlobSink,
        request: Callable[[dict[str, str]], requests.Response],
    ) -> None:
        def get() -> None:
            if sink.count >= descriptor.size:
                return
            headers = {"Range": f"bytes={sink.count}-"} if sink.count else {}
            with request(headers) as response:
                if sink.count and not _continues(response, sink.count):
                    sink.reset()
                    if response.status_code != 200:
                        raise Transient("the answer is for another range than the one asked for")
                self._check_status(response, f"layer {descriptor.digest}")
                for data in self._chunks(response):
                    sink.write(data)
            if sink.count < descriptor.size:
                raise Transient(f"the answer ended after {sink.count} of {descriptor.size} bytes")

        self._retried(get)

    def _blob_url(self, descriptor: Descriptor) -> str:
        return f"{self._client.prefix}://{self._container.get_blob_url(descriptor.digest)}"

    def _get_manifest(self, name: str) -> tuple[bytes, str, str]:
        url = f"{self._client.prefix}://{self._container.manifest_url(name)}"
        with self._request(url, {"Accept": ", ".join(MANIFEST_TYPES)}) as response:
            if response.status_code == 400 and self._client.prefix == "http":
                # How a TLS server answers plain HTTP, where that was only allowed, not demanded.
                self._client.prefix = "https"
                return self._get_manifest(name)
            self._check_status(response, f"manifest {name}")
            data = self._read(response, self._limits.manifest_bytes + 1, f"manifest {name}")
            media_type = response.headers.get("Content-Type", "").split(";")[0].strip()
            claimed = response.headers.get("Docker-Content-Digest", "")
        if len(data) > self._limits.manifest_bytes:
            raise InvalidInput(
                f"{self._reference}: the manifest has more than {self._limits.manifest_bytes} bytes",
                reason="IMAGE_TOO_LARGE",
            )
        return data, media_type if media_type in MANIFEST_TYPES else "", claimed

    def _request(self, url: str, headers: dict[str, str]) -> requests.Response:
        self._cancel.check()
        response: requests.Response = self._client.do_request(url, headers=headers, stream=True)
        return response

    def _read(self, response: requests.Response, limit: int, what: str) -> bytes:
        parts: list[bytes] = []
        left = limit
        for data in self._chunks(response):
            parts.append(data[:left])
            left -= len(parts[-1])
            if left <= 0:
                break
        data = b"".join(parts)
        announced = response.headers.get("Content-Length", "")
        if left > 0 and announced.isdigit() and len(data) < int(announced):
            raise Transient(f"the answer for {what} ended after {len(data)} of {announced} bytes")
        return data

    def _chunks(self, response: requests.Response) -> Any:
        """The body as it arrives, watched for cancellation and for dripping."""
        raw = response.raw
        if response.headers.get("Content-Encoding", "identity") not in ("", "identity"):
            raise Transient("the answer is encoded although identity was asked for")

        def stop() -> None:
            with contextlib.suppress(ValueError, RuntimeError, OSError):  # the connection has ended already
                raw.shutdown()

        self._cancel.on_cancel(stop)
        window_start, window_bytes = time.monotonic(), 0
        try:
            while data := raw.read1(_CHUNK, decode_content=False):
                self._cancel.check()
                window_bytes += len(data)
                elapsed = time.monotonic() - window_start
                if elapsed >= self._settings.slow_seconds:
                    if window_bytes < self._settings.slow_bytes_per_second * elapsed:
                        raise Transient(f"only {window_bytes} bytes came in {elapsed:.0f} s")
                    window_start, window_bytes = time.monotonic(), 0
                yield data
            self._cancel.check()
        finally:
            self._cancel.forget(stop)

    def _check_status(self, response: requests.Response, what: str) -> None:
        status = response.status_code
        if status in (200, 206):
            return
        host, reference = self._reference.registry, self._reference
        if status in TRANSIENT_STATUSES:
            raise Transient(f"it answers {status} for {what}", retry_after(response))
        if status == 404:
            raise NotFound(
                f"{reference}: {host} has no {what}; check the name and the tag",
                reason="IMAGE_NOT_FOUND",
                reference=reference,
            )
        if status == 401:
            raise Unauthenticated(
                f"{reference}: {host} wants a login, or the image does not exist; "
                f"log in with: docker login {host}{self._keyring.trouble}",
                reason="REGISTRY_LOGIN",
                reference=reference,
            )
        if status == 403:
            raise Denied(
                f"{reference}: {host} refuses access with this login; ask for the right to pull, or log in "
                f"as somebody else: docker login {host}",
                reason="REGISTRY_DENIED",
                reference=reference,
            )
        raise Unavailable(f"{reference}: {host} answers {status} for {what}", reason="REGISTRY_STATUS")


def _continues(response: requests.Response, start: int) -> bool:
    """Whether the answer goes on at byte `start`, or is none at all."""
    if response.status_code == 206:
        found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        return found is not None and int(found[1]) == start
    return response.status_code not in (200, 416)
