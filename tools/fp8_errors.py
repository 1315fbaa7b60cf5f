"""Errors of matrix products in bf16 and FP8 on the activations of a model; see :mod:`fusiontree.cli.fp8_errors`."""

import sys

from fusiontree.cli.fp8_errors import main

if __name__ == "__main__":
    sys.exit(main())
