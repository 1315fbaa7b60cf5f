"""Labels as rows of a head, of which a rank may hold a shard.

Shape legend: N tokens.
"""

from __future__ import annotations

from torch import Tensor


def rows_of_labels(labels_N: Tensor, vocab_start: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return the row of the head for each label, and which tokens have a label.

    Args:
        labels_N: int64 labels; negative means the token has none.
        vocab_start: token id of the first row of this rank's shard of the head.
        rows: number of rows of the shard.

    Returns:
        ``(index_N, valid_N)``: int64 rows, -1 where the label is missing or in another shard; bool.
    """
    valid_N = labels_N >= 0
    index_N = labels_N - vocab_start
    return index_N.masked_fill((index_N < 0) | (index_N >= rows), -1), valid_N
