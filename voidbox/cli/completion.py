"""`voidbox completion`: scripts for shells, made from the parser, so they cannot be out of date."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from voidbox.cli.parser import build

# Commands whose arguments may be files.
_FILES = ("run", "validate", "inspect", "cp")


def script(shell: str) -> str:
    """The completion script for `shell`."""
    _, commands = build()
    options = {name: _options(command) for name, command in commands.items()}
    nested = {name: _nested(command) for name, command in commands.items() if _nested(command)}
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](options, nested, _helps(commands))


def _options(command: argparse.ArgumentParser) -> list[str]:
    return sorted(
        option for action in command._actions for option in action.option_strings if option[:2] == "--"
    )


def _nested(command: argparse.ArgumentParser) -> list[str]:
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            return list(action.choices)
        if action.choices is not None and not action.option_strings:
            return [str(choice) for choice in action.choices]
    return []


def _helps(commands: Mapping[str, argparse.ArgumentParser]) -> dict[str, str]:
    return {name: (command.description or "").replace("'", "") for name, command in commands.items()}


def _bash(options: Mapping[str, list[str]], nested: Mapping[str, list[str]], helps: Mapping[str, str]) -> str:
    words = {name: " ".join([*nested.get(name, []), *options[name]]) for name in options}
    cases = "\n".join(
        f'    {name}) words="{words[name]}"; files={int(name in _FILES)} ;;' for name in options
    )
    return f"""\
# voidbox completion for bash: eval "$(voidbox completion bash)"
_voidbox() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} command="" words files=0 i
  for ((i = 1; i < COMP_CWORD; i++)); do
    case ${{COMP_WORDS[i]}} in
    --) COMPREPLY=(); return ;;
    --output | --address | --log-level) ((i++)) ;;
    -*) ;;
    *) command=${{command:-${{COMP_WORDS[i]}}}} ;;
    esac
  done
  if [[ ${{COMP_WORDS[COMP_CWORD - 1]}} == --output ]]; then
    COMPREPLY=($(compgen -W "human json" -- "$current")); return
  fi
  case $command in
    "") words="{" ".join(options)} --help --version --output --address" ;;
{cases}
    *) words="" ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  if ((files)) && [[ $current != -* ]]; then
    COMPREPLY+=($(compgen -f -- "$current"))
  fi
}}
complete -o filenames -F _voidbox voidbox
"""


def _zsh(options: Mapping[str, list[str]], nested: Mapping[str, list[str]], helps: Mapping[str, str]) -> str:
    names = "\n".join(f"    '{name}:{helps[name]}'" for name in options)
    cases = "\n".join(
        f"    {name}) compadd -- {' '.join([*nested.get(name, []), *options[name]])}"
        + ("; _files" if name in _FILES else "")
        + " ;;"
        for name in options
    )
    return f"""\
#compdef voidbox
# voidbox completion for zsh: eval "$(voidbox completion zsh)"
_voidbox() {{
  local -a commands
  commands=(
{names}
  )
  if ((CURRENT == 2)); then
    _describe command commands
    return
  fi
  case ${{words[2]}} in
{cases}
  esac
}}
compdef _voidbox voidbox
"""


def _fish(options: Mapping[str, list[str]], nested: Mapping[str, list[str]], helps: Mapping[str, str]) -> str:
    lines = ["# voidbox completion for fish: voidbox completion fish | source", "complete -c voidbox -f"]
    for name in options:
        lines.append(f"complete -c voidbox -n __fish_use_subcommand -a {name} -d '{helps[name]}'")
    for name, words in options.items():
        condition = f"-n '__fish_seen_subcommand_from {name}'"
        lines += [f"complete -c voidbox {condition} -l {word.removeprefix('--')}" for word in words]
        if name in nested:
            lines.append(f"complete -c voidbox {condition} -a '{' '.join(nested[name])}'")
        if name in _FILES:
            lines.append(f"complete -c voidbox {condition} -F")
    return "\n".join(lines) + "\n"
