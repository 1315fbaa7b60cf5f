"""The frame of every program: a user's mistake gives one line and exit code 2, a fault of the machine does not."""

from __future__ import annotations

import argparse
import errno
from pathlib import Path

import pytest
import yaml

from fusiontree.cli.program import run_program
from fusiontree.utils.errors import UserError


def run(error: Exception) -> int:
    def command(args: argparse.Namespace) -> int:
        raise error

    return run_program(argparse.ArgumentParser, command, [])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("wrong"), "error: wrong"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"),
            "error: 'a/b': No such file or directory",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "error: 'a': Permission denied"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "error: 'a': Is a directory"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a"), "error: 'a': File name too long"),
        (
            OSError(errno.ELOOP, "Too many levels of symbolic links", "a"),
            "error: 'a': Too many levels of symbolic links",
        ),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "error: an input cannot be read: "),
        (yaml.YAMLError("a\n  b"), "error: an input cannot be read: a b"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], error: Exception, line: str) -> None:
    assert run(error) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error", "a"),  # a launcher starts again after these
        OSError(errno.ENOSPC, "No space left on device", "a"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        FileNotFoundError("without a name"),
        ZeroDivisionError("a fault of the program"),
    ],
)
def test_a_fault_of_machine_or_program_is_none(error: Exception) -> None:
    with pytest.raises(type(error)):
        run(error)


def test_a_missing_file_behind_an_option_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def parser() -> argparse.ArgumentParser:
        made = argparse.ArgumentParser()
        made.add_argument("file", type=Path)
        return made

    missing = tmp_path / "missing.txt"
    assert run_program(parser, lambda args: len(args.file.read_text()), [str(missing)]) == 2
    assert capsys.readouterr().err == f"error: '{missing}': No such file or directory\n"
