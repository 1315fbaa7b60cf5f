"""Small datasets with known tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fusiontree.data.format import DatasetInfo, TokenizerInfo, write_dataset
from fusiontree.data.writer import ShardWriter, shard_name, token_dtype

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
