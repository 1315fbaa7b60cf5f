"""``fusiontree plot RUN``: draw losses, gates, learning rate and throughput of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusiontree.cli.program import run_program
from fusiontree.tracking.plots import plot_run


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Draw losses, gates, learning rate and throughput of a run as PNG.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--output", type=Path, help="PNG to write (default: RUN/loss.png)")
    parser.add_argument(
        "--reference", nargs=2, action="append", metavar=("NAME", "LOSS"), help="loss level to mark, in nats per token"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; exit code 2 if there is nothing to draw."""
    return run_program(build_parser, plot, argv, errors=(ValueError,))


def plot(args: argparse.Namespace) -> int:
    """Draw and print the file's path; return the exit code of :func:`main`."""
    output = args.output or args.run / "loss.png"
    plot_run(args.run, output, {name: float(level) for name, level in args.reference or []})
    print(output)
    return 0
