"""The shard cache: bounded, shared, whole after any crash."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from fusiontree.data.config import DataConfig, DatasetConfig
from fusiontree.data.sources.cache import ShardCache
from fusiontree.data.sources.cached_shards import open_shards
from fusiontree.utils.errors import UserError
from fusiontree.utils.file_lock import FileLock
from tests.data.batches import global_batches, open_data
from tests.data.datasets import random_dataset
from tests.data.http_folder import HttpFolder

KEY = "{:064x}"


def filler(size: int, slow_s: float = 0.0):  # type: ignore[no-untyped-def]
    """A fetch that writes ``size`` bytes in all."""

    def fetch(part: Path) -> None:
        (part / "index").write_bytes(b"i" * 10)
        time.sleep(slow_s)
        (part / "tar").write_bytes(b"t" * (size - 10))

    return fetch


def held(folder: Path) -> int:
    """Bytes of everything in the cache, at one moment.

    A file that goes while others are counted would be counted beside what took its room; such a count is dropped.
    """
    while True:
        before = _names(folder)
        total = 0
        for name in before:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(name).st_size
        if _names(folder) == before:
            return total


def _names(folder: Path) -> list[str]:
    return sorted(os.path.join(root, name) for root, _, files in os.walk(folder) for name in files)


def keys(cache: ShardCache) -> set[int]:
    return {int(path.stem, 16) for path in cache.folder.glob("*.tar")}


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 350)
    for number in range(3):
        cache.ensure(KEY.format(number), 100, filler(100))
        os.utime(cache.tar(KEY.format(number)), (0, 1000.0 + number))
    cache.touch(KEY.format(0), 0.0)
    cache.ensure(KEY.format(3), 100, filler(100))
    assert keys(cache) == {0, 2, 3}
    assert held(tmp_path) == 300
    cache.ensure(KEY.format(4), 300, filler(300))
    assert keys(cache) == {4}


def test_what_is_read_stays(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 250)
    cache.ensure(KEY.format(0), 100, filler(100))
    os.utime(cache.tar(KEY.format(0)), (0, 1000.0))
    reading = cache.lock(KEY.format(0))
    assert reading.acquire(shared=True)
    for number in range(1, 5):
        cache.ensure(KEY.format(number), 100, filler(100))
        assert 0 in keys(cache)
        assert held(tmp_path) <= 250
    reading.close()
    cache.ensure(KEY.format(9), 100, filler(100))
    assert 0 not in keys(cache)


def test_no_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(tmp_path, 250)
    with pytest.raises(UserError, match=r"does not fit in data.cache_size_gib"):
        cache.ensure(KEY.format(0), 300, filler(300))
    monkeypatch.setattr("fusiontree.data.sources.cache._PATIENCE_S", 0.2)
    cache.ensure(KEY.format(0), 200, filler(200))
    reading = cache.lock(KEY.format(0))
    reading.acquire(shared=True)
    with pytest.raises(UserError, match=r"everything in it is in use; raise data.cache_size_gib"):
        cache.ensure(KEY.format(1), 200, filler(200))
    threading.Timer(0.1, reading.close).start()
    cache.ensure(KEY.format(1), 200, filler(200))  # waits until the reader is done
    assert keys(cache) == {1}


def test_a_full_disk_makes_room_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(tmp_path, 10_000)
    for number in range(3):
        cache.ensure(KEY.format(number), 100, filler(100))
        os.utime(cache.tar(KEY.format(number)), (0, 1000.0 + number))

    def usage(folder: Path) -> Any:
        return type("usage", (), {"free": 350 - held(tmp_path)})

    monkeypatch.setattr("fusiontree.data.sources.cache.shutil.disk_usage", usage)
    cache.ensure(KEY.format(3), 200, filler(200))
    assert keys(cache) == {2, 3}


def test_an_evicted_shard_gives_its_space_back_at_once_and_is_fetched_again(tmp_path: Path) -> None:
    """Even where a process keeps it open between two reads."""
    folder = random_dataset(tmp_path / "d", shards=2)
    with HttpFolder(folder) as server:
        config = DataConfig(train=server.url, cache_dir=str(tmp_path / "cache"))
        source = open_shards(DatasetConfig(path=server.url), config)
        opened = source.open(0)
        shard = opened.pin()
        tokens = shard.read(0, 20).tokens
        descriptor = shard._descriptor
        opened.unpin()
        cache = ShardCache(tmp_path / "cache", source.cache_bytes(0))
        cache.ensure(KEY.format(1), 10, filler(10))
        assert os.fstat(descriptor).st_size == 0
        assert opened.pin().read(0, 20).tokens.tolist() == tokens.tolist()
        opened.unpin()
        assert server.requests["shard-000000.tar"] == 2
        opened.close()


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 1000)

    def fail(part: Path) -> None:
        (part / "tar").write_bytes(b"half")
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        cache.ensure(KEY.format(0), 100, fail)
    assert held(tmp_path) == 0
    cache.ensure(KEY.format(0), 100, filler(100))


def test_one_fetches_and_the_others_wait_or_turn_to_something_else(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 1000)
    fetched = []

    def fetch(part: Path) -> None:
        fetched.append(threading.current_thread().name)
        filler(100, 0.2)(part)

    threads = [threading.Thread(target=cache.ensure, args=(KEY.format(0), 100, fetch)) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    assert not cache.ensure(KEY.format(0), 100, fetch, wait=False)
    for thread in threads:
        thread.join()
    assert len(fetched) == 1
    assert cache.ensure(KEY.format(0), 100, fetch, wait=False)


def test_transfers_under_way_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(tmp_path, 150)
    monkeypatch.setattr("fusiontree.data.sources.cache._PATIENCE_S", 0.1)
    slow = threading.Thread(target=cache.ensure, args=(KEY.format(0), 100, filler(100, 0.5)))
    slow.start()
    time.sleep(0.1)
    with pytest.raises(UserError, match="in use"):
        cache.ensure(KEY.format(1), 100, filler(100))
    slow.join()
    cache.ensure(KEY.format(1), 100, filler(100))


def test_a_folder_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache_dir '.*file' cannot be used"):
        ShardCache(tmp_path / "file", 100)


def test_a_cache_too_small_for_its_readers_is_refused(tmp_path: Path) -> None:
    folder = random_dataset(tmp_path / "d", shards=5)
    values = {"cache_dir": str(tmp_path / "cache"), "shuffle_shards": 3}
    with HttpFolder(folder) as server:
        source = open_shards(DatasetConfig(path=server.url), DataConfig(train=server.url, **values))
        sizes = sorted(source.cache_bytes(n) for n in range(5))
        need = sum(sizes[-3:])
        open_data(DataConfig(train=server.url, cache_size_gib=need / 2**30, **values))
        with pytest.raises(UserError, match=r"up to 3 shards.*raise it, lower data.shuffle_shards"):
            open_data(DataConfig(train=server.url, cache_size_gib=(need - 1) / 2**30, **values))


@pytest.mark.parametrize("workers", [0, 4])
def test_the_bound_holds_all_the_time(tmp_path: Path, workers: int) -> None:
    folder = random_dataset(tmp_path / "d", shards=12, count=40)
    cache = tmp_path / "cache"
    reference, _ = global_batches(DataConfig(train=str(folder), num_workers=0, shuffle_shards=3), 200)
    with HttpFolder(folder) as server:
        probe = DataConfig(train=server.url, cache_dir=str(cache), shuffle_shards=3, num_workers=workers)
        sizes = sorted(open_shards(DatasetConfig(path=server.url), probe).cache_bytes(n) for n in range(12))
        limit = sum(sizes[-8:])
        most, done = [0], threading.Event()

        def watch() -> None:
            while not done.is_set():
                most[0] = max(most[0], held(cache))
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        config = probe.model_copy(update={"cache_size_gib": limit / 2**30, "prefetch_shards": 4})
        batches, _ = global_batches(config, 200)
        done.set()
        watcher.join()
        assert batches == reference
        assert limit / 2 < most[0] <= limit
        epochs = batches[-1].epochs[0]
        fetched = sum(count for name, count in server.requests.items() if name.endswith(".tar"))
        assert fetched <= 12 * (epochs + 1)  # once an epoch: nothing is thrown out and fetched again in between


def test_next_shards_are_there_before_they_are_due(tmp_path: Path) -> None:
    folder = random_dataset(tmp_path / "d", shards=8, count=40)
    with HttpFolder(folder) as server:
        values = {"train": server.url, "shuffle_shards": 2, "prefetch_shards": 3}
        config = DataConfig.model_validate({**values, "cache_dir": str(tmp_path / "cache")})
        stream = open_data(config).steps()
        next(stream)
        for _ in range(100):
            if sum(server.requests[f"shard-00000{n}.tar"] for n in range(8)) == 5:
                break
            time.sleep(0.02)
        fetched = {n for n in range(8) if server.requests[f"shard-00000{n}.tar"]}
        data = open_data(config.model_copy(update={"num_workers": 0}))
        groups = data.orders[0].shards_from(0)
        due = [*next(groups), *next(groups), *next(groups)]
        assert fetched == set(due[:5])
        stream.close()
        off = config.model_copy(update={"prefetch_shards": 0, "cache_dir": str(tmp_path / "other"), "num_workers": 0})
        server.requests.clear()
        stream = open_data(off).steps()
        next(stream)
        time.sleep(0.1)
        assert sum(server.requests[f"shard-00000{n}.tar"] for n in range(8)) <= 2


def read_steps(url: str, cache: str, limit_gib: float, steps: int, results: Any) -> None:
    config = DataConfig(
        train=url, cache_dir=cache, cache_size_gib=limit_gib, shuffle_shards=3, num_workers=2, fetch_wait_s=0.05
    )
    results.put([batch.tokens_hash for batch, _ in islice(open_data(config).steps(), steps)])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("roomy", [True, False])
def test_processes_share_one_cache(tmp_path: Path, roomy: bool) -> None:
    folder = random_dataset(tmp_path / "d", shards=9, count=40)
    reference = [b.tokens_hash for b in global_batches(DataConfig(train=str(folder), shuffle_shards=3), 80)[0]]
    with HttpFolder(folder) as server:
        probe = open_shards(
            DatasetConfig(path=server.url), DataConfig(train=server.url, cache_dir=str(tmp_path / "cache"))
        )
        sizes = sorted(probe.cache_bytes(n) for n in range(9))
        limit = (sum(sizes) + 1 if roomy else sum(sizes[-4:])) / 2**30
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        arguments = (server.url, str(tmp_path / "cache"), limit, 80, results)
        processes = [context.Process(target=read_steps, args=arguments) for _ in range(3)]
        for process in processes:
            process.start()
        for _ in processes:
            assert results.get(timeout=60) == reference
        for process in processes:
            process.join(20)
            assert process.exitcode == 0
        if roomy:
            assert max(server.requests[f"shard-00000{n}.tar"] for n in range(9)) == 1
        assert held(tmp_path / "cache") <= limit * 2**30


def test_leftovers_of_the_killed_are_removed_and_nothing_else(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 1000)
    cache.ensure(KEY.format(0), 100, filler(100))
    part = tmp_path / f"{KEY.format(1)}.500.part"  # nobody's: its lock is free
    part.mkdir()
    (part / "tar").write_bytes(b"half")
    cache.index(KEY.format(2)).write_bytes(b"x" * 50)  # killed between the two renames
    (tmp_path / f"{KEY.format(3)}.lock").touch()
    mine = cache.lock(KEY.format(4))  # somebody's, alive
    mine.acquire()
    alive = tmp_path / f"{KEY.format(4)}.200.part"
    alive.mkdir()
    cache.ensure(KEY.format(5), 100, filler(100))
    names = {path.name for path in tmp_path.iterdir()}
    expected = {f"{KEY.format(n)}.{kind}" for n in (0, 5) for kind in ("tar", "index", "lock")}
    assert names == expected | {"space.lock", alive.name, f"{KEY.format(4)}.lock"}


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from fusiontree.utils.file_lock import FileLock\n"
        "lock = FileLock(Path(sys.argv[1])); lock.acquire(); print('held', flush=True); time.sleep(60)"
    )
    path = tmp_path / "x.lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    lock = FileLock(path)
    assert not lock.acquire(wait=False)
    assert not lock.acquire(shared=True, wait=False)
    holder.kill()
    holder.wait()
    assert lock.acquire(wait=False)


def test_a_lock_on_a_removed_file_excludes_nobody_and_is_taken_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    first, second, third = FileLock(path), FileLock(path), FileLock(path)
    first.acquire()
    got: list[bool] = []
    waiter = threading.Thread(target=lambda: got.append(second.acquire()))
    waiter.start()
    time.sleep(0.05)
    path.unlink()
    first.close()
    waiter.join()
    assert got == [True]
    assert not third.acquire(wait=False)  # the waiter holds the file that is there now
