"""The command line: commands, options, and what is said about wrong ones.

Standard library only: `voidbox --help` must not wait for gRPC to be imported.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from voidbox.cli.exitcode import ExitCode

EPILOG = """\
exit codes: 0 every stage succeeded, 1 a program or agent failed, 2 wrong usage, 3 wrong spec or input,
4 a box, image or service failed, 5 timeout, 6 cancelled, 7 resources used up, 130 Ctrl-C.
`voidbox exec` exits with its program's code; 124 to 127 are those of timeout and docker."""


class Parser(argparse.ArgumentParser):
    """A parser that suggests what was meant, in one line."""

    def __init__(self, **options: object) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options, allow_abbrev=False)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Print the fault and the cure; exit with `ExitCode.USAGE`."""
        if message.startswith("the following arguments are required: "):
            message = "missing " + message.partition(": ")[2]
        fail(f"{message} (see: {self.prog} --help)", argv=sys.argv[1:])


def fail(message: str, *, argv: Sequence[str] = ()) -> NoReturn:
    """Report wrong usage in the format that the command line asks for, and exit."""
    if ("json" in argv and "--output" in argv) or "--output=json" in argv:
        import json

        error = {"code": "USAGE", "reason": "USAGE", "message": message, "exit_code": int(ExitCode.USAGE)}
        print(json.dumps({"error": error}), file=sys.stderr)
    else:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(ExitCode.USAGE)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed command line; exits for help and for wrong usage."""
    parser, commands = build()
    _check_command(argv, commands)
    args, extra = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        sys.exit(ExitCode.USAGE)
    if extra:
        current = commands[args.command]
        nested = getattr(args, f"{args.command}_command", None)
        if nested:
            current = _subparsers(current)[nested]
        known = [option for action in current._actions for option in action.option_strings]
        wrong = extra[0].partition("=")[0]
        hint = difflib.get_close_matches(wrong, known, n=1) if wrong.startswith("-") else []
        what = "unknown option" if wrong.startswith("-") else "unexpected argument"
        cure = f"; did you mean {hint[0]}?" if hint else f" (see: {current.prog} --help)"
        fail(f"{what} {wrong!r} for {current.prog}{cure}", argv=argv)
    return args


def _check_command(argv: Sequence[str], commands: dict[str, Parser]) -> None:
    """Say which command was meant, before argparse lists all of them."""
    values = {"--output", "--address", "--log-level", "--log-dir"}
    words = iter(argv)
    for word in words:
        if word in values:
            next(words, None)
        elif not word.startswith("-"):
            _suggest("command", word, list(commands), argv)
            if known := _subparsers(commands[word]):
                nested = next((name for name in words if not name.startswith("-")), None)
                if nested is not None:
                    _suggest(f"{word} command", nested, list(known), argv)
            return


def _suggest(what: str, word: str, known: list[str], argv: Sequence[str]) -> None:
    if word not in known:
        hint = difflib.get_close_matches(word, known, n=1)
        cure = f"did you mean {hint[0]!r}?" if hint else f"known: {', '.join(known)}"
        fail(f"unknown {what} {word!r}; {cure}", argv=argv)


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, Parser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _common(*, top: bool) -> Parser:
    """Options that are accepted before and after the command."""
    default = None if top else argparse.SUPPRESS
    common = Parser(add_help=False)
    group = common.add_argument_group("common options")
    group.add_argument(
        "--output", choices=("human", "json"), default=default, help="format of what is printed"
    )
    group.add_argument(
        "--address",
        default=default,
        metavar="ADDR",
        help="stack to use instead of the embedded one: unix:/path or tcp://host:port (VOIDBOX_ADDRESS; "
        "token in the file VOIDBOX_TOKEN_FILE)",
    )
    group.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default=default,
        help="least level of log records on stderr (VOIDBOX_LOG_LEVEL)",
    )
    flag = {"action": "store_true", "default": False if top else argparse.SUPPRESS}
    group.add_argument("--no-banner", help="accepted for compatibility; there is no banner", **flag)  # type: ignore[arg-type]
    group.add_argument("--no-color", help="no colours and no live progress (NO_COLOR)", **flag)  # type: ignore[arg-type]
    return common


def build() -> tuple[Parser, dict[str, Parser]]:
    """The parser and those of its commands."""
    import voidbox

    parser = Parser(
        prog="voidbox",
        description="Run agents and programs, every pipeline stage in its own micro-VM.",
        epilog=EPILOG,
        parents=[_common(top=True)],
    )
    parser.add_argument("--version", action="version", version=f"voidbox {voidbox.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    shared = [_common(top=False)]

    def add(name: str, text: str) -> Parser:
        return commands.add_parser(name, help=text, description=text, parents=shared)

    def add_spec(command: Parser, text: str) -> None:
        command.add_argument("spec", nargs="?", metavar="SPEC", help=text)
        command.add_argument("--file", "-f", metavar="SPEC", help="the same, as an option")

    run = add("run", "Run a spec and follow it to its end.")
    add_spec(run, "spec file (.yaml, .yml or .json)")
    run.add_argument(
        "--input", metavar="TEXT|@FILE", help="input of the first stages; @- reads standard input"
    )
    run.add_argument("--run-id", "--name", metavar="ID", help="id of the run: [a-z][a-z0-9-]*, at most 63")
    run.add_argument("--detach", "-d", action="store_true", help="print the run's id and leave it running")
    run.add_argument("--timeout", type=_seconds, metavar="S", help="limit of the whole run in seconds")
    run.add_argument("--max-parallel", type=_positive, metavar="N", help="boxes at once")
    run.add_argument("--cold", action="store_true", help=_COLD)
    validate = add("validate", "Check a spec without running it.")
    add_spec(validate, "spec file")
    inspect = add("inspect", "Show a spec with its defaults, or a run with its stages.")
    add_spec(inspect, "spec file or run id")
    _add_exec(add("exec", "Run a program in a fresh box, or in a running one."))
    copy = add("cp", "Copy a file or directory into or out of a box.")
    copy.add_argument("source", metavar="SOURCE", help="LOCAL or BOX:PATH; BOX is a box id, RUN or RUN/STAGE")
    copy.add_argument("target", metavar="TARGET", help="BOX:PATH or LOCAL")
    ps = add("ps", "List runs.")
    ps.add_argument("-a", "--all", action="store_true", help="also those that have ended")
    logs = add("logs", "Print what the programs of a run have printed.")
    logs.add_argument("run", metavar="RUN", help="run id")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")
    logs.add_argument("--stage", metavar="NAME", help="only this stage")
    logs.add_argument("--from-offset", type=_count, default=0, metavar="N", help="first event")
    stop = add("stop", "Stop runs and wait for their boxes to end.")
    stop.add_argument("runs", nargs="+", metavar="RUN", help="run id")
    remove = add("rm", "Remove ended runs with their events and artifacts.")
    remove.add_argument("runs", nargs="+", metavar="RUN", help="run id")
    remove.add_argument("-f", "--force", action="store_true", help="stop running ones; ignore unknown ones")
    _add_changes(add)
    _add_machine(add)
    _add_volume(add("volume", "Manage named disks that outlive boxes."), shared)
    _add_egress(add, shared)
    _add_saved(add, shared)
    _add_image(add("image", "Manage images and the guest image."), shared)
    add("doctor", "Check whether this host can run boxes, and say what to do if not.")
    add("up", "Start the embedded stack and wait until it answers.")
    down = add("down", "Stop the embedded stack and everything that belongs to it.")
    down.add_argument("--force", action="store_true", help="kill instead of stopping runs in order")
    add("status", "Show the stack: services, host, boxes and runs.")
    add("version", "Print the version.")
    completion = add("completion", "Print a completion script for a shell.")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")
    return parser, dict(commands.choices)


_COLD = "boot each box afresh instead of restoring a saved machine"


def _add_exec(command: Parser) -> None:
    command.usage = "voidbox exec [options] [--] PROGRAM [ARGS...]"
    command.add_argument("--image", metavar="REF", help="OCI image whose files are the box's root")
    command.add_argument(
        "--entrypoint", metavar="PROGRAM", help="instead of the image's; '' for none; its CMD does not count"
    )
    command.add_argument(
        "--pull",
        choices=("always", "missing", "never"),
        help="when to ask a registry for the image (missing); always notices a moved tag",
    )
    command.add_argument("--memory-mb", type=_positive, metavar="N", help="memory of the box (1024)")
    command.add_argument("--vcpus", type=_positive, metavar="N", help="processors of the box (1)")
    command.add_argument(
        "--disk-mb",
        type=_positive,
        metavar="N",
        help="size of the root disk with --image (the image's + 1024)",
    )
    command.add_argument(
        "--env", "-e", action="append", default=[], metavar="K=V", help="environment; K copies ours"
    )
    command.add_argument(
        "--mount",
        "-v",
        action="append",
        default=[],
        metavar="HOST:GUEST[:ro|rw|overlay]",
        help="share a host directory or file; overlay: its changes are kept apart (voidbox diff, apply)",
    )
    command.add_argument(
        "--volume",
        action="append",
        default=[],
        metavar="NAME:GUEST",
        help="a named disk that stays when the box is gone; made if it is not there",
    )
    command.add_argument("--user", "-u", metavar="U", help="user of the program: name or uid[:gid]")
    command.add_argument("--workdir", "-w", metavar="DIR", help="working directory of the program")
    command.add_argument(
        "--timeout", type=_seconds, metavar="S", help="kill the program after S seconds (exit 124)"
    )
    command.add_argument("--tty", "-t", action="store_true", help="give the program a terminal")
    command.add_argument(
        "--interactive", "-i", action="store_true", help="send standard input (as when piped)"
    )
    command.add_argument("--in", dest="target", metavar="BOX", help="a running box: box id, RUN or RUN/STAGE")
    command.add_argument("--keep", action="store_true", help="leave the box running afterwards")
    command.add_argument("--cold", action="store_true", help=_COLD)
    command.add_argument("argv", nargs=argparse.REMAINDER, metavar="PROGRAM", help="program and arguments")


def _add_changes(add: Callable[[str, str], Parser]) -> None:
    target = "a run, RUN/STAGE, or a box, also of those that have ended"
    paths = "only these files and directories: relative to the mount, or as the box names them"
    diff = add("diff", "Show what boxes have changed in host directories mounted as overlay.")
    diff.add_argument("target", metavar="TARGET", help=target)
    diff.add_argument("paths", nargs="*", metavar="PATH", help=paths)
    diff.add_argument("--stat", action="store_true", help="names and numbers of lines instead of a patch")
    apply = add("apply", "Bring what boxes have changed in overlays to the host's directories.")
    apply.add_argument("target", metavar="TARGET", help=target)
    apply.add_argument("paths", nargs="*", metavar="PATH", help=paths)
    apply.add_argument("--dry-run", action="store_true", help="only tell what would be done")
    apply.add_argument(
        "--force", action="store_true", help="overwrite what was changed on the host since the box began"
    )
    apply.add_argument(
        "--trust", action="store_true", help="also links that lead out, and files that git may run"
    )
    add("discard", "Throw away what boxes have changed in overlays.").add_argument(
        "target", metavar="TARGET", help=target
    )


def _add_machine(add: Callable[[str, str], Parser]) -> None:
    box = "a box id, RUN or RUN/STAGE"
    stats = add("stats", "Show what boxes take of the host, and what their guests have left.")
    stats.add_argument("boxes", nargs="*", metavar="BOX", help=f"{box}; none means every running box")
    stats.add_argument("--watch", "-w", action="store_true", help="again and again, until Ctrl-C")
    stats.add_argument(
        "--interval", type=_interval, default=1.0, metavar="S", help="time that is measured over (1)"
    )
    console = add("console", "Print what the kernel and the agent of a box have printed.")
    console.add_argument("box", metavar="BOX", help=box)
    console.add_argument("-f", "--follow", action="store_true", help="go on until the box ends")
    console.add_argument(
        "--tail-bytes",
        type=_count,
        default=0,
        metavar="N",
        help="only the last N bytes (0: all that is kept)",
    )
    for name, text in (("pause", "Stop the processors of boxes."), ("resume", "Let paused boxes go on.")):
        add(name, text).add_argument("boxes", nargs="+", metavar="BOX", help=box)
    update = add("update", "Change limits, times and labels of boxes that run.")
    update.add_argument("boxes", nargs="+", metavar="BOX", help=box)
    update.add_argument("--cpus", type=_cpus, metavar="N", help="processors, also fractions of one")
    update.add_argument("--memory-mb", type=_positive, metavar="N", help="memory of the guest in MiB")
    update.add_argument("--processes", type=_positive, metavar="N", help="processes of all programs together")
    for option, what in (
        ("--max-lifetime", "it is stopped so long after its creation"),
        ("--idle-timeout", "it is stopped when nothing has used it for so long"),
        ("--auto-pause", "it is paused when nothing has used it for so long, until the next call"),
    ):
        update.add_argument(option, type=_age_or_never, metavar="TIME", help=f"{what}, e.g. 90s, 10m, never")
    update.add_argument(
        "--label", action="append", default=[], metavar="NAME=VALUE", help="set a label; no value removes it"
    )
    forward = add("port-forward", "Make ports of a box reachable on this host until Ctrl-C.")
    forward.add_argument("box", metavar="BOX", help=box)
    forward.add_argument(
        "ports",
        nargs="+",
        metavar="[ADDRESS:]HOST:GUEST",
        help="port here and port in the box, or one number for both; the address is 127.0.0.1 if not given",
    )


def _add_volume(volume: Parser, shared: list[Parser]) -> None:
    commands = volume.add_subparsers(
        dest="volume_command", metavar="COMMAND", required=True, parser_class=Parser, help="what to do"
    )

    def add(name: str, text: str) -> Parser:
        return commands.add_parser(name, help=text, description=text, parents=shared)

    create = add("create", "Make a volume.")
    create.add_argument("name", metavar="NAME", help="its name: 1 to 63 of a-z, 0-9 and '-'")
    create.add_argument("--size-mb", type=_positive, metavar="N", help="its size in MiB (10240)")
    add("ls", "List volumes.")
    remove = add("rm", "Remove volumes and all that is in them.")
    remove.add_argument("names", nargs="+", metavar="NAME", help="a volume that no box uses")


def _add_egress(add: Callable[[str, str], Parser], shared: list[Parser]) -> None:
    def group(name: str, text: str) -> Callable[[str, str], Parser]:
        commands = add(name, text).add_subparsers(
            dest=f"{name}_command", metavar="COMMAND", required=True, parser_class=Parser, help="what to do"
        )
        return lambda name, text: commands.add_parser(name, help=text, description=text, parents=shared)

    log = group("egress", "See what boxes did on the network.")("log", "Print what the boxes of a run did.")
    log.add_argument("run", metavar="RUN", help="run id")
    log.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")
    log.add_argument("--stage", metavar="NAME", help="only this stage")
    log.add_argument("--denied", action="store_true", help="only what was denied")
    policy = group("policy", "Understand and make network policies.")
    explain = policy("explain", "Say what a spec's policy does with a URL, and why.")
    explain.add_argument("--file", "-f", required=True, metavar="SPEC", help="spec file")
    explain.add_argument("--stage", metavar="NAME", help="the box of a pipeline; else the top-level sandbox")
    explain.add_argument(
        "url", metavar="URL", help="e.g. https://pypi.org/simple, tcp://10.0.0.5:5432, a name"
    )
    learn = policy("learn", "Print the rules that a run would have needed.")
    learn.add_argument("run", metavar="RUN", help="a run whose spec has sandbox.network.learn, or any other")
    learn.add_argument("--stage", metavar="NAME", help="only this stage")


def _add_saved(add: Callable[[str, str], Parser], shared: list[Parser]) -> None:
    box = "a box id, RUN or RUN/STAGE"

    def group(name: str, text: str) -> Callable[[str, str], Parser]:
        commands = add(name, text).add_subparsers(
            dest=f"{name}_command", metavar="COMMAND", required=True, parser_class=Parser, help="what to do"
        )
        return lambda word, what: commands.add_parser(word, help=what, description=what, parents=shared)

    template = group("template", "Manage the saved machines that boxes are restored from.")
    build = template("build", "Boot and save a machine, so that the first box need not.")
    build.add_argument("--memory-mb", type=_positive, metavar="N", help="memory of the boxes (1024)")
    build.add_argument("--vcpus", type=_positive, metavar="N", help="processors of the boxes (1)")
    build.add_argument("--kernel", metavar="FILE", help="kernel instead of the default guest image's")
    build.add_argument("--initramfs", metavar="FILE", help="initramfs instead of the default guest image's")
    template("ls", "List templates.")
    template("rm", "Remove templates; boxes go on.").add_argument(
        "templates", nargs="+", metavar="TEMPLATE", help="id of a template"
    )
    snapshot = group("snapshot", "Save running boxes by name, and start boxes from them.")
    create = snapshot("create", "Save a running box; it goes on.")
    create.add_argument("box", metavar="BOX", help=box)
    create.add_argument("name", metavar="NAME", help="name of the snapshot: 1 to 63 of [a-z0-9-]")
    snapshot("ls", "List snapshots.")
    snapshot("rm", "Remove snapshots; boxes go on.").add_argument(
        "snapshots", nargs="+", metavar="NAME", help="name of a snapshot"
    )
    restore = snapshot("restore", "Start a box from a snapshot.")
    restore.add_argument("name", metavar="NAME", help="name of the snapshot")
    restore.add_argument("--box-id", metavar="ID", help="id of the box (made up if not given)")
    fork = add("fork", "Make copies of a running box, whose programs go on in each.")
    fork.add_argument("box", metavar="BOX", help=box)
    fork.add_argument("--count", "-n", type=_positive, default=1, metavar="N", help="how many (1)")
    fork.add_argument("--name", action="append", metavar="ID", help="id of a copy; once for each")
    for command in (create, fork):
        command.add_argument(
            "--allow-secrets", action="store_true", help="also if the box holds secrets, which are copied"
        )
    boxes = group("box", "List and remove boxes, also those of no run.")
    boxes("ls", "List boxes.")
    remove = boxes("rm", "End and remove boxes.")
    remove.add_argument("boxes", nargs="+", metavar="BOX", help=box)
    remove.add_argument("-f", "--force", action="store_true", help="kill instead of asking first")


def _add_image(image: Parser, shared: list[Parser]) -> None:
    commands = image.add_subparsers(
        dest="image_command", metavar="COMMAND", required=True, parser_class=Parser, help="what to do"
    )

    def add(name: str, text: str) -> Parser:
        return commands.add_parser(name, help=text, description=text, parents=shared)

    pull = add("pull", "Bring an image into the cache.")
    pull.add_argument(
        "reference",
        metavar="REF",
        help="HOST/NAME[:TAG], oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker-archive:FILE[:NAME]",
    )
    pull.add_argument(
        "--platform", metavar="OS/ARCH[/VARIANT]", help="of several, e.g. linux/arm64 (the host's)"
    )
    pull.add_argument("--insecure", action="store_true", help="allow plain HTTP")
    pull.add_argument(
        "--policy", choices=("always", "missing", "never"), default="always", help="when to ask"
    )
    push = add("push", "Send a cached image, or a guest image, to a registry.")
    push.add_argument("source", metavar="SOURCE", help="reference or digest; of a guest image or 'default'")
    push.add_argument("reference", metavar="REF", help="where to: HOST/NAME[:TAG]")
    push.add_argument("--guest", action="store_true", help="SOURCE is a guest image: its digest, or default")
    push.add_argument("--insecure", action="store_true", help="allow plain HTTP")
    listing = add("ls", "List cached images.")
    listing.add_argument(
        "-a", "--all", action="store_true", help="also guest images and disks of agents and directories"
    )
    inspect = add("inspect", "Show a cached image.")
    inspect.add_argument("reference", metavar="REF", help="reference or digest")
    remove = add("rm", "Remove cached images.")
    remove.add_argument(
        "references", nargs="+", metavar="REF", help="reference, or digest of what `ls -a` shows"
    )
    prune = add("prune", "Remove images that are not used.")
    prune.add_argument(
        "--older-than", type=_age, metavar="TIME", help="not used for so long: seconds, or 90m, 12h, 30d"
    )
    prune.add_argument(
        "--max-size", type=_bytes, metavar="SIZE", help="remove the oldest until the cache fits: 500M, 20G"
    )
    prune.add_argument("--max-size-mb", type=_count, metavar="N", help="the same in MiB")
    verify = add("verify", "Compare cached content with its digests; exits with 4 if any is damaged.")
    verify.add_argument(
        "reference", metavar="REF", nargs="?", help="one image with its disks; everything if left out"
    )
    verify.add_argument("--repair", action="store_true", help="remove what is damaged; it is fetched again")
    export = add("export", "Write a cached image to a file.")
    export.add_argument("reference", metavar="REF", help="reference or digest")
    export.add_argument("-o", "--file", metavar="FILE", required=True, help="where to; - is standard output")
    export.add_argument("--format", choices=("ext4", "tar", "initramfs"), default="tar", help="(tar)")
    export.add_argument(
        "--compression", choices=("none", "gzip", "zstd", "lz4"), default="none", help="(none)"
    )
    export.add_argument("--force", action="store_true", help="replace FILE if it exists")
    build = add("build-guest", "Build the kernel and initramfs that boxes boot.")
    build.add_argument("--kernel", choices=("debian", "slim"), default="debian", help="which kernel")
    build.add_argument("--no-default", action="store_true", help="do not make it the default")
    agent = add("build-agent", "Make the read-only disk of an agent's program from its pinned package.")
    agent.add_argument("agent", metavar="AGENT", help="claude-code or codex")
    agent.add_argument("--arch", metavar="NAME", help="amd64 or arm64 (the host's)")
    agent.add_argument("--package", metavar="FILE", help="the package as a file, where npm cannot fetch it")


def _positive(text: str) -> int:
    value = _count(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) >= 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _bytes(text: str) -> int:
    units = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
    match = re.fullmatch(r"([0-9]{1,15})([kmgt]?)(?:i?b)?", text, re.IGNORECASE)
    value = int(match[1]) * units[match[2].lower()] if match else 0
    if not 0 < value < 1 << 60:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size above 0, such as 500M or 20G")
    return value


def _age(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
    unit = units.get(text[-1:], 0)
    try:
        return _seconds(text[:-1]) * unit if unit else _seconds(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time above 0: seconds, or a number with s, m, h, d or w"
        ) from None


def _age_or_never(text: str) -> float:
    return 0.0 if text == "never" else _age(text)


def _cpus(text: str) -> float:
    value = _seconds(text)
    if not 0.01 <= value <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processors from 0.01 to 1024")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _interval(text: str) -> float:
    value = _seconds(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 3600")
    return value
