"""`python -m baatt` is the command `baatt`."""

import sys

from baatt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
