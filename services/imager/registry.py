"""Pulls from a registry by `oras`, of which only the transport is used.

What oras 0.2.43 lacks is added here: time limits, bounded retries, verification of digest and
size while streaming, resumption, limits on what is read into memory. Its unpacking is not used.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Any, Final, Self, TypeVar
from urllib.parse import urljoin, urlsplit

import oras.container
import oras.provider
import requests
import tenacity
import urllib3.exceptions
from requests.utils import should_bypass_proxies

from services.common.errors import (
    Cancelled,
    Denied,
    InvalidInput,
    NotFound,
    Unauthenticated,
    Unavailable,
    VoidboxError,
)
from services.imager.credentials import Credentials, find_credentials
from services.imager.limits import Cancel, Limits
from services.imager.manifest import MANIFEST_TYPES, Descriptor
from services.imager.reference import RegistryReference
from services.imager.sources import BlobSink, check_content, check_digest

log = logging.getLogger(__name__)

_CHUNK: Final = 1 << 18
_MAX_REDIRECTS: Final = 5
_TRANSIENT_STATUSES: Final = {408, 429, 500, 502, 503, 504}
_MAX_RETRY_AFTER_SECONDS: Final = 20.0
_MAX_SHORT_ANSWER: Final = 1 << 20
_USER_AGENT: Final = "voidbox"
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrySettings:
    """How registries are talked to.

    Attributes:
        connect_seconds: Until a connection stands.
        read_seconds: Until the next byte of an answer.
        attempts: Of each request, and of each blob in all.
        backoff_seconds: Before the second attempt; doubles.
        slow_bytes_per_second: A download that stays below this for `slow_seconds` is broken off.
        slow_seconds: See above.
        parallel_layers: Downloads at once.
        proxies: By scheme, as `requests` wants them.
        no_proxy: Hosts that are not reached by proxy, in the usual form.
        ca_bundle: File with more certificates to trust, or None.
        auth_files: Where logins are looked up.
    """

    connect_seconds: float = 10.0
    read_seconds: float = 30.0
    attempts: int = 4
    backoff_seconds: float = 0.5
    slow_bytes_per_second: int = 1024
    slow_seconds: float = 30.0
    parallel_layers: int = 4
    proxies: Mapping[str, str] = field(default_factory=dict)
    no_proxy: str = ""
    ca_bundle: Path | None = None
    auth_files: tuple[Path, ...] = ()


class _Transient(Exception):
    """Worth another attempt; `after` is what the registry asked for, in seconds."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class _InsecureRedirect(requests.RequestException):
    """A redirect from HTTPS to plain HTTP."""


class _Session(requests.Session):
    """A session that always has limits and takes nothing from the environment.

    Redirects are followed here: `requests` would read the whole body of each into memory.
    """

    def __init__(self, settings: RegistrySettings, plain_allowed: bool) -> None:
        super().__init__()
        self._settings = settings
        self._plain_allowed = plain_allowed
        self.trust_env = False  # else ~/.netrc may add or replace credentials
        self.headers.update({"User-Agent": _USER_AGENT, "Accept-Encoding": "identity"})

    def request(self, method: str, url: str, **options: Any) -> requests.Response:  # type: ignore[override]
        settings = self._settings
        stream = options.pop("stream", False)
        headers = dict(options.pop("headers", None) or {})
        options |= {"timeout": (settings.connect_seconds, settings.read_seconds), "allow_redirects": False}
        if settings.ca_bundle is not None:
            options["verify"] = str(settings.ca_bundle)
        for _ in range(_MAX_REDIRECTS + 1):
            direct = not settings.proxies or should_bypass_proxies(url, settings.no_proxy)
            options["proxies"] = {} if direct else dict(settings.proxies)
            response = super().request(method, url, headers=headers, stream=True, **options)
            if not response.is_redirect:
                return response if stream else self._load(response)
            response.close()
            following = urljoin(response.url, response.headers["location"])
            self._check_redirect(response.url, following)
            if self.should_strip_auth(response.url, following):  # type: ignore[no-untyped-call, unused-ignore]
                headers.pop("Authorization", None)
            url, options["params"] = following, None
        raise requests.TooManyRedirects(f"more than {_MAX_REDIRECTS} redirects")

    def get_redirect_target(self, resp: requests.Response) -> None:
        """None: even with redirects off, `requests` would look for the next one and read the body."""

    def _check_redirect(self, before: str, after: str) -> None:
        target = urlsplit(after)
        allowed = (
            ("http", "https") if self._plain_allowed or urlsplit(before).scheme == "http" else ("https",)
        )
        if target.scheme not in allowed:
            raise _InsecureRedirect(f"a redirect to {target.scheme}://{target.hostname} is not followed")

    def _load(self, response: requests.Response) -> requests.Response:
        """Read the body of a short answer, such as a token."""
        data = b""
        deadline = time.monotonic() + self._settings.read_seconds
        while piece := response.raw.read1(_CHUNK, decode_content=False):
            data += piece
            if len(data) > _MAX_SHORT_ANSWER or time.monotonic() > deadline:
                response.close()
                raise requests.ConnectionError("an answer that should be short is too long or too slow")
        response._content = data
        response.close()
        return response


class _Oras(oras.provider.Registry):  # type: ignore[misc]
    """oras's client with one request per call, and authentication when it is asked for."""

    def __init__(self, host: str, *, plain: bool, session: _Session, login: Credentials | None) -> None:
        super().__init__(hostname=host, insecure=plain, auth_backend="token")
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self.session: _Session = session
        self.auth.session = session
        self._plain = plain
        self._basic = ""
        if login is not None:
            self.auth.set_basic_auth(login.user, login.password)

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
        authorization = self._basic or self.auth.get_auth_header().get("Authorization", "")
        for attempt in (1, 2):
            if authorization:
                headers["Authorization"] = authorization
            response: requests.Response = self.session.request(
                method, url, data=data, headers=headers, json=json, stream=stream
            )
            if response.status_code != 401 or attempt == 2:
                break
            challenge = response.headers.get("Www-Authenticate", "")
            response.close()
            authorization = self._authorize(response, challenge)
            if not authorization:
                break
        return response

    def _authorize(self, response: requests.Response, challenge: str) -> str:
        """The header that answers `challenge`, or "" if nothing can."""
        scheme = challenge.split(" ", 1)[0].lower()
        if scheme == "basic":
            encoded = getattr(self.auth, "_basic_auth", "")
            self._basic = f"Basic {encoded}" if encoded else ""
            return self._basic
        if scheme != "bearer":
            return ""
        realm = urlsplit(oras.auth.utils.parse_auth_header(challenge).realm or "")
        if realm.scheme not in (("http", "https") if self._plain else ("https",)):
            raise Denied(
                f"the registry {self.hostname} sends clients for a token to {realm.geturl()[:200]!r}, "
                "which is not https; no credentials were sent",
                reason="INSECURE_TOKEN_SERVER",
            )
        try:
            headers, changed = self.auth.authenticate_request(response, {}, refresh=True)
        except (AttributeError, KeyError, TypeError) as error:
            raise Unauthenticated(
                f"the token server {realm.hostname} of the registry {self.hostname} gives no sound answer",
                reason="BAD_TOKEN_SERVER",
            ) from error
        return str(headers.get("Authorization", "")) if changed else ""


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
        plain = insecure or reference.is_loopback
        if insecure and not reference.is_loopback:
            log.warning("%s: plain HTTP is allowed; anybody on the way can replace the image", reference)
        self._session = _Session(settings, plain)
        self._client = _Oras(
            reference.host,
            plain=plain,
            session=self._session,
            login=find_credentials(settings.auth_files, reference),
        )
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

        def get() -> None:
            if sink.count >= descriptor.size:
                return
            headers = {"Range": f"bytes={sink.count}-"} if sink.count else {}
            with self._request(self._blob_url(descriptor), headers) as response:
                if sink.count and not _continues(response, sink.count):
                    sink.reset()
                    if response.status_code != 200:
                        raise _Transient("the answer is for another range than the one asked for")
                self._check_status(response, f"layer {descriptor.digest}")
                for data in self._chunks(response):
                    sink.write(data)
            if sink.count < descriptor.size:
                raise _Transient(f"the answer ended after {sink.count} of {descriptor.size} bytes")

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
            raise _Transient(f"the answer for {what} ended after {len(data)} of {announced} bytes")
        return data

    def _chunks(self, response: requests.Response) -> Any:
        """The body as it arrives, watched for cancellation and for dripping."""
        raw = response.raw
        if response.headers.get("Content-Encoding", "identity") not in ("", "identity"):
            raise _Transient("the answer is encoded although identity was asked for")

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
                        raise _Transient(f"only {window_bytes} bytes came in {elapsed:.0f} s")
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
        if status in _TRANSIENT_STATUSES:
            raise _Transient(f"it answers {status} for {what}", _retry_after(response))
        if status == 404:
            raise NotFound(
                f"{reference}: {host} has no {what}; check the name and the tag",
                reason="IMAGE_NOT_FOUND",
                reference=reference,
            )
        if status == 401:
            raise Unauthenticated(
                f"{reference}: {host} wants a login, or the image does not exist; "
                f"log in with: docker login {host}",
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

    def _retried(self, call: Callable[[], Result]) -> Result:
        """`call`, again after what may pass; at last a clear error."""
        settings = self._settings

        def wait(state: tenacity.RetryCallState) -> float:
            backoff: float = settings.backoff_seconds * 2.0 ** (state.attempt_number - 1)
            error = state.outcome.exception() if state.outcome else None
            return max(backoff, error.after if isinstance(error, _Transient) else 0.0)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Transient),
            stop=tenacity.stop_after_attempt(settings.attempts),
            wait=wait,
            sleep=tenacity.sleep_using_event(self._cancel.event),
            reraise=True,
        )
        try:
            result: Result = retrying(self._translated, call)
            return result
        except _Transient as error:
            self._cancel.check()
            raise Unavailable(
                f"{self._reference}: the registry {self._reference.host} is not reachable: {error}; "
                "check its name, the network and the proxy settings, or use a cached image with the "
                "pull policy 'never'",
                reason="REGISTRY_UNREACHABLE",
                registry=self._reference.registry,
            ) from error

    def _translated(self, call: Callable[[], Result]) -> Result:
        """`call` with the exceptions of requests and urllib3 sorted into ours."""
        try:
            return call()
        except (VoidboxError, _Transient):
            raise
        except requests.exceptions.SSLError as error:
            raise Unavailable(
                f"{self._reference}: no trusted TLS connection to {self._reference.host}: "
                f"{_root_cause(error)}; add its certificate with --ca-bundle, or allow plain HTTP "
                "with 'insecure' if it has no TLS",
                reason="REGISTRY_TLS",
                registry=self._reference.registry,
            ) from error
        except _InsecureRedirect as error:
            raise Denied(f"{self._reference}: {error}", reason="INSECURE_REDIRECT") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            if self._cancel.event.is_set():
                raise Cancelled("the caller cancelled") from error
            if isinstance(error, OSError) and not isinstance(
                error, (requests.RequestException, ConnectionError, TimeoutError)
            ):
                raise  # the local disk, not the network
            raise _Transient(_root_cause(error)) from error


def _continues(response: requests.Response, start: int) -> bool:
    """Whether the answer goes on at byte `start`, or is none at all."""
    if response.status_code == 206:
        found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        return found is not None and int(found[1]) == start
    return response.status_code not in (200, 416)


def _retry_after(response: requests.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return min(float(text), _MAX_RETRY_AFTER_SECONDS) if text.isdigit() else 0.0


def _root_cause(error: BaseException) -> str:
    """The innermost message: the outer ones repeat URLs and object addresses."""
    seen = error
    while True:
        inner = getattr(seen, "reason", None)
        if not isinstance(inner, BaseException):
            inner = seen.args[0] if seen.args and isinstance(seen.args[0], BaseException) else seen.__cause__
        if not isinstance(inner, BaseException) or inner is seen:
            break
        seen = inner
    text = str(seen) or type(seen).__name__
    return text.rpartition(">: ")[2] or text
