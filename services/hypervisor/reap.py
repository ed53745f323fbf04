"""`python -m services.hypervisor.reap --state DIR`: end and remove all boxes that no service holds."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from services.common.errors import VoidboxError
from services.common.paths import Paths
from services.hypervisor.registry import reap


def main() -> None:
    """Reap and print the ids of the boxes that still ran, one a line; exits 1 if that failed."""
    parser = argparse.ArgumentParser(prog="voidbox-reap", description=__doc__)
    parser.add_argument("--state", type=Path, help="the state directory (default: VOIDBOX_STATE_DIR)")
    state = parser.parse_args().state or Paths.from_env(os.environ).state
    try:
        for box_id in reap(state):
            print(box_id)
    except (VoidboxError, OSError) as error:
        print(f"voidbox-reap: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
