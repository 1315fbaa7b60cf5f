"""Builds a dataset: the documents are divided into one group per data shard, and worker processes write the shards.

The dataset depends only on documents and options, not on the number of processes. Each finished shard leaves a record;
after a kill, the same command skips every shard with a record that matches its documents.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fusiontree.data.corpus import Corpus, CorpusOptions, corpus_files
from fusiontree.data.format import DATASET, DatasetInfo, ShardInfo, TokenizerInfo, write_dataset
from fusiontree.data.progress import Progress
from fusiontree.data.shard_job import (
    Chunk,
    ShardJob,
    TokenizerChoice,
    finished_record,
    start_worker,
    write_shard,
)
from fusiontree.data.shuffle import ShuffledCorpus
from fusiontree.data.statistics import merge_statistics
from fusiontree.data.tokenizers import SMALLEST_BPE, TOKENIZER_FILE, train_bpe
from fusiontree.data.writer import token_dtype
from fusiontree.utils.errors import UserError
from fusiontree.utils.file_lock import FileLock
from fusiontree.utils.files import atomic_write
from fusiontree.utils.hashing import stable_hash

BUILD = "build.json"
"""File with the options of an unfinished build; removed when the dataset is complete."""
_LOCK = ".build.lock"
_SHUFFLED = "shuffled"
"""Folder of documents while they are shuffled."""
_THREADS = 4
"""Tokenizer threads per worker, which use all cores even if there are fewer shards than processes."""

Records = dict[str, dict[int, dict[str, Any]]]
"""Finished shards by split and number."""


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build: inputs, tokenizer, output."""

    corpus: CorpusOptions
    output: Path
    tokenizer: str
    """byte | bpe:VOCAB_SIZE | path of a tokenizer.json."""
    eos: str | None = None
    validation_fraction: float = 0.0
    """Share of documents that go to OUTPUT/validation; the rest goes to OUTPUT/train."""
    shard_bytes: int = 64 << 20
    """Bytes of text per shard."""
    shuffle: bool = False
    """Shuffle the documents by the seed; during the build this needs disk space in OUTPUT for all of their text."""
    remove_duplicates: bool = False
    bpe_sample_bytes: int = 256 << 20
    """Bytes of text to train a BPE on, from the beginning of the (shuffled) corpus."""
    seed: int = 0
    processes: int = 0
    """0 means one per core."""

    @property
    def splits(self) -> list[str]:
        """Folders inside OUTPUT, or "" for OUTPUT itself."""
        return ["train", "validation"] if self.validation_fraction else [""]

    @property
    def identity(self) -> dict[str, Any]:
        """All options that affect the dataset's content, besides the documents."""
        values = asdict(self)
        for key in ("processes", "output"):
            del values[key]
        return json.loads(json.dumps(values, default=str))


def build_dataset(options: BuildOptions, report: Callable[[str], object] = print) -> dict[str, DatasetInfo]:
    """Build the dataset (or the train and validation datasets) and return what was built, by split.

    Args:
        options: what to build.
        report: called with lines of progress.

    Raises:
        UserError: no input, an unusable tokenizer, no text, or an output folder that holds something else.
    """
    _check(options)
    corpus = Corpus(corpus_files(options.corpus, options.output), options.corpus)
    tokenizer = TokenizerChoice()
    if options.tokenizer.startswith("bpe:"):
        tokenizer = TokenizerChoice(options.output / TOKENIZER_FILE, options.tokenizer)
    elif options.tokenizer != "byte":
        tokenizer = TokenizerChoice(Path(options.tokenizer), eos=options.eos)
        tokenizer.load()  # fails on an unusable file before anything is written
    with _claimed(options):
        documents: Corpus | ShuffledCorpus = corpus
        if options.shuffle:
            documents = ShuffledCorpus(corpus, options.output / _SHUFFLED, options.seed)
            documents.fill(Progress("shuffling", corpus.bytes, report))
        if options.tokenizer.startswith("bpe:"):
            _train_bpe(options, documents, report)
        info = tokenizer.load().info
        if tokenizer.path is not None:
            tokenizer = replace(tokenizer, name=info.name)
        finished, duplicates = _build_shards(options, documents, tokenizer, info, report)
        results = {split: _describe(options.output / split, finished[split], info) for split in options.splits}
        for split, dataset in results.items():
            folder = options.output / split
            dataset.statistics["duplicates_removed"] = duplicates
            if tokenizer.path is not None and tokenizer.path != folder / TOKENIZER_FILE:
                shutil.copyfile(tokenizer.path, folder / TOKENIZER_FILE)
            write_dataset(folder, dataset)
        _remove_leftovers(options, results)
    if corpus.left_out:
        report(f"{len(corpus.left_out):,} files are no text and were left out, {corpus.left_out[0]} first")
    return results


def _check(options: BuildOptions) -> None:
    if not 0 <= options.validation_fraction < 1:
        raise UserError(f"validation fraction {options.validation_fraction} is outside [0, 1)")
    if options.processes < 0:
        raise UserError(
            f"{options.processes} processes are not possible; give --processes a number from 1, or 0 for one per core"
        )
    if not options.shard_bytes > 0:
        raise UserError(f"a shard size of {options.shard_bytes} bytes is not possible; give --shard-mb more than 0")
    if options.eos and (options.tokenizer == "byte" or options.tokenizer.startswith("bpe:")):
        raise UserError(
            f"--eos {options.eos} is for a tokenizer.json; '{options.tokenizer}' has its own end of document"
        )
    if not options.tokenizer.startswith("bpe:"):
        return
    size = options.tokenizer.removeprefix("bpe:")
    if not size.isdigit():
        raise UserError(
            f"tokenizer '{options.tokenizer}': '{size}' is not a vocabulary size; write for example bpe:32000"
        )
    if int(size) < SMALLEST_BPE:
        raise UserError(f"a byte-level BPE needs at least {SMALLEST_BPE} tokens; bpe:{size} is too small")


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
                yield document.content.decode("utf-8")

    size = int(options.tokenizer.removeprefix("bpe:"))
    report(f"training a BPE of {size:,} tokens")
    temporary = options.output / f".{TOKENIZER_FILE}.tmp"
    train_bpe(sample(), size, temporary)
    temporary.replace(path)


def _chunks(
    options: BuildOptions, documents: Corpus | ShuffledCorpus, tokenizer: TokenizerInfo, counts: dict[str, int]
) -> Iterator[Chunk]:
    """Divide the corpus into chunks, one per shard; a document's split depends only on the hash of its text."""
    splits = options.splits
    open_chunks: dict[str, Chunk] = {}
    numbers, firsts = dict.fromkeys(splits, 0), dict.fromkeys(splits, 0)
    seen: set[bytes] = set()
    told = 0

    def close(split: str) -> Chunk:
        nonlocal told
        chunk = open_chunks.pop(split)
        chunk.input_bytes, told = documents.bytes_read - told, documents.bytes_read
        return chunk

    for document in documents:
        if not document.content:
            continue
        digest = hashlib.blake2b(document.content, digest_size=16).digest()
        if options.remove_duplicates:
            if digest in seen:
                counts["duplicates"] += 1
                continue
            seen.add(digest)
        split = splits[0]
        if len(splits) > 1:
            draw = stable_hash("split", options.seed, digest.hex()) / 2**64
            split = "validation" if draw < options.validation_fraction else "train"
        chunk = open_chunks.get(split)
        if chunk is None:
            chunk = open_chunks[split] = Chunk(split, numbers[split], firsts[split], tokenizer.sha256)
            numbers[split] += 1
        chunk.add(document)
        firsts[split] += 1
        if chunk.bytes >= options.shard_bytes:
            yield close(split)
    for split in list(open_chunks):
        yield close(split)


def _build_shards(
    options: BuildOptions,
    documents: Corpus | ShuffledCorpus,
    tokenizer: TokenizerChoice,
    info: TokenizerInfo,
    report: Callable[[str], object],
) -> tuple[Records, int]:
    cores = len(os.sched_getaffinity(0))
    processes = options.processes or cores
    threads = min(cores, _THREADS)
    progress = Progress("tokenizing", documents.bytes, report)
    finished: Records = {split: {} for split in options.splits}
    counts = {"duplicates": 0}
    # spawn: a forked child of a process with threads (tokenizers has them) can deadlock.
    context = multiprocessing.get_context("spawn")
    pending: dict[Future[dict[str, Any]], Chunk] = {}

    def collect(limit: int) -> None:
        while len(pending) > limit:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                chunk = pending.pop(future)
                finished[chunk.split][chunk.number] = future.result()
                progress.add(chunk.input_bytes, chunk.bytes)

    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=start_worker, initargs=(threads,))
    try:
        for chunk in _chunks(options, documents, info, counts):
            folder = options.output / chunk.split
            record = finished_record(folder, chunk.number, chunk.digest)
            if record is not None:
                finished[chunk.split][chunk.number] = record
                progress.add(chunk.input_bytes, skipped=True)
                continue
            collect(processes)  # bounds memory: one chunk per process and one waiting
            job = ShardJob(folder, chunk.number, chunk.first_document, chunk.digest, tokenizer, chunk.documents)
            pending[pool.submit(write_shard, job)] = chunk
            chunk.documents = []
        collect(0)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, by the system if memory ran out; repeat the command to go on, with fewer "
            "--processes or smaller --shard-mb if it happens again"
        ) from error
    except BaseException:
        for process in list(pool._processes.values()):  # there is no public API to end running work
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    progress.end()
    return finished, counts["duplicates"]


def _describe(folder: Path, records: dict[int, dict[str, Any]], tokenizer: TokenizerInfo) -> DatasetInfo:
    if not records:
        raise UserError(
            f"{folder}: no document fell into this split; give more text, or another --validation-fraction with "
            "another --output"
            if folder.name in ("train", "validation")
            else f"the inputs hold no text; nothing was built in {folder}"
        )
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
