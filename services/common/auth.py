"""Who may call: anyone who can open the 0600 unix socket; over TCP, who knows the token.

The token is 16 or more printable characters in a file that only its owner can read.
"""

from __future__ import annotations

import hmac
import stat
from collections.abc import Iterable
from pathlib import Path

from services.common.errors import InvalidInput, Unauthenticated

AUTHORIZATION = "authorization"
_MIN_LENGTH = 16


def read_token(path: Path) -> str:
    """The token in the file `path`.

    Raises:
        InvalidInput: the file is missing, readable by others, or holds no usable token.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"token file {path}: {error}", reason="BAD_TOKEN_FILE", path=path) from error
    if mode & 0o077:
        raise InvalidInput(
            f"token file {path} is readable by others; run: chmod 600 {path}", reason="BAD_TOKEN_FILE"
        )
    if len(token) < _MIN_LENGTH or not token.isprintable() or " " in token:
        raise InvalidInput(
            f"token file {path} must hold one word of {_MIN_LENGTH} or more characters; "
            f"make one: openssl rand -hex 32 > {path}",
            reason="BAD_TOKEN_FILE",
        )
    return token


def check_token(expected: str, metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """Compare the bearer token in `metadata` in constant time.

    Raises:
        Unauthenticated: it is missing or wrong.
    """
    for key, value in metadata:
        if key == AUTHORIZATION and isinstance(value, str) and value.startswith("Bearer "):
            if hmac.compare_digest(value.removeprefix("Bearer ").encode(), expected.encode()):
                return
            raise Unauthenticated("the token is wrong; use the service's token file", reason="WRONG_TOKEN")
    raise Unauthenticated(
        "this address needs a token; set VOIDBOX_TOKEN_FILE or send 'authorization: Bearer …'",
        reason="MISSING_TOKEN",
    )
