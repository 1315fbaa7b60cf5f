"""Builds one data shard in a worker process: tokenize, write, record."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fusiontree.data.build.corpus import Document
from fusiontree.data.build.statistics import ShardStatistics
from fusiontree.data.build.writer import ShardWriter, shard_name
from fusiontree.data.format import token_dtype
from fusiontree.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Tokenizer
from fusiontree.utils.environment import limit_tokenizer_threads
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import atomic_write

_BATCH_BYTES = 1 << 20
"""Bytes of text per tokenizer call: enough for several threads; the library's output is about 100 times as large as the
tokens, so it must stay bounded."""


@dataclass(frozen=True)
class TokenizerChoice:
    """A tokenizer that any process can load."""

    path: Path | None = None
    """Path of a tokenizer.json; None means the byte tokenizer."""
    name: str | None = None
    eos: str | None = None
    eos_id: int | None = None

    def load(self) -> Tokenizer:
        """Return the tokenizer; see :class:`HuggingFaceTokenizer` for errors."""
        if self.path is None:
            return ByteTokenizer()
        return HuggingFaceTokenizer(self.path, name=self.name, eos=self.eos, eos_id=self.eos_id)


class ShardDocuments:
    """The documents of one shard."""

    def __init__(self, split: str, number: int, first_document: int, tokenizer_sha256: str) -> None:
        """Start without documents."""
        self.split, self.number, self.first_document = split, number, first_document
        self.documents: list[Document] = []
        self.bytes = 0
        self.input_bytes = 0
        """Bytes of the corpus that were read to fill the shard."""
        self._state = hashlib.sha256(f"{first_document} {tokenizer_sha256}".encode())

    def add(self, document: Document) -> None:
        """Append a document."""
        self.documents.append(document)
        self.bytes += len(document.content)
        self._state.update(f"\n{document.source} {len(document.content)} {document.is_tokens}\n".encode())
        self._state.update(document.content)

    @property
    def digest(self) -> str:
        """Hash of everything that determines the shard, to recognize a finished shard."""
        return self._state.hexdigest()


@dataclass(frozen=True)
class ShardJob:
    """A shard to build."""

    folder: Path
    number: int
    first_document: int
    digest: str
    tokenizer: TokenizerChoice
    documents: list[Document] = field(repr=False)
    max_unknown: float = 1.0
    """Fraction of the shard's tokens that may stand for text unknown to the tokenizer."""


def record_path(folder: Path, number: int) -> Path:
    """Return the path of a finished shard's record in an unfinished build."""
    return folder / f"{shard_name(number)}.record.json"


def finished_record(folder: Path, number: int, digest: str) -> dict[str, Any] | None:
    """Return the record of a shard that was finished with the same ``digest``, or None."""
    path = record_path(folder, number)
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return record if record["digest"] == digest else None


def start_worker(threads: int) -> None:
    """Set up a worker process: ``threads`` tokenizer threads, and it ends when its parent process ends."""
    limit_tokenizer_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets the signal too and ends its workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@lru_cache(maxsize=1)
def _tokenizer(choice: TokenizerChoice) -> Tokenizer:
    """Load a tokenizer, cached per process, since large tokenizers take a second to load."""
    return choice.load()


def write_shard(job: ShardJob) -> dict[str, Any]:
    """Tokenize and write one shard with its record, and return the record.

    Raises:
        UserError: a document given as tokens contains a token outside the tokenizer's vocabulary, a text cannot be
            tokenized, or the tokenizer knows too little of the shard's text.
    """
    tokenizer = _tokenizer(job.tokenizer)
    info = tokenizer.info
    dtype = token_dtype(info.vocab_size)
    writer = ShardWriter(job.folder, shard_name(job.number), job.first_document, dtype)
    first_lost = ""
    statistics = ShardStatistics(info.vocab_size, count_pairs=isinstance(tokenizer, ByteTokenizer))
    for document, tokens in _tokens(job.documents, tokenizer):
        if document.is_tokens and len(tokens) and int(tokens.max()) >= info.vocab_size:
            raise UserError(
                f"{document.source} holds token {int(tokens.max())}, and tokenizer '{info.name}' has "
                f"{info.vocab_size}; name the tokenizer that made the corpus with --tokenizer"
            )
        # Documents given as tokens may already end with the end-of-document token.
        ended = document.is_tokens and len(tokens) and tokens[-1] == info.eos_id
        whole = np.empty(len(tokens) + (not ended), dtype)
        whole[: len(tokens)] = tokens
        whole[len(tokens) :] = info.eos_id
        writer.add(whole, {"source": document.source, "tokens": len(whole)})
        lost = 0 if document.is_tokens else tokenizer.count_lost(document.content, tokens)
        statistics.add(whole, 0 if document.is_tokens else len(document.content), lost)
        if lost and not first_lost:
            first_lost = document.source
    if statistics.unknown > job.max_unknown * writer.tokens:
        raise UserError(
            f"tokenizer '{info.name}' lacks {statistics.unknown:,} pieces of text in shard {job.number} of "
            f"{writer.tokens:,} tokens, first in {first_lost}: they would be lost; use a tokenizer made for this text, "
            "or accept the loss with --max-unknown FRACTION"
        )
    shard = asdict(writer.close())
    record = {"digest": job.digest, "shard": shard, "statistics": statistics.result()}
    with atomic_write(record_path(job.folder, job.number)) as file:
        file.write(json.dumps(record))  # several times faster than json.dump
    return record


def _tokens(documents: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        if document.is_tokens:
            yield from _encode(batch, tokenizer)
            batch, size = [], 0
            yield document, np.frombuffer(document.content, "<u4")
            continue
        batch.append(document)
        size += len(document.content)
        if size >= _BATCH_BYTES:
            yield from _encode(batch, tokenizer)
            batch, size = [], 0
    yield from _encode(batch, tokenizer)


def _encode(batch: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    return zip(batch, tokenizer.encode_utf8([document.content for document in batch]), strict=True)
