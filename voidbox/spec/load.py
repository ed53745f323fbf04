"""Spec files: read, parsed, checked, and what a client must send along with them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Final, Literal

from voidbox.spec.bind import Binder, unknown
from voidbox.spec.checks import check
from voidbox.spec.models import Box, FileInput, Llm, Provider, Skill, SkillRef, SkillType, Spec
from voidbox.spec.nodes import MAX_BYTES, Malformed, read_nodes
from voidbox.spec.problems import Problem, SpecError

Format = Literal["yaml", "json"]

_EXTENSIONS: Final[Mapping[str, Format]] = {".yaml": "yaml", ".yml": "yaml", ".json": "json"}

LLM_PROVIDER: Final = "VOIDBOX_LLM_PROVIDER"
LLM_MODEL: Final = "VOIDBOX_LLM_MODEL"
LLM_BASE_URL: Final = "VOIDBOX_LLM_BASE_URL"
LLM_API_KEY_ENV: Final = "VOIDBOX_LLM_API_KEY_ENV"
_LLM_OVERRIDES: Final = (LLM_PROVIDER, LLM_MODEL, LLM_BASE_URL, LLM_API_KEY_ENV)


def load_spec(path: str | os.PathLike[str], format: Format | None = None) -> Spec:  # noqa: A002
    """The spec in the file `path`; its relative paths start from the file's directory.

    Raises:
        SpecError: the file cannot be read or is no valid spec; every problem is in it.
    """
    shown = os.fspath(path)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SpecError([Problem(file=shown, message=f"cannot be read: {error.strerror}")]) from error
    return parse_spec(content, shown, FilePath(path).resolve().parent, format)


def parse_spec(
    text: str | bytes,
    filename: str,
    base_dir: str | os.PathLike[str] | None,
    format: Format | None = None,  # noqa: A002
) -> Spec:
    """The spec that `text` is.

    Args:
        text: The document; bytes must be UTF-8.
        filename: For messages, and its extension for the format.
        base_dir: Absolute directory that relative host paths start from; None if unknown,
            which makes relative mounts and kernels faults.
        format: The format, whatever the extension.

    Raises:
        SpecError: it is no valid spec; every problem is in it.
    """
    language = format or _EXTENSIONS.get(os.path.splitext(filename)[1].lower())
    if language is None:
        message = "the format is not clear from the name; name the file .yaml, .yml or .json"
        raise SpecError([Problem(file=filename, message=message)])
    try:
        node = read_nodes(_decoded(text), language)
    except Malformed as fault:
        problem = Problem(
            file=filename, line=fault.line, column=fault.column, message=f"invalid {language}: {fault}"
        )
        raise SpecError([problem]) from fault
    binder = Binder(filename, None if base_dir is None else os.fspath(base_dir))
    spec = binder.bind(node, Spec)
    if spec is not None:
        check(spec, binder.report)
    if spec is None or binder.problems:
        raise SpecError(binder.problems)
    return spec


def _decoded(text: str | bytes) -> str:
    if isinstance(text, str):
        return text
    if len(text) > MAX_BYTES:
        raise Malformed(f"larger than {MAX_BYTES} bytes", 1, 1)
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = text[: error.start]
        line = before.count(b"\n") + 1
        column = len(before[before.rfind(b"\n") + 1 :].decode(errors="replace")) + 1
        raise Malformed(f"byte 0x{text[error.start]:02x} is not UTF-8", line, column) from error


def _boxes(spec: Spec) -> tuple[Box, ...]:
    return spec.pipeline.boxes if spec.pipeline else ()


def _skills(spec: Spec) -> Iterator[Skill]:
    if spec.agent is not None:
        yield from spec.agent.skills
    for box in _boxes(spec):
        yield from box.skills


def input_files(spec: Spec) -> tuple[str, ...]:
    """Absolute paths of the files and directories that a client must upload, each once."""
    entries = [
        *(spec.agent.inputs if spec.agent else ()),
        *(spec.workflow.inputs if spec.workflow else ()),
        *(entry for box in _boxes(spec) for entry in box.inputs),
    ]
    paths = [entry.file for entry in entries if isinstance(entry, FileInput)]
    paths += [
        skill.value for skill in _skills(spec) if isinstance(skill, SkillRef) and skill.type is SkillType.FILE
    ]
    return tuple(dict.fromkeys(paths))


def copied_variables(spec: Spec) -> Mapping[str, str]:
    """Variables that are copied from the client's environment, to where the spec says so."""
    found: dict[str, str] = {}
    for name, value in spec.sandbox.env.items():
        if value == "":
            found.setdefault(name, f"sandbox.env.{name}")
    for at, box in enumerate(_boxes(spec)):
        for name, value in box.sandbox.env.items():
            if value == "":
                found.setdefault(name, f"pipeline.boxes[{at}].sandbox.env.{name}")
    return found


def client_env(spec: Spec, environ: Mapping[str, str]) -> dict[str, str]:
    """What a client sends of its environment: copied variables and `VOIDBOX_LLM_*` overrides.

    Raises:
        SpecError: variables are not set; all of them are named.
    """
    _require(spec, environ)
    names = [*copied_variables(spec), *(name for name in _LLM_OVERRIDES if environ.get(name))]
    return {name: environ[name] for name in names}


def resolve_env(spec: Spec, env: Mapping[str, str]) -> Spec:
    """`spec` with copied variables and `VOIDBOX_LLM_*` overrides from `env` put in.

    Raises:
        SpecError: a variable is not in `env`, or an override is wrong.
    """
    _require(spec, env)
    sandbox = dataclasses.replace(spec.sandbox, env=_filled(spec.sandbox.env, env))
    pipeline = spec.pipeline
    if pipeline is not None:
        boxes = tuple(
            dataclasses.replace(
                box, sandbox=dataclasses.replace(box.sandbox, env=_filled(box.sandbox.env, env))
            )
            for box in pipeline.boxes
        )
        pipeline = dataclasses.replace(pipeline, boxes=boxes)
    return dataclasses.replace(spec, sandbox=sandbox, pipeline=pipeline, llm=_overridden(spec.llm, env))


def _require(spec: Spec, env: Mapping[str, str]) -> None:
    missing = {name: path for name, path in copied_variables(spec).items() if name not in env}
    if missing:
        raise SpecError(
            [
                Problem(
                    file="environment",
                    path=path,
                    message=f"variable {name} is to be copied from the environment, but it is not set; "
                    "set it, or give it a value in the spec",
                )
                for name, path in missing.items()
            ]
        )


def _filled(spec_env: Mapping[str, str], env: Mapping[str, str]) -> dict[str, str]:
    return {name: env[name] if value == "" else value for name, value in spec_env.items()}


def _overridden(llm: Llm | None, env: Mapping[str, str]) -> Llm | None:
    changes: dict[str, object] = {}
    if env.get(LLM_PROVIDER):
        text = env[LLM_PROVIDER].lower()
        names = [provider.value for provider in Provider]
        if text not in names:
            message = f"{unknown('value', env[LLM_PROVIDER], names)} Known: {', '.join(names)}"
            raise SpecError([Problem(file="environment", path=LLM_PROVIDER, message=message)])
        changes["provider"] = Provider(text)
    for name, key in ((LLM_MODEL, "model"), (LLM_BASE_URL, "base_url"), (LLM_API_KEY_ENV, "api_key_env")):
        if env.get(name):
            changes[key] = env[name]
    if not changes:
        return llm
    return dataclasses.replace(llm or Llm(provider=Provider.CLAUDE), **changes)  # type: ignore[arg-type]
