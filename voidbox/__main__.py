"""`python -m voidbox`: the command line client."""

import sys

from voidbox.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
