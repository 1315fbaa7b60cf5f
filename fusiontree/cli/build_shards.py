"""Builds token shards from text.

fusiontree data build --input FOLDER_OR_FILE … --output DIR --tokenizer byte|bpe:32000|tokenizer.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fusiontree.cli.program import run_program
from fusiontree.cli.show_dataset import print_summary
from fusiontree.data.build.corpus import CorpusOptions
from fusiontree.data.build.dataset import build_dataset
from fusiontree.data.build.options import BuildOptions
from fusiontree.utils.errors import UserError

INTERRUPTED = "stopped; repeat the command to continue"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Turn text files, folders, JSON lines and arrays (also packed: gz, zst, bz2, xz), Parquet and "
        "Megatron corpora (.bin beside .idx; --tokenizer names the one that made them) into token shards that training "
        "and any WebDataset reader can read. What a file is, its content tells. An interrupted command continues when "
        "it is repeated.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        metavar="PATH",
        help="text, folders, JSON, Parquet, Megatron .bin",
    )
    add("--output", type=Path, metavar="DIR", help="new folder for the dataset")
    add("--tokenizer", default="byte", metavar="T", help="byte, bpe:VOCAB_SIZE (trained here), or a tokenizer.json")
    add("--eos", metavar="TOKEN", help="the tokenizer's end-of-document token, if its files do not say it")
    add("--include", action="append", default=[], metavar="PATTERN", help="file names to read in folders, e.g. *.py")
    add("--exclude", action="append", default=[], metavar="PATTERN", help="file or folder names to leave out")
    add("--text-key", default="text", metavar="KEY", help="JSON field or Parquet column with the text (default text)")
    add("--separator", metavar="LINE", help="line between two documents of a text file, e.g. '<|endoftext|>'")
    add(
        "--validation-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="fraction of documents for DIR/validation, selected by the hash of their text, at least one or the end of "
        "the longest; the rest goes to DIR/train",
    )
    add(
        "--shuffle",
        action="store_true",
        help="shuffle the documents by --seed; during the build, DIR needs space for their text once more",
    )
    add("--remove-duplicates", action="store_true", help="keep only the first of documents with the same text")
    add(
        "--max-unknown",
        type=float,
        default=0.01,
        metavar="F",
        help="fraction of a shard's tokens that may stand for text that the tokenizer lacks (default 0.01)",
    )
    add("--seed", type=int, default=0, help="seed of split and shuffle (default 0)")
    add("--shard-mb", type=float, default=64, metavar="MB", help="megabytes of text per shard (default 64)")
    add("--processes", type=int, default=0, metavar="N", help="worker processes (default: one per core)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Build a dataset; return the exit code: 0 done, 2 an input or option is wrong or the disk failed."""
    return run_program(build_parser, build, argv, interrupted=INTERRUPTED)


def build(args: argparse.Namespace) -> int:
    """Build the dataset and print its summary; return the exit code of :func:`main`.

    Raises:
        UserError: an input or option is wrong, or the disk failed.
    """
    if not args.input or not args.output:
        raise UserError("give --input and --output; see --help")
    if not 0 < args.shard_mb < 1e6:
        raise UserError(f"--shard-mb {args.shard_mb} is no size of a shard; give megabytes of text, for example 64")
    corpus = CorpusOptions(args.input, args.include, args.exclude, args.text_key, args.separator)
    if args.separator is not None and ("\n" in args.separator or args.separator.endswith("\r")):
        raise UserError(f"--separator {args.separator!r} holds a line end; give the text of one line")
    options = BuildOptions(
        corpus=corpus,
        output=args.output,
        tokenizer=args.tokenizer,
        eos=args.eos,
        validation_fraction=args.validation_fraction,
        shard_bytes=int(args.shard_mb * 1e6),
        shuffle=args.shuffle,
        remove_duplicates=args.remove_duplicates,
        max_unknown=args.max_unknown,
        seed=args.seed,
        processes=args.processes,
    )
    try:
        for split, info in build_dataset(options, report=lambda line: print(line, flush=True)).items():
            print_summary(args.output / split, info)
    except OSError as error:
        # The disk is full, or a file cannot be read; finished shards stay.
        raise UserError(f"{error}; correct this and repeat the command to continue") from error
    return 0
