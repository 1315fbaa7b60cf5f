"""Real text to hide needles in: the tokens of a dataset or of text files, without ends of documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np

from fusiontree.data.sources.base import TokenSource
from fusiontree.data.tokenizers import Tokenizer
from fusiontree.utils.errors import UserError


class LongText:
    """Tokens of one text, read where needed."""

    def __init__(self, tokenizer: Tokenizer, sizes: Sequence[int], read: Callable[[int, int, int], np.ndarray]) -> None:
        """Join parts.

        Args:
            tokenizer: of the tokens.
            sizes: tokens of each part.
            read: returns tokens [begin, end) of a part.
        """
        self.tokenizer, self.read = tokenizer, read
        self._ends = list(accumulate(sizes))
        self.total = self._ends[-1] if self._ends else 0
        self._breaks: dict[int, bool] = {}

    @classmethod
    def of_files(cls, tokenizer: Tokenizer, texts: Sequence[Sequence[int]]) -> LongText:
        """Return the text of encoded files."""
        arrays = [np.asarray(text) for text in texts]
        return cls(tokenizer, [len(array) for array in arrays], lambda part, begin, end: arrays[part][begin:end])

    @classmethod
    def of_source(cls, tokenizer: Tokenizer, source: TokenSource) -> LongText:
        """Return the text of a dataset."""
        return cls(tokenizer, source.shard_tokens, lambda part, begin, end: source.read(part, begin, end).tokens)

    def take(self, share: float, count: int) -> list[int]:
        """Return ``count`` tokens that begin near ``share`` of the text.

        Raises:
            UserError: the text has too few tokens.
            ShardDamage: the dataset cannot be read.
        """
        place = int(share * max(0, self.total - count))
        found: list[int] = []
        for begin in (place, 0):  # ends of documents near the text's end may leave too few
            found = self._from(begin, count)
            if len(found) == count:
                return found
        raise UserError(
            f"the text to hide needles in has {len(found)} tokens, and a row needs {count}; give more --text or "
            f"--data, or shorter --lengths"
        )

    def _from(self, place: int, count: int) -> list[int]:
        found: list[int] = []
        for part, end in enumerate(self._ends):
            first = self._ends[part - 1] if part else 0
            while place < end and len(found) < count:
                stop = min(end, place + count - len(found))
                tokens = self.read(part, place - first, stop - first)
                found += tokens[tokens != self.tokenizer.eos_id].tolist()
                place = stop
        return found

    def lines(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        """Split tokens after those that end a line."""
        lines: list[tuple[int, ...]] = []
        begin = 0
        for at, token in enumerate(tokens):
            if token not in self._breaks:
                self._breaks[token] = "\n" in self.tokenizer.decode([token])
            if self._breaks[token]:
                lines.append(tuple(tokens[begin : at + 1]))
                begin = at + 1
        return [*lines, tuple(tokens[begin:])] if begin < len(tokens) else lines
