"""Bytes of the text that tokens stand for, as bits per byte need them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from fusiontree.data.tokenizers import Tokenizer
from fusiontree.generation.text import REPLACEMENT


class ByteCount:
    """Counts the bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Choose how to count; :attr:`source` says it."""
        self._tokenizer = tokenizer
        self._sizes = tokenizer.token_bytes()
        self.source = "unknown"
        """``tokens``: exact, each token has its number of bytes; ``decoded``: of the tokens' text, less at most six
        bytes at each edge of a row; ``unknown``: the tokenizer changes text, so its tokens do not say."""
        if self._sizes is not None:
            self.source = "tokens"
        elif not tokenizer.changes_text:
            self.source = "decoded"

    @property
    def is_exact(self) -> bool:
        """Whether each token has its number of bytes."""
        return self._sizes is not None

    def count(self, tokens: Sequence[int]) -> int:
        """Return the bytes of a row's tokens in order, ends of documents left out; 0 if unknown."""
        if self._sizes is not None:
            ids = np.asarray(tokens, np.int64)
            return int(self._sizes[ids[ids < len(self._sizes)]].sum())  # those above pad the model's vocabulary
        return 0 if self._tokenizer.changes_text else text_bytes(self._tokenizer, tokens)


def text_bytes(tokenizer: Tokenizer, tokens: Sequence[int]) -> int:
    """Return the UTF-8 bytes of the text that a row's tokens decode to, without ends of documents.

    Counts no byte of a character that the row's edges cut, which decoders replace by U+FFFD: at most 6 bytes per row.
    """
    size = 0
    for is_end, document in groupby(tokens, lambda token: token == tokenizer.eos_id):
        if not is_end:
            size += len(tokenizer.decode(list(document)).strip(REPLACEMENT).encode())
    return size
