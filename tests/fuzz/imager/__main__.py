"""Fuzz one target of the imager with coverage guidance until it is interrupted.

python -m tests.fuzz.imager layers [libFuzzer's options] [directory for new inputs]
"""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    """Only the imager's own modules are instrumented: all that is imported would take a minute."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["services.imager"]):
        targets = importlib.import_module("tests.fuzz.imager.targets")
    name = sys.argv.pop(1)
    atheris.Setup([*sys.argv, str(targets.CORPUS / name)], targets.TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
