"""Batches for training and validation.

The rows of a step are a function of seed, step and batch size alone; ranks and workers only share the reading. Every
step takes ``global_batch_size`` whole rows of ``seq_len`` from the order; a curriculum stage of shorter rows cuts
each of them, so a stage neither changes the tokens a step nor which text comes when.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusiontree.data.batch import IGNORED, MicroBatch, StepBatch
from fusiontree.data.config import DataConfig
from fusiontree.data.format import ShardDamage, TokenizerInfo
from fusiontree.data.mixture import Mixture
from fusiontree.data.order import RowOrder, RowPlace
from fusiontree.data.rows import Row, RowReader, row_positions
from fusiontree.data.tokenizers import save_tokenizer
from fusiontree.utils.errors import UserError
from fusiontree.utils.hashing import stable_hash


@dataclass(frozen=True)
class _NumberedRow:
    """A row of ``seq_len`` and what is known of it."""

    row: Row
    number: int
    source: int
    weight: float
    skipped: bool = False


@dataclass(frozen=True)
class _Wanted:
    """A row to read."""

    number: int
    source: int
    place: RowPlace


class TrainingData:
    """The training rows of one data parallel rank."""

    def __init__(
        self,
        config: DataConfig,
        *,
        seq_len: int,
        global_batch_size: int,
        micro_batch_size: int,
        curriculum: Sequence[Sequence[int]] | None,
        seed: int,
        vocab_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        """Open the datasets.

        Args:
            config: the ``data`` section.
            seq_len: length of a row.
            global_batch_size: rows a step, over all ranks.
            micro_batch_size: rows a rank computes in one pass.
            curriculum: stages ``[row length, steps]`` before ``seq_len`` is reached.
            seed: decides the order.
            vocab_size: of the model.
            dp_rank: which part of a batch to read; ranks that share rows give the same.
            dp_size: number of parts.

        Raises:
            UserError: a dataset is missing, empty, or was made with another tokenizer than its siblings or the model.
        """
        self.config, self.seq_len = config, seq_len
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.curriculum = curriculum or []
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.readers = [RowReader(Path(source.path), seq_len, vocab_size) for source in config.sources]
        self.tokenizer = self._one_tokenizer()
        self.mixture = Mixture([source.weight for source in config.sources], seed)
        self.orders = [
            RowOrder(
                reader.rows_of_shards,
                seed=stable_hash("source", seed, index),
                block=config.shuffle_shards,
                shuffle=config.shuffle,
            )
            for index, reader in enumerate(self.readers)
        ]
        order = [seed, seq_len, config.shuffle, config.shuffle_shards, [s.weight for s in config.sources]]
        order += [reader.info.fingerprint for reader in self.readers]
        self.fingerprint = hashlib.sha256(json.dumps(order).encode()).hexdigest()[:32]
        self._lock = threading.Lock()
        self.skipped_rows = 0

    def _one_tokenizer(self) -> TokenizerInfo:
        first = self.readers[0]
        for reader in self.readers[1:]:
            if reader.info.tokenizer.sha256 != first.info.tokenizer.sha256:
                raise UserError(
                    f"datasets '{first.folder}' (tokenizer '{first.info.tokenizer.name}') and '{reader.folder}' "
                    f"(tokenizer '{reader.info.tokenizer.name}') were made with different tokenizers; they cannot be "
                    f"mixed"
                )
        return first.info.tokenizer

    def save_tokenizer(self, folder: Path) -> list[Path]:
        """Write what a checkpoint should carry of the tokenizer into ``folder`` and return the files."""
        return save_tokenizer(self.tokenizer, self.readers[0].folder, folder)

    def stage_length(self, step: int) -> int:
        """Return the row length of a step (the first is 1)."""
        for length, steps in self.curriculum:
            if step <= steps:
                return length
            step -= steps
        return self.seq_len

    def state(self, step: int, row: int) -> dict[str, Any]:
        """Return what a resume needs after ``step`` steps and ``row`` rows; a few numbers, however long the run."""
        before = self.mixture.rows_before(row)
        sources = [
            {"path": source.path, "epoch": count // order.total, "row": count % order.total}
            for source, count, order in zip(self.config.sources, before, self.orders, strict=True)
        ]
        return {"step": step, "row": row, "fingerprint": self.fingerprint, "sources": sources}

    def describe_row(self, number: int) -> str:
        """Say where a row of the run comes from: its dataset, shard and place in the shard."""
        source = self.mixture.source(number)
        _, place = self.orders[source].place(self.mixture.rows_before(number)[source])
        shard = self.readers[source].info.shards[place.shard].name
        return f"row {number} ({self.config.sources[source].path}/{shard}, row {place.row})"

    def steps(self, state: dict[str, Any] | None = None) -> Iterator[tuple[StepBatch, dict[str, Any]]]:
        """Yield every step's batch from ``state`` on, for ever, with the state to save after it.

        Raises:
            UserError: ``state`` is of other datasets, or another seed, order or row length.
            ShardDamage: a row cannot be read (``on_damage: stop``), or too many were skipped.
        """
        step, row = 0, 0
        if state is not None:
            if state["fingerprint"] != self.fingerprint:
                raise UserError(
                    "the datasets or their order are not those of the checkpoint: a dataset was rebuilt, or "
                    "training.seed, training.seq_len, data.shuffle, data.shuffle_shards or the weights changed; set "
                    "them back, or start a new run_dir"
                )
            step, row = state["step"], state["row"]
        counts = self.mixture.rows_before(row)
        with _Reads(self.config.num_workers) as reads:
            ahead: deque[tuple[int, int, Future[StepBatch]]] = deque()
            while True:
                began = time.perf_counter()
                while len(ahead) < (self.config.prefetch_steps if self.config.num_workers else 1):
                    step, row = step + 1, row + self.global_batch_size
                    wanted = self._wanted(row - self.global_batch_size, counts)
                    ahead.append((step, row, reads.submit(self._read_step, step, wanted)))
                done, end, future = ahead.popleft()
                batch = future.result()
                wait_s = time.perf_counter() - began
                yield (
                    StepBatch(batch.micro_batches, batch.seq_len, batch.skipped_rows, wait_s),
                    self.state(done, end),
                )

    def _wanted(self, first: int, counts: list[int]) -> list[_Wanted]:
        """Return this rank's rows of the global batch that begins at row ``first``; moves ``counts`` past the batch."""
        share = -(-self.global_batch_size // self.dp_size)
        mine = range(first + self.dp_rank * share, first + min((self.dp_rank + 1) * share, self.global_batch_size))
        wanted = []
        for number in range(first, first + self.global_batch_size):
            source = self.mixture.source(number)
            if number in mine:
                wanted.append(_Wanted(number, source, self.orders[source].place(counts[source])[1]))
            counts[source] += 1
        return wanted

    def _read_step(self, step: int, wanted: list[_Wanted]) -> StepBatch:
        share = -(-self.global_batch_size // self.dp_size)
        rows = [self._read(item) for item in wanted]
        blank = Row(np.zeros(self.seq_len, np.int64), np.full(self.seq_len, IGNORED), np.arange(self.seq_len))
        # Ranks with fewer rows compute fillers: all must take part in every pass.
        passes = -(-share // self.micro_batch_size)
        rows += [_NumberedRow(blank, -1, 0, 0.0)] * (passes * self.micro_batch_size - len(rows))
        length = self.stage_length(step)
        size = self.micro_batch_size
        micro = [make_micro_batch(rows[i * size : (i + 1) * size], length) for i in range(passes)]
        return StepBatch(micro, length, sum(r.skipped for r in rows), 0.0)

    def _read(self, item: _Wanted) -> _NumberedRow:
        try:
            with self._lock:  # shards keep what they verified; the reading itself is short
                row = self.readers[item.source].read(item.place)
        except ShardDamage as damage:
            message = f"row {item.number} (row {item.place.row} of its shard): {damage}"
            if self.config.on_damage == "stop":
                raise UserError(
                    f"{message}; mend the shard (tools/build_shards.py --verify names all damage) or set "
                    f"data.on_damage=skip"
                ) from damage
            self.skipped_rows += 1
            if self.skipped_rows > self.config.max_skipped_rows:
                raise UserError(
                    f"{message}; more than data.max_skipped_rows {self.config.max_skipped_rows}"
                ) from damage
            blank = Row(np.zeros(self.seq_len, np.int64), np.full(self.seq_len, IGNORED), np.arange(self.seq_len))
            return _NumberedRow(blank, item.number, item.source, 1.0, skipped=True)
        return _NumberedRow(row, item.number, item.source, 1.0)


def make_micro_batch(rows: Sequence[_NumberedRow], length: int) -> MicroBatch:
    """Stack rows, each cut into rows of ``length`` if that is shorter."""
    seq_len = len(rows[0].row.input_ids_S)
    pieces = seq_len // length

    def stack(arrays: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(arrays).reshape(len(rows) * pieces, length))

    positions = [r.row.positions_S for r in rows]
    if pieces > 1:
        positions = [np.concatenate([row_positions(p) for p in np.split(array, pieces)]) for array in positions]
    numbers = [r.number * pieces + piece if r.number >= 0 else -1 for r in rows for piece in range(pieces)]
    return MicroBatch(
        input_ids_BS=stack([r.row.input_ids_S for r in rows]),
        labels_BS=stack([r.row.labels_S for r in rows]),
        positions_BS=stack(positions),
        rows_B=torch.tensor(numbers, dtype=torch.int64),
        row_weight_B=torch.tensor([r.weight for r in rows for _ in range(pieces)], dtype=torch.float32),
        sources_B=torch.tensor([r.source for r in rows for _ in range(pieces)], dtype=torch.int64),
    )


class ValidationData:
    """The same rows of the held-out split at every validation, spread evenly over it."""

    def __init__(
        self,
        config: DataConfig,
        *,
        seq_len: int,
        micro_batch_size: int,
        max_rows: int,
        vocab_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        """Open the split; ``max_rows`` 0 takes all its rows.

        Raises:
            UserError: the split is missing or empty, or of another tokenizer.
        """
        assert config.validation is not None
        self.reader = RowReader(Path(config.validation), seq_len, vocab_size)
        self.micro_batch_size, self.dp_rank, self.dp_size = micro_batch_size, dp_rank, dp_size
        total = sum(self.reader.rows_of_shards)
        self.rows = min(max_rows or total, total)
        self._order = RowOrder(self.reader.rows_of_shards, seed=0, block=1, shuffle=False)
        self._stride = total / self.rows

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Yield this rank's rows; all ranks yield the same number of micro batches."""
        size, length = self.micro_batch_size, self.reader.seq_len
        passes = -(-self.rows // (size * self.dp_size))
        blank = Row(np.zeros(length, np.int64), np.full(length, IGNORED), np.arange(length))
        for index in range(passes):
            first = (index * self.dp_size + self.dp_rank) * size
            rows = []
            for number in range(first, first + size):
                if number >= self.rows:
                    rows.append(_NumberedRow(blank, -1, 0, 0.0))
                    continue
                place = self._order.place(int(number * self._stride))[1]
                rows.append(_NumberedRow(self.reader.read(place), number, 0, 1.0))
            yield make_micro_batch(rows, length)


class _Reads:
    """Runs reads on threads, or at once where there are none; the order of results is the order asked."""

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="data") if workers else None

    def __enter__(self) -> _Reads:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def submit(self, read: Any, *arguments: Any) -> Future[Any]:
        if self._pool:
            return self._pool.submit(read, *arguments)
        future: Future[Any] = Future()
        try:
            future.set_result(read(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future
