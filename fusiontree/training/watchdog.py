"""Ends a process that hangs, and says where it hung.

A collective that waits for a lost peer says nothing for half an hour and then names nobody. Here every rank notes what
it is doing; when one thing lasts longer than its limit, the rank writes its Python stacks and its section into the run
folder and leaves, so that a scheduler can start the job again. The next start puts what was left into events.jsonl.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXIT_CODE = 70
"""Exit code of a process that its watchdog ended (EX_SOFTWARE)."""


class Watchdog:
    """Watches one process from a thread of its own."""

    def __init__(self, run_dir: Path, rank: int, leave: Callable[[int], Any] = os._exit) -> None:
        """Prepare; ``leave`` ends the process and is replaced in tests."""
        self.folder = run_dir / "hangs"
        self.rank = rank
        self._leave = leave
        self._section: tuple[str, float, float] | None = None  # name, since, limit
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(timeout=5)

    @contextmanager
    def section(self, name: str, limit_s: float) -> Iterator[None]:
        """Note that the process is doing ``name``, which takes at most ``limit_s`` seconds; 0 sets no limit."""
        outer = self._section
        self._section = (name, time.monotonic(), limit_s)
        try:
            yield
        finally:
            # Time inside this section does not count against the one around it.
            self._section = (outer[0], time.monotonic(), outer[2]) if outer else None

    def _watch(self) -> None:
        while not self._closed.wait(0.2):
            section = self._section
            if section is None:
                continue
            name, since, limit = section
            lasted = time.monotonic() - since
            if limit and lasted > limit:
                self._report(name, lasted, limit)
                self._leave(EXIT_CODE)
                return

    def _report(self, name: str, lasted: float, limit: float) -> None:
        message = f"rank {self.rank} hung: '{name}' lasted {lasted:.0f} s, more than its limit of {limit:.0f} s"
        print(f"error: {message}; stacks are in {self.folder}", file=sys.stderr, flush=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank-{self.rank}.stacks.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            record = {"rank": self.rank, "section": name, "seconds": round(lasted, 1), "limit": limit}
            (self.folder / f"rank-{self.rank}.json").write_text(json.dumps(record))
        except OSError as error:  # a full disk must not keep the process alive
            print(f"error: the report could not be written: {error}", file=sys.stderr, flush=True)


def collect_hangs(run_dir: Path) -> list[dict[str, Any]]:
    """Return what watchdogs left in the run folder, and remove it; the stacks stay."""
    found = []
    for file in sorted((run_dir / "hangs").glob("rank-*.json")):
        try:
            found.append(json.loads(file.read_text()))
        except ValueError:
            found.append({"rank": file.stem.removeprefix("rank-"), "section": "unknown: its report was cut off"})
        file.unlink()
    return found
