"""Shards of remote datasets are brought near before their rows are due."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType

from fusiontree.data.format import ShardDamage
from fusiontree.data.sources import Source
from fusiontree.utils.errors import UserError
from fusiontree.utils.threads import StoppableThread, Stopped

log = logging.getLogger(__name__)

_RECHECK_S = 5.0
_PAUSE_S = 0.2
"""Least time between two looks at the plan: a look costs the trainer's interpreter time, and a block lasts long."""


class ShardPrefetcher:
    """Threads that fetch what a plan lists, in its order, and look again whenever the reader has moved.

    They only help: what they cannot fetch, the reader meets itself and reports.
    """

    def __init__(self, plan: Callable[[], Iterable[tuple[Source, int]]], threads: int) -> None:
        """Start ``threads`` threads; ``plan`` lists the shards that should be near now."""
        self._plan = plan
        self._condition = threading.Condition()
        self._moves = 0
        self._closed = False
        self._failed: set[tuple[str, int]] = set()
        self._threads = [StoppableThread(self._work, f"fetch-{i}") for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def moved(self) -> None:
        """Say that other shards may be due."""
        with self._condition:
            self._moves += 1
            self._condition.notify_all()

    def _work(self) -> None:
        while not self._closed:
            seen = self._moves
            for source, number in self._plan():
                if self._closed:
                    return
                if (source.place, number) in self._failed:
                    continue
                try:
                    source.fetch(number)  # nothing if it is there, or another thread or process fetches it
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

    def __enter__(self) -> ShardPrefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        for thread in self._threads:
            thread.stop()
        self.moved()
        for thread in self._threads:
            thread.join(2.0)
