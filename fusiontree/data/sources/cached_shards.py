"""Remote token shards: full shards are fetched into the local cache and read there."""

from __future__ import annotations

import logging
import tempfile
import threading
from pathlib import Path

from fusiontree.data.config import DataConfig, DatasetConfig, is_remote
from fusiontree.data.format import DATASET, DatasetInfo, ShardDamage, parse_dataset
from fusiontree.data.sources.base import TOKEN_SOURCES
from fusiontree.data.sources.cache import ShardCache
from fusiontree.data.sources.index import Shard, index_size
from fusiontree.data.sources.remote import FileMissing, RemoteFolder, Retries, local_folder, open_remote
from fusiontree.data.sources.shards import LocalShards, OpenShard, ShardSource, open_shard_limit
from fusiontree.data.tokenizers import save_tokenizer
from fusiontree.utils.errors import UserError
from fusiontree.utils.hashing import sha256_file

log = logging.getLogger(__name__)


def open_shards(dataset: DatasetConfig, config: DataConfig) -> ShardSource:
    """Open a dataset of token shards in a folder, at a URL or behind a command: read its dataset.json.

    Raises:
        UserError: there is no dataset, or it cannot be reached.
    """
    if dataset.options:
        raise UserError(f"dataset '{dataset.path}' of type shards has no options; remove {sorted(dataset.options)}")
    retries = Retries(config.fetch_attempts, config.fetch_wait_s)
    if not is_remote(dataset.path):
        return LocalShards(local_folder(dataset.path), retries, open_shard_limit(config))
    remote = open_remote(dataset.path, config.storage_options, config.allow_pipe, config.fetch_stall_s)
    cache = ShardCache(config.cache_folder, int(config.cache_size_gib * 2**30))
    return CachedShards(remote, cache, retries, open_shard_limit(config))


TOKEN_SOURCES.register("shards", open_shards)


class CachedShards(ShardSource):
    """A remote dataset; full shards are fetched into the cache and read there."""

    cached = True

    def __init__(self, remote: RemoteFolder, cache: ShardCache, retries: Retries, open_shards: int) -> None:
        """Read dataset.json; see :func:`open_shards`."""
        self._remote, self.cache, self._retries = remote, cache, retries
        self._fetched_again: set[int] = set()
        self._lost: dict[int, ShardDamage] = {}
        self.inodes: dict[int, int] = {}
        """Inode of each shard's tar when it was last opened in the cache."""
        super().__init__(remote.url, self._download_info(), open_shards)

    def _download_info(self) -> DatasetInfo:
        with tempfile.TemporaryDirectory(prefix="fusiontree-") as folder:
            path = Path(folder) / DATASET
            try:
                self._download(DATASET, path)
            except FileMissing as error:
                raise UserError(f"'{self._remote.url}' has no {DATASET}, so it is not a complete dataset") from error
            return parse_dataset(path.read_bytes(), f"{self._remote.url} ({DATASET})")

    def _download(self, name: str, target: Path) -> None:
        self._retries.run(lambda: self._remote.download(name, target), f"fetching {name} of {self._remote.url}")

    def cache_bytes(self, shard: int) -> int:
        """See :class:`TokenSource`."""
        info = self.info.shards[shard]
        return info.bytes + index_size(info.documents)

    def open(self, number: int) -> OpenShard:
        """See :class:`ShardSource`."""
        return _OpenCached(self, number)

    def fetch(self, shard: int, *, wait: bool = False) -> None:
        """See :class:`ShardSource`."""
        if shard in self._lost:
            raise self._lost[shard]
        key = self.info.shards[shard].index_sha256
        try:
            self.cache.ensure(key, self.cache_bytes(shard), lambda partial: self._fetch_into(partial, shard), wait=wait)
        except ShardDamage as damage:
            self._lost[shard] = damage  # remember it, so that the shard is not fetched again for each of its rows
            raise

    def _fetch_into(self, partial: Path, number: int) -> None:
        info = self.info.shards[number]
        tar, index = partial / "tar", partial / "index"
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
            damaged = next(shard.damages(), None)
            shard.close()
            if damaged is None or attempt > 1 or self._retries.attempts == 1:
                return  # damaged at its origin: keep it, reads then report the damaged documents
            log.warning("%s; fetching it again", damaged)

    def mend(self, number: int, damage: ShardDamage, attempt: int) -> bool:
        """See :class:`ShardSource`: the cached copy may be damaged, so it is fetched again, once."""
        if number in self._fetched_again or number in self._lost:
            return False
        self._fetched_again.add(number)
        log.warning("%s; the copy in %s is dropped and fetched again", damage, self.cache.folder)
        self.cache.discard(self.info.shards[number].index_sha256, self.inodes.get(number, 0))
        return True

    def save_tokenizer(self, folder: Path) -> list[Path]:
        """See :class:`ShardSource`."""
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


class _OpenCached:
    """A cached shard. While it is not pinned, it may be removed from the cache; the next read fetches it again."""

    def __init__(self, source: CachedShards, number: int) -> None:
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
