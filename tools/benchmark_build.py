"""How fast text becomes shards, beside what the tokenizers library alone does with the same text.

python tools/benchmark_build.py [--text FOLDER] [--text-mb 48] [--rounds 5]

The library has the texts in memory, encodes them with its own threads and drops the result; the build reads files,
starts processes, encodes, hashes and writes. Sides take turns, so that what else runs on the machine meets all alike.
Processor seconds stand beside the seconds of the clock: a busy machine changes them less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from fusiontree.data.build.corpus import Corpus, CorpusOptions, corpus_files
from fusiontree.data.build.dataset import build_dataset
from fusiontree.data.build.options import BuildOptions
from fusiontree.data.tokenizers import train_bpe


class Cost(NamedTuple):
    """What one turn of one side took."""

    clock_s: float
    processor_s: float
    """Of all its threads and processes."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Building shards, beside the tokenizers library alone.")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    parser.add_argument("--text", type=Path, default=stdlib, metavar="DIR", help="*.py, *.txt and *.md files to read")
    parser.add_argument("--text-mb", type=float, default=48, help="how much of it (default 48)")
    parser.add_argument("--vocab", type=int, default=32000, help="vocabulary of the BPE (default 32000)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default 5)")
    parser.add_argument("--shard-mb", type=float, default=8, help="text in a shard (default 8)")
    return parser


def some_files(folder: Path, limit: int) -> list[Path]:
    """Return text files below ``folder`` of ``limit`` bytes together, spread evenly over it."""
    files = corpus_files(CorpusOptions(inputs=[folder], include=["*.py", "*.txt", "*.md"]))
    total = sum(file.stat().st_size for file in files)
    kept, taken, passed = [], 0, 0
    for file in files:
        size = file.stat().st_size
        passed += size
        if taken + size / 2 < min(1.0, limit / total) * passed:
            kept.append(file)
            taken += size
    return kept


def measure(action: Callable[[], object]) -> Cost:
    """Run ``action`` once."""
    began, before = time.perf_counter(), os.times()
    action()
    after = os.times()
    return Cost(time.perf_counter() - began, sum(after[:4]) - sum(before[:4]))


def batches(texts: Sequence[str], size: int) -> list[list[str]]:
    """Split texts into batches of ``size`` characters or a little more."""
    found: list[list[str]] = [[]]
    count = 0
    for text in texts:
        if count >= size:
            found.append([])
            count = 0
        found[-1].append(text)
        count += len(text)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table and one JSON line."""
    from tokenizers import Tokenizer

    args = build_parser().parse_args(argv)
    files = some_files(args.text, int(args.text_mb * 1e6))
    corpus = CorpusOptions(inputs=files)
    texts = [document.content.decode() for document in Corpus(files, corpus) if document.content]
    text_mb = sum(len(text.encode()) for text in texts) / 1e6
    costs: dict[str, list[Cost]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = Path(temporary) / "tokenizer.json"
        train_bpe(texts[:: max(1, round(text_mb / 16))], args.vocab, tokenizer)
        turn = 0

        def encode(size: int) -> None:
            library = Tokenizer.from_file(str(tokenizer))  # with an empty cache of words, as the build's
            for batch in batches(texts, size):
                library.encode_batch_fast(batch, add_special_tokens=False)

        def build(kind: str) -> None:
            output = Path(temporary) / f"{kind}-{turn}"
            options = BuildOptions(
                corpus, output, str(tokenizer) if kind == "bpe" else "byte", shard_bytes=int(args.shard_mb * 1e6)
            )
            build_dataset(options, report=lambda line: None)

        sides: dict[str, Callable[[], None]] = {
            "library, 1 MB a call": lambda: encode(1 << 20),
            "library, 8 MB a call": lambda: encode(8 << 20),
            "build, BPE": lambda: build("bpe"),
            "build, bytes": lambda: build("byte"),
        }
        for turn in range(args.rounds):
            for name, side in sides.items():
                costs.setdefault(name, []).append(measure(side))
                print(f"round {turn + 1}: {name:22} {costs[name][-1].clock_s:7.2f} s", file=sys.stderr, flush=True)
    medians = {name: Cost(*map(statistics.median, zip(*turns, strict=True))) for name, turns in costs.items()}
    print(f"{len(texts):,} documents, {text_mb:.1f} MB; median of {args.rounds} turns, {os.cpu_count()} cores")
    for name, cost in medians.items():
        print(f"  {name:22} {text_mb / cost.clock_s:7.1f} MB/s   {cost.processor_s:7.1f} processor seconds")
    ratios = {}
    for index, key in enumerate(Cost._fields):
        of_turns = [turn[2][index] / min(turn[0][index], turn[1][index]) for turn in zip(*costs.values(), strict=True)]
        ratios[f"bpe_{key}_over_library"] = round(statistics.median(of_turns), 3)
    print(json.dumps({**ratios, "bytes_mb_per_s": round(text_mb / medians["build, bytes"].clock_s, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
