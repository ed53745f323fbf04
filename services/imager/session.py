"""HTTP with limits: nothing from the environment, no endless answers, no redirect that takes a login."""

from __future__ import annotations

import time
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import BaseAdapter
from requests.utils import should_bypass_proxies

from services.imager.registry_settings import RegistrySettings
from services.imager.trust import TlsAdapter, context_for

_CHUNK: Final = 1 << 18
_MAX_REDIRECTS: Final = 5
_MAX_SHORT_ANSWER: Final = 1 << 20
_USER_AGENT: Final = "voidbox"


class InsecureRedirect(requests.RequestException):
    """A redirect from HTTPS to plain HTTP."""


class Session(requests.Session):
    """A session that always has limits and takes nothing from the environment.

    Redirects are followed here: `requests` would read the whole body of each into memory.
    """

    def __init__(self, settings: RegistrySettings, plain_allowed: bool) -> None:
        super().__init__()
        self._settings = settings
        self._plain_allowed = plain_allowed
        self.trust_env = False  # else ~/.netrc may add or replace credentials
        self.headers.update({"User-Agent": _USER_AGENT, "Accept-Encoding": "identity"})
        # Some registries take a client with cookies for a browser.
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))

    def get_adapter(self, url: str) -> BaseAdapter:
        """The adapter for `url`; one per host that is spoken to by TLS, made when it is needed."""
        parts = urlsplit(url)
        if parts.scheme == "https":
            place = f"https://{parts.netloc.rpartition('@')[2].lower()}/"
            if place not in self.adapters:
                self.mount(place, TlsAdapter(context_for(self._settings, place[len("https://") : -1])))
        return super().get_adapter(url)

    def request(self, method: str, url: str, **options: Any) -> requests.Response:  # type: ignore[override]
        settings = self._settings
        stream = options.pop("stream", False)
        headers = dict(options.pop("headers", None) or {})
        options |= {"timeout": (settings.connect_seconds, settings.read_seconds), "allow_redirects": False}
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

    def post_secret(self, url: str, form: dict[str, str]) -> requests.Response:
        """Send a form that holds a secret; a redirect is not followed, it would take the secret along."""
        settings = self._settings
        direct = not settings.proxies or should_bypass_proxies(url, settings.no_proxy)
        response = super().request(
            "POST", url, data=form, stream=True, allow_redirects=False,
            timeout=(settings.connect_seconds, settings.read_seconds),
            proxies={} if direct else dict(settings.proxies),
        )  # fmt: skip
        return self._load(response)

    def get_redirect_target(self, resp: requests.Response) -> None:
        """None: even with redirects off, `requests` would look for the next one and read the body."""

    def _check_redirect(self, before: str, after: str) -> None:
        target = urlsplit(after)
        allowed = (
            ("http", "https") if self._plain_allowed or urlsplit(before).scheme == "http" else ("https",)
        )
        if target.scheme not in allowed:
            raise InsecureRedirect(f"a redirect to {target.scheme}://{target.hostname} is not followed")

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
