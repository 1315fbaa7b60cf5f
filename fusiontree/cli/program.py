"""The frame of every program: reads the command line, runs, and answers a user's mistake with one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from fusiontree.config.plugins import load_plugins
from fusiontree.utils.errors import UserError, nearest


def run_program(
    build_parser: Callable[[], argparse.ArgumentParser],
    command: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None = None,
    errors: tuple[type[Exception], ...] = (UserError,),
    interrupted: str = "interrupted",
) -> int:
    """Parse ``argv`` (default: the process's) and return the exit code of ``command``.

    The code is 2 if it raises ``errors``, and 130, with the line ``interrupted``, if Ctrl-C ends it. Options may stand
    before, between and behind the other words.

    Raises:
        SystemExit: ``--help`` was asked for (code 0), or an option is unknown or its value wrong (code 2).
    """
    parser = build_parser()
    if sys.argv[0].startswith("fusiontree "):  # set by fusiontree.cli.main: the command that the user typed
        parser.prog = sys.argv[0]
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="module (dotted name, or path of a .py file) that adds mixers, optimizers, metrics or token sources; "
        "may be given several times",
    )
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        hint = nearest(unknown[0].split("=")[0], parser._option_string_actions)
        parser.error(f"unknown argument '{unknown[0]}'{hint}; see --help")
    try:
        load_plugins(args.plugin)
        return command(args)
    except errors as error:
        # Every rank meets the same error; one message is enough, unless it is this rank's own.
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr, flush=True)
        return 130


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` and ``--dtype`` of a program that loads a checkpoint."""
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto: a GPU if there is one)"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights (default auto: bfloat16 on a GPU, float32 on a CPU)",
    )
