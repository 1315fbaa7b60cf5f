"""``fusiontree plot`` from a clone."""

import sys

from fusiontree.cli.plot_run import main

if __name__ == "__main__":
    sys.exit(main())
