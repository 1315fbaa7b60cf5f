"""``fusiontree data build`` from a clone, with ``data inspect`` and ``data verify`` as options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fusiontree.cli import build_shards
from fusiontree.cli.program import run_program
from fusiontree.cli.show_dataset import inspect, verify


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = build_shards.build_parser()
    add = parser.add_argument
    add("--verify", type=Path, metavar="DIR", help="check every byte of a dataset; exit code 1 if any is damaged")
    add("--inspect", type=Path, metavar="DIR", help="show a dataset's contents, and a document as text")
    add("--document", type=int, default=0, metavar="N", help="the document --inspect shows (default 0)")
    return parser


def command(args: argparse.Namespace) -> int:
    """Build, check or show as asked."""
    if args.verify:
        return verify(args.verify)
    return inspect(args.inspect, args.document) if args.inspect else build_shards.build(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return the exit code: 0 done, 1 damage found, 2 the user gave something wrong."""
    return run_program(build_parser, command, argv, interrupted=build_shards.INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
