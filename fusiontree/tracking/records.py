"""The record files of a run: metrics.jsonl and events.jsonl; experiment trackers follow the former."""

from __future__ import annotations

import functools
import logging
import os
import secrets
import time
from pathlib import Path
from typing import Any

from fusiontree.tracking.config import LoggingConfig
from fusiontree.tracking.json_lines import format_line, parse_line
from fusiontree.tracking.tracker_process import TrackerProcess
from fusiontree.utils.files import atomic_write

log = logging.getLogger(__name__)

_CLOCK_JUMP_S = 10.0
"""Corrections of the clock over the network are smaller."""


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSONL file: events have a name, metrics a step.

    A last line that a crash cut off is omitted. Damaged lines, or a file that cannot be read, cost one warning: records
    are no precondition of a run.
    """
    records, damaged = parse_records(path)
    if damaged:
        _warn(f"{path}: {len(damaged)} damaged lines are left out; the first is line {damaged[0][0]}")
    return records


def parse_records(path: Path) -> tuple[list[dict[str, Any]], list[tuple[int, bytes]]]:
    """Return the records of a JSONL file, and number and bytes of each damaged line; see :func:`read_records`."""
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    except OSError as error:
        _warn(f"{path} cannot be read ({error.strerror}); the run goes on as if it were empty")
        return [], []
    records: list[dict[str, Any]] = []
    damaged: list[tuple[int, bytes]] = []
    for number, line in enumerate(lines, start=1):
        record = parse_line(line, "event" if path.name.startswith("events") else "step")
        if record is not None:
            records.append(record)
        elif line.strip() and number < len(lines):  # the last line has no end: a crash cut it off
            damaged.append((number, line))
    return records, damaged


@functools.cache
def _warn(message: str) -> None:
    """Warn once per process: several readers meet the same damage."""
    log.warning("%s", message)


class Records:
    """Appends to the run's record files. On other ranks than the main one it writes nothing."""

    def __init__(self, run_dir: Path, enabled: bool) -> None:
        """Open for a run folder that exists; ``enabled`` on the main rank only."""
        self.metrics_path = run_dir / "metrics.jsonl"
        self.events_path = run_dir / "events.jsonl"
        self.enabled = enabled
        self._unwritten: dict[Path, list[str]] = {}
        self._whole: set[Path] = set()  # files that end with a complete line
        self._trackers: list[TrackerProcess] = []
        self._session = secrets.token_hex(4)
        self._began = time.monotonic()
        self._clock_offset = time.time() - self._began

    def open_trackers(self, config: LoggingConfig, run_dir: Path, values: dict[str, Any], after_step: int) -> None:
        """Start the configured experiment trackers for the steps after ``after_step``.

        Args:
            config: the ``logging`` section.
            run_dir: the run folder.
            values: the whole configuration as plain values.
            after_step: step of the checkpoint that training starts from.

        Raises:
            UserError: the package of a tracker is not installed.
        """
        for name in config.trackers if self.enabled else ():
            tracker = TrackerProcess(name, config, run_dir, values, after_step)
            self._trackers.append(tracker)
            if tracker.note:
                self.event(f"{name}_offline", reason=tracker.note)

    def truncate_metrics(self, step: int) -> int:
        """Move lines after ``step`` to metrics.discarded.jsonl, as training repeats these steps.

        Damaged lines move to metrics.damaged.txt. Where the files cannot be written, it warns and changes nothing.

        Returns:
            The last step that was moved; ``step`` if there is none.
        """
        if not self.enabled:
            return step
        records, damaged = parse_records(self.metrics_path)
        later = [r for r in records if r["step"] > step]
        try:
            if damaged:
                _warn(f"{self.metrics_path}: {len(damaged)} damaged lines are now in metrics.damaged.txt")
                with self.metrics_path.with_name("metrics.damaged.txt").open("ab") as raw:
                    raw.writelines(line + b"\n" for _, line in damaged)
            if later:
                with self.metrics_path.with_name("metrics.discarded.jsonl").open("a", encoding="utf-8") as file:
                    file.writelines(format_line(r) for r in later)
                    file.flush()
                    os.fsync(file.fileno())  # before the lines leave the other file
            if later and not damaged and (end := _start_of_tail(self.metrics_path, later)) is not None:
                os.truncate(self.metrics_path, end)
            elif later or damaged:
                with atomic_write(self.metrics_path) as file:
                    file.writelines(format_line(r) for r in records if r["step"] <= step)
        except OSError as error:
            _warn(f"{self.metrics_path} keeps lines after step {step}: {error}")
        return max((r["step"] for r in later), default=step)

    def metrics(self, values: dict[str, Any]) -> None:
        """Append one logged step, with the time."""
        if not self.enabled:
            return
        self._append(self.metrics_path, values | {"unix_time": round(time.time(), 3)})
        for tracker in self._trackers:
            if problem := tracker.failure():
                self.event(f"{tracker.name}_failed", reason=problem)

    def event(self, event: str, **details: Any) -> None:
        """Append an event: a start, a resume, a save, a skipped step, a fault.

        ``session`` names this process; ``session_s`` is the monotonic time since its start, without clock jumps.
        """
        if not self.enabled:
            return
        offset = time.time() - time.monotonic()
        if abs(offset - self._clock_offset) > _CLOCK_JUMP_S:
            jump, self._clock_offset = offset - self._clock_offset, offset
            self.event("clock_jump", seconds=round(jump, 1), reason=f"the machine's clock jumped by {jump:+.0f} s")
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "unix_time": time.time(),
            "session": self._session,
            "session_s": round(time.monotonic() - self._began, 3),
            "event": event,
        }
        self._append(self.events_path, entry | details)

    def close(self, patience_s: float = 60.0) -> None:
        """End the trackers, each within ``patience_s``, and write lines that are left."""
        for tracker in self._trackers:
            if problem := tracker.close(patience_s):
                self.event(f"{tracker.name}_failed", reason=problem)
        self.flush()

    def flush(self) -> None:
        """Try again to write lines that a full disk refused."""
        for path in list(self._unwritten):
            self._append(path, None)

    def _append(self, path: Path, values: dict[str, Any] | None) -> None:
        """Append a line; lines that cannot be written now are kept in order for the next call."""
        lines = self._unwritten.setdefault(path, [])
        if values is not None:
            lines.append(format_line(values))
        try:
            with path.open("ab", buffering=0) as file:  # a buffer would be written again on closing
                end = file.tell() if path in self._whole else _end_of_lines(path)
                file.truncate(end)
                data = "".join(lines).encode()
                written = 0
                try:
                    while written < len(data):
                        written += file.write(data[written:]) or 0
                except OSError:
                    file.truncate(end)  # all or nothing: the lines come again
                    raise
                self._whole.add(path)
        except OSError as error:
            if len(lines) == 1:
                log.error("cannot write %s (%s); its lines are kept until it can be written", path, error)
            return
        del self._unwritten[path]


def _start_of_tail(path: Path, records: list[dict[str, Any]]) -> int | None:
    """Return the offset of the lines of ``records`` if the file ends with exactly them, else None."""
    tail = "".join(format_line(r) for r in records).encode()
    start = _end_of_lines(path) - len(tail)
    if start < 0:
        return None
    with path.open("rb") as file:
        file.seek(max(0, start - 1))
        before = file.read(min(1, start))
        return start if before in (b"", b"\n") and file.read(len(tail)) == tail else None


def _end_of_lines(path: Path) -> int:
    """Return the offset of the end of the last complete line: a crash may have left a partial line after it."""
    with path.open("rb") as file:
        position = file.seek(0, 2)
        while position:
            start = max(0, position - 65536)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            position = start
    return 0
