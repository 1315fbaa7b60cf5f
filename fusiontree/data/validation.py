"""Validation batches."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Sequence
from contextlib import closing

from fusiontree.data.batch import MicroBatch, RowsOfStep
from fusiontree.data.config import DataConfig
from fusiontree.data.order import RowOrder
from fusiontree.data.rows import RowReader, WantedRow, read_rows
from fusiontree.data.sources.base import TokenSource, common_tokenizer, open_source
from fusiontree.data.workers import OrderedWorkers
from fusiontree.training.config import TrainingConfig
from fusiontree.utils.errors import UserError

log = logging.getLogger(__name__)


class ValidationData:
    """Rows of a held-out dataset, spread evenly over it; the same rows in every validation."""

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
        training: Sequence[TokenSource] = (),
        name: str | None = None,
    ) -> None:
        """Open the dataset.

        Args:
            config: the ``data`` section, with ``validation`` set.
            seq_len: length of a row.
            micro_batch_size: rows per micro-batch of a rank.
            max_rows: number of rows to read; 0 means all.
            vocab_size: of the model.
            dp_rank: part of the rows to read.
            dp_size: number of parts.
            training: the training datasets, none of which may equal this one.
            name: one of ``config.validation_sets``; None means the first.

        Raises:
            UserError: the dataset is missing or empty, has another tokenizer, or is one of the training datasets.
        """
        datasets = config.validation_sets
        self.source = open_source(datasets[next(iter(datasets)) if name is None else name], config)
        common_tokenizer([*training[:1], self.source])
        for other in training:
            if other.fingerprint == self.source.fingerprint:
                raise UserError(
                    f"data.validation '{self.source.place}' holds the same documents as data.train '{other.place}'; "
                    f"hold out another dataset"
                )
        self.config = config
        self.reader = RowReader(self.source, seq_len, vocab_size)
        if note := self.reader.note_on_unread():
            log.info("%s", note)  # the main rank alone shows it
        self.rows = min(max_rows or self.reader.rows, self.reader.rows)
        self.micro_batch_size = min(micro_batch_size, -(-self.rows // dp_size))  # more would only add fillers
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.skipped_rows = 0
        self._order = RowOrder(self.reader.rows_of_shards, seed=0, group_size=1, shuffle=False)

    @classmethod
    def for_training(
        cls,
        config: DataConfig,
        training: TrainingConfig,
        vocab_size: int,
        dp_rank: int,
        dp_size: int,
        sources: Sequence[TokenSource],
    ) -> dict[str, ValidationData]:
        """Open the validation sets of a run by name, none if it does not validate.

        Arguments and errors are those of the constructor; ``sources`` are the training datasets.
        """
        return {
            name: cls(
                config,
                seq_len=training.seq_len,
                micro_batch_size=training.micro_batch_size,
                max_rows=training.validation.rows,
                vocab_size=vocab_size,
                dp_rank=dp_rank,
                dp_size=dp_size,
                training=sources,
                name=name,
            )
            for name in (config.validation_sets if training.validation.interval else ())
        }

    def metrics(self, name: str, loss: float, tokens: int) -> dict[str, float]:
        """Return the metrics of this dataset.

        Args:
            name: of the dataset, empty if it has none.
            loss: mean loss per token, in nats.
            tokens: number of tokens that the loss is the mean of.

        Returns:
            ``validation_loss``, ``validation_tokens``, and ``validation_bits_per_byte`` if the dataset records the
            bytes of its text, each followed by ``/NAME`` if the dataset has a name. Bits per byte are the bits to
            encode the whole dataset, ends of documents included, at the mean loss, divided by the bytes of its text.
        """
        suffix = f"/{name}" if name else ""
        values = {f"validation_loss{suffix}": loss, f"validation_tokens{suffix}": tokens}
        if self.source.bytes_per_token:
            values[f"validation_bits_per_byte{suffix}"] = loss / math.log(2) / self.source.bytes_per_token
        return values

    def micro_batches(self) -> Generator[MicroBatch]:
        """Yield this rank's rows; all ranks yield the same number of micro-batches.

        Raises:
            UserError: a row cannot be read (``on_damage: stop``), or too many were skipped.
        """
        count = -(-self.rows // (self.micro_batch_size * self.dp_size))
        self.skipped_rows = 0
        workers = OrderedWorkers(
            self._read_micro_batch,
            iter(range(count)),
            workers=self.config.num_workers,
            ahead=self.config.prefetch_steps,
        )
        with closing(workers):
            for micro_batch, damages in workers:
                for message in damages:
                    log.warning("skipped in validation: %s", message)
                self.skipped_rows += len(damages)
                if self.skipped_rows > self.config.max_skipped_rows:
                    raise UserError(
                        f"validation skipped more than data.max_skipped_rows {self.config.max_skipped_rows} rows; "
                        f"the last was {damages[-1]}"
                    )
                yield micro_batch

    def _read_micro_batch(self, index: int) -> tuple[MicroBatch, list[str]]:
        size = self.micro_batch_size
        rows = RowsOfStep(size, self.reader.seq_len, self.reader.seq_len)
        first = (index * self.dp_size + self.dp_rank) * size
        wanted = []
        for slot, number in enumerate(range(first, first + size)):
            if number >= self.rows:
                rows.blank(slot)
            else:
                place = self._order.place(number * self.reader.rows // self.rows)[1]
                wanted.append(WantedRow(slot, number, 0, place))
        damages, _ = read_rows(rows, wanted, [self.reader], self.config.on_damage)
        return rows.micro_batches(size)[0], damages
