"""``fusiontree checkpoint inspect`` from a clone."""

import sys

from fusiontree.cli.inspect_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
