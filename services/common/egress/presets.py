"""Policies that have names: what packages need, what a model's provider needs, all of the Internet."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from services.common.egress.policy import ALL_PORTS, Rule, make_rule

PACKAGES = (
    # Python, JavaScript, Rust, Go, Ruby.
    "pypi.org", "files.pythonhosted.org", "registry.npmjs.org", "registry.yarnpkg.com", "nodejs.org",
    "crates.io", "static.crates.io", "index.crates.io", "static.rust-lang.org",
    "proxy.golang.org", "sum.golang.org", "storage.googleapis.com", "go.dev", "dl.google.com",
    "rubygems.org", "index.rubygems.org",
    # Java.
    "repo.maven.apache.org", "repo1.maven.org", "plugins.gradle.org", "services.gradle.org",
    # Systems.
    "deb.debian.org", "security.debian.org", "archive.ubuntu.com", "security.ubuntu.com",
    "ports.ubuntu.com", "dl-cdn.alpinelinux.org", "conda.anaconda.org", "repo.anaconda.com",
    # Forges.
    "github.com", "api.github.com", "codeload.github.com", "*.githubusercontent.com", "gitlab.com",
    "bitbucket.org", "codeberg.org",
)  # fmt: skip
PROVIDERS: dict[str, tuple[str, ...]] = {
    "claude": ("api.anthropic.com",),
    "claude-personal": ("api.anthropic.com", "claude.ai", "console.anthropic.com", "platform.claude.com"),
    "codex": ("api.openai.com", "chatgpt.com", "auth.openai.com"),
    "openrouter": ("openrouter.ai",),
}
LOCAL_PROVIDERS = {"ollama": 11434, "lm-studio": 1234}
"""Ports of the host's loopback, where these listen unless they are told otherwise."""


def internet() -> tuple[Rule, ...]:
    """All names and public addresses, all ports of TCP and UDP."""
    targets = ({"host": "*"}, {"cidr": "0.0.0.0/0"}, {"cidr": "::/0"})
    return tuple(
        make_rule(**target, ports=ALL_PORTS, protocol=protocol, tls="any" if protocol == "tcp" else "")
        for protocol in ("tcp", "udp")
        for target in targets
    )


def packages() -> tuple[Rule, ...]:
    """Where packages and sources come from, by HTTP and HTTPS; forges by SSH too."""
    forges = ("github.com", "gitlab.com", "bitbucket.org", "codeberg.org")
    return (
        *(make_rule(host=host) for host in PACKAGES),
        *(make_rule(host=host, ports=[22]) for host in forges),
    )


def provider(name: str, base_url: str = "") -> tuple[tuple[Rule, ...], Sequence[int]]:
    """What a model's provider needs: rules, and ports of the host.

    Args:
        name: The provider, as specs have it.
        base_url: Where it answers instead of its usual place.

    Raises:
        ValueError: the URL is none.
    """
    if base_url:
        parts = urlsplit(base_url)
        port = parts.port or (80 if parts.scheme == "http" else 443)
        host = parts.hostname or ""
        if host in (
            "localhost",
            "127.0.0.1",
            "::1",
            "10.0.2.2",
            "host.docker.internal",
            "host.voidbox.internal",
        ):
            return (), (port,)
        if host.replace(".", "").isdecimal() or ":" in host:
            return (make_rule(cidr=host, ports=[port]),), ()
        return (make_rule(host=host, ports=[port]),), ()
    if name in LOCAL_PROVIDERS:
        return (), (LOCAL_PROVIDERS[name],)
    return tuple(make_rule(host=host, ports=[443]) for host in PROVIDERS.get(name, ())), ()
