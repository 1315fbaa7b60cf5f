"""Draw loss and gates of a run: ``python tools/plot_run.py RUN [--output FILE]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fusiontree.tracking.plots import plot_run


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Draw loss and gates of a run as PNG.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--output", type=Path, help="PNG to write (default: RUN/loss.png)")
    parser.add_argument(
        "--reference", nargs=2, action="append", metavar=("NAME", "LOSS"), help="a level of loss to mark"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the tool; exit code 2 when there is nothing to draw."""
    args = build_parser().parse_args(argv)
    output = args.output or args.run / "loss.png"
    try:
        plot_run(args.run, output, {name: float(level) for name, level in args.reference or []})
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
