"""Megatron's indexed corpora (.bin beside .idx) as documents or as a token source; megatron-core reads them."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fusiontree.data.config import DataConfig, DatasetConfig
from fusiontree.data.sources.base import TOKEN_SOURCES, TokenSource, TokenSpan, source_options
from fusiontree.data.tokenizers import HuggingFaceTokenizer, open_tokenizer
from fusiontree.utils.errors import UserError
from fusiontree.utils.hashing import sample_file, sha256_file
from fusiontree.utils.settings import PathText, Section, setting


def is_megatron(file: Path) -> bool:
    """Return True if ``file`` is the ``.bin`` of a corpus and the ``.idx`` is in the same folder."""
    return file.suffix == ".bin" and file.with_suffix(".idx").is_file()


def read_megatron(file: Path) -> Iterator[np.ndarray]:
    """Yield the tokens of each document; a document's sequences are joined.

    Raises:
        UserError: megatron-core is not installed, or its reader cannot read the corpus.
    """
    corpus = _open_corpus(file)
    for first, last in itertools.pairwise(corpus.document_indices):
        sequences = [corpus.get(int(i)) for i in range(first, last)]
        yield np.concatenate(sequences) if sequences else np.empty(0, np.uint16)


def _open_corpus(file: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about every missing GPU package
        try:
            from megatron.core.datasets.indexed_dataset import IndexedDataset
        except ImportError as error:
            raise UserError(
                f"'{file}' is a Megatron corpus, and megatron-core is not installed; pip install 'fusiontree[megatron]'"
            ) from error
        try:
            corpus = IndexedDataset(str(file.with_suffix("")))
        except Exception as error:  # its reader asserts
            raise UserError(f"'{file}' cannot be read as a Megatron corpus: {error}") from error
        if not np.issubdtype(corpus.index.dtype, np.integer):
            raise UserError(f"'{file}' is a Megatron corpus of {np.dtype(corpus.index.dtype)} values, not of tokens")
        return corpus


class MegatronOptions(Section):
    """Options of a dataset of type megatron."""

    tokenizer: PathText = setting(..., "byte, or the tokenizer.json that made the corpus.")
    eos: str | None = setting(None, "The tokenizer's end-of-document token, if it has an unusual name.")


class MegatronSource(TokenSource):
    """A corpus read in place, as one shard. No end-of-document token is added; Megatron's --append-eod writes them."""

    def __init__(self, dataset: DatasetConfig, config: DataConfig) -> None:
        """Open the corpus at ``dataset.path``, which names its .bin.

        Raises:
            UserError: the corpus or its tokenizer is missing or cannot be read, or an option is wrong.
        """
        options = source_options(dataset, MegatronOptions)
        file = Path(dataset.path).expanduser()
        if not is_megatron(file):
            raise UserError(f"dataset '{file}' of type megatron is not a .bin file with its .idx beside it")
        tokenizer = open_tokenizer(options.tokenizer, options.eos)
        self.place, self.tokenizer = str(file), tokenizer.info
        self.tokenizer_path = tokenizer.path if isinstance(tokenizer, HuggingFaceTokenizer) else None
        self._corpus = _open_corpus(file)
        self._ends = np.cumsum(self._corpus.sequence_lengths, dtype=np.int64)
        bounds = np.concatenate([[0], self._ends])
        self._starts = np.unique(bounds[np.asarray(self._corpus.document_indices)])
        self.shard_tokens = [int(bounds[-1])]
        # The whole .bin would take hours to hash; its samples show a corpus that was written again.
        content = f"{sha256_file(file.with_suffix('.idx'))} {sample_file(file)} {self.tokenizer.sha256}"
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def read(self, shard: int, begin: int, end: int) -> TokenSpan:
        """See :class:`TokenSource`."""
        ranges = []
        first_sequence, last_sequence = np.searchsorted(self._ends, [begin, end - 1], "right").tolist()
        for sequence in range(first_sequence, last_sequence + 1):
            first = int(self._ends[sequence - 1]) if sequence else 0
            low, high = max(begin, first), min(end, int(self._ends[sequence]))
            ranges.append(self._corpus.get(sequence, offset=low - first, length=high - low))
        tokens = np.concatenate(ranges)
        first_start, last_start = np.searchsorted(self._starts, [begin, end])
        starts = self._starts[first_start:last_start] - begin
        return TokenSpan(tokens.astype(f"u{tokens.dtype.itemsize}", copy=False), starts)


TOKEN_SOURCES.register("megatron", MegatronSource)
