"""``python -m fusiontree.cli VERB``: the console command if it is not on the path."""

import sys

from fusiontree.cli import main

if __name__ == "__main__":
    sys.exit(main())
