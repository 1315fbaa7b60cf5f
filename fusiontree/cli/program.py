"""The frame of every program: reads the command line, runs, and answers a user's mistake with one line."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from fusiontree.config.plugins import load_plugins
from fusiontree.utils.environment import expand_path
from fusiontree.utils.errors import UserError, nearest

_USERS_ERRNOS = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP),
    errno.ENAMETOOLONG,
}
"""Errors of a path that a user gave; others are faults of disk or network, after which a launcher starts again."""


def run_program(
    build_parser: Callable[[], argparse.ArgumentParser],
    command: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None = None,
    errors: tuple[type[Exception], ...] = (UserError,),
    interrupted: str = "interrupted",
) -> int:
    """Parse ``argv`` (default: the process's) and return the exit code of ``command``.

    The code is 2 if it raises ``errors``, or if a file is missing, forbidden or no text, and 130, with the line
    ``interrupted``, if Ctrl-C ends it. Options may stand before, between and behind the other words.

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
        help="module (dotted name, or path of a .py file) that adds mixers, optimizers, metrics, token sources or "
        "tasks; may be given several times",
    )
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        hint = nearest(unknown[0].split("=")[0], parser._option_string_actions)
        parser.error(f"unknown argument '{unknown[0]}'{hint}; see --help")
    try:
        load_plugins(args.plugin)
        _expand_paths(args)
        return command(args)
    except errors as error:
        # Every rank meets the same error; one message is enough, unless it is this rank's own.
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        if error.errno not in _USERS_ERRNOS or error.filename is None:
            raise
        print(f"error: '{error.filename}': {error.strerror}", file=sys.stderr, flush=True)
        return 2
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        print(f"error: an input cannot be read: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr, flush=True)
        return 130


def _expand_paths(args: argparse.Namespace) -> None:
    """Replace ``~`` and ``$NAME`` in options of type Path: a shell does not do so behind ``--option=``."""
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, Path(expand_path(str(value))))
        elif isinstance(value, list) and value and all(isinstance(path, Path) for path in value):
            setattr(args, name, [Path(expand_path(str(path))) for path in value])


def check_output_folders(args: argparse.Namespace, *options: str) -> None:
    """Check, before long work, that the folder exists in which each of these options names a file to write.

    Raises:
        UserError: one does not exist.
    """
    for option in options:
        file: Path | None = getattr(args, option)
        if file and not file.parent.is_dir():
            raise UserError(f"--{option} {file}: the folder '{file.parent}' does not exist; create it")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` and ``--dtype`` of a program that loads a checkpoint."""
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto: a GPU if there is one)"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="type of the weights (default auto: bfloat16 on a GPU, float32 on a CPU)",
    )
