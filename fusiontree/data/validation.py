"""Validation batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from fusiontree.data.assemble import WantedRow, one_tokenizer, read_rows
from fusiontree.data.batch import MicroBatch, RowsOfStep
from fusiontree.data.config import DataConfig
from fusiontree.data.order import RowOrder
from fusiontree.data.rows import RowReader
from fusiontree.data.sources import Source, open_source
from fusiontree.data.workers import OrderedWorkers
from fusiontree.utils.errors import UserError

log = logging.getLogger(__name__)


class ValidationData:
    """Rows of the held-out split, spread evenly over it; the same rows in every validation."""

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
        training: Sequence[Source] = (),
    ) -> None:
        """Open the split.

        Args:
            config: the ``data`` section, with ``validation`` set.
            seq_len: length of a row.
            micro_batch_size: rows per micro-batch of a rank.
            max_rows: number of rows to read; 0 means all.
            vocab_size: of the model.
            dp_rank: part of the rows to read.
            dp_size: number of parts.
            training: the training datasets, none of which may equal the split.

        Raises:
            UserError: the split is missing or empty, has another tokenizer, or is one of the training datasets.
        """
        assert config.validation is not None
        self.source = open_source(config.validation, config)
        one_tokenizer([*training[:1], self.source])
        for other in training:
            if other.info.fingerprint == self.source.info.fingerprint:
                raise UserError(
                    f"data.validation '{self.source.place}' holds the same documents as data.train '{other.place}'; "
                    f"hold out another dataset"
                )
        self.config = config
        self.reader = RowReader(self.source, seq_len, vocab_size)
        self.micro_batch_size, self.dp_rank, self.dp_size = micro_batch_size, dp_rank, dp_size
        self.rows = min(max_rows or self.reader.rows, self.reader.rows)
        self.skipped_rows = 0
        self._order = RowOrder(self.reader.rows_of_shards, seed=0, block=1, shuffle=False)

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Yield this rank's rows; all ranks yield the same number of micro-batches.

        Raises:
            UserError: a row cannot be read (``on_damage: stop``), or too many were skipped.
        """
        passes = -(-self.rows // (self.micro_batch_size * self.dp_size))
        self.skipped_rows = 0
        workers = OrderedWorkers(
            self._read_pass, iter(range(passes)), workers=self.config.num_workers, ahead=self.config.prefetch_steps
        )
        try:
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
        finally:
            workers.close()

    def _read_pass(self, index: int) -> tuple[MicroBatch, list[str]]:
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
