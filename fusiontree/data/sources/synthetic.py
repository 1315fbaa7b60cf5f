"""Synthetic tokens, computed instead of read: measures speed, or tries a cluster, without a dataset."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from fusiontree.data.config import DataConfig, DatasetConfig
from fusiontree.data.format import TokenizerInfo, token_dtype
from fusiontree.data.sources.base import TOKEN_SOURCES, TokenSource, TokenSpan, source_options
from fusiontree.utils.errors import UserError
from fusiontree.utils.hashing import stable_hash
from fusiontree.utils.settings import Section, setting

_TOKENS = 1 << 30
_DRAWN = 1 << 20
"""Documents that are drawn; more than ``_TOKENS`` tokens hold."""
_LONG_SHARE = 0.1
_SHORT, _LONG = (600, 1.0), (6000, 1.2)
"""Median in tokens and sigma of the logarithm of the two kinds of documents."""
_END = 0
"""Token that ends a document and occurs nowhere else."""


class SyntheticOptions(Section):
    """Options of a dataset of type synthetic."""

    vocab_size: int = setting(..., "Size of the vocabulary; at most model.vocab_size.", unit="tokens", ge=2, le=1 << 31)
    seed: int = setting(0, "Determines the tokens and the lengths of the documents.", ge=0)


class SyntheticSource(TokenSource):
    """2^30 tokens without meaning, in documents of plausible lengths; one shard, a function of the options alone.

    Lengths come from two log-normal distributions: nine of ten documents have a median of 600 tokens (sigma of the
    logarithm 1.0), as web pages; the tenth has a median of 6,000 (sigma 1.2), as books and source files. The mean is
    about 2,100 tokens, and the long kind holds 58% of all tokens. The distributions are chosen, not fitted to a corpus.

    The k-th token of the vocabulary has a probability of about 1/k, so that look-ups of embeddings repeat as in text.
    A document ends with token 0.
    """

    def __init__(self, dataset: DatasetConfig, config: DataConfig) -> None:
        """Draw the documents; takes a tenth of a second.

        Raises:
            UserError: the dataset's path is not ``synthetic``, or an option is wrong.
        """
        options = source_options(dataset, SyntheticOptions)
        if dataset.path != "synthetic":
            raise UserError(
                f"dataset '{dataset.path}' of type synthetic would not be read; write path: synthetic to train on "
                f"synthetic tokens, or remove the type to read the dataset"
            )
        self.place = f"synthetic tokens (vocabulary {options.vocab_size:,}, seed {options.seed})"
        self.fingerprint = hashlib.sha256(f"synthetic 1 {options.vocab_size} {options.seed}".encode()).hexdigest()
        self.tokenizer = TokenizerInfo("synthetic", "synthetic", options.vocab_size, _END, self.fingerprint)
        self.shard_tokens = [_TOKENS]
        self._dtype = token_dtype(options.vocab_size)
        self._key = stable_hash("synthetic", options.seed)
        ends = np.cumsum(_lengths(options.seed))
        assert ends[-1] > _TOKENS
        self._starts = np.concatenate([[0], ends[ends < _TOKENS]])

    def read(self, shard: int, begin: int, end: int) -> TokenSpan:
        """See :class:`TokenSource`."""
        uniform = _uniform(self._key, np.arange(begin, end, dtype=np.uint64))
        # 1 to vocab_size - 1; the half keeps a value just below one from rounding up to vocab_size
        tokens = ((self.tokenizer.vocab_size - 0.5) ** uniform).astype(self._dtype)
        first, last = np.searchsorted(self._starts, [begin + 1, end + 1])
        tokens[self._starts[first:last] - 1 - begin] = _END
        first, last = np.searchsorted(self._starts, [begin, end])
        return TokenSpan(tokens, self._starts[first:last] - begin)

    def save_tokenizer(self, folder: Path) -> list[Path]:
        """Write nothing: the tokens are of no text."""
        return []


def _lengths(seed: int) -> np.ndarray:
    """Return the tokens of each document, by the method of Box and Muller (1958)."""
    numbers = np.arange(_DRAWN, dtype=np.uint64)
    kind, radius, angle = (_uniform(stable_hash("documents", seed, part), numbers) for part in range(3))
    normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)
    median, sigma = (np.where(kind < _LONG_SHARE, *pair) for pair in zip(_LONG, _SHORT, strict=True))
    return np.maximum(2, median * np.exp(sigma * normal)).astype(np.int64)


def _uniform(key: int, numbers: np.ndarray) -> np.ndarray:
    """Return a value in [0, 1) for each uint64: the finaliser of SplitMix64 (Steele, Lea and Flood 2014) of key + n."""
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ mixed >> np.uint64(31)) >> np.uint64(11)) * 2.0**-53


TOKEN_SOURCES.register("synthetic", SyntheticSource)
