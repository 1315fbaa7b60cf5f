"""How fast rows are read, beside webdataset's own pipeline over the same shards.

python tools/benchmark_data.py [--documents 4000] [--seq-len 32768]

Both sides give rows of input ids, labels and positions with labels cut at document starts; warm page cache, one
process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from fusiontree.data.config import DataConfig
from fusiontree.data.format import DatasetInfo, TokenizerInfo, write_dataset
from fusiontree.data.loader import TrainingData
from fusiontree.data.writer import ShardWriter, shard_name

EOS = 50_000


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Rows a second, beside webdataset's pipeline over the same shards.")
    parser.add_argument("--documents", type=int, default=8000, help="documents to write (default 8000)")
    parser.add_argument("--shards", type=int, default=8, help="shards to write (default 8)")
    parser.add_argument("--seq-len", type=int, default=32768, help="tokens of a row (default 32768)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each measurement (default 5)")
    parser.add_argument("--workers", type=int, default=0, help="our reader threads (default 0, as webdataset has none)")
    return parser


def write_random_dataset(folder: Path, documents: int, shards: int) -> Path:
    """Write documents of log-normal length (median 1,100 tokens, as web text has) of random tokens."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    infos, first = [], 0
    for number in range(shards):
        writer = ShardWriter(folder, shard_name(number), first, np.dtype("<u2"))
        for _ in range(documents // shards):
            length = int(np.clip(rng.lognormal(7.0, 1.2), 16, 300_000))
            writer.add(np.append(rng.integers(0, EOS, length), EOS), {})
        first += documents // shards
        infos.append(writer.close())
    tokenizer = TokenizerInfo("huggingface", "random", EOS + 1, EOS, "0" * 64)
    write_dataset(folder, DatasetInfo(tokenizer, "uint16", infos))
    return folder


def our_rows(folder: Path, seq_len: int, workers: int) -> Iterator[int]:
    """Read rows through the training loader; yield the tokens of each step."""
    data = TrainingData(
        DataConfig(train=str(folder), num_workers=workers),
        seq_len=seq_len,
        global_batch_size=8,
        micro_batch_size=1,
        curriculum=None,
        seed=0,
        vocab_size=EOS + 1,
    )
    for batch, _ in data.steps():
        yield sum(micro.input_ids_BS.numel() for micro in batch.micro_batches)


def webdataset_rows(folder: Path, seq_len: int) -> Iterator[int]:
    """Read documents with webdataset, shuffled in its buffer, and pack them into rows; yield the tokens of each row."""
    import torch
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    pipeline = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(100).decode().to_tuple("npy").repeat()
    )
    tokens, positions, count = [], [], 0
    for (document,) in pipeline:
        tokens.append(document.astype(np.int64))
        positions.append(np.arange(len(document)))
        count += len(document)
        if count <= seq_len:
            continue
        whole, places = np.concatenate(tokens), np.concatenate(positions)
        used = 0
        while len(whole) - used > seq_len:
            ids = torch.from_numpy(whole[used : used + seq_len])
            labels = torch.from_numpy(whole[used + 1 : used + seq_len + 1].copy())
            labels[torch.from_numpy(places[used + 1 : used + seq_len + 1] == 0)] = -100
            row_places = torch.from_numpy(places[used : used + seq_len].copy())
            yield ids.numel() if len(labels) == len(row_places) else 0
            used += seq_len
        tokens, positions, count = [whole[used:]], [places[used:]], len(whole) - used


def tokens_per_second(rows: Callable[[], Iterator[int]], seconds: float) -> float:
    """Consume rows for about ``seconds`` after a second of warm-up; return tokens a second."""
    stream = rows()
    warm = time.perf_counter() + 1.0
    while time.perf_counter() < warm:
        next(stream)
    total, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        total += next(stream)
    return total / elapsed


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both in turn, twice, and print a table and one JSON line."""
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_random_dataset(Path(temporary) / "data", args.documents, args.shards)
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(2):
            ours.append(tokens_per_second(lambda: our_rows(folder, args.seq_len, args.workers), args.seconds))
            theirs.append(tokens_per_second(lambda: webdataset_rows(folder, args.seq_len), args.seconds))
    print(f"rows of {args.seq_len} tokens, million tokens a second and process")
    print(f"  fusiontree  {' '.join(f'{v / 1e6:8.1f}' for v in ours)}")
    print(f"  webdataset  {' '.join(f'{v / 1e6:8.1f}' for v in theirs)}")
    print(json.dumps({"fusiontree": ours, "webdataset": theirs, "ratio": min(ours) / max(theirs)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
