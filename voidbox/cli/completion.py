"""`voidbox completion`: scripts for shells, made from the parser, so they cannot be out of date."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

from voidbox.cli.parser import build

# Commands whose arguments may be files.
_FILES = ("run", "validate", "inspect", "cp", "image export", "image build-agent", "image pull")


def script(shell: str) -> str:
    """The completion script for `shell`."""
    _, commands = build()
    parsers = {
        name: parser for top, command in commands.items() for name, parser in _with_nested(top, command)
    }
    options = {name: _options(parser) for name, parser in parsers.items()}
    nested = {name: words for name, parser in parsers.items() if (words := _nested(parser))}
    choices = {key: words for name, parser in parsers.items() for key, words in _choices(name, parser)}
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](options, nested, choices, _helps(commands))


def _with_nested(
    name: str, command: argparse.ArgumentParser
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """A command and those below it: "image", "image pull", …"""
    yield name, command
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below, parser in action.choices.items():
                yield f"{name} {below}", parser


def _choices(name: str, command: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    """The values of an option that takes only some, by command and option."""
    for action in command._actions:
        if action.choices is not None and not isinstance(action, argparse._SubParsersAction):
            for option in action.option_strings:
                yield f"{name} {option}", [str(choice) for choice in action.choices]


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


def _bash(
    options: Mapping[str, list[str]],
    nested: Mapping[str, list[str]],
    choices: Mapping[str, list[str]],
    helps: Mapping[str, str],
) -> str:
    words = {name: " ".join([*nested.get(name, []), *options[name]]) for name in options}
    cases = "\n".join(
        f'    "{name}") words="{words[name]}"; files={int(name in _FILES)} ;;' for name in options
    )
    groups = " | ".join(sorted({name.partition(" ")[0] for name in options if " " in name}))
    values = "\n".join(
        f'    "{key}") words="{" ".join(found)}"; files=0 ;;' for key, found in choices.items()
    )
    return f"""\
# voidbox completion for bash: eval "$(voidbox completion bash)"
_voidbox() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}}
  local command="" words files=0 i
  for ((i = 1; i < COMP_CWORD; i++)); do
    case ${{COMP_WORDS[i]}} in
    --) COMPREPLY=(); return ;;
    --output | --address | --log-level) ((i++)) ;;
    -*) ;;
    *)
      case $command in
      "") command=${{COMP_WORDS[i]}} ;;
      {groups}) command+=" ${{COMP_WORDS[i]}}" ;;
      esac ;;
    esac
  done
  if [[ $previous == --output ]]; then
    COMPREPLY=($(compgen -W "human json" -- "$current")); return
  fi
  case $command in
    "") words="{" ".join(helps)} --help --version --output --address" ;;
{cases}
    *) words="" ;;
  esac
  case "$command $previous" in
{values}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  if ((files)) && [[ $current != -* ]]; then
    COMPREPLY+=($(compgen -f -- "$current"))
  fi
}}
complete -o filenames -F _voidbox voidbox
"""


def _zsh(
    options: Mapping[str, list[str]],
    nested: Mapping[str, list[str]],
    choices: Mapping[str, list[str]],
    helps: Mapping[str, str],
) -> str:
    names = "\n".join(f"    '{name}:{text}'" for name, text in helps.items())
    # Longer names first: the first pattern that fits is taken.
    cases = "\n".join(
        f"    '{name} '*) compadd -- {' '.join([*nested.get(name, []), *options[name]])}"
        + ("; _files" if name in _FILES else "")
        + " ;;"
        for name in sorted(options, key=lambda name: -len(name.split()))
    )
    values = "\n".join(
        f"    *'{key}'|'{key}|'*) compadd -- {' '.join(found)}; return ;;" for key, found in choices.items()
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
  case "${{words[2]}} ${{words[CURRENT-1]}}|${{words[2]}} ${{words[3]}} ${{words[CURRENT-1]}}" in
{values}
  esac
  case "${{words[2,CURRENT-1]}} " in
{cases}
  esac
}}
compdef _voidbox voidbox
"""


def _fish(
    options: Mapping[str, list[str]],
    nested: Mapping[str, list[str]],
    choices: Mapping[str, list[str]],
    helps: Mapping[str, str],
) -> str:
    lines = ["# voidbox completion for fish: voidbox completion fish | source", "complete -c voidbox -f"]
    for name, text in helps.items():
        lines.append(f"complete -c voidbox -n __fish_use_subcommand -a {name} -d '{text}'")
    for name, words in options.items():
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in name.split())
        below = [other.partition(" ")[2] for other in options if other.startswith(f"{name} ")]
        if below:
            seen += f"; and not __fish_seen_subcommand_from {' '.join(below)}"
        condition = f"-n '{seen}'"
        for word in words:
            found = choices.get(f"{name} {word}")
            values = f" -x -a '{' '.join(found)}'" if found else ""
            lines.append(f"complete -c voidbox {condition} -l {word.removeprefix('--')}{values}")
        if name in nested:
            lines.append(f"complete -c voidbox {condition} -a '{' '.join(nested[name])}'")
        if name in _FILES:
            lines.append(f"complete -c voidbox {condition} -F")
    return "\n".join(lines) + "\n"
