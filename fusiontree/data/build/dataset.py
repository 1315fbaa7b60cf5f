"""Builds a dataset: the documents are divided into one group per data shard, and worker processes write the shards.

The dataset depends only on documents and options, not on the number of processes. Each finished shard leaves a record;
after a kill, the same command skips every shard with a record that matches its documents.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusiontree.data.build.corpus import Corpus, corpus_files
from fusiontree.data.build.options import BuildOptions
from fusiontree.data.build.pool import build_shards
from fusiontree.data.build.progress import BuildProgress
from fusiontree.data.build.shard_job import TokenizerChoice
from fusiontree.data.build.shuffle import ShuffledCorpus
from fusiontree.data.build.split import plan_split
from fusiontree.data.build.statistics import merge_statistics
from fusiontree.data.format import (
    DATASET,
    TOKENIZER_FILE,
    DatasetInfo,
    ShardInfo,
    TokenizerInfo,
    token_dtype,
    write_dataset,
)
from fusiontree.data.long_texts import cut_at_lines
from fusiontree.data.tokenizers import HuggingFaceTokenizer, train_bpe
from fusiontree.utils.errors import UserError
from fusiontree.utils.file_lock import FileLock
from fusiontree.utils.files import atomic_write

BUILD = "build.json"
"""File with the options of an unfinished build; removed when the dataset is complete."""
_LOCK = ".build.lock"
_SHUFFLED = "shuffled"
"""Folder of documents while they are shuffled."""


def build_dataset(options: BuildOptions, report: Callable[[str], object] = print) -> dict[str, DatasetInfo]:
    """Build the dataset (or the train and validation datasets) and return what was built, by split.

    Args:
        options: what to build.
        report: called with lines of progress.

    Raises:
        UserError: no input, an unusable tokenizer, no text, or an output folder that holds something else.
    """
    options.check()
    corpus = Corpus(corpus_files(options.corpus, options.output), options.corpus)
    tokenizer = TokenizerChoice()
    if options.tokenizer.startswith("bpe:"):
        tokenizer = TokenizerChoice(options.output / TOKENIZER_FILE, options.tokenizer)
    elif options.tokenizer != "byte":
        tokenizer = TokenizerChoice(Path(options.tokenizer), eos=options.eos)
        tokenizer.load()  # fails on an unusable file before anything is written
    division = plan_split(options, corpus, report)
    with _claimed(options):
        documents: Corpus | ShuffledCorpus = corpus
        if options.shuffle:
            documents = ShuffledCorpus(corpus, options.output / _SHUFFLED, options.seed)
            documents.fill(BuildProgress("shuffling", corpus.bytes, report))
        if options.tokenizer.startswith("bpe:"):
            _train_bpe(options, documents, report)
        loaded = tokenizer.load()
        info = loaded.info
        for note in loaded.notes:
            report(f"tokenizer {info.name}: {note}")
        if isinstance(loaded, HuggingFaceTokenizer):
            tokenizer = TokenizerChoice(loaded.path, info.name, eos_id=info.eos_id)
        finished, duplicates = build_shards(options, documents, tokenizer, info, division, report)
        results = {split: _describe(options.output / split, finished[split], info) for split in options.splits}
        for split, dataset in results.items():
            folder = options.output / split
            dataset.statistics["duplicates_removed"] = duplicates
            if tokenizer.path is not None and tokenizer.path != folder / TOKENIZER_FILE:
                shutil.copyfile(tokenizer.path, folder / TOKENIZER_FILE)
            write_dataset(folder, dataset)
        _remove_leftovers(options, results)
    for note in corpus.notes():
        report(note)
    return results


@contextmanager
def _claimed(options: BuildOptions) -> Iterator[None]:
    """Create the output folders and lock out other builds.

    Raises:
        UserError: the folder contains other files, a complete dataset, a build with other options, or a running build.
    """
    output = options.output
    if not output.is_dir():
        output.mkdir(parents=True)
    lock = FileLock(output / _LOCK)
    if not lock.acquire(wait=False):
        raise UserError(f"another process is building in '{output}'; wait until it ends, or name another --output")
    try:
        held = sorted(p.name for p in output.iterdir() if p.name != _LOCK)
        if held and BUILD not in held:
            if any((output / split / DATASET).exists() for split in ("", "train", "validation")):
                raise UserError(
                    f"'{output}' holds a complete dataset already; name another --output or delete it first"
                )
            raise UserError(f"'{output}' holds other files ({held[0]} …); name a new folder")
        if BUILD in held and json.loads((output / BUILD).read_text()) != options.identity:
            if any(output.rglob("*.record.json")):
                raise UserError(
                    f"'{output}' holds an unfinished build with other options; repeat those to finish it, or delete it"
                )
            shutil.rmtree(output / _SHUFFLED, ignore_errors=True)
            (output / TOKENIZER_FILE).unlink(missing_ok=True)
        with atomic_write(output / BUILD) as file:
            json.dump(options.identity, file)
        for split in options.splits:
            (output / split).mkdir(exist_ok=True)
        yield
    finally:
        lock.path.unlink(missing_ok=True)
        lock.close()


def _train_bpe(options: BuildOptions, documents: Corpus | ShuffledCorpus, report: Callable[[str], object]) -> None:
    path = options.output / TOKENIZER_FILE
    if path.exists():
        return

    def sample() -> Iterator[str]:
        left = options.bpe_sample_bytes
        for document in documents:
            if left <= 0:
                return
            if not document.is_tokens:
                left -= len(document.content)
                yield from (piece.decode("utf-8") for piece in cut_at_lines(document.content))

    size = int(options.tokenizer.removeprefix("bpe:"))
    report(f"training a BPE of {size:,} tokens")
    temporary = options.output / f".{TOKENIZER_FILE}.tmp"
    train_bpe(sample(), size, temporary)
    temporary.replace(path)


def _describe(folder: Path, records: dict[int, dict[str, Any]], tokenizer: TokenizerInfo) -> DatasetInfo:
    if not records:
        raise UserError(f"the inputs hold no text; nothing was built in {folder}")
    ordered = [record for _, record in sorted(records.items())]
    return DatasetInfo(
        tokenizer=tokenizer,
        dtype=token_dtype(tokenizer.vocab_size).name,
        shards=[ShardInfo(**record["shard"]) for record in ordered],
        statistics=merge_statistics([record["statistics"] for record in ordered], tokenizer.vocab_size),
    )


def _remove_leftovers(options: BuildOptions, results: dict[str, DatasetInfo]) -> None:
    """Remove temporary files of this build and leftovers of killed or earlier builds; build.json last."""
    for split, info in results.items():
        folder = options.output / split
        kept = {shard.name for shard in info.shards}
        for path in [*folder.glob("shard-*"), *folder.glob(".*.tmp")]:
            if path.name not in kept and path.with_suffix(".tar").name not in kept:
                path.unlink()
    shutil.rmtree(options.output / _SHUFFLED, ignore_errors=True)
    if "" not in results:
        (options.output / TOKENIZER_FILE).unlink(missing_ok=True)
    (options.output / BUILD).unlink()
