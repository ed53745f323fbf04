"""What a machine leaves behind is turned into a reason and a cure."""

from __future__ import annotations

import pytest

from services.common.errors import Exhausted, InvalidInput, TimedOut, VoidboxError, WrongState
from services.hypervisor.failure import Remains, boot_failure, boot_timeout, describe_end

PANIC = "[    0.9] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\n[ 1.0] x"


@pytest.mark.parametrize(
    ("remains", "words"),
    [
        (Remains(console=PANIC, recorded=True, exit_code=0), "kernel panicked: VFS: Unable to mount root fs"),
        (Remains(shutdown="guest-shutdown", recorded=True, exit_code=0), "powered itself off"),
        (Remains(shutdown="guest-reset", recorded=True, exit_code=0), "restarted itself"),
        (Remains(exit_signal=9, recorded=True), "killed by SIGKILL (by someone"),
        (Remains(exit_signal=11, recorded=True), "killed by SIGSEGV"),
        (Remains(exit_signal=200, recorded=True), "signal 200"),
        (Remains(), "device process was killed"),
        (
            Remains(recorded=True, exit_signal=9, device="IndexError: x"),
            "device process failed: IndexError: x",
        ),
        (Remains(exit_code=1, recorded=True, log="a\nqemu: bad thing"), "exit code 1: qemu: bad thing"),
        (Remains(exit_code=0, recorded=True), "without being asked"),
    ],
)
def test_every_end_has_a_sentence(remains: Remains, words: str) -> None:
    assert words in describe_end(remains)


@pytest.mark.parametrize(
    ("remains", "kind", "reason", "words"),
    [
        (
            Remains(log="qemu: cannot set up guest memory 'ram': Cannot allocate memory", exit_code=1),
            Exhausted, "HOST_MEMORY", "64 MiB",
        ),
        (
            Remains(console="Kernel panic - not syncing: System is deadlocked on memory"),
            InvalidInput, "MEMORY_TOO_SMALL", "sandbox.memory_mb",
        ),
        (
            Remains(console="Initramfs unpacking failed: write error"),
            InvalidInput, "MEMORY_TOO_SMALL", "sandbox.memory_mb",
        ),
        (Remains(log="qemu: invalid kernel header", exit_code=1), InvalidInput, "BAD_KERNEL", "/k/vmlinux"),
        (Remains(console=PANIC), WrongState, "BOOT_FAILED", "Unable to mount root"),
        (Remains(), WrongState, "BOOT_FAILED", "(nothing was printed)"),
    ],
)  # fmt: skip
def test_a_failed_start_names_cause_evidence_and_cure(
    remains: Remains, kind: type[VoidboxError], reason: str, words: str
) -> None:
    error = boot_failure("b", "/k/vmlinux", 64, remains)
    assert type(error) is kind
    assert error.reason == reason
    assert words in error.message


def test_a_timeout_shows_the_end_of_the_console_only() -> None:
    error = boot_timeout("b", 2.5, Remains(console="\n".join(f"line {n}" for n in range(100))))
    assert isinstance(error, TimedOut)
    assert "2.5 s" in error.message
    assert "line 99" in error.message
    assert "line 50" not in error.message
