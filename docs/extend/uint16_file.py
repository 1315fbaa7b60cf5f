"""A token source: a plain file of uint16 tokens, in which the end-of-document token separates documents."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from fusiontree.data.config import DataConfig, DatasetConfig
from fusiontree.data.format import ShardDamage
from fusiontree.data.sources.base import TOKEN_SOURCES, TokenSource, TokenSpan, source_options
from fusiontree.data.tokenizers import HuggingFaceTokenizer, open_tokenizer
from fusiontree.utils.errors import UserError
from fusiontree.utils.hashing import sha256_file
from fusiontree.utils.settings import Section, setting


class Uint16Options(Section):
    """Options of a dataset of type uint16."""

    tokenizer: str = setting("byte", "byte, or the tokenizer.json that made the file.")


class Uint16File(TokenSource):
    """The file is one shard."""

    def __init__(self, dataset: DatasetConfig, config: DataConfig) -> None:
        """Open the file at ``dataset.path``.

        Raises:
            UserError: the file is missing or empty, or an option is wrong.
        """
        options = source_options(dataset, Uint16Options)
        file = Path(dataset.path)
        if not file.is_file() or not file.stat().st_size:
            raise UserError(f"dataset '{file}' of type uint16 is not a file with tokens")
        tokenizer = open_tokenizer(options.tokenizer)
        self.place, self.tokenizer = str(file), tokenizer.info
        self.tokenizer_path = tokenizer.path if isinstance(tokenizer, HuggingFaceTokenizer) else None
        self._tokens = np.memmap(file, "<u2", "r")
        ends = np.flatnonzero(self._tokens == tokenizer.eos_id) + 1
        self._starts = np.concatenate([[0], ends]).astype(np.int64)
        self.shard_tokens = [len(self._tokens)]
        self.fingerprint = hashlib.sha256(f"{sha256_file(file)} {tokenizer.info.sha256}".encode()).hexdigest()

    def read(self, shard: int, begin: int, end: int) -> TokenSpan:
        """See :class:`TokenSource`."""
        tokens = self._tokens[begin:end]
        if len(tokens) < end - begin:
            raise ShardDamage(self.place, None, f"ends at token {begin + len(tokens)}: truncated")
        first, last = np.searchsorted(self._starts, [begin, end])
        return TokenSpan(np.asarray(tokens), self._starts[first:last] - begin)


TOKEN_SOURCES.register("uint16", Uint16File)
