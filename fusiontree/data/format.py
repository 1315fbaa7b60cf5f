"""A dataset on disk: WebDataset tar shards of tokenized documents, an index beside each, and one dataset.json.

    DIR/dataset.json            description of the dataset; written last, so a folder without it is incomplete
    DIR/tokenizer.json          only if the tokenizer is a file
    DIR/shard-000000.tar        members KEY.npy (uint16 or uint32 tokens, the end-of-document token last), KEY.json
    DIR/shard-000000.index      offset of each document in the tar, its length, its SHA-256

KEY is the document's number in the dataset, nine digits or more.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fusiontree.utils.errors import UserError, nearest_file
from fusiontree.utils.files import atomic_write

DATASET = "dataset.json"
FORMAT = "fusiontree-shards"
VERSION = 1
TOKENIZER_FILE = "tokenizer.json"


class ShardDamage(RuntimeError):
    """A shard does not match its index. The message names shard, member and reason."""

    def __init__(self, shard: Path | str, member: str | None, reason: str) -> None:
        super().__init__(f"{shard}{f', member {member}' if member else ''}: {reason}")
        self.shard, self.member, self.reason = str(shard), member, reason


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest dtype that can represent every token id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer of a dataset."""

    kind: str
    """byte | huggingface; synthetic tokens have none that could be saved."""
    name: str
    vocab_size: int
    eos_id: int
    sha256: str
    """SHA-256 of the tokenizer's file, or of the definition of ``byte``."""
    file: str | None = None
    """``tokenizer.json`` in the dataset's folder; None for ``byte``."""

    def check(self, place: str) -> None:
        """Check values that come from outside; the file's name becomes a path in runs and checkpoints.

        Raises:
            UserError: a value is not possible; ``place`` names its origin.
        """
        numbers = (self.vocab_size, self.eos_id)
        if not all(type(n) is int for n in numbers) or not 0 <= self.eos_id < self.vocab_size <= 1 << 31:
            problem = f"end-of-document token {self.eos_id!r} of a vocabulary of {self.vocab_size!r}"
        elif self.kind not in ("byte", "huggingface"):
            problem = f"kind {self.kind!r}; known are byte and huggingface"
        elif self.file not in (None, TOKENIZER_FILE) or (self.kind == "huggingface" and self.file is None):
            problem = f"file {self.file!r}; a tokenizer's file is called {TOKENIZER_FILE}"
        elif not isinstance(self.name, str) or not re.fullmatch("[0-9a-f]{64}", str(self.sha256)):
            problem = f"name {self.name!r} with SHA-256 {self.sha256!r}"
        else:
            return
        raise UserError(f"{place} describes an impossible tokenizer: {problem}; take the file as it was written")


@dataclass(frozen=True)
class ShardInfo:
    """One shard of a dataset."""

    name: str
    """File name of the tar; the index has the same name with ``.index``."""
    documents: int
    tokens: int
    bytes: int
    index_sha256: str
    sha256: str = ""
    """SHA-256 of the full tar, for verification; empty if it was not recorded."""


@dataclass(frozen=True)
class DatasetInfo:
    """The content of dataset.json."""

    tokenizer: TokenizerInfo
    dtype: str
    """uint16 | uint32."""
    shards: list[ShardInfo]
    statistics: dict[str, Any] = field(default_factory=dict)

    @property
    def documents(self) -> int:
        """Number of documents in all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Number of tokens in all shards, end-of-document tokens included."""
        return sum(shard.tokens for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all fields that determine the tokens of each row."""
        shards = [{key: value for key, value in vars(s).items() if key != "sha256"} for s in self.shards]
        content = [asdict(self.tokenizer), self.dtype, shards]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_dataset(folder: Path, info: DatasetInfo) -> None:
    """Write dataset.json; its presence declares the dataset complete."""
    values = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": info.fingerprint,
        "documents": info.documents,
        "tokens": info.tokens,
        "dtype": info.dtype,
        "tokenizer": asdict(info.tokenizer),
        "statistics": info.statistics,
        "shards": [vars(s) for s in info.shards],
    }
    with atomic_write(folder / DATASET) as file:
        json.dump(values, file, indent=1)


def read_dataset(folder: Path) -> DatasetInfo:
    """Read dataset.json.

    Raises:
        UserError: there is no dataset in ``folder``, it is empty, of another format or version, or its dataset.json
            was changed after it was written.
    """
    path = Path(folder) / DATASET
    if not path.is_file():
        if not path.parent.is_dir():
            near = nearest_file(path.parent)
            raise UserError(f"dataset folder '{folder}' does not exist{near}; make one with 'fusiontree data build'")
        inner = sorted(p.parent.name for p in path.parent.glob(f"*/{DATASET}"))
        hint = f"; it holds the datasets {inner}" if inner else "; make one with 'fusiontree data build'"
        raise UserError(f"'{folder}' has no {DATASET}, so it is not a complete dataset{hint}")
    return parse_dataset(path.read_bytes(), str(path))


def parse_dataset(text: str | bytes, place: str) -> DatasetInfo:
    """Parse the text of a dataset.json; ``place`` names its origin in errors. See :func:`read_dataset`."""
    try:
        values = json.loads(text)
        if values["format"] != FORMAT or values["version"] != VERSION:
            raise UserError(
                f"{place} is {values['format']} version {values['version']}; this program reads {FORMAT} {VERSION}"
            )
        info = DatasetInfo(
            tokenizer=TokenizerInfo(**values["tokenizer"]),
            dtype=values["dtype"],
            shards=[ShardInfo(**s) for s in values["shards"]],
            statistics=values["statistics"],
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{place} cannot be read ({error!r}); build the dataset again") from error
    _check_names(info, place)
    if info.fingerprint != values.get("fingerprint"):
        raise UserError(f"{place} was changed after it was written (its fingerprint differs); build the dataset again")
    if not info.tokens:
        raise UserError(f"{place}: the dataset is empty")
    return info


def _check_names(info: DatasetInfo, place: str) -> None:
    """Reject file names that would lead out of the dataset's folder or the cache, since names become paths."""
    info.tokenizer.check(place)
    mean = info.statistics.get("bytes_per_token") if isinstance(info.statistics, dict) else 0
    if mean is not None and not (isinstance(mean, int | float) and 0 < mean < float("inf")):
        raise UserError(f"{place}: its statistics are invalid; build the dataset again")
    for name in (shard.name for shard in info.shards):
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
            raise UserError(f"{place} names a file {name!r}, which is not a plain file name; build the dataset again")
    for shard in info.shards:
        numbers = (shard.documents, shard.tokens, shard.bytes)
        if not all(isinstance(n, int) and n >= 0 for n in numbers) or not re.fullmatch(
            "[0-9a-f]{64}", str(shard.index_sha256)
        ):
            raise UserError(f"{place}: the entry of {shard.name} is invalid; build the dataset again")
