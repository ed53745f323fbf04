"""Entry point of `voidbox`: parse, dispatch, and turn every failure into a line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from voidbox.cli.exitcode import ExitCode, of_error
from voidbox.cli.parser import parse
from voidbox.cli.screen import Screen, quiet_broken_pipe

# Where each command is; imported only when it is used.
_MODULES = {
    "run": "run",
    "validate": "spec",
    "inspect": "spec",
    "exec": "execute",
    "cp": "copy",
    "ps": "runs",
    "logs": "runs",
    "stop": "runs",
    "rm": "runs",
    "stats": "stats",
    "console": "machine",
    "pause": "machine",
    "update": "machine",
    "resume": "machine",
    "port-forward": "forward",
    "template": "saved",
    "snapshot": "saved",
    "fork": "saved",
    "box": "saved",
    "image": "image",
    "volume": "volume",
    "egress": "egress",
    "policy": "policy",
    "diff": "changes",
    "apply": "changes",
    "discard": "changes",
    "doctor": "doctor",
    "up": "stack",
    "down": "stack",
    "status": "stack",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        quiet_broken_pipe()
        return ExitCode.BROKEN_PIPE
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED


def _run(words: list[str]) -> int:
    args = parse(words)
    screen = Screen.of(args.output, no_color=args.no_color, env=os.environ)
    if args.command == "version":
        import voidbox

        data = {"name": "voidbox", "version": voidbox.__version__}
        screen.result(f"voidbox {voidbox.__version__}", data)
        return ExitCode.OK
    if args.command == "completion":
        from voidbox.cli.completion import script

        print(script(args.shell), end="")
        return ExitCode.OK
    return _command(args.command, args, screen)


def _command(name: str, args: object, screen: Screen) -> int:
    # Must be set before gRPC is imported: its fork handlers complain when children are started.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    # gRPC's own log speaks of internals; failures reach the user as errors.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from services.common import config
    from services.common import logging as common_logging
    from services.common.errors import VoidboxError
    from voidbox.cli.connection import Context, Settings
    from voidbox.stack.layout import Layout

    try:
        settings = config.load(Settings, "cli", [], os.environ)
        if args.output is None:  # type: ignore[attr-defined]
            screen = Screen.of(settings.output, no_color=args.no_color, env=os.environ)  # type: ignore[attr-defined]
        common_logging.set_up("cli", args.log_level or settings.log_level)  # type: ignore[attr-defined]
        context = Context(
            args=args,  # type: ignore[arg-type]
            screen=screen,
            settings=settings,
            layout=Layout.from_env(os.environ),
        )
        module = import_module(f"voidbox.cli.{_MODULES[name]}")
        code: int = getattr(module, f"{name.replace('-', '_')}_command")(context)
        return code
    except VoidboxError as error:
        code = of_error(error)
        screen.error(error, code)
        return code


if __name__ == "__main__":
    sys.exit(main())
