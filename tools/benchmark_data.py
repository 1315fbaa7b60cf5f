"""How fast rows are read, from a folder and from a cached remote, beside webdataset's pipeline over the same shards.

python tools/benchmark_data.py [--dataset DIR] [--seq-len 32768]

All sides give rows of input ids, labels and positions with labels cut at document starts; warm page cache, one
process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fusiontree.data.build.writer import ShardWriter, shard_name
from fusiontree.data.config import DataConfig
from fusiontree.data.format import DatasetInfo, TokenizerInfo, read_dataset, write_dataset
from fusiontree.data.loader import TrainingData

EOS = 50_000
_SLICE_S = 0.5


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Rows a second, beside webdataset's pipeline over the same shards.")
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="dataset to read (default: random documents)")
    parser.add_argument("--documents", type=int, default=8000, help="random documents to write (default 8000)")
    parser.add_argument("--shards", type=int, default=8, help="shards to write them into (default 8)")
    parser.add_argument("--seq-len", type=int, default=32768, help="tokens of a row (default 32768)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each side (default 5)")
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


def our_rows(path: str, seq_len: int, workers: int, vocab_size: int, cache: Path) -> Iterator[int]:
    """Read rows through the training loader; yield the tokens of each step."""
    data = TrainingData(
        DataConfig(train=path, num_workers=workers, cache_dir=str(cache)),
        seq_len=seq_len,
        global_batch_size=16,
        micro_batch_size=4,
        curriculum=None,
        seed=0,
        vocab_size=vocab_size,
    )
    for source in data.sources:
        for number in range(len(source.shard_tokens)):
            source.fetch(number)  # warm: what is remote is in the cache before the clock starts
    for batch, _ in data.steps():
        yield sum(micro.input_ids_BS.numel() for micro in batch.micro_batches)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder over HTTP on this machine, from a process of its own; give its URL."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        said = server.stdout.readline()  # Serving HTTP on 127.0.0.1 port N …
        yield f"http://127.0.0.1:{said.split(' port ')[1].split()[0]}"
    finally:
        server.kill()
        server.wait()


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


def measure(sides: dict[str, Callable[[], Iterator[int]]], seconds: float) -> dict[str, float]:
    """Let all sides read in turn, in short slices, and return each one's tokens a second in its median slice.

    What else runs on the machine then slows all sides alike.
    """
    streams = {name: rows() for name, rows in sides.items()}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(max(3, round(seconds / _SLICE_S)) + 1):
        for name, stream in streams.items():
            total, began = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - began) < _SLICE_S:
                total += next(stream)
            if number:  # the first warms up
                rates[name].append(total / elapsed)
    return {name: statistics.median(values) for name, values in rates.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table and one JSON line."""
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dataset or write_random_dataset(Path(temporary) / "data", args.documents, args.shards)
        info = read_dataset(folder)
        vocab_size = info.tokenizer.vocab_size
        with served(folder) as url:
            sides: dict[str, Callable[[], Iterator[int]]] = {
                "folder": lambda: our_rows(str(folder), args.seq_len, args.workers, vocab_size, Path(temporary)),
                "http, cached": lambda: our_rows(url, args.seq_len, args.workers, vocab_size, Path(temporary)),
                "webdataset": lambda: webdataset_rows(folder, args.seq_len),
            }
            rates = measure(sides, args.seconds)
    print(f"{info.documents:,} documents of {info.tokens / info.documents:,.0f} tokens ({info.dtype}) on average")
    print(f"rows of {args.seq_len:,} tokens, million tokens a second and process")
    for name, rate in rates.items():
        print(f"  {name:14} {rate / 1e6:8.1f}")
    ratios = {
        "folder_over_webdataset": rates["folder"] / rates["webdataset"],
        "http_over_folder": rates["http, cached"] / rates["folder"],
    }
    print(json.dumps({**{key: round(value, 3) for key, value in ratios.items()}, "tokens_per_s": rates}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
