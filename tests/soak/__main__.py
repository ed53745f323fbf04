"""Run the long proofs that nothing leaks and print a table of each.

python -m tests.soak [cycles|crowd|faults ...] [--cycles N] [--boxes N] [--points N] [--seed N]
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import time

from rich.console import Console

from tests.soak import crowd, cycles, faults

PARTS = ("cycles", "crowd", "faults")


def main() -> int:
    """Measure and print; exit code 1 if something has leaked or missed its limit."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("part", nargs="*", choices=[[], *PARTS], help="what to run (default: all)")
    parser.add_argument("--cycles", type=int, default=500, help="boxes, one after the other (default: 500)")
    parser.add_argument("--every", type=int, default=25, help="cycles between two counts (default: 25)")
    parser.add_argument("--boxes", type=int, default=crowd.BOXES, help="boxes at once (default: 64)")
    parser.add_argument("--idle", type=float, default=crowd.IDLE_SECONDS, help="seconds that they idle")
    parser.add_argument("--points", type=int, default=30, help="points for each victim (default: 30)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32), help="of the random points")
    options = parser.parse_args()
    console = Console()
    began = time.monotonic()

    def tell(line: str) -> None:
        console.print(f"[{time.monotonic() - began:7.1f} s] {line}", highlight=False, markup=False)

    failures: list[str] = []
    for part in options.part or PARTS:
        outcome: cycles.Course | crowd.Crowd | faults.Outcome
        if part == "cycles":
            outcome = asyncio.run(cycles.measure(options.cycles, options.every, tell))
        elif part == "crowd":
            outcome = asyncio.run(crowd.measure(options.boxes, options.idle, tell))
        else:
            outcome = asyncio.run(faults.measure(options.seed, options.points, tell))
        console.print(outcome.table())
        failures += outcome.failures()
    for failure in failures:
        console.print(f"FAILED: {failure}", style="bold red", markup=False)
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
