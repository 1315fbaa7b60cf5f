"""Small datasets with known tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from fusiontree.data.batch import RowArrays, RowsOfStep
from fusiontree.data.build.writer import ShardWriter, shard_name
from fusiontree.data.format import DatasetInfo, ShardInfo, TokenizerInfo, token_dtype, write_dataset
from fusiontree.data.order import RowPlace
from fusiontree.data.rows import RowReader
from fusiontree.data.sources.index import index_bytes, write_index
from fusiontree.data.sources.remote import Retries
from fusiontree.data.sources.shards import LocalShards

TOKENIZER = TokenizerInfo(kind="byte", name="byte", vocab_size=257, eos_id=256, sha256="0" * 64)


def documents(count: int, seed: int, longest: int = 60) -> list[np.ndarray]:
    """Documents of random bytes that end with 256."""
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(0, 256, rng.integers(1, longest)), 256) for _ in range(count)]


def write(folder: Path, shards: list[list[np.ndarray]], tokenizer: TokenizerInfo = TOKENIZER) -> Path:
    """Write a dataset of the given documents."""
    folder.mkdir(parents=True)
    infos, first = [], 0
    for number, docs in enumerate(shards):
        writer = ShardWriter(folder, shard_name(number), first, token_dtype(tokenizer.vocab_size))
        for doc in docs:
            writer.add(doc, {"n": len(doc)})
        infos.append(writer.close())
        first += len(docs)
    write_dataset(folder, DatasetInfo(tokenizer, token_dtype(tokenizer.vocab_size).name, infos))
    return folder


def random_dataset(folder: Path, shards: int = 5, seed: int = 0, count: int = 20) -> Path:
    """A dataset of random documents."""
    return write(folder, [documents(count + 3 * s, 100 * seed + s) for s in range(shards)])


def sparse_dataset(folder: Path, shards: int, documents: int, length: int) -> Path:
    """A dataset of ``shards * documents`` documents of zeros: one sparse tar and one index under many names."""
    folder.mkdir(parents=True)
    item, header = 2, 640
    stride = header + -(-length * item // 512) * 512 + 1024
    offsets = [header + stride * i for i in range(documents)]
    ends = [length * (i + 1) for i in range(documents)]
    tar_bytes = stride * documents + 1024
    digest = hashlib.sha256(bytes(length * item)).digest()
    content = index_bytes(offsets, ends, [digest] * documents, tar_bytes=tar_bytes, first=0, item_bytes=item)
    first = folder / shard_name(0)
    digest_of_index = write_index(first.with_suffix(".index"), content)
    with first.open("wb") as file:
        file.truncate(tar_bytes)
    infos = [ShardInfo(first.name, documents, ends[-1], tar_bytes, digest_of_index)]
    for number in range(1, shards):
        name = shard_name(number)
        (folder / name).hardlink_to(first)
        (folder / name).with_suffix(".index").hardlink_to(first.with_suffix(".index"))
        infos.append(ShardInfo(name, documents, ends[-1], tar_bytes, digest_of_index))
    write_dataset(folder, DatasetInfo(TOKENIZER, "uint16", infos))
    return folder


def row_reader(folder: Path, seq_len: int, vocab_size: int = 264, open_shards: int = 64) -> RowReader:
    """A reader of a local dataset."""
    return RowReader(LocalShards(folder, Retries(6, 0.0), open_shards), seq_len, vocab_size)


def read_row(reader: RowReader, row: int, pieces: int = 1) -> RowArrays:
    """A row of the first shard."""
    out = RowsOfStep(1, reader.seq_len, reader.seq_len).place(0)
    reader.read(RowPlace(0, row), out, subrow=reader.seq_len // pieces)
    return out
