"""``fusiontree checkpoint convert`` from a clone."""

import sys

from fusiontree.cli.convert_checkpoint import main, parse_size

__all__ = ["main", "parse_size"]

if __name__ == "__main__":
    sys.exit(main())
