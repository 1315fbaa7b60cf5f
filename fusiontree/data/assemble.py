"""Reads rows into a step's arrays, for training and validation."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from fusiontree.data.batch import RowsOfStep
from fusiontree.data.format import ShardDamage, TokenizerInfo
from fusiontree.data.order import RowPlace
from fusiontree.data.rows import RowReader
from fusiontree.data.sources import Source
from fusiontree.utils.errors import UserError

_WHICH = struct.Struct("<qiI")
"""Number, source and hash of a row."""


@dataclass(frozen=True)
class WantedRow:
    """A row to read: its index in the step, the number of its first curriculum row, and its place in the dataset."""

    index: int
    number: int
    source: int
    place: RowPlace


def read_rows(
    rows: RowsOfStep, wanted: Sequence[WantedRow], readers: Sequence[RowReader], on_damage: str
) -> tuple[list[str], int]:
    """Read rows into their slots of ``rows``; return a message per skipped row, and the hash of all rows.

    Raises:
        UserError: a row is damaged and ``on_damage`` is stop, or a dataset cannot be reached.
    """
    damages, total = [], 0
    for item in wanted:
        row_hash, weight = 0, 1.0
        try:
            row_hash = readers[item.source].read(item.place, rows.place(item.index), piece=rows.length)
        except ShardDamage as damage:
            message = f"row {item.number} of the run (row {item.place.row} of its shard): {damage}"
            if on_damage == "stop":
                raise UserError(
                    f"{message}; mend the shard (fusiontree data verify names all damage) or set data.on_damage=skip"
                ) from damage
            damages.append(message)
            rows.blank(item.index)
            weight = 0.0
        rows.describe(item.index, item.number, item.source, weight)
        total += zlib.crc32(_WHICH.pack(item.number, item.source, row_hash))
    return damages, total & 0xFFFF_FFFF


def one_tokenizer(sources: Sequence[Source]) -> TokenizerInfo:
    """Return the tokenizer of all ``sources``.

    Raises:
        UserError: the datasets were made with different tokenizers.
    """
    first = sources[0]
    for source in sources[1:]:
        if source.info.tokenizer.sha256 != first.info.tokenizer.sha256:
            raise UserError(
                f"datasets '{first.place}' (tokenizer '{first.info.tokenizer.name}') and '{source.place}' (tokenizer "
                f"'{source.info.tokenizer.name}') were made with different tokenizers; they cannot be mixed"
            )
    return first.info.tokenizer
