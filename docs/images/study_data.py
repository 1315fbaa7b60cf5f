"""Builds the data of configs/study/blocks.yaml from a tree of sources: one document per directory.

    python docs/images/study_data.py --tree linux-source-6.1 --out data/study

The files of a directory, each behind a line with its path, are joined into one document, so that documents are long and
their parts refer to each other. Directories are sampled by the hash of their path; a directory belongs to the
validation split or to the training split as a whole. Writes OUT/train and OUT/validation (token shards with one BPE
tokenizer, trained on the beginning of the training split). The result depends on the tree and the options alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import zstandard

from fusiontree.data.format import read_dataset, write_dataset
from fusiontree.data.tokenizers import train_bpe

SUFFIXES = (".c", ".h", ".S", ".rst", ".txt", ".py", ".sh", ".pl", ".dts", ".dtsi", ".yaml", ".rs", ".json")
GENERATED = ("asic_reg", "pmu-events")
"""Folders of tables that programs wrote: a third of the kernel's bytes, and easy to predict."""
LONGEST_VALIDATION = 0.15
"""A directory with more than this fraction of the validation split stays in the training split."""


def directories(tree: Path) -> list[Path]:
    """Return the directories with text, relative to ``tree``, in the order of the hashes of their paths."""
    found = {
        file.parent.relative_to(tree)
        for file in tree.rglob("*")
        if file.suffix in SUFFIXES and file.is_file() and not file.is_symlink()
    }
    kept = [folder for folder in found if not any(part in GENERATED for part in folder.parts)]
    return sorted(kept, key=lambda folder: hashlib.sha256(folder.as_posix().encode()).hexdigest())


def document(tree: Path, folder: Path) -> str:
    """Return the text of a directory's files in the order of their names."""
    files = sorted(f for f in (tree / folder).iterdir() if f.suffix in SUFFIXES and f.is_file() and not f.is_symlink())
    return "\n".join(f"==> {f.relative_to(tree)}\n{f.read_text(encoding='utf-8', errors='replace')}" for f in files)


def write_splits(tree: Path, out: Path, train_bytes: float, validation_bytes: float) -> None:
    """Write OUT/validation.jsonl.zst, then OUT/train.jsonl.zst, until they hold that many bytes of text."""
    budgets = {"validation": validation_bytes, "train": train_bytes}
    sizes, counts = dict.fromkeys(budgets, 0), dict.fromkeys(budgets, 0)
    files = {name: zstandard.open(out / f"{name}.jsonl.zst", "wt", encoding="utf-8") for name in budgets}
    for folder in directories(tree):
        text = document(tree, folder)
        size = len(text.encode())
        full = sizes["validation"] >= validation_bytes or size > LONGEST_VALIDATION * validation_bytes
        split = "train" if full else "validation"
        if sizes[split] + size > budgets[split] * 1.02:
            continue
        files[split].write(json.dumps({"text": text}) + "\n")
        sizes[split] += size
        counts[split] += 1
    for name, file in files.items():
        file.close()
        print(f"{name}: {counts[name]:,} directories, {sizes[name] / 1e6:.1f} MB of text", flush=True)


def beginning(file: Path, size: float) -> Iterator[str]:
    """Yield documents of a split until they hold ``size`` bytes."""
    with zstandard.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            yield text
            size -= len(text.encode())
            if size <= 0:
                return


def keep_first(folder: Path, shards: int) -> None:
    """Reduce a dataset to its first shards."""
    info = read_dataset(folder)
    for shard in info.shards[shards:]:
        for file in (folder / shard.name, (folder / shard.name).with_suffix(".index")):
            file.unlink()
    write_dataset(folder, replace(info, shards=info.shards[:shards], statistics={}))


def main() -> int:
    """Build both splits; return the exit code of the build."""
    parser = argparse.ArgumentParser(description="Build the data of configs/study/blocks.yaml.")
    parser.add_argument("--tree", type=Path, required=True, help="folder with sources, such as linux-source-6.1")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the splits")
    parser.add_argument("--megabytes", type=float, default=320, help="text of the training split (default 320)")
    parser.add_argument("--validation-megabytes", type=float, default=3.2, help="text for validation (default 3.2)")
    parser.add_argument("--vocab-size", type=int, default=16384, help="tokens of the BPE (default 16384)")
    parser.add_argument("--bpe-megabytes", type=float, default=48, help="text that the BPE is trained on (default 48)")
    parser.add_argument("--shard-mb", type=float, default=36, help="megabytes of text per shard (default 36)")
    parser.add_argument("--shards", type=int, metavar="N", help="keep only the first N shards of the training split")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_splits(args.tree, args.out, args.megabytes * 1e6, args.validation_megabytes * 1e6)
    tokenizer = args.out / "tokenizer.json"
    train_bpe(beginning(args.out / "train.jsonl.zst", args.bpe_megabytes * 1e6), args.vocab_size, tokenizer)
    for split in ("validation", "train"):
        command = [sys.executable, "-m", "fusiontree.cli", "data", "build", "--input", args.out / f"{split}.jsonl.zst"]
        command += ["--tokenizer", tokenizer, "--shard-mb", args.shard_mb, "--output", args.out / split]
        if code := subprocess.run([str(word) for word in command]).returncode:
            return code
    if args.shards:
        keep_first(args.out / "train", args.shards)
    return 0


if __name__ == "__main__":
    sys.exit(main())
