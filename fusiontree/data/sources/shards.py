"""WebDataset token shards as a token source: shards kept open, reads retried after damage that can be repaired."""

from __future__ import annotations

import errno
import logging
import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from fusiontree.data.config import DataConfig
from fusiontree.data.format import DatasetInfo, ShardDamage, read_dataset
from fusiontree.data.sources.base import TokenSource, TokenSpan
from fusiontree.data.sources.index import Shard
from fusiontree.data.sources.remote import Retries
from fusiontree.utils.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

# Possibly transient errors of a disk or network file system. Others mean that the file is missing or not accessible.
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOLCK}
_OPEN_SHARDS = 192
"""Shards kept open over all datasets; each takes up to three file descriptors, of usually 1,024 per process."""


def open_shard_limit(config: DataConfig) -> int:
    """Return the number of shards that each dataset of a run may keep open."""
    return max(4, min(2 * config.shuffle_shards, _OPEN_SHARDS // len(config.sources)))


class OpenShard(Protocol):
    """A shard that a process keeps open."""

    def pin(self) -> Shard:
        """Return the shard and keep it on disk until :meth:`unpin`; several threads may pin it at once."""
        ...

    def unpin(self) -> None:
        """Release the shard; call once per :meth:`pin`."""
        ...

    def close(self) -> None:
        """Close its files."""
        ...


class _Kept:
    """A shard kept open between reads."""

    def __init__(self) -> None:
        self.opening = threading.Lock()
        self.opened: OpenShard | None = None
        self.users = 0
        self.dropped = False

    def close(self) -> None:
        if self.opened is not None:
            self.opened.close()
            self.opened = None


class ShardSource(TokenSource):
    """A dataset of token shards; where the shards are is for derived classes to say."""

    def __init__(self, place: str, info: DatasetInfo, open_shards: int) -> None:
        """Prepare; shards are opened when needed, and at most ``open_shards`` stay open.

        Raises:
            UserError: the dataset's data type cannot represent its vocabulary.
        """
        self.place, self.info, self._open_shards = place, info, open_shards
        self.fingerprint, self.tokenizer = info.fingerprint, info.tokenizer
        self.shard_tokens = [shard.tokens for shard in info.shards]
        self.bytes_per_token = info.statistics.get("bytes_per_token")
        if info.dtype not in ("uint16", "uint32") or info.tokenizer.vocab_size - 1 > np.iinfo(info.dtype).max:
            raise UserError(
                f"dataset '{place}': tokens of type {info.dtype} cannot represent a vocabulary of "
                f"{info.tokenizer.vocab_size}; build the dataset again"
            )
        self._item_bytes = np.dtype(info.dtype).itemsize
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, _Kept] = OrderedDict()

    @abstractmethod
    def open(self, number: int) -> OpenShard:
        """Open a shard; fetch it first if necessary.

        Raises:
            ShardDamage: the shard is missing or does not match dataset.json.
            UserError: the dataset cannot be reached.
        """

    @abstractmethod
    def mend(self, number: int, damage: ShardDamage, attempt: int) -> bool:
        """Try to repair a shard after a failed read; return True if the caller should open and read it again."""

    def shard_name(self, shard: int) -> str:
        """See :class:`TokenSource`."""
        return f"{self.place}/{self.info.shards[shard].name}"

    def locate(self, shard: int, token: int) -> str:
        """See :class:`TokenSource`: names the document's member in the tar."""
        return self._with_shard(shard, lambda s: f"{s.name}, member {s.key(s.document_at(token))}")

    def read(self, shard: int, begin: int, end: int) -> TokenSpan:
        """See :class:`TokenSource`."""
        return self._with_shard(shard, lambda s: s.read(begin, end))

    def _with_shard(self, number: int, action: Callable[[Shard], T]) -> T:
        """Return the result of ``action`` on an open shard; retry after damage that can be repaired."""
        attempt = 1
        while True:
            kept = self._take(number)
            try:
                shard = self._pin(number, kept)
                try:
                    return action(shard)
                finally:
                    assert kept.opened is not None
                    kept.opened.unpin()
            except ShardDamage as damage:
                with self._lock:
                    mended = self._kept.get(number) is not kept  # repaired by another thread meanwhile
                if not mended:
                    if not self.mend(number, damage, attempt):
                        raise
                    attempt += 1
                    self._drop(number, kept)
            finally:
                self._give_back(kept)

    def _pin(self, number: int, kept: _Kept) -> Shard:
        with kept.opening:
            if kept.opened is None:
                kept.opened = self.open(number)
        shard = kept.opened.pin()
        if shard.item_bytes != self._item_bytes:
            kept.opened.unpin()
            raise ShardDamage(shard.name, None, f"has tokens of {shard.item_bytes} bytes, not {self._item_bytes}")
        return shard

    def _take(self, number: int) -> _Kept:
        with self._lock:
            kept = self._kept.setdefault(number, _Kept())
            self._kept.move_to_end(number)
            kept.users += 1
            return kept

    def _give_back(self, kept: _Kept) -> None:
        with self._lock:
            kept.users -= 1
            too_many = len(self._kept) - self._open_shards
            if too_many > 0:
                for number in [n for n, k in self._kept.items() if not k.users][:too_many]:
                    self._kept.pop(number).close()
            if kept.dropped and not kept.users:
                kept.close()

    def _drop(self, number: int, kept: _Kept) -> None:
        with self._lock:
            if self._kept.get(number) is kept:
                del self._kept[number]
            kept.dropped = True

    def close(self) -> None:
        """Close all shards."""
        with self._lock:
            for kept in self._kept.values():
                kept.close()
            self._kept.clear()


class LocalShards(ShardSource):
    """A dataset in a folder; its shards are read where they are."""

    def __init__(self, folder: Path, retries: Retries, open_shards: int) -> None:
        """Read dataset.json; see :func:`read_dataset`."""
        super().__init__(str(folder), read_dataset(folder), open_shards)
        self.folder, self.tokenizer_path, self._retries = folder, folder, retries
        self._checked: dict[int, tuple[int, ...]] = {}

    def check(self) -> None:
        """See :class:`TokenSource`."""
        for info in self.info.shards:
            tar = self.folder / info.name
            try:
                size, _ = tar.stat().st_size, tar.with_suffix(".index").stat()
            except OSError as error:
                raise UserError(
                    f"{error.filename}: {error.strerror}; restore the file or build the dataset again"
                ) from error
            if size != info.bytes:
                raise UserError(
                    f"{tar} has {size} bytes and dataset.json says {info.bytes}; restore it or build the dataset again"
                )

    def open(self, number: int) -> OpenShard:
        """See :class:`ShardSource`."""
        info = self.info.shards[number]
        tar = self.folder / info.name
        index = tar.with_suffix(".index")
        identity = _identity(index)
        shard = Shard(tar, index, info, checked=identity is not None and self._checked.get(number) == identity)
        if identity is not None:
            self._checked[number] = identity
        return _OpenLocal(shard)

    def mend(self, number: int, damage: ShardDamage, attempt: int) -> bool:
        """See :class:`ShardSource`: retry after transient disk errors, but not after wrong content."""
        cause = damage.__cause__
        if not isinstance(cause, OSError) or cause.errno not in _TRANSIENT or attempt >= self._retries.attempts:
            return False
        log.warning("attempt %d of %d failed: %s", attempt, self._retries.attempts, damage)
        self._retries.wait(attempt)
        return True


def _identity(path: Path) -> tuple[int, ...] | None:
    """Return values that change when the file changes; while they are equal, its hash need not be recomputed."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class _OpenLocal:
    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def pin(self) -> Shard:
        return self._shard

    def unpin(self) -> None:
        pass

    def close(self) -> None:
        self._shard.close()
