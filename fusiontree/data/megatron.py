"""Documents of Megatron's indexed corpora (PREFIX.bin beside PREFIX.idx), through megatron-core's reader."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fusiontree.utils.errors import UserError


def is_megatron(file: Path) -> bool:
    """Return True if ``file`` is the ``.bin`` of a corpus and the ``.idx`` is in the same folder."""
    return file.suffix == ".bin" and file.with_suffix(".idx").is_file()


def read_megatron(file: Path) -> Iterator[np.ndarray]:
    """Yield the tokens of each document; a document's sequences are joined.

    Raises:
        UserError: megatron-core is not installed, or its reader cannot read the corpus.
    """
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
    bounds = corpus.document_indices
    for first, last in itertools.pairwise(bounds):
        yield np.concatenate([corpus.get(int(i)) for i in range(first, last)])
