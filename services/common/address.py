"""Where a service listens: `unix:/path` or `tcp://host:port`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.common.errors import InvalidInput

# sizeof(sun_path) - 1 on Linux (unix(7)).
UNIX_PATH_MAX = 107


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A listening address; exactly one of `path` and `port` is set."""

    path: Path | None = None
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `unix:/path`, `unix:///path` or `tcp://host:port`.

        Raises:
            InvalidInput: another form, a relative or too long path, a bad port.
        """
        if text.startswith("unix:"):
            path = Path("/" + text.removeprefix("unix:").lstrip("/"))
            if not text.removeprefix("unix:").startswith("/"):
                raise _bad(text, "the path must be absolute")
            if len(str(path).encode()) > UNIX_PATH_MAX:
                raise _bad(
                    text,
                    f"the path is longer than {UNIX_PATH_MAX} bytes; set a shorter VOIDBOX_RUNTIME_DIR",
                )
            return cls(path=path)
        if text.startswith("tcp://"):
            host, _, port = text.removeprefix("tcp://").rpartition(":")
            if not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
                raise _bad(text, "expected tcp://host:port")
            return cls(host=host, port=int(port))
        raise _bad(text, "expected unix:/path or tcp://host:port")

    @property
    def target(self) -> str:
        """The form that gRPC takes."""
        return f"unix:{self.path}" if self.path else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"tcp://{self.host}:{self.port}"


def _bad(text: str, why: str) -> InvalidInput:
    return InvalidInput(f"address {text!r}: {why}", reason="BAD_ADDRESS", address=text)
