"""Text to token shards; checking and showing them.

python tools/build_shards.py --input FOLDER_OR_FILE … --output DIR --tokenizer byte|bpe:32000|tokenizer.json
python tools/build_shards.py --verify DIR
python tools/build_shards.py --inspect DIR --document 3
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fusiontree.data.build import BuildOptions, build_dataset
from fusiontree.data.corpus import CorpusOptions
from fusiontree.data.format import DatasetInfo, read_dataset
from fusiontree.data.tokenizers import tokenizer_of
from fusiontree.data.verify import document_of_dataset, verify_dataset
from fusiontree.utils.errors import UserError, nearest


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Turn text files, folders, JSONL (.gz, .zst) and Megatron corpora (.bin beside .idx; --tokenizer "
        "names the one that made them) into token shards that training and any WebDataset "
        "reader can read. Repeating an interrupted command goes on where it was.",
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
        help="text, folders, JSONL, Megatron .bin",
    )
    add("--output", type=Path, metavar="DIR", help="new folder for the dataset")
    add("--tokenizer", default="byte", metavar="T", help="byte, bpe:VOCAB_SIZE (trained here), or a tokenizer.json")
    add("--eos", metavar="TOKEN", help="the tokenizer's end-of-document token, if it is not one of the usual names")
    add("--include", action="append", default=[], metavar="PATTERN", help="file names to read in folders, e.g. *.py")
    add("--exclude", action="append", default=[], metavar="PATTERN", help="file or folder names to leave out")
    add("--text-key", default="text", metavar="KEY", help="field of a JSONL object with the text (default text)")
    add(
        "--validation-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="share of documents for DIR/validation, chosen by the hash of their text; the rest goes to DIR/train",
    )
    add(
        "--shuffle",
        action="store_true",
        help="put the documents in an order decided by --seed; DIR holds their text once more meanwhile",
    )
    add("--remove-duplicates", action="store_true", help="keep only the first of documents with the same text")
    add("--seed", type=int, default=0, help="decides the split and the shuffle (default 0)")
    add("--shard-mb", type=float, default=64, metavar="MB", help="text in a shard (default 64)")
    add("--processes", type=int, default=0, metavar="N", help="worker processes (default: one a core)")
    add("--verify", type=Path, metavar="DIR", help="check every byte of a dataset; exit code 1 if any is damaged")
    add("--inspect", type=Path, metavar="DIR", help="show what a dataset holds, and a document as text")
    add("--document", type=int, default=0, metavar="N", help="the document --inspect shows (default 0)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return the exit code: 0 done, 1 damage found, 2 the user gave something wrong."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    try:
        if unknown:
            known = nearest(unknown[0].split("=")[0], parser._option_string_actions)
            raise UserError(f"unknown argument '{unknown[0]}'{known}; see --help")
        if args.verify:
            return verify(args.verify)
        if args.inspect:
            return inspect(args.inspect, args.document)
        if not args.input or not args.output:
            raise UserError("give --input and --output to build, or --verify or --inspect; see --help")
        if not 0 < args.shard_mb < 1e6:
            raise UserError(f"--shard-mb {args.shard_mb} is no size of a shard; give megabytes of text, 64 say")
        options = BuildOptions(
            corpus=CorpusOptions(
                inputs=args.input,
                include=args.include,
                exclude=args.exclude,
                text_key=args.text_key,
            ),
            output=args.output,
            tokenizer=args.tokenizer,
            eos=args.eos,
            validation_fraction=args.validation_fraction,
            shard_bytes=int(args.shard_mb * 1e6),
            shuffle=args.shuffle,
            remove_duplicates=args.remove_duplicates,
            seed=args.seed,
            processes=args.processes,
        )
        for split, info in build_dataset(options, report=lambda line: print(line, flush=True)).items():
            print_summary(args.output / split, info)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # The disk is full, a file cannot be read: what is finished stays.
        print(f"error: {error}; mend that and repeat the command to go on", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; repeat the command to go on", file=sys.stderr)
        return 130
    return 0


def print_summary(folder: Path, info: DatasetInfo) -> None:
    """Print what a dataset holds."""
    s = info.statistics
    print(
        f"\n{folder}: {info.documents:,} documents, {info.tokens:,} tokens in {len(info.shards)} shards ({info.dtype})"
    )
    print(f"  tokenizer {info.tokenizer.name}, vocabulary {info.tokenizer.vocab_size:,}, eos {info.tokenizer.eos_id}")
    if s["text_bytes"]:
        print(f"  {s['text_bytes'] / 1e6:,.1f} MB of text, {s['text_bytes'] / info.tokens:.2f} bytes a token")
    if s.get("duplicates_removed"):
        print(f"  {s['duplicates_removed']:,} duplicates were removed")
    if "bigram_entropy_nats" in s:
        print(f"  a byte given the byte before it: {s['bigram_entropy_nats']:.3f} nats")
    print("  document lengths in tokens:")
    histogram = s["length_histogram_log2"]
    widest = max(histogram)
    for power, count in enumerate(histogram):
        if count:
            bar = "#" * max(1, round(40 * count / widest))
            print(f"    {1 << (power - 1):>10,} to {(1 << power) - 1:>10,}  {count:>10,}  {bar}")


def verify(folder: Path) -> int:
    """Check a dataset and name all damage."""
    damaged = 0
    for info, problems in verify_dataset(folder):
        damaged += bool(problems)
        print(f"{info.name}: {'ok' if not problems else f'{len(problems)} problems'}", flush=True)
        for problem in problems:
            print(f"  {problem}")
    print("every shard is whole" if not damaged else f"{damaged} shards are damaged")
    return 1 if damaged else 0


def inspect(folder: Path, number: int) -> int:
    """Show a dataset's summary and one document."""
    info = read_dataset(folder)
    print_summary(folder, info)
    try:
        shard, tokens = document_of_dataset(folder, info, number)
    except IndexError as error:
        raise UserError(f"--document {number}: the dataset has {info.documents:,} documents, from 0") from error
    print(f"\ndocument {number} ({len(tokens):,} tokens, {shard}):\n")
    print(tokenizer_of(info.tokenizer, folder).decode(tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
