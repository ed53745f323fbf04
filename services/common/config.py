"""Configuration: one frozen dataclass per service, from flags > environment > file > defaults.

A field declared by `setting(default, help)` becomes the flag `--field-name`, the
environment variable `VOIDBOX_<SERVICE>_<FIELD_NAME>` (or the names given) and the key
`<service>.field_name` of the configuration file (`VOIDBOX_CONFIG`, else
`$XDG_CONFIG_HOME/voidbox/config.yaml`). Unknown keys fail.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml

from services.common.errors import InvalidInput

Config = TypeVar("Config")

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


def setting(default: Any, help: str, *, env: Sequence[str] = ()) -> Any:  # noqa: A002 - argparse's word
    """A configuration field with its default, its help text and extra environment variables."""
    return dataclasses.field(default=default, metadata={"help": help, "env": tuple(env)})


def load(cls: type[Config], service: str, argv: Sequence[str], env: Mapping[str, str]) -> Config:
    """Build the configuration of `service`.

    Args:
        cls: A frozen dataclass whose fields are `setting`s of type str, int, float, bool,
            Path, or one of these with None.
        service: Its name, e.g. "imager": names the file's section and the variables.
        argv: Command line without the program's name; `--help` exits.
        env: The process environment.

    Raises:
        InvalidInput: an unknown key or a value of the wrong type; the message names the place.
    """
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    parser = argparse.ArgumentParser(prog=f"voidbox-{service}", description=cls.__doc__)
    for field in fields.values():
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=field.name,
            metavar=field.name.upper(),
            help=f"{field.metadata['help']} (default: {field.default})",
        )
    values: dict[str, Any] = {}
    path, section = _file_section(service, env)
    for key, value in section.items():
        if key not in fields:
            hint = difflib.get_close_matches(str(key), fields, n=1)
            cure = f"; did you mean {hint[0]!r}?" if hint else f"; known keys: {', '.join(sorted(fields))}"
            raise InvalidInput(
                f"{path}: {service}: unknown key {key!r}{cure}", reason="BAD_CONFIG", file=path
            )
        values[key] = _convert(value, hints[key], f"{path}: {service}.{key}")
    for name, field in fields.items():
        for variable in (f"VOIDBOX_{service.upper()}_{name.upper()}", *field.metadata["env"]):
            if env.get(variable):
                values[name] = _convert(env[variable], hints[name], variable)
                break
    for name, value in vars(parser.parse_args(argv)).items():
        if value is not None:
            values[name] = _convert(value, hints[name], f"--{name.replace('_', '-')}")
    return cls(**values)


def _file_section(service: str, env: Mapping[str, str]) -> tuple[Path, Mapping[str, Any]]:
    explicit = env.get("VOIDBOX_CONFIG")
    base = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", "/")) / ".config")
    path = Path(explicit) if explicit else base / "voidbox/config.yaml"
    try:
        text = path.read_text()
    except FileNotFoundError:
        if explicit:
            raise InvalidInput(
                f"{path}: no such file (VOIDBOX_CONFIG)", reason="BAD_CONFIG", file=path
            ) from None
        return path, {}
    try:
        document = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise InvalidInput(f"{path}: {error}", reason="BAD_CONFIG", file=path) from error
    section = document.get(service) or {} if isinstance(document, dict) else None
    if not isinstance(section, dict):
        raise InvalidInput(f"{path}: {service!r} must be a mapping", reason="BAD_CONFIG", file=path)
    return path, section


def _convert(value: object, hint: Any, place: str) -> object:
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
    kind = kinds[0]
    text = str(value).strip()
    try:
        if kind is bool:
            if text.lower() in _TRUE | _FALSE:
                return text.lower() in _TRUE
            raise ValueError(text)
        return kind(text)
    except ValueError:
        raise InvalidInput(
            f"{place}: {text!r} is not a {kind.__name__}", reason="BAD_CONFIG", place=place
        ) from None
