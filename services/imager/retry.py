"""Tries requests to a registry again when the reason may pass, and names at last what was wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import requests
import tenacity
import urllib3.exceptions

from services.common.errors import Cancelled, Denied, Unavailable, VoidboxError
from services.imager.limits import Cancel
from services.imager.reference import RegistryReference
from services.imager.registry_settings import RegistrySettings
from services.imager.session import InsecureRedirect

TRANSIENT_STATUSES: Final = {408, 429, 500, 502, 503, 504}
_MAX_RETRY_AFTER_SECONDS: Final = 20.0
Result = TypeVar("Result")


class Transient(Exception):
    """Worth another attempt; `after` is what the registry asked for, in seconds."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


def retry_after(response: requests.Response) -> float:
    """What the answer asks us to wait, in seconds; never long."""
    text = response.headers.get("Retry-After", "")
    return min(float(text), _MAX_RETRY_AFTER_SECONDS) if text.isdigit() else 0.0


class Retries:
    """Calls that talk to the registry of one image."""

    def __init__(self, reference: RegistryReference, settings: RegistrySettings, cancel: Cancel) -> None:
        self._reference, self._settings, self._cancel = reference, settings, cancel

    def __call__(self, call: Callable[[], Result]) -> Result:
        """`call`, again after what may pass; at last a clear error.

        Raises:
            Unavailable: it did not pass.
            Cancelled: the caller cancelled.
        """
        settings = self._settings

        def wait(state: tenacity.RetryCallState) -> float:
            backoff: float = settings.backoff_seconds * 2.0 ** (state.attempt_number - 1)
            error = state.outcome.exception() if state.outcome else None
            return max(backoff, error.after if isinstance(error, Transient) else 0.0)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Transient),
            stop=tenacity.stop_after_attempt(settings.attempts),
            wait=wait,
            sleep=tenacity.sleep_using_event(self._cancel.event),
            reraise=True,
        )
        try:
            result: Result = retrying(self._translated, call)
            return result
        except Transient as error:
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
        except (VoidboxError, Transient):
            raise
        except requests.exceptions.SSLError as error:
            raise Unavailable(
                f"{self._reference}: no trusted TLS connection to {self._reference.host}: "
                f"{_root_cause(error)}; add its certificate with --ca-bundle, or allow plain HTTP "
                "with 'insecure' if it has no TLS",
                reason="REGISTRY_TLS",
                registry=self._reference.registry,
            ) from error
        except InsecureRedirect as error:
            raise Denied(f"{self._reference}: {error}", reason="INSECURE_REDIRECT") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            if self._cancel.event.is_set():
                raise Cancelled("the caller cancelled") from error
            if isinstance(error, OSError) and not isinstance(
                error, (requests.RequestException, ConnectionError, TimeoutError)
            ):
                raise  # the local disk, not the network
            raise Transient(_root_cause(error)) from error


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
