"""Building a dataset: documents are cut into chunks, each chunk becomes one shard, shards are made in parallel.

The dataset depends on the documents and options alone, not on the number of processes. A finished shard leaves a
record; after a kill the same command skips every shard whose record fits its documents.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusiontree.data.corpus import CorpusOptions, Document, corpus_files, read_documents
from fusiontree.data.format import DATASET, DatasetInfo, ShardInfo, write_dataset
from fusiontree.data.tokenizers import (
    TOKENIZER_FILE,
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    train_bpe,
)
from fusiontree.data.writer import ShardWriter, shard_name, token_dtype
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import atomic_write
from fusiontree.utils.hashing import stable_hash

BUILD = "build.json"
"""What a folder is being built from; removed when its dataset is complete."""


@dataclass(frozen=True)
class BuildOptions:
    """What to build, and from what."""

    corpus: CorpusOptions
    output: Path
    tokenizer: str
    """byte | bpe:VOCAB_SIZE | path of a tokenizer.json."""
    eos: str | None = None
    validation_fraction: float = 0.0
    """Share of documents that go to OUTPUT/validation; the rest goes to OUTPUT/train."""
    shard_bytes: int = 64 << 20
    """Text that goes into one shard."""
    remove_duplicates: bool = False
    bpe_sample_bytes: int = 256 << 20
    """Text that a BPE is trained on, from the beginning of the (shuffled) corpus."""
    seed: int = 0
    processes: int = 0
    """0 means one a core."""


@dataclass
class Chunk:
    """Documents of one shard."""

    split: str
    number: int
    first_document: int
    documents: list[Document] = field(default_factory=list)
    bytes: int = 0

    def digest(self) -> str:
        """Hash of the documents, to recognise a finished shard."""
        state = hashlib.sha256(str(self.first_document).encode())
        for document in self.documents:
            content = document.content()
            state.update(len(content).to_bytes(8, "little"))
            state.update(content)
        return state.hexdigest()


def build_dataset(options: BuildOptions, report: Any = print) -> dict[str, DatasetInfo]:
    """Build the dataset (or the train and validation datasets) and return what was built, by split.

    Args:
        options: what to build.
        report: called with lines of progress.

    Raises:
        UserError: no input, an unusable tokenizer, no text, or an output folder that holds something else.
    """
    files = corpus_files(options.corpus)
    if not 0 <= options.validation_fraction < 1:
        raise UserError(f"validation fraction {options.validation_fraction} is outside [0, 1)")
    splits = ["train", "validation"] if options.validation_fraction else [""]
    folders = {split: options.output / split for split in splits}
    for folder in folders.values():
        _check_folder(folder, options)
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer = _prepare_tokenizer(options, files)
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / BUILD) as file:
            json.dump(_identity(options), file)
        _copy_tokenizer(tokenizer, folder)
    finished, duplicates = _build_shards(options, files, folders, tokenizer, report)
    results = {}
    for split, folder in folders.items():
        records = [record for _, record in sorted(finished[split].items())]
        if not records:
            raise UserError(
                f"{folder}: no document fell into this split; give more text or another --validation-fraction"
                if split
                else f"the inputs hold no text; nothing was built in {folder}"
            )
        statistics = merge_statistics([r["statistics"] for r in records], tokenizer)
        statistics["duplicates_removed"] = duplicates
        info = DatasetInfo(
            tokenizer=tokenizer.info,
            dtype=token_dtype(tokenizer.info.vocab_size).name,
            shards=[ShardInfo(**r["shard"]) for r in records],
            statistics=statistics,
        )
        write_dataset(folder, info)
        for leftover in [*folder.glob("*.record.json"), folder / BUILD]:
            leftover.unlink()
        results[split] = info
    if tokenizer.info.file and "" not in folders:
        (options.output / TOKENIZER_FILE).unlink(missing_ok=True)
    return results


def _identity(options: BuildOptions) -> dict[str, Any]:
    values = asdict(options)
    for key in ("processes", "output"):
        del values[key]
    return json.loads(json.dumps(values, default=str))


def _check_folder(folder: Path, options: BuildOptions) -> None:
    if (folder / DATASET).exists():
        raise UserError(f"'{folder}' holds a complete dataset already; name another --output or delete it first")
    if not folder.exists():
        return
    if (folder / BUILD).exists():
        if json.loads((folder / BUILD).read_text()) != _identity(options):
            raise UserError(
                f"'{folder}' holds an unfinished build with other options; repeat those to finish it, or delete it"
            )
        return
    names = sorted(p.name for p in folder.iterdir() if p.name not in (TOKENIZER_FILE, "train", "validation"))
    if names:
        raise UserError(f"'{folder}' holds other files ({names[0]} …); name a new folder")


def _prepare_tokenizer(options: BuildOptions, files: list[Path]) -> Tokenizer:
    if options.tokenizer == "byte":
        return ByteTokenizer()
    if not options.tokenizer.startswith("bpe:"):
        return HuggingFaceTokenizer(Path(options.tokenizer), eos=options.eos)
    size = options.tokenizer.removeprefix("bpe:")
    if not size.isdigit():
        raise UserError(f"tokenizer '{options.tokenizer}': '{size}' is no vocabulary size; write bpe:32000, say")
    path = options.output / TOKENIZER_FILE
    if not path.exists():
        temporary = options.output / f".{TOKENIZER_FILE}.tmp"
        train_bpe(_sample(options, files), int(size), temporary)
        temporary.replace(path)
    return HuggingFaceTokenizer(path, name=options.tokenizer)


def _sample(options: BuildOptions, files: list[Path]) -> Iterator[str]:
    left = options.bpe_sample_bytes
    for document in read_documents(files, options.corpus.text_key):
        if left <= 0:
            return
        left -= len(document.text)
        yield document.text


def _copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.path != folder / TOKENIZER_FILE:
        shutil.copyfile(tokenizer.path, folder / TOKENIZER_FILE)


def _chunks(options: BuildOptions, files: list[Path], splits: list[str], counts: dict[str, int]) -> Iterator[Chunk]:
    """Cut the corpus into chunks; a document's split follows from the hash of its text alone."""
    open_chunks: dict[str, Chunk] = {}
    numbers, documents = dict.fromkeys(splits, 0), dict.fromkeys(splits, 0)
    seen: set[bytes] = set()
    for document in read_documents(files, options.corpus.text_key):
        data = document.content()
        if not data:
            continue
        digest = hashlib.blake2b(data, digest_size=16).digest()
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
            chunk = open_chunks[split] = Chunk(split, numbers[split], documents[split])
            numbers[split] += 1
        chunk.documents.append(document)
        chunk.bytes += len(data)
        documents[split] += 1
        if chunk.bytes >= options.shard_bytes:
            yield open_chunks.pop(split)
    yield from open_chunks.values()


def _build_shards(
    options: BuildOptions, files: list[Path], folders: dict[str, Path], tokenizer: Tokenizer, report: Any
) -> tuple[dict[str, dict[int, dict[str, Any]]], int]:
    processes = options.processes or os.cpu_count() or 1
    total = sum(f.stat().st_size for f in files)
    progress = _Progress(total, report, exact=not any(f.suffix in (".gz", ".zst") for f in files))
    finished: dict[str, dict[int, dict[str, Any]]] = {split: {} for split in folders}
    counts = {"duplicates": 0}
    source = None if isinstance(tokenizer, ByteTokenizer) else tokenizer.path  # type: ignore[attr-defined]
    # spawn: a forked child of a process with threads (tokenizers has them) can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        pending: dict[Future[dict[str, Any]], Chunk] = {}

        def collect(limit: int) -> None:
            while len(pending) > limit:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    chunk = pending.pop(future)
                    finished[chunk.split][chunk.number] = future.result()
                    progress.add(chunk.bytes)

        for chunk in _chunks(options, files, list(folders), counts):
            folder = folders[chunk.split]
            digest = chunk.digest()
            record = _finished_record(folder, chunk, digest)
            if record is not None:
                finished[chunk.split][chunk.number] = record
                progress.add(chunk.bytes, skipped=True)
                continue
            collect(processes)  # a chunk a process, and one waiting: memory stays bounded
            future = pool.submit(_write_shard, folder, chunk, digest, source, tokenizer.info.name, options.eos)
            pending[future] = chunk
        collect(0)
    progress.end()
    return finished, counts["duplicates"]


def _record_path(folder: Path, number: int) -> Path:
    return folder / f"{shard_name(number)}.record.json"


def _finished_record(folder: Path, chunk: Chunk, digest: str) -> dict[str, Any] | None:
    path = _record_path(folder, chunk.number)
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return record if record["digest"] == digest else None


def _write_shard(
    folder: Path, chunk: Chunk, digest: str, tokenizer_path: Path | None, name: str, eos: str | None
) -> dict[str, Any]:
    """Tokenize and write one shard; runs in a worker process."""
    tokenizer: Tokenizer = (
        ByteTokenizer() if tokenizer_path is None else HuggingFaceTokenizer(tokenizer_path, name=name, eos=eos)
    )
    info = tokenizer.info
    dtype = token_dtype(info.vocab_size)
    writer = ShardWriter(folder, shard_name(chunk.number), chunk.first_document, dtype)
    lengths: list[int] = []
    pairs = np.zeros(info.vocab_size**2, np.int64) if isinstance(tokenizer, ByteTokenizer) else None
    for begin in range(0, len(chunk.documents), 1024):
        batch = chunk.documents[begin : begin + 1024]
        for document, encoded in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
            tokens = encoded if document.tokens is None else document.tokens
            if len(tokens) and int(tokens.max()) >= info.vocab_size:
                raise UserError(
                    f"{document.source} holds token {int(tokens.max())}, and tokenizer '{info.name}' has "
                    f"{info.vocab_size}; name the tokenizer that made the corpus with --tokenizer"
                )
            # Corpora of tokens may end their documents themselves.
            ended = document.tokens is not None and len(tokens) and tokens[-1] == info.eos_id
            whole = (tokens if ended else np.append(tokens, info.eos_id)).astype(dtype)
            writer.add(whole, {"source": document.source, "tokens": len(whole)})
            lengths.append(len(whole))
            if pairs is not None:
                codes = whole[:-1].astype(np.int64) * info.vocab_size + whole[1:]
                pairs += np.bincount(codes, minlength=len(pairs))
    statistics: dict[str, Any] = {
        "documents": len(lengths),
        "tokens": int(sum(lengths)),
        "text_bytes": chunk.bytes,
        "longest_document": max(lengths),
        "length_histogram": np.bincount([n.bit_length() for n in lengths], minlength=1).tolist(),
    }
    if pairs is not None:
        used = np.flatnonzero(pairs)
        statistics["pairs"] = [used.tolist(), pairs[used].tolist()]
    record = {"digest": digest, "shard": asdict(writer.close()), "statistics": statistics}
    with atomic_write(_record_path(folder, chunk.number)) as file:
        json.dump(record, file)
    return record


def merge_statistics(parts: list[dict[str, Any]], tokenizer: Tokenizer) -> dict[str, Any]:
    """Add up the statistics of shards; for bytes, find the entropy of a byte given the byte before it."""
    width = max(len(p["length_histogram"]) for p in parts)
    histogram = np.zeros(width, np.int64)
    for part in parts:
        histogram[: len(part["length_histogram"])] += part["length_histogram"]
    merged: dict[str, Any] = {key: sum(p[key] for p in parts) for key in ("documents", "tokens", "text_bytes")}
    merged["bytes_per_token"] = merged["text_bytes"] / merged["tokens"]
    merged["longest_document"] = max(p["longest_document"] for p in parts)
    # Entry i counts documents of 2^(i-1) to 2^i - 1 tokens.
    merged["length_histogram_log2"] = histogram.tolist()
    if all("pairs" in p for p in parts):
        size = tokenizer.info.vocab_size
        counts = np.zeros(size * size, np.int64)
        for part in parts:
            counts[part["pairs"][0]] += part["pairs"][1]
        merged["bigram_entropy_nats"] = bigram_entropy(counts.reshape(size, size))
    return merged


def bigram_entropy(counts_VV: np.ndarray) -> float:
    """Return the conditional entropy H(next | token) in nats of pair counts ``[token, next]``."""
    joint = counts_VV / counts_VV.sum()
    marginal = joint.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(joint > 0, joint * np.log(joint / marginal), 0.0)
    return float(-terms.sum())


class _Progress:
    """Says every few seconds how much text is done, how fast, and how long it still takes."""

    def __init__(self, total_bytes: int, report: Any, exact: bool) -> None:
        self.total, self.report, self.exact = total_bytes, report, exact
        self.done = self.skipped = 0
        self.began = self.said = time.monotonic()

    def add(self, count: int, skipped: bool = False) -> None:
        self.done += count
        self.skipped += count if skipped else 0
        if time.monotonic() - self.said > 2:
            self.said = time.monotonic()
            self.report(self.line())

    def line(self) -> str:
        seconds = max(time.monotonic() - self.began, 1e-9)
        rate = (self.done - self.skipped) / seconds
        text = f"{self.done / 1e6:,.0f} MB of text"
        if self.exact:  # compressed inputs do not tell how much text they hold
            left = max(0, self.total - self.done) / max(rate, 1.0)
            text += f" of {self.total / 1e6:,.0f}, {left:,.0f} s left"
        return f"{text}, {rate / 1e6:.1f} MB/s"

    def end(self) -> None:
        self.report(self.line())
        if self.skipped:
            self.report(f"{self.skipped / 1e6:,.0f} MB were finished before and not done again")
