"""What a stage gets of the stages before it: `input.json`, standard input, its prompt."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# As in the reference; counted in characters, so that none is ever cut in two.
MAX_IN_PROMPT: Final = 4000
# A result is held in memory while `input.json` is made; what is longer goes through files.
MAX_IN_JSON: Final = 16 << 20
# MAX_ARG_STRLEN of Linux (include/uapi/linux/binfmts.h): 32 pages for one argument, with its NUL.
MAX_PROMPT_BYTES: Final = 32 * 4096 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """The result of one stage before; `path` is None and `error` says why if it has none."""

    name: str
    path: Path | None = None
    error: str = ""


def input_json(carried: Sequence[Carried]) -> bytes:
    """A JSON array with one object per stage, in the given order.

    `output` is the text; `output_base64` instead if it is not UTF-8; `truncated` if it is
    longer than `MAX_IN_JSON` bytes; `error` if there is none.
    """
    return json.dumps([_entry(item) for item in carried], ensure_ascii=False).encode()


def _entry(item: Carried) -> dict[str, object]:
    if item.path is None:
        return {"name": item.name, "error": item.error}
    with open(item.path, "rb") as file:
        data = file.read(MAX_IN_JSON + 1)
    truncated = len(data) > MAX_IN_JSON
    more: dict[str, object] = {"truncated": True} if truncated else {}
    data = data[:MAX_IN_JSON]
    try:
        return {"name": item.name, "output": _whole_characters(data, truncated).decode()} | more
    except UnicodeDecodeError:
        return {"name": item.name, "output_base64": base64.b64encode(data).decode()} | more


def _whole_characters(data: bytes, cut: bool) -> bytes:
    """`data` without the first bytes of a character that a cut has split."""
    if cut:
        for back in range(1, min(4, len(data)) + 1):
            byte = data[-back]
            if byte & 0xC0 != 0x80:
                length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
                return data[:-back] if length > back else data
    return data


def text_for_prompt(carried: Sequence[Carried]) -> str:
    """The text that is put into an agent's prompt: a lone result as it is, else the array."""
    if len(carried) == 1 and carried[0].path is not None:
        with open(carried[0].path, "rb") as file:
            # Four bytes are the longest character, so this holds enough to tell that there is more.
            return file.read(4 * MAX_IN_PROMPT + 4).decode(errors="replace")
    return input_json(carried).decode()


def compose_prompt(prompt: str, carried: str, output_file: str, input_path: str) -> str:
    """What the agent is told: its prompt, the results before it, and where to write its own."""
    text = prompt
    if carried:
        cut = carried[:MAX_IN_PROMPT]
        more = "The text above is cut. " if len(carried) > MAX_IN_PROMPT else ""
        text += (
            f"\n\n--- Previous stage output ---\n{cut}\n--- End of previous stage output ---\n"
            f"{more}The full data is in {input_path}."
        )
    if output_file:
        text += f"\n\nWrite your output to {output_file}."
    return text
