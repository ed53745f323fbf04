"""Every failure class and every error has its documented exit code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from services.common import errors
from services.common.errors import VoidboxError
from voidbox.cli.exitcode import ExitCode, of_error, of_run
from voidbox.orchestrator.v1 import orchestrator_pb2 as pb

DOCS = Path(__file__).resolve().parents[3] / "docs/cli.md"


def test_every_kind_of_error_has_a_code_other_than_success() -> None:
    kinds = {
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VoidboxError)
    }
    assert len(kinds) >= 15
    for kind in kinds:
        assert of_error(kind("x")) not in (ExitCode.OK, ExitCode.WORKLOAD, ExitCode.USAGE)
    assert of_error(errors.TimedOut("x")) == ExitCode.TIMEOUT
    assert of_error(errors.Exhausted("x")) == ExitCode.EXHAUSTED
    assert of_error(errors.Unavailable("x")) == ExitCode.INFRASTRUCTURE
    assert of_error(errors.NotFound("x")) == ExitCode.INPUT


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (pb.FAILURE_CLASS_WORKLOAD, 1),
        (pb.FAILURE_CLASS_INPUT, 3),
        (pb.FAILURE_CLASS_INFRASTRUCTURE, 4),
        (pb.FAILURE_CLASS_TIMEOUT, 5),
        (pb.FAILURE_CLASS_CANCELLED, 6),
        (pb.FAILURE_CLASS_EXHAUSTED, 7),
        (pb.FAILURE_CLASS_UNSPECIFIED, 1),
    ],
)
def test_a_failed_run_exits_by_its_class(failure: pb.FailureClass.ValueType, code: int) -> None:
    assert of_run(pb.Run(state=pb.RUN_STATE_FAILED, failure_class=failure)) == code


def test_only_a_run_whose_every_stage_succeeded_exits_with_0() -> None:
    good = pb.Stage(state=pb.STAGE_STATE_SUCCEEDED)
    bad = pb.Stage(state=pb.STAGE_STATE_SKIPPED)
    assert of_run(pb.Run(state=pb.RUN_STATE_SUCCEEDED, stages=[good, good])) == 0
    assert of_run(pb.Run(state=pb.RUN_STATE_SUCCEEDED, stages=[good, bad])) == 1
    assert of_run(pb.Run(state=pb.RUN_STATE_CANCELLED)) == 6
    assert of_run(pb.Run(state=pb.RUN_STATE_TIMED_OUT)) == 5
    assert of_run(pb.Run(state=pb.RUN_STATE_RUNNING)) == 4


def test_every_code_is_documented() -> None:
    text = DOCS.read_text()
    for code in ExitCode:
        assert re.search(rf"\b{int(code)}\b", text), code
