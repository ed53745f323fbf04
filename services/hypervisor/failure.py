"""Why a machine ended, in words, from what it left behind. Pure functions."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

from services.common.errors import Exhausted, InvalidInput, TimedOut, VoidboxError, WrongState

_PANIC = re.compile(r"Kernel panic - not syncing: ?(.*)")
# The kernel's own words when the initramfs does not fit or is too large to unpack.
_GUEST_MEMORY = re.compile(
    r"deadlocked on memory|Initramfs unpacking failed: write error|initrd.*exceeds|initramfs.*disabled"
    r"|Out of memory and no killable processes",
    re.IGNORECASE,
)
_HOST_MEMORY = re.compile(r"[Cc]annot (set up guest memory|allocate memory)|Failed to allocate memory")
_QEMU_TOO_LARGE = re.compile(r"initrd is too large|kernel.* too large|initrd.*too big", re.IGNORECASE)
_BAD_KERNEL = re.compile(
    r"invalid kernel header|could not load (the )?kernel|linux kernel too old"
    r"|Error loading uncompressed kernel|Cannot load x86-64 image",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What is left of a machine that ended.

    Attributes:
        exit_code: QEMU's; None if a signal killed it or nobody could tell.
        exit_signal: The signal that killed QEMU; 0 if none did.
        recorded: Whether the device process lived to tell how QEMU ended.
        device: What failed in the device process; empty if nothing did.
        shutdown: Reason of QEMU's SHUTDOWN event, e.g. "guest-shutdown"; empty if unknown.
        console: The end of the console log.
        log: The end of what QEMU and the device process printed.
    """

    exit_code: int | None = None
    exit_signal: int = 0
    recorded: bool = False
    device: str = ""
    shutdown: str = ""
    console: str = ""
    log: str = ""


def describe_end(remains: Remains) -> str:
    """One sentence: why the machine ended."""
    if panic := _PANIC.findall(remains.console):
        return f"the guest's kernel panicked: {panic[-1].strip() or 'no reason given'}"
    if remains.device:
        return f"the machine's device process failed: {remains.device}"
    if remains.shutdown == "guest-shutdown":
        return "the guest powered itself off"
    if remains.shutdown in ("guest-reset", "guest-panic"):
        return "the guest's kernel restarted itself, which ends a box"
    if remains.exit_signal:
        return f"QEMU was killed by {_signal_name(remains.exit_signal)}{_hint(remains.exit_signal)}"
    if not remains.recorded:
        return "the machine's device process was killed, and QEMU with it"
    if remains.exit_code:
        return (
            f"QEMU ended with exit code {remains.exit_code}: {_last_line(remains.log) or 'it said nothing'}"
        )
    return "QEMU ended without being asked"


def boot_failure(box_id: str, kernel: str, memory_mib: int, remains: Remains) -> VoidboxError:
    """The error for a machine that ended before its agent answered."""
    evidence = _evidence(remains)
    if _HOST_MEMORY.search(remains.log):
        return Exhausted(
            f"box {box_id}: the host could not give the machine its {memory_mib} MiB; stop boxes or ask for "
            f"less (spec: sandbox.memory_mb){evidence}",
            reason="HOST_MEMORY",
            box=box_id,
        )
    if _GUEST_MEMORY.search(remains.console) or _QEMU_TOO_LARGE.search(remains.log):
        return InvalidInput(
            f"box {box_id}: the guest cannot start in {memory_mib} MiB; ask for more "
            f"(spec: sandbox.memory_mb){evidence}",
            reason="MEMORY_TOO_SMALL",
            box=box_id,
        )
    if _BAD_KERNEL.search(remains.log):
        return InvalidInput(
            f"box {box_id}: QEMU cannot load the kernel {kernel}{evidence}", reason="BAD_KERNEL", box=box_id
        )
    return WrongState(
        f"box {box_id} ended before its agent answered: {describe_end(remains)}{evidence}",
        reason="BOOT_FAILED",
        box=box_id,
    )


def boot_timeout(box_id: str, seconds: float, remains: Remains) -> VoidboxError:
    """The error for a machine whose agent did not answer in time."""
    return TimedOut(
        f"box {box_id}: its agent did not answer within {seconds:g} s; the machine was ended. Give it longer "
        f"(start_timeout) if the host is slow{_evidence(remains)}",
        reason="START_TIMEOUT",
        box=box_id,
    )


def _evidence(remains: Remains) -> str:
    parts = []
    if remains.log:
        parts.append(f"\nQEMU said:\n{_indent(remains.log)}")
    parts.append(f"\nEnd of the console:\n{_indent(remains.console or '(nothing was printed)')}")
    return "".join(parts)


def _indent(text: str, lines: int = 15) -> str:
    return "\n".join(f"  {line.rstrip()}" for line in text.splitlines()[-lines:])


def _last_line(text: str) -> str:
    return text.splitlines()[-1].strip() if text else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _hint(number: int) -> str:
    return " (by someone, or because the host ran out of memory)" if number == signal.SIGKILL else ""
