"""Divides documents into data shards and writes the shards in worker processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from fusiontree.data.build.corpus import Corpus
from fusiontree.data.build.options import BuildOptions
from fusiontree.data.build.progress import BuildProgress
from fusiontree.data.build.shard_job import (
    ShardDocuments,
    ShardJob,
    TokenizerChoice,
    finished_record,
    start_worker,
    write_shard,
)
from fusiontree.data.build.shuffle import ShuffledCorpus
from fusiontree.data.build.split import Split, digest_of
from fusiontree.data.format import TokenizerInfo
from fusiontree.utils.errors import UserError

_THREADS = 4
"""Tokenizer threads per worker, which use all cores even if there are fewer shards than processes."""

Records = dict[str, dict[int, dict[str, Any]]]
"""Finished shards by split and number."""


class _ShardDivider:
    """Divides a corpus into the documents of each shard."""

    def __init__(
        self, options: BuildOptions, documents: Corpus | ShuffledCorpus, tokenizer: TokenizerInfo, split: Split
    ) -> None:
        self.duplicates = 0
        self._options, self._documents, self._tokenizer, self._split = options, documents, tokenizer, split
        self._open: dict[str, ShardDocuments] = {}
        self._shards = dict.fromkeys(options.splits, 0)
        self._counts = dict.fromkeys(options.splits, 0)
        self._seen: set[bytes] = set()
        self._bytes_assigned = 0

    def __iter__(self) -> Iterator[ShardDocuments]:
        for document in self._documents:
            if not document.content:
                continue
            digest = digest_of(document)
            if self._options.remove_duplicates:
                if digest in self._seen:
                    self.duplicates += 1
                    continue
                self._seen.add(digest)
            for split, part in self._split.parts(document, digest):
                if split not in self._open:
                    first = self._counts[split]
                    self._open[split] = ShardDocuments(split, self._shards[split], first, self._tokenizer.sha256)
                    self._shards[split] += 1
                self._counts[split] += 1
                self._open[split].add(part)
                if self._open[split].bytes >= self._options.shard_bytes:
                    yield self._close(split)
        for split in list(self._open):
            yield self._close(split)

    def _close(self, split: str) -> ShardDocuments:
        shard = self._open.pop(split)
        shard.input_bytes = self._documents.bytes_read - self._bytes_assigned
        self._bytes_assigned = self._documents.bytes_read
        return shard


def build_shards(
    options: BuildOptions,
    documents: Corpus | ShuffledCorpus,
    tokenizer: TokenizerChoice,
    info: TokenizerInfo,
    split: Split,
    report: Callable[[str], object],
) -> tuple[Records, int]:
    """Write all shards that have no record of an earlier, interrupted build.

    Args:
        options: of the build; the folders of its splits exist.
        documents: in the order of the dataset.
        tokenizer: loaded by each worker process.
        info: of the tokenizer.
        split: of the documents.
        report: called with lines of progress.

    Returns:
        The records of all shards by split and number, and the number of duplicates that were left out.

    Raises:
        UserError: a worker process was killed, or a document cannot be read or tokenized.
    """
    processes = options.processes or len(os.sched_getaffinity(0))
    progress = BuildProgress("tokenizing", documents.bytes, report)
    finished: Records = {split: {} for split in options.splits}
    shards = _ShardDivider(options, documents, info, split)
    pending: dict[Future[dict[str, Any]], ShardDocuments] = {}

    def collect(limit: int) -> None:
        while len(pending) > limit:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                shard = pending.pop(future)
                finished[shard.split][shard.number] = future.result()
                progress.add(shard.input_bytes, shard.bytes)

    with _worker_pool(processes) as pool:
        for shard in shards:
            folder = options.output / shard.split
            record = finished_record(folder, shard.number, shard.digest)
            if record is not None:
                finished[shard.split][shard.number] = record
                progress.add(shard.input_bytes, skipped=True)
                continue
            collect(processes)  # bounds memory: the documents of one shard per process and of one waiting shard
            made_of = shard.first_document, shard.digest, tokenizer, shard.documents
            job = ShardJob(folder, shard.number, *made_of, options.max_unknown)
            pending[pool.submit(write_shard, job)] = shard
            shard.documents = []
        collect(0)
    progress.end()
    return finished, shards.duplicates


@contextmanager
def _worker_pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Start worker processes; kill them if the block raises.

    Raises:
        UserError: a worker process was killed.
    """
    # spawn: a forked child of a process with threads (tokenizers has them) can deadlock.
    context = multiprocessing.get_context("spawn")
    threads = min(len(os.sched_getaffinity(0)), _THREADS)
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=start_worker, initargs=(threads,))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, by the system if memory ran out; repeat the command to continue, with fewer "
            "--processes or smaller --shard-mb if it happens again"
        ) from error
    except BaseException:
        for process in list(pool._processes.values()):  # there is no public API to end running work
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
