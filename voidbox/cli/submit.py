"""From a spec file to the request that starts it."""

from __future__ import annotations

import os
import re
import secrets
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import InvalidInput
from voidbox.cli.screen import Screen, size
from voidbox.client import Client
from voidbox.orchestrator.v1 import orchestrator_pb2 as pb
from voidbox.spec import Problem, Spec, SpecError, client_env, input_files, parse_spec

# The orchestrator's own limits (SpecDocument.content; a message is at most 4 MiB).
MAX_SPEC_BYTES = 1024 * 1024
MAX_INPUT_BYTES = 2 * 1024 * 1024
# A client that was killed leaves no run behind; long enough for its network to come back.
ORPHAN_SECONDS = 60.0

_RUN_ID = re.compile(r"[a-z][a-z0-9-]{0,62}")
# Less than this is sent before anybody looks for a progress bar.
_SHOWN_UPLOAD_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A spec that has been read and checked."""

    path: Path
    content: bytes
    spec: Spec
    files: tuple[Path, ...]


def spec_path(args: Namespace) -> str:
    """The spec that the command line names.

    Raises:
        InvalidInput: none or two.
    """
    if (args.spec is None) == (args.file is None):
        raise InvalidInput(
            f"name one spec file: voidbox {args.command} SPEC",
            reason="MISSING_SPEC" if args.spec is None else "TWO_SPECS",
        )
    return str(args.spec or args.file)


def read(path: str) -> Submission:
    """Read and check a spec and the presence of the files that it names.

    Raises:
        SpecError: it is no valid spec, or files are missing; every problem is in it.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_SPEC_BYTES + 1)
    except OSError as error:
        raise SpecError([Problem(file=path, message=f"cannot be read: {error.strerror}")]) from error
    spec = parse_spec(content, path, Path(path).resolve().parent)
    files = tuple(Path(name) for name in input_files(spec))
    problems = [
        Problem(file=path, line=line, column=column, message=message)
        for file in files
        if (message := _fault(file))
        for line, column in (_place_of(content, file, Path(path).resolve().parent),)
    ]
    if problems:
        raise SpecError(problems)
    return Submission(path=Path(path), content=content, spec=spec, files=files)


def _fault(path: Path) -> str:
    try:
        path.stat()
    except OSError as error:
        return (
            f"input {path}: {error.strerror}; create it or correct the path "
            "(relative paths start at the spec's directory)"
        )
    if not (path.is_file() or path.is_dir()):
        return f"input {path} is neither a file nor a directory"
    if not os.access(path, os.R_OK):
        return f"input {path} is not readable by you; change its permissions"
    return ""


def _place_of(content: bytes, path: Path, base: Path) -> tuple[int, int]:
    """Line and column of the text that names `path`; 0 and 0 if it cannot be told."""
    names = [str(path), os.path.relpath(path, base)]
    for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
        for name in names:
            at = line.find(name)
            if at >= 0 and "file" in line[:at]:
                return number, at + 1
    return 0, 0


def run_id(args: Namespace, name: str) -> str:
    """The id for the new run.

    Raises:
        InvalidInput: the one on the command line is malformed.
    """
    if args.run_id is None:
        word = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
        return f"{word if word[:1].isalpha() else f'run-{word}'.rstrip('-')}-{secrets.token_hex(4)}"
    if not _RUN_ID.fullmatch(args.run_id):
        raise InvalidInput(
            f"--run-id {args.run_id!r}: use 1 to 63 of a-z, 0-9 and '-', starting with a letter",
            reason="BAD_RUN_ID",
        )
    return str(args.run_id)


def input_text(text: str | None) -> str:
    """The run's input: TEXT, @FILE or @- for standard input.

    Raises:
        InvalidInput: the file cannot be read, is no text or too long.
    """
    if text is None or not text.startswith("@"):
        return text or ""
    name = text[1:]
    try:
        if name == "-":
            data = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
        else:
            with open(name, "rb") as file:
                data = file.read(MAX_INPUT_BYTES + 1)
        if len(data) > MAX_INPUT_BYTES:
            raise InvalidInput(
                f"--input {text}: longer than {size(MAX_INPUT_BYTES)}; make it a file input of the spec",
                reason="INPUT_TOO_LONG",
            )
        return data.decode()
    except OSError as error:
        raise InvalidInput(f"--input {text}: {error.strerror}", reason="BAD_INPUT") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"--input {text}: byte {error.start} is not UTF-8; make it a file input of the spec",
            reason="BAD_INPUT",
        ) from error


async def submit(
    client: Client, submission: Submission, args: Namespace, env: Mapping[str, str], screen: Screen
) -> pb.Run:
    """Upload the spec's files and start the run."""
    request = pb.CreateRunRequest(
        run_id=run_id(args, submission.spec.name),
        spec=pb.SpecDocument(content=submission.content, filename=str(submission.path)),
        input=input_text(args.input),
        env=client_env(submission.spec, env),
        base_directory=str(submission.path.resolve().parent),
    )
    if not args.detach:
        request.options.orphan_timeout.FromNanoseconds(int(ORPHAN_SECONDS * 1e9))
    if args.timeout:
        request.options.timeout.FromNanoseconds(int(args.timeout * 1e9))
    request.options.max_parallel_boxes = args.max_parallel or 0
    request.options.cold_boot = args.cold
    for path in submission.files:
        request.files.append(await _upload(client, path, screen))
    return await client.create_run(request)


async def _upload(client: Client, path: Path, screen: Screen) -> pb.InputFile:
    total = sum(_sizes(path))
    if not screen.live or total < _SHOWN_UPLOAD_BYTES:
        return await client.upload(path)
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"sending {path.name}", total=total)
        return await client.upload(path, lambda count: bar.advance(task, count))


def _sizes(path: Path) -> Iterator[int]:
    if path.is_file():
        yield path.stat().st_size
        return
    for directory, _, names in os.walk(path):
        for name in names:
            yield os.lstat(os.path.join(directory, name)).st_size
