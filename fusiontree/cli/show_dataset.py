"""Shows and verifies datasets: ``fusiontree data inspect DIR`` and ``fusiontree data verify DIR``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusiontree.cli.program import run_program
from fusiontree.data.build.verify import document_of_dataset, verify_dataset
from fusiontree.data.format import DatasetInfo, ShardDamage, read_dataset
from fusiontree.data.tokenizers import tokenizer_of
from fusiontree.utils.errors import UserError


def inspect_parser() -> argparse.ArgumentParser:
    """Return the command line of ``data inspect``."""
    parser = argparse.ArgumentParser(
        description="Show the contents of a dataset, and a document as text.", allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the dataset")
    parser.add_argument("--document", type=int, default=0, metavar="N", help="the document to show (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of text")
    return parser


def verify_parser() -> argparse.ArgumentParser:
    """Return the command line of ``data verify``."""
    parser = argparse.ArgumentParser(description="Check every byte of a dataset; exit code 1 if any is damaged.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the dataset")
    return parser


def inspect_main(argv: Sequence[str] | None = None) -> int:
    """Show a dataset; return the exit code: 0 done, 2 an option is wrong, or there is no dataset or it is damaged."""
    errors = (UserError, ShardDamage)
    return run_program(inspect_parser, lambda args: inspect(args.folder, args.document, args.json), argv, errors)


def verify_main(argv: Sequence[str] | None = None) -> int:
    """Check a dataset; return the exit code: 0 undamaged, 1 damaged, 2 there is no dataset."""
    return run_program(verify_parser, lambda args: verify(args.folder), argv)


def print_summary(folder: Path, info: DatasetInfo) -> None:
    """Print a dataset's size, tokenizer and document lengths."""
    s = info.statistics
    print(
        f"\n{folder}: {info.documents:,} documents, {info.tokens:,} tokens in {len(info.shards)} shards ({info.dtype})"
    )
    print(f"  tokenizer {info.tokenizer.name}, vocabulary {info.tokenizer.vocab_size:,}, eos {info.tokenizer.eos_id}")
    if s["text_bytes"]:
        print(f"  {s['text_bytes'] / 1e6:,.1f} MB of text, {s['bytes_per_token']:.2f} bytes per token")
    if s.get("unknown"):
        share = s["unknown"] / info.tokens
        print(f"  {s['unknown']:,} pieces of text were unknown to the tokenizer and lost ({share:.2%} of the tokens)")
    if s.get("duplicates_removed"):
        print(f"  {s['duplicates_removed']:,} duplicates were removed")
    if "bigram_entropy_nats" in s:
        print(f"  entropy of a byte given the previous byte: {s['bigram_entropy_nats']:.3f} nats")
    print("  document lengths in tokens:")
    histogram = s["length_histogram_log2"]
    widest = max(histogram)
    for power, count in enumerate(histogram):
        if count:
            bar = "#" * max(1, round(40 * count / widest))
            print(f"    {1 << (power - 1):>10,} to {(1 << power) - 1:>10,}  {count:>10,}  {bar}")


def verify(folder: Path) -> int:
    """Check a dataset and print all damage."""
    damaged = 0
    for info, problems in verify_dataset(folder):
        damaged += bool(problems)
        print(f"{info.name}: {'ok' if not problems else f'{len(problems)} problems'}", flush=True)
        for problem in problems:
            print(f"  {problem}")
    print("every shard is undamaged" if not damaged else f"{damaged} shards are damaged")
    return 1 if damaged else 0


def inspect(folder: Path, number: int, as_json: bool = False) -> int:
    """Show a dataset's summary and document ``number``, as text or as one JSON object.

    Raises:
        UserError: there is no dataset, or it has fewer documents.
        ShardDamage: the document differs from its recorded hash.
    """
    info = read_dataset(folder)
    try:
        shard, tokens = document_of_dataset(folder, info, number)
    except IndexError as error:
        raise UserError(f"--document {number}: the dataset has {info.documents:,} documents, from 0") from error
    text = tokenizer_of(info.tokenizer, folder).decode(tokens)
    if as_json:
        document = {"number": number, "shard": shard, "tokens": len(tokens), "text": text}
        print(json.dumps(dataset_facts(folder, info) | {"document": document}, ensure_ascii=False))
        return 0
    print_summary(folder, info)
    print(f"\ndocument {number} ({len(tokens):,} tokens, {shard}):\n")
    print(text)
    return 0


def dataset_facts(folder: Path, info: DatasetInfo) -> dict[str, Any]:
    """Return the facts of :func:`print_summary` as plain values; ``statistics`` is that of dataset.json."""
    return {
        "dataset": str(folder),
        "documents": info.documents,
        "tokens": info.tokens,
        "shards": len(info.shards),
        "dtype": info.dtype,
        "tokenizer": asdict(info.tokenizer),
        "statistics": info.statistics,
    }
