"""Local cache for data shards of remote datasets: bounded in size, shared by processes, consistent after any crash.

    CACHE/KEY.index, KEY.tar    a complete shard; the tar appears last, so if the tar exists, both files exist
    CACHE/KEY.BYTES.part/       download of one process; BYTES are reserved for it
    CACHE/KEY.lock              held exclusively while the shard is fetched or removed, shared while it is read
    CACHE/space.lock            held while space is freed

KEY is the SHA-256 of the index, which contains the SHA-256 of every document. Locks end with their process, so
leftovers of killed processes are unlocked; they are removed when space is freed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fusiontree.utils.errors import UserError
from fusiontree.utils.file_lock import FileLock
from fusiontree.utils.files import fsync_directory
from fusiontree.utils.threads import Stopped, stop_wanted

_PATIENCE_S = 600.0
"""How long to wait for space that downloads of other processes occupy."""
_TOUCH_S = 2.0


@dataclass
class _Entry:
    """Files in the cache under one key."""

    bytes: int = 0
    used: float = 0.0
    """Time of last use."""


class ShardCache:
    """One process's access to the cache in a folder. Methods may be called from any thread."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Open or create the cache.

        Args:
            folder: of the cache.
            limit_bytes: maximum size, including running downloads.

        Raises:
            UserError: the folder cannot be created or written.
        """
        self.folder, self.limit_bytes = folder, limit_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / "space.lock")
            lock.acquire(shared=True, wait=False)
            lock.close()
        except OSError as error:
            raise UserError(f"data.cache_dir '{folder}' cannot be used: {error}; name another folder") from error

    def tar(self, key: str) -> Path:
        """Return the path of a shard's tar, present or future."""
        return self.folder / f"{key}.tar"

    def index(self, key: str) -> Path:
        """Return the path of a shard's index, present or future."""
        return self.folder / f"{key}.index"

    def lock(self, key: str) -> FileLock:
        """Return the lock of a shard; hold it shared while reading the shard."""
        return FileLock(self.folder / f"{key}.lock")

    def ensure(self, key: str, size: int, fetch: Callable[[Path], None], *, wait: bool = True) -> bool:
        """Fetch the shard if it is not in the cache; return True once it is.

        Args:
            key: of the shard.
            size: bytes of tar and index together.
            fetch: writes ``tar`` and ``index`` into the folder it is given.
            wait: if False, return False at once when another process or thread is fetching the shard.

        Raises:
            UserError: there is not enough space.
            Stopped: the thread was told to end.
            Exception: any exception of ``fetch``.
        """
        if self.tar(key).exists():
            return True
        lock = self.lock(key)
        if not lock.acquire(wait=wait):
            return False
        try:
            if self.tar(key).exists():  # another process or thread fetched it while this call waited
                return True
            part = self._reserve(key, size)
            try:
                fetch(part)
                for name in ("index", "tar"):
                    with (part / name).open("rb") as file:
                        os.fsync(file.fileno())
                os.replace(part / "index", self.index(key))
                os.replace(part / "tar", self.tar(key))
                os.utime(self.tar(key))
            finally:
                shutil.rmtree(part, ignore_errors=True)
            fsync_directory(self.folder)
            return True
        finally:
            lock.close()

    def touch(self, key: str, last: float) -> float:
        """Record the time of use of a shard, unless ``last`` is recent; return the recorded time."""
        now = time.time()
        if now - last < _TOUCH_S:
            return last
        try:
            os.utime(self.tar(key))
        except FileNotFoundError:
            return last
        return now

    def discard(self, key: str, inode: int) -> None:
        """Remove a shard with wrong content, unless its tar has been replaced (its inode is no longer ``inode``).

        Raises:
            Stopped: the thread was told to end.
        """
        lock = self.lock(key)
        lock.acquire()
        try:
            if self.tar(key).exists() and self.tar(key).stat().st_ino == inode:
                self._remove(key)
        finally:
            lock.close()

    def _reserve(self, key: str, size: int) -> Path:
        """Free space for ``size`` bytes and return a new folder that reserves them."""
        if size > self.limit_bytes:
            raise UserError(
                f"a shard of {size / 2**30:.3f} GiB does not fit in data.cache_size_gib "
                f"{self.limit_bytes / 2**30:.3f}; raise it or build smaller shards"
            )
        give_up = time.monotonic() + _PATIENCE_S
        while True:
            space = FileLock(self.folder / "space.lock")
            space.acquire()
            try:
                lacking = self._make_room(size, key)
                if lacking <= 0:
                    part = self.folder / f"{key}.{size}.part"
                    part.mkdir()
                    return part
            finally:
                space.close()
            if time.monotonic() > give_up:
                raise UserError(
                    f"data.cache_dir '{self.folder}' lacks {lacking / 2**30:.3f} GiB for another shard, and everything "
                    f"in it is in use; raise data.cache_size_gib, lower data.shuffle_shards or free the disk"
                )
            if stop_wanted():
                raise Stopped
            time.sleep(0.1)

    def _make_room(self, size: int, wanted: str) -> int:
        """Remove unused shards, least recently used first, until ``size`` more bytes fit; return the missing bytes."""
        self._remove_leftovers(wanted)
        entries = self._entries()
        total = sum(entry.bytes for entry in entries.values())

        def lacking() -> int:
            return max(total + size - self.limit_bytes, size - self._free_bytes())

        for key, entry in sorted(entries.items(), key=lambda item: item[1].used):
            if lacking() <= 0:
                break
            lock = self.lock(key)
            if key == wanted or not lock.acquire(wait=False):
                lock.close()
                continue
            self._remove(key)
            lock.path.unlink(missing_ok=True)
            lock.close()
            total -= entry.bytes
        return lacking()

    def _free_bytes(self) -> int:
        """Return the disk's free bytes after all reserved downloads."""
        unwritten = 0
        for part in self.folder.glob("*.part"):
            written = sum(_size(file) for file in (part / "tar", part / "index"))
            unwritten += max(0, _reserved(part) - written)
        return shutil.disk_usage(self.folder).free - unwritten

    def _entries(self) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        for path in self.folder.iterdir():
            key = path.name.split(".", 1)[0]
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            if path.suffix in (".tar", ".index"):
                entry = entries.setdefault(key, _Entry())
                entry.bytes += stat.st_size
                entry.used = max(entry.used, stat.st_mtime if path.suffix == ".tar" else 0.0)
            elif path.suffix == ".part":
                entry = entries.setdefault(key, _Entry())
                entry.bytes += _reserved(path)
                entry.used = stat.st_mtime
        return entries

    def _remove_leftovers(self, wanted: str) -> None:
        """Remove leftovers of killed processes: abandoned downloads, an index without a tar, unused locks."""
        for path in self.folder.iterdir():
            key = path.name.split(".", 1)[0]
            if path.suffix not in (".part", ".index", ".lock") or path.name == "space.lock":
                continue
            if path.suffix != ".part" and self.tar(key).exists():
                continue
            lock = self.lock(key)
            if key == wanted:  # this process holds its lock, so all files are leftovers
                if path.suffix != ".lock":
                    _delete(path)
            elif lock.acquire(wait=False):
                if not self.tar(key).exists():
                    _delete(path)
                    lock.path.unlink(missing_ok=True)
                elif path.suffix == ".part":
                    _delete(path)
            lock.close()

    def _remove(self, key: str) -> None:
        """Remove a shard; this process must hold its lock."""
        try:
            descriptor = os.open(self.tar(key), os.O_RDWR)
        except FileNotFoundError:
            pass
        else:
            # Other processes may keep the file open without reading it: truncating frees the space at once. They notice
            # the removal because the file has no name any more.
            self.tar(key).unlink()
            os.ftruncate(descriptor, 0)
            os.close(descriptor)
        self.index(key).unlink(missing_ok=True)
        for part in self.folder.glob(f"{key}.*.part"):
            _delete(part)


def _reserved(part: Path) -> int:
    return int(part.name.split(".")[1])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
