"""Counts the starts of a run, and delays or refuses starts after failures in a row.

A scheduler or launcher restarts a dead run again and again. That is right after a lost node, but wasteful if each start
dies at the same place: then each start waits longer than the previous start, and after a number of failures it refuses.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusiontree.supervision.config import SupervisionConfig
from fusiontree.tracking.crash_report import explain, read_reports
from fusiontree.tracking.records import read_records
from fusiontree.utils.errors import UserError

log = logging.getLogger(__name__)

_LONGEST_WAIT_S = 600.0
_ENDS = ("finished", "stopped", "interrupted")


def count_starts(events: list[dict[str, Any]]) -> int:
    """Return how often the run was started so far."""
    return sum(event["event"] in ("start", "resume") for event in events)


def failures_in_a_row(events: list[dict[str, Any]]) -> int:
    """Return how many of the last starts died before they saved a new checkpoint, one after the other."""
    failed = 0
    for event in events:
        kind = event["event"]
        if kind in ("start", "resume"):
            failed += 1  # until it saves a checkpoint or ends well
        elif kind == "save" or kind in _ENDS:
            failed = 0
    return failed


def apply_restart_policy(run_dir: Path, config: SupervisionConfig, sleep: Callable[[float], None] = time.sleep) -> None:
    """Wait before a start if the last starts failed without progress; refuse it if too many did.

    Every rank reads the same events and comes to the same answer.

    Raises:
        UserError: ``max_failed_starts`` starts in a row died without a new checkpoint.
    """
    failed = failures_in_a_row(read_records(run_dir / "events.jsonl"))
    limit = config.max_failed_starts
    if limit and failed >= limit:
        raise UserError(
            f"the last {failed} starts of {run_dir} died before they saved a new checkpoint, as many as "
            f"supervision.max_failed_starts allows; the last one: {explain(read_reports(run_dir))}. Mend the cause; "
            f"supervision.max_failed_starts=0 tries again"
        )
    if failed >= 2:  # a single failure needs no delay
        seconds = min(config.restart_backoff_s * 2 ** (failed - 2), _LONGEST_WAIT_S)
        log.warning("the last %d starts died without progress: waiting %.0f s before the next", failed, seconds)
        sleep(seconds)
