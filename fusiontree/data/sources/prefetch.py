"""Fetches shards of remote datasets into the cache before their rows are needed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from fusiontree.data.format import ShardDamage
from fusiontree.data.sources.base import TokenSource
from fusiontree.utils.errors import UserError
from fusiontree.utils.threads import StoppableThread, Stopped

log = logging.getLogger(__name__)

_RECHECK_S = 5.0
_PAUSE_S = 0.2
"""Minimum time between two lists: a call takes the GIL from the trainer, and the list changes seldom."""


class ShardPrefetcher:
    """Threads that fetch the shards of ``list_shards`` in order, and list them again when the reader has moved.

    Failures here only cost time: the reader fetches the shard again and reports the error.
    """

    def __init__(self, list_shards: Callable[[], Iterable[tuple[TokenSource, int]]], threads: int) -> None:
        """Start ``threads`` threads; ``list_shards`` returns the shards that should be in the cache now."""
        self._list_shards = list_shards
        self._condition = threading.Condition()
        self._moves = 0
        self._closed = False
        self._failed: set[tuple[str, int]] = set()
        self._threads = [StoppableThread(self._work, f"fetch-{i}") for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def moved(self) -> None:
        """Notify the threads that the reader has moved, so the list may have changed."""
        with self._condition:
            self._moves += 1
            self._condition.notify_all()

    def _work(self) -> None:
        while not self._closed:
            seen = self._moves
            for source, number in self._list_shards():
                if self._closed:
                    return
                if (source.place, number) in self._failed:
                    continue
                try:
                    source.fetch(number)  # no-op if it is cached or another thread or process fetches it
                except (ShardDamage, UserError) as error:
                    self._failed.add((source.place, number))
                    log.warning("fetching ahead failed: %s", error)
                except Stopped:
                    raise
                except Exception:
                    self._failed.add((source.place, number))
                    log.warning("fetching ahead failed", exc_info=True)
            time.sleep(_PAUSE_S)
            with self._condition:
                self._condition.wait_for(lambda before=seen: self._closed or self._moves != before, _RECHECK_S)  # type: ignore[misc]

    def close(self) -> None:
        """End the threads; a thread still in a transfer after two seconds is abandoned."""
        self._closed = True
        for thread in self._threads:
            thread.stop()
        self.moved()
        for thread in self._threads:
            thread.join(2.0)
