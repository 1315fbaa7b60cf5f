"""Ends a process that hangs, and says where it hung and which rank is to blame.

A collective that waits for a lost peer says nothing for half an hour and then names nobody. Here every rank notes what
it is doing; when one thing lasts longer than its limit, the rank writes its Python stacks and its section into the run
folder, looks at what the other ranks wrote, and leaves, so that a scheduler can start the job again. The next start
puts what was left into events.jsonl.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusiontree.tracking.crash_report import FOLDER, explain, read_reports, write_report
from fusiontree.utils.errors import UserError

EXIT_CODE = 70
"""Exit code of a process that its watchdog ended (EX_SOFTWARE)."""
_WRITING_S = 8.0
"""The report's file system may be what hangs; after this the process leaves without it."""
_PEERS_S = 3.0
"""How long to wait for the reports of the other ranks, whose limits end at about the same time."""


class Watchdog:
    """Watches one process from a thread of its own."""

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        world_size: int = 1,
        leave: Callable[[int], Any] = os._exit,
        flight_record: Callable[[], bytes | None] = lambda: None,
    ) -> None:
        """Prepare.

        Args:
            run_dir: folder of the run; reports go to its folder ``hangs``.
            rank: this process among all.
            world_size: number of processes.
            leave: ends the process; replaced in tests.
            flight_record: returns the communication library's own record of the last collectives, where it keeps one.
        """
        self.run_dir = run_dir
        self.rank, self.world_size = rank, world_size
        self.step = 0
        """The optimizer step the process is in, for the report."""
        self.silent_hosts: Callable[[], list[str]] = list
        """Returns the job's hosts that no longer answer this one, for the report."""
        self._leave = leave
        self._flight_record = flight_record
        self._entered = 0
        self._section: tuple[str, float, float] | None = None  # name, since, limit
        self._failed_in: str | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._closed.set()
        if error is not None:
            self._write_crash(error)
        self._thread.join(timeout=5)

    @contextmanager
    def section(self, name: str, limit_s: float) -> Iterator[None]:
        """Note that the process is doing ``name``, which takes at most ``limit_s`` seconds; 0 sets no limit."""
        outer = self._section
        self._entered += 1
        self._section, self._failed_in = (name, time.monotonic(), limit_s), None
        try:
            yield
        except BaseException:
            self._failed_in = self._failed_in or name  # the innermost, for the report of a crash
            raise
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
                # In a thread of its own: a file system that hangs must not keep the process alive.
                report = threading.Thread(target=self._report, args=(name, lasted, limit), daemon=True)
                report.start()
                report.join(_WRITING_S)
                self._leave(EXIT_CODE)
                return

    def _state(self, kind: str, section: str) -> dict[str, Any]:
        return {
            "kind": kind,
            "world_size": self.world_size,
            "step": self.step,
            "section": section,
            "sections": self._entered,
        }

    def _report(self, name: str, lasted: float, limit: float) -> None:
        message = f"rank {self.rank} hung: '{name}' lasted {lasted:.0f} s, more than its limit of {limit:.0f} s"
        _complain(f"{message}; stacks are in {self.run_dir / FOLDER}")
        values = {**self._state("hang", name), "seconds": round(lasted, 1), "limit": limit}
        values["silent_hosts"] = self.silent_hosts()
        try:
            write_report(self.run_dir, self.rank, values)
            with (self.run_dir / FOLDER / f"rank-{self.rank}.stacks.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            record = self._flight_record()
            if record:
                (self.run_dir / FOLDER / f"rank-{self.rank}.nccl").write_bytes(record)
            until = time.monotonic() + _PEERS_S
            while len(read_reports(self.run_dir)) < self.world_size and time.monotonic() < until:
                time.sleep(0.2)
            _complain(explain(read_reports(self.run_dir)))
        except Exception as error:  # a full disk must not keep the process alive
            _complain(f"the report could not be written: {error}")

    def _write_crash(self, error: BaseException) -> None:
        section = self._failed_in or "between sections"
        values = {**self._state("crash", section), "error": summarize_error(error)}
        try:
            write_report(self.run_dir, self.rank, values)
            with (self.run_dir / FOLDER / f"rank-{self.rank}.stacks.txt").open("w") as file:
                traceback.print_exception(error, file=file)
        except OSError as problem:
            _complain(f"the report of the error could not be written: {problem}")


def summarize_error(error: BaseException) -> str:
    """Return an error in a line: its kind and message; of a long message its first and last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"
    return (text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")[:1000]


def _complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
