"""Training batches.

The rows of a step depend only on seed, step and batch size; ranks and workers only divide the reading. Every step takes
``global_batch_size`` rows of ``seq_len`` from the order; a curriculum stage of shorter rows splits each of them into
subrows.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from fusiontree.data.batch import RowsOfStep, StepBatch
from fusiontree.data.config import DataConfig
from fusiontree.data.mixture import ChangingMixture
from fusiontree.data.order import LengthSchedule, RowOrder
from fusiontree.data.rows import RowReader, WantedRow, read_rows
from fusiontree.data.sources.base import TokenSource, common_tokenizer, open_source
from fusiontree.data.sources.prefetch import ShardPrefetcher
from fusiontree.data.state import DataState, Order, SourceIdentity, mixture_parts
from fusiontree.data.workers import OrderedWorkers
from fusiontree.training.config import TrainingConfig
from fusiontree.utils.errors import UserError
from fusiontree.utils.hashing import stable_hash

log = logging.getLogger(__name__)

_FETCH_THREADS = 2
_AHEAD_BYTES = 1 << 30
"""Maximum bytes of steps read ahead; overrides ``prefetch_steps``."""


class TrainingData:
    """The training rows of one data parallel rank."""

    def __init__(
        self, config: DataConfig, training: TrainingConfig, vocab_size: int, dp_rank: int = 0, dp_size: int = 1
    ) -> None:
        """Open the datasets.

        Args:
            config: the ``data`` section.
            training: the ``training`` section: sizes of a batch, curriculum, and the seed that determines the order.
            vocab_size: of the model.
            dp_rank: part of each batch to read; equal for ranks that share rows.
            dp_size: number of parts.

        Raises:
            UserError: a dataset is missing, is empty, cannot be reached, was made with another tokenizer than the other
                datasets or the model, or its shards do not fit in the cache.
        """
        assert 0 <= dp_rank < dp_size
        self.config, self.seq_len, seed = config, training.seq_len, training.seed
        self._seed = seed
        self.global_batch_size = training.global_batch_size
        self._rows_of_rank = -(-self.global_batch_size // dp_size)
        self.micro_batch_size = min(training.micro_batch_size, self._rows_of_rank)  # more would only add fillers
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.lengths = LengthSchedule(self.seq_len, training.curriculum)
        self.sources: list[TokenSource] = [open_source(dataset, config) for dataset in config.sources]
        common_tokenizer(self.sources)
        self.readers = [RowReader(source, self.seq_len, vocab_size) for source in self.sources]
        for note in filter(None, (reader.note_on_unread() for reader in self.readers)):
            log.info("%s", note)  # the main rank alone shows it
        self.orders = [
            RowOrder(
                reader.rows_of_shards,
                seed=stable_hash("source", seed, index),
                group_size=config.shuffle_shards,
                shuffle=config.shuffle,
            )
            for index, reader in enumerate(self.readers)
        ]
        identities = (
            SourceIdentity(source.place, given.weight, source.fingerprint, reader.rows)
            for given, source, reader in zip(config.sources, self.sources, self.readers, strict=True)
        )
        self.order = Order(seed, self.seq_len, config.shuffle, config.shuffle_shards, tuple(identities))
        self.mixture = ChangingMixture(mixture_parts(None, self.order), seed)
        self._step_bytes = self._rows_of_rank * self.seq_len * 3 * 8  # tokens, labels, positions
        self._check_cache()
        self._position = DataState()
        self._recent: deque[DataState] = deque(maxlen=3)  # before and after each of the last two steps
        self._asked_row = 0
        self._last_state: dict[str, Any] = {}

    def _check_cache(self) -> None:
        """Check that the cache can hold all shards that are read at the same time."""
        together = self.config.shuffle_shards if self.config.shuffle else 1
        need = sum(
            sum(sorted(map(source.cache_bytes, range(len(source.shard_tokens))))[-together:])
            for source in self.sources
            if source.cached
        )
        if need > self.config.cache_size_gib * 2**30:
            raise UserError(
                f"up to {together} shards of each remote dataset are read at the same time, {need / 2**30:.3f} GiB in "
                f"total, and data.cache_size_gib is {self.config.cache_size_gib}; raise it, lower "
                f"data.shuffle_shards or build smaller shards"
            )

    def save_tokenizer(self, folder: Path) -> list[Path]:
        """Write the tokenizer's files for a checkpoint into ``folder`` and return them."""
        return self.sources[0].save_tokenizer(folder)

    def steps(self, state: dict[str, Any] | None = None) -> Generator[tuple[StepBatch, dict[str, Any]]]:
        """Yield the batch of every step from ``state`` on, without end, each with the state to save after the step.

        Only one iteration may be open at a time; closing it ends its threads.

        Raises:
            UserError: ``state`` belongs to other datasets or another seed, order or row length; a row cannot be read
                (``on_damage: stop``); too many rows were skipped; or a dataset cannot be reached.
        """
        self._position = DataState()
        if state is not None:
            self._position.load_state_dict(state, self.order)
        self.mixture = ChangingMixture(mixture_parts(state, self.order), self._seed)
        self._recent.clear()
        self._recent.append(self._position)
        self._asked_row = self._position.row
        skipped_here = self._position.skipped_rows
        threads = _FETCH_THREADS if self.config.prefetch_shards and any(s.cached for s in self.sources) else 0
        prefetcher = ShardPrefetcher(self._shards_ahead, threads)
        workers = OrderedWorkers(
            self._read_step,
            self._positions(self._position),
            workers=self.config.num_workers,
            ahead=max(1, min(self.config.prefetch_steps, _AHEAD_BYTES // self._step_bytes)),
        )
        with closing(prefetcher), closing(workers):
            while True:
                began = time.perf_counter()
                batch, after = next(workers)
                wait_s = time.perf_counter() - began
                prefetcher.moved()
                for message in batch.damage:
                    log.warning("skipped: %s", message)
                skipped_here += batch.skipped_rows
                self._check_skipped(skipped_here, batch.damage)
                self._position = replace(after, skipped_rows=self._position.skipped_rows)
                self._recent.append(self._position)
                rows = self.mixture.rows_before(after.row)
                self._last_state = self._position.state_dict(self.order, rows, self.mixture.parts)
                epochs = tuple(count / order.total for count, order in zip(rows, self.orders, strict=True))
                yield replace(batch, wait_s=wait_s, epochs=epochs), self._last_state

    def describe_row(self, number: int) -> str:
        """Return the origin of a row of the last two steps: dataset, shard and first token in the shard.

        Raises:
            ValueError: ``number`` (as in ``MicroBatch.rows_B``) is not a row of the last two steps.
        """
        steps = [step for step in pairwise(self._recent) if step[0].number <= number < step[1].number]
        if not steps:
            known = f"{self._recent[0].number} to {self._recent[-1].number - 1}" if self._recent else "none"
            raise ValueError(f"row {number} is not one of the last two steps', {known}")
        before, after = steps[0]
        subrows = (after.number - before.number) // (after.row - before.row)
        row, subrow = divmod(number - before.number, subrows)
        source = self.mixture.source(before.row + row)
        _, place = self.orders[source].place(self.mixture.rows_before(before.row + row)[source])
        first = place.row * self.seq_len + subrow * (self.seq_len // subrows)
        return f"row {number} ({self.sources[source].shard_name(place.shard)}, from token {first})"

    def count_skipped(self, rows: int) -> None:
        """Add the last step's number of skipped rows, over all ranks, to its state.

        Raises:
            UserError: the run has skipped more than ``max_skipped_rows`` rows; raised on every rank alike.
        """
        self._position.skipped_rows += rows
        self._last_state["skipped_rows"] = self._position.skipped_rows
        if rows:
            self._check_skipped(self._position.skipped_rows, ())

    def _check_skipped(self, rows: int, damage: Sequence[str]) -> None:
        if rows > self.config.max_skipped_rows:
            last = f"; the last was {damage[-1]}" if damage else "; the log names them"
            raise UserError(
                f"{rows} damaged rows were skipped in this run, more than data.max_skipped_rows "
                f"{self.config.max_skipped_rows}{last}"
            )

    def _positions(self, position: DataState) -> Iterator[DataState]:
        """Yield the position before each step from ``position`` on."""
        while True:
            self._asked_row = position.row
            yield position
            position = self._after(position)

    def _after(self, position: DataState) -> DataState:
        subrows = self.seq_len // self.lengths.length(position.step + 1)
        rows = self.global_batch_size
        return DataState(position.step + 1, position.row + rows, position.number + rows * subrows)

    def _read_step(self, before: DataState) -> tuple[StepBatch, DataState]:
        """Read this rank's part of the step after ``before``; depends on no other state of the loader."""
        # Ranks with fewer rows compute fillers: all ranks must take part in every micro-batch.
        slots = -(-self._rows_of_rank // self.micro_batch_size) * self.micro_batch_size
        length = self.lengths.length(before.step + 1)
        rows = RowsOfStep(slots, self.seq_len, length)
        wanted = self._wanted(before, rows.subrows)
        damages, tokens_hash = read_rows(rows, wanted, self.readers, self.config.on_damage)
        for index in range(len(wanted), slots):
            rows.blank(index)
        micro_batches = rows.micro_batches(self.micro_batch_size)
        batch = StepBatch(micro_batches, length, len(damages), 0.0, tokens_hash=tokens_hash, damage=tuple(damages))
        return batch, self._after(before)

    def _wanted(self, before: DataState, subrows: int) -> list[WantedRow]:
        """Return this rank's rows of the global batch after ``before``."""
        share, size = self._rows_of_rank, self.global_batch_size
        mine = range(self.dp_rank * share, min((self.dp_rank + 1) * share, size))
        shift = self._shift_of_slots(before.step)
        counts: list[int] = []
        wanted = []
        for index, slot in enumerate(mine):
            offset = (slot + shift) % size
            if not counts or not offset:
                counts = self.mixture.rows_before(before.row + offset)
            source = self.mixture.source(before.row + offset)
            place = self.orders[source].place(counts[source])[1]
            counts[source] += 1
            wanted.append(WantedRow(index, before.number + offset * subrows, source, place))
        return wanted

    def _shift_of_slots(self, step: int) -> int:
        """Return by how many slots the rows of the step after ``step`` are rotated; the rows are the same.

        With some batch sizes (89, 610, …) row n + batch size comes from the source of row n for hundreds of steps, and
        so would every slot of the batch, and every rank.
        """
        if len(self.sources) == 1 or not self.mixture.repeats(self.global_batch_size):
            return 0
        return stable_hash("slots", self._seed, step) % self.global_batch_size

    def _shards_ahead(self) -> list[tuple[TokenSource, int]]:
        """List the shards in use, followed by the next shards in order, as far as the cache can hold them."""
        counts = self.mixture.rows_before(self._asked_row)
        now: list[tuple[TokenSource, int]] = []
        later: list[tuple[TokenSource, int]] = []
        for source, order, count in zip(self.sources, self.orders, counts, strict=True):
            if source.cached:
                groups = order.shards_from(count)
                now += [(source, shard) for shard in next(groups)]
                following = (shard for group in groups for shard in group)
                later += [(source, shard) for shard in islice(following, self.config.prefetch_shards)]
        # Reserve twice the size of the shards in use: rows read ahead may belong to the next shuffle group while other
        # ranks and workers still read the current group.
        left = self.config.cache_size_gib * 2**30 - 2 * sum(source.cache_bytes(shard) for source, shard in now)
        fitting = dict.fromkeys(now)
        for source, shard in later:
            left -= source.cache_bytes(shard)
            if left < 0:
                break
            fitting[source, shard] = None
        return list(fitting)
