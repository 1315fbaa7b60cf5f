"""Access to the shards of a dataset: in a local folder, or in a remote folder through the local cache."""

from __future__ import annotations

import errno
import logging
import tempfile
import threading
from pathlib import Path
from typing import Protocol

from fusiontree.data.cache import ShardCache
from fusiontree.data.config import DataConfig
from fusiontree.data.format import DATASET, DatasetInfo, ShardDamage, parse_dataset, read_dataset
from fusiontree.data.index import Shard, index_size
from fusiontree.data.remote import (
    FileMissing,
    RemoteFolder,
    Retries,
    is_remote,
    local_folder,
    open_remote,
)
from fusiontree.data.tokenizers import save_tokenizer
from fusiontree.utils.errors import UserError
from fusiontree.utils.hashing import sha256_file

log = logging.getLogger(__name__)

# Possibly transient errors of a disk or network file system. Others mean that the file is missing or not accessible.
_PASSING = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOLCK}


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


class Source(Protocol):
    """A dataset and access to its shards. Methods may be called from any thread."""

    place: str
    info: DatasetInfo
    remote: bool

    def open(self, number: int) -> OpenShard:
        """Open a shard; fetch it first if necessary.

        Raises:
            ShardDamage: the shard is missing or does not match dataset.json.
            UserError: the dataset cannot be reached.
        """
        ...

    def fetch(self, number: int) -> None:
        """Prefetch a shard into the cache; does nothing if another process is already fetching it."""
        ...

    def mend(self, number: int, damage: ShardDamage, attempt: int) -> bool:
        """Try to repair a shard after a failed read; return True if the caller should open and read it again."""
        ...

    def save_tokenizer(self, folder: Path) -> list[Path]:
        """Write the tokenizer's files into ``folder`` and return them."""
        ...


def open_source(path: str, config: DataConfig) -> Source:
    """Open the dataset at ``path``: read its dataset.json.

    Raises:
        UserError: there is no dataset, or it cannot be reached.
    """
    retries = Retries(config.fetch_attempts, config.fetch_wait_s)
    if not is_remote(path):
        return LocalSource(local_folder(path), retries)
    remote = open_remote(path, config.storage_options, config.allow_pipe)
    cache = ShardCache(config.cache_folder, int(config.cache_size_gib * 2**30))
    return RemoteSource(remote, cache, retries)


class LocalSource:
    """A dataset in a folder; its shards are read where they are."""

    remote = False

    def __init__(self, folder: Path, retries: Retries) -> None:
        """Read dataset.json; see :func:`read_dataset`."""
        self.folder, self.place, self._retries = folder, str(folder), retries
        self.info = read_dataset(folder)
        self._checked: dict[int, tuple[int, ...]] = {}

    def open(self, number: int) -> OpenShard:
        """See :class:`Source`."""
        info = self.info.shards[number]
        tar = self.folder / info.name
        index = tar.with_suffix(".index")
        identity = _identity(index)
        shard = Shard(tar, index, info, checked=identity is not None and self._checked.get(number) == identity)
        if identity is not None:
            self._checked[number] = identity
        return _OpenLocal(shard)

    def fetch(self, number: int) -> None:
        """See :class:`Source`: nothing to do."""

    def mend(self, number: int, damage: ShardDamage, attempt: int) -> bool:
        """See :class:`Source`: retry after transient disk errors, but not after wrong content."""
        cause = damage.__cause__
        if not isinstance(cause, OSError) or cause.errno not in _PASSING or attempt >= self._retries.attempts:
            return False
        log.warning("attempt %d of %d failed: %s", attempt, self._retries.attempts, damage)
        self._retries.wait(attempt)
        return True

    def save_tokenizer(self, folder: Path) -> list[Path]:
        """See :class:`Source`."""
        return save_tokenizer(self.info.tokenizer, self.folder, folder)


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


class RemoteSource:
    """A remote dataset; full shards are fetched into the cache and read there."""

    remote = True

    def __init__(self, remote: RemoteFolder, cache: ShardCache, retries: Retries) -> None:
        """Read dataset.json; see :func:`open_source`."""
        self.place, self._remote, self.cache, self._retries = remote.url, remote, cache, retries
        self._fetched_again: set[int] = set()
        self._lost: dict[int, ShardDamage] = {}
        self.inodes: dict[int, int] = {}
        """Inode of each shard's tar when it was last opened in the cache."""
        with tempfile.TemporaryDirectory(prefix="fusiontree-") as folder:
            path = Path(folder) / DATASET
            try:
                self._download(DATASET, path)
            except FileMissing as error:
                raise UserError(f"'{self.place}' has no {DATASET}, so it is not a complete dataset") from error
            self.info = parse_dataset(path.read_text(encoding="utf-8"), f"{self.place} ({DATASET})")

    def _download(self, name: str, target: Path) -> None:
        self._retries.run(lambda: self._remote.download(name, target), f"fetching {name} of {self.place}")

    def bytes(self, number: int) -> int:
        """Return the size of a shard in the cache, in bytes."""
        info = self.info.shards[number]
        return info.bytes + index_size(info.documents)

    def open(self, number: int) -> OpenShard:
        """See :class:`Source`."""
        return _OpenCached(self, number)

    def fetch(self, number: int, *, wait: bool = False) -> None:
        """See :class:`Source`."""
        if number in self._lost:
            raise self._lost[number]
        key = self.info.shards[number].index_sha256
        try:
            self.cache.ensure(key, self.bytes(number), lambda part: self._fetch_into(part, number), wait=wait)
        except ShardDamage as damage:
            self._lost[number] = damage  # remember it, so that the shard is not fetched again for each of its rows
            raise

    def _fetch_into(self, part: Path, number: int) -> None:
        info = self.info.shards[number]
        tar, index = part / "tar", part / "index"
        index_name = Path(info.name).with_suffix(".index").name
        for attempt in range(1, self._retries.attempts + 1):
            try:
                self._download(index_name, index)
                self._download(info.name, tar)
                shard = Shard(tar, index, info, name=f"{self.place}/{info.name}")
            except FileMissing as error:
                raise ShardDamage(f"{self.place}/{info.name}", None, f"is missing ({error})") from error
            except ShardDamage as damage:
                # The transfer may have been truncated.
                if attempt == self._retries.attempts:
                    raise
                log.warning("attempt %d of %d failed: %s", attempt, self._retries.attempts, damage)
                self._retries.wait(attempt)
                continue
            damaged = _first_damage(shard)
            shard.close()
            if damaged is None or attempt > 1:
                return  # damaged at its origin: keep it, reads then report the damaged documents
            log.warning("%s; fetching it again", damaged)

    def mend(self, number: int, damage: ShardDamage, attempt: int) -> bool:
        """See :class:`Source`: the cached copy may be damaged, so it is fetched again, once."""
        if number in self._fetched_again or number in self._lost:
            return False
        self._fetched_again.add(number)
        log.warning("%s; the copy in %s is dropped and fetched again", damage, self.cache.folder)
        self.cache.discard(self.info.shards[number].index_sha256, self.inodes.get(number, 0))
        return True

    def save_tokenizer(self, folder: Path) -> list[Path]:
        """See :class:`Source`."""
        info = self.info.tokenizer
        with tempfile.TemporaryDirectory(prefix="fusiontree-") as near:
            if info.file:
                path = Path(near) / info.file
                try:
                    self._download(info.file, path)
                except FileMissing as error:
                    raise UserError(f"'{self.place}' lacks its tokenizer {info.file}") from error
                if sha256_file(path) != info.sha256:
                    raise UserError(f"{self.place}/{info.file} is not the tokenizer that made the dataset")
            return save_tokenizer(info, Path(near), folder)


def _first_damage(shard: Shard) -> ShardDamage | None:
    for document in range(shard.info.documents):
        try:
            shard.read_document(document)
        except ShardDamage as damage:
            return damage
    return None


class _OpenCached:
    """A cached shard. While it is not pinned, it may be removed from the cache; the next read fetches it again."""

    def __init__(self, source: RemoteSource, number: int) -> None:
        self._source, self._number = source, number
        self._key = source.info.shards[number].index_sha256
        self._lock = source.cache.lock(self._key)
        self._mutex = threading.Lock()
        self._readers = 0
        self._shard: Shard | None = None
        self._touched = 0.0
        self.pin()
        self.unpin()

    def pin(self) -> Shard:
        with self._mutex:
            shard = self._shard if self._readers else None
            if shard is None:
                shard = self._shared()
            self._readers += 1
            return shard

    def unpin(self) -> None:
        with self._mutex:
            self._readers -= 1
            if not self._readers:
                self._lock.release()

    def _shared(self) -> Shard:
        """Acquire the shard's lock (shared) and return the shard, which is then open and in the cache.

        Raises:
            Stopped: the thread was told to end.
        """
        source, cache, info = self._source, self._source.cache, self._source.info.shards[self._number]
        if self._shard is not None and self._lock.share_again():
            # The lock file is removed after the tar, so if the tar exists, the lock file is still valid.
            if not self._shard.is_removed():
                self._touched = cache.touch(self._key, self._touched)
                return self._shard
            self._lock.release()
        while True:
            # An exclusive holder of the lock is fetching or removing the shard.
            self._lock.acquire(shared=True)
            try:
                if self._shard is not None and self._shard.is_removed():
                    self._shard.close()
                    self._shard = None
                tar = cache.tar(self._key)
                if self._shard is None and tar.exists():
                    source.inodes[self._number] = tar.stat().st_ino
                    name = f"{source.place}/{info.name}"
                    self._shard = Shard(tar, cache.index(self._key), info, name=name)
            except BaseException:
                self._lock.release()
                raise
            if self._shard is not None:
                self._touched = cache.touch(self._key, self._touched)
                return self._shard
            self._lock.release()
            source.fetch(self._number, wait=True)

    def close(self) -> None:
        with self._mutex:
            if self._shard is not None:
                self._shard.close()
            self._lock.close()
