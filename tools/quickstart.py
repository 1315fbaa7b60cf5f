"""``fusiontree quickstart`` in the clone's own folder, wherever it is called from; ``make quickstart`` runs it."""

import os
import sys
from pathlib import Path

from fusiontree.cli.quickstart import main

if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent.parent)
    sys.exit(main())
