"""From exec's options to a program, as docker run has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.common.errors import InvalidInput
from voidbox.cli import program
from voidbox.cli.copy import split
from voidbox.cli.parser import parse
from voidbox.imager.v1.imager_pb2 import ImageConfig
from voidbox.spec import parse_spec

IMAGE = ImageConfig(
    entrypoint=["/entry"],
    cmd=["default", "args"],
    env=["PATH=/image/bin", "A=image", "odd"],
    working_dir="/srv",
    user="web",
)


@pytest.mark.parametrize(
    ("config", "argv", "words"),
    [
        (IMAGE, [], ["/entry", "default", "args"]),
        (IMAGE, ["x"], ["/entry", "x"]),
        (ImageConfig(cmd=["sh", "-l"]), [], ["sh", "-l"]),
        (ImageConfig(cmd=["sh", "-l"]), ["ls", "-a"], ["ls", "-a"]),
        (None, ["ls"], ["ls"]),
    ],
)
def test_entrypoint_and_command_combine_as_in_docker(
    config: ImageConfig | None, argv: list[str], words: list[str]
) -> None:
    start = program.start(parse(["exec"]), argv, {}, config, None)
    assert [start.program, *start.args] == words


@pytest.mark.parametrize(
    ("entrypoint", "argv", "words"),
    [
        ("/other", [], ["/other"]),
        ("/other", ["x"], ["/other", "x"]),
        ("", ["x", "y"], ["x", "y"]),
    ],
)
def test_another_entrypoint_takes_the_default_arguments_away(
    entrypoint: str, argv: list[str], words: list[str]
) -> None:
    start = program.start(parse(["exec", "--entrypoint", entrypoint]), argv, {}, IMAGE, None)
    assert [start.program, *start.args] == words


def test_no_entrypoint_and_no_argument_is_no_program() -> None:
    with pytest.raises(InvalidInput, match="PROGRAM"):
        program.start(parse(["exec", "--entrypoint", ""]), [], {}, IMAGE, None)


def test_an_image_without_a_directory_starts_in_the_root_and_a_missing_one_is_made() -> None:
    start = program.start(parse(["exec"]), ["x"], {}, ImageConfig(), None)
    assert (start.working_directory, start.create_working_directory) == ("/", True)
    plain = program.start(parse(["exec"]), ["x"], {}, None, None)
    assert plain.working_directory == ""
    joined = program.start(parse(["exec", "--in", "box", "-w", "/x"]), ["x"], {}, None, None)
    assert not joined.create_working_directory, "as docker exec"


def test_options_win_over_the_image() -> None:
    args = parse(["exec", "-e", "A=ours", "-e", "B", "-u", "0", "-w", "/tmp", "--timeout", "1.5"])
    start = program.start(args, ["x"], {"B": "copied"}, IMAGE, None)
    assert dict(start.env) == {"PATH": "/image/bin", "A": "ours", "B": "copied"}
    assert (start.user, start.working_directory) == ("0", "/tmp")
    assert start.timeout.ToMilliseconds() == 1500
    plain = program.start(parse(["exec"]), ["x"], {}, IMAGE, None)
    assert (plain.user, plain.working_directory, plain.env["A"]) == ("web", "/srv", "image")
    assert not plain.HasField("timeout")


def test_without_a_program_the_message_says_how_to_name_one() -> None:
    with pytest.raises(InvalidInput, match="PROGRAM"):
        program.start(parse(["exec"]), [], {}, None, None)


def test_the_box_is_a_valid_spec_with_absolute_paths() -> None:
    args = parse(
        [
            "exec",
            "--image",
            "img",
            "--memory-mb",
            "64",
            "--vcpus",
            "2",
            "--disk-mb",
            "9",
            "-v",
            "d:/d:rw",
            "-v",
            "/e:/e",
        ]
    )
    content = program.sandbox_spec(args, {"VOID_BOX_KERNEL": "k"}, Path("/base"))
    sandbox = parse_spec(content, "exec.json", "/").sandbox
    assert (sandbox.image, sandbox.memory_mb, sandbox.vcpus, sandbox.disk_mb) == ("img", 64, 2, 9)
    assert sandbox.kernel == "/base/k"
    assert [(m.host, m.guest, m.mode.value) for m in sandbox.mounts] == [
        ("/base/d", "/d", "rw"),
        ("/e", "/e", "ro"),
    ]
    assert json.loads(program.sandbox_spec(parse(["exec"]), {}, Path("/")))["sandbox"] == {}


@pytest.mark.parametrize("option", ["/only", ":/g", "h:relative", "h:/g:rx", "h:/g:rw:x"])
def test_malformed_mounts_are_refused(option: str) -> None:
    with pytest.raises(InvalidInput, match="--mount"):
        program.mounts([option], Path("/"))


@pytest.mark.parametrize("option", ["=x", "1A=x", "A-B=x", "UNSET"])
def test_malformed_or_missing_variables_are_refused(option: str) -> None:
    with pytest.raises(InvalidInput, match="--env"):
        program.environment([option], {})


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("box:/a", ("box", "/a")),
        ("run/stage:/a:b", ("run/stage", "/a:b")),
        ("./a:b", ("", "./a:b")),
        ("/a:b", ("", "/a:b")),
        ("plain", ("", "plain")),
        ("../x", ("", "../x")),
    ],
)
def test_a_box_and_a_local_path_are_told_apart(text: str, parts: tuple[str, str]) -> None:
    assert split(text) == parts
