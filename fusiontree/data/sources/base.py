"""The interface of a token source, the registry of their types, and how a source is opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from pydantic import ValidationError

from fusiontree.data.config import DataConfig, DatasetConfig
from fusiontree.data.format import TokenizerInfo
from fusiontree.data.tokenizers import save_tokenizer
from fusiontree.utils.errors import UserError
from fusiontree.utils.registry import Registry
from fusiontree.utils.settings import Section

Options = TypeVar("Options", bound=Section)


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive tokens of a shard and the starts of their documents."""

    tokens: np.ndarray
    """Unsigned integers, one-dimensional."""
    starts: np.ndarray
    """int64 indices in ``tokens`` at which documents start, ascending; contains 0 only if a document starts there."""


class TokenSource(Protocol):
    """Random access to the tokens of a dataset. Methods may be called from any thread.

    A source consists of one or more shards. Each shard is divided into rows of ``seq_len`` tokens; no row crosses from
    one shard into another. The order of rows is computed from ``shard_tokens``; a source only answers :meth:`read`. A
    class that derives from this one inherits the methods that have a body.
    """

    place: str
    """Path or name of the source in messages."""
    fingerprint: str
    """Hash of everything that determines the tokens and their documents, but not of the place, as a dataset may move. A
    run resumes only on a source with an equal fingerprint."""
    tokenizer: TokenizerInfo
    """The tokenizer that made the tokens. All sources of a run have the same one."""
    shard_tokens: Sequence[int]
    """Number of tokens of each shard."""
    bytes_per_token: float | None = None
    """Mean bytes of text per token; None if unknown. With it, validation reports bits per byte."""
    tokenizer_path: Path | None = None
    """The tokenizer's file, or the folder that contains it; None if ``tokenizer.file`` is None."""
    cached: bool = False
    """Whether shards are fetched into ``data.cache_dir`` and read there."""

    def read(self, shard: int, begin: int, end: int) -> TokenSpan:
        """Return tokens [begin, end) of a shard; the range is non-empty and inside the shard.

        Raises:
            ShardDamage: the tokens are damaged or missing; ``data.on_damage`` decides how training continues.
            UserError: the source cannot be reached.
        """
        ...

    def shard_name(self, shard: int) -> str:
        """Return the name of a shard for messages."""
        return self.place

    def locate(self, shard: int, token: int) -> str:
        """Return the place of a token for messages, as exactly as a person needs to find it."""
        return f"{self.shard_name(shard)}, token {token},"

    def check(self) -> None:
        """Check, without reading tokens, that every shard is there; done before a run is queued.

        Raises:
            UserError: a shard is missing or has another size.
        """
        return

    def save_tokenizer(self, folder: Path) -> list[Path]:
        """Write the tokenizer's files into ``folder`` and return them."""
        return save_tokenizer(self.tokenizer, self.tokenizer_path or Path(), folder)

    def cache_bytes(self, shard: int) -> int:
        """Return the size of a shard in ``data.cache_dir``, in bytes."""
        return 0

    def fetch(self, shard: int) -> None:
        """Fetch a shard into the cache ahead of its use; does nothing if another process is already fetching it."""
        return


SourceType = Callable[[DatasetConfig, DataConfig], TokenSource]
"""Opens a dataset of one type, given its entry in the configuration and the ``data`` section."""
TOKEN_SOURCES: Registry[SourceType] = Registry("type of token source")


def open_source(dataset: DatasetConfig, config: DataConfig) -> TokenSource:
    """Open a dataset of any type.

    Raises:
        UserError: the type is unknown, an option is wrong, or the dataset is missing or cannot be reached.
    """
    return TOKEN_SOURCES.get(dataset.type)(dataset, config)


def source_options(dataset: DatasetConfig, section: type[Options]) -> Options:
    """Return the ``options`` of a dataset as the section that its type declares.

    Raises:
        UserError: an option is unknown, missing, or has a wrong type or value.
    """
    try:
        return section.model_validate(dataset.options)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        known = ", ".join(section.known_keys()) or "none"
        raise UserError(
            f"options of dataset '{dataset.path}' (type {dataset.type}): {problems}; known options: {known}"
        ) from error


def common_tokenizer(sources: Sequence[TokenSource]) -> TokenizerInfo:
    """Return the tokenizer of all ``sources``.

    Raises:
        UserError: the datasets were made with different tokenizers, or end documents with different tokens.
    """
    first = sources[0]
    for source in sources[1:]:
        if source.tokenizer.sha256 != first.tokenizer.sha256:
            raise UserError(
                f"datasets '{first.place}' (tokenizer '{first.tokenizer.name}') and '{source.place}' (tokenizer "
                f"'{source.tokenizer.name}') were made with different tokenizers; they cannot be mixed"
            )
        if source.tokenizer.eos_id != first.tokenizer.eos_id:
            raise UserError(
                f"datasets '{first.place}' and '{source.place}' end documents with different tokens, "
                f"{first.tokenizer.eos_id} and {source.tokenizer.eos_id}; build one again with the other's --eos"
            )
    return first.tokenizer
