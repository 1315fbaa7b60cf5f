"""Crash reports: each rank's account of its hang or crash, and the conclusion that the next start draws from them.

Each rank writes RUN/hangs/rank-N.json by itself, because ranks that hang cannot communicate. All ranks enter the same
sections in the same order, so the rank that entered the fewest is behind. A rank without a report was stopped, killed
or cut off from the file system.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from fusiontree.utils.files import atomic_write

FOLDER = "hangs"

NO_REPORT = "killed or crashed without a report"

_PEER_LOST = ("closed by peer", "reset by peer", "connection refused", "broken pipe", "nccl", "gloo", "tcpstore")
"""Words in the error of a rank whose peer failed."""


def write_report(run_dir: Path, rank: int, values: dict[str, Any]) -> None:
    """Write one rank's report; ``values`` has at least ``kind`` (hang or crash), ``world_size`` and ``section``."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    record = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "unix_time": time.time(), **values}
    with atomic_write(folder / f"rank-{rank}.json") as file:
        json.dump(record, file)


def read_reports(run_dir: Path) -> list[dict[str, Any]]:
    """Return the reports in the run folder, ordered by rank."""
    found = []
    for file in (run_dir / FOLDER).glob("rank-*.json"):
        if not (number := file.stem.removeprefix("rank-")).isdecimal():
            continue
        unknown = {"rank": int(number), "kind": "hang", "section": "unknown: its report cannot be read"}
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            report = None
        found.append({**report, "rank": int(number)} if _is_whole(report) else unknown)
    return sorted(found, key=lambda report: report["rank"])


def _is_whole(report: Any) -> bool:
    """Return whether a report has what :func:`explain` reads."""
    if not isinstance(report, dict):
        return False
    required = {"kind", "section"} | ({"error", "unix_time"} if report.get("kind") == "crash" else set())
    return required <= report.keys()


def collect_reports(run_dir: Path) -> list[dict[str, Any]]:
    """Return the reports and delete their files; files with stacks stay until the next reports replace them."""
    found = read_reports(run_dir)
    for report in found:
        (run_dir / FOLDER / f"rank-{report['rank']}.json").unlink(missing_ok=True)
    return found


def explain(reports: list[dict[str, Any]]) -> str:
    """Return a sentence that names the most likely cause of the end of the run and the ranks to inspect first."""
    if not reports:
        return NO_REPORT
    own = [r for r in reports if r.get("kind") == "crash" and not _lost_a_peer(r["error"])]
    if own:
        first = min(own, key=lambda report: report["unix_time"])
        return f"{_name(first)} failed in '{first['section']}': {first['error']}"
    cut = next((r for r in reports if r.get("silent_hosts")), None)
    if cut is not None:
        hosts = ", ".join(cut["silent_hosts"][:4])
        return (
            f"{_name(cut)} waited in '{cut['section']}'{_at_step(cut)} and no longer reaches {hosts}: link or host down"
        )
    present = {report["rank"] for report in reports}
    missing = sorted(set(range(reports[0].get("world_size", 0))) - present)
    waiting = f"{_name(reports[0])} waited in '{reports[0]['section']}'" + _at_step(reports[0])
    if missing:
        which = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
        plural = "ranks" if len(missing) > 1 else "rank"
        return f"{plural} {which} left no report: stopped, killed or cut off, while {waiting}"
    entered = [report.get("sections", 0) for report in reports]
    if len(reports) > 1 and min(entered) < max(entered):
        behind = reports[entered.index(min(entered))]
        ahead = reports[entered.index(max(entered))]
        return (
            f"{_name(behind)} hung in '{behind['section']}'{_at_step(behind)}, while {_name(ahead)} was further on, in "
            f"'{ahead['section']}'"
        )
    if len(reports) == 1:
        verb = "hung in" if reports[0].get("kind") != "crash" else "failed in"
        what = f": {reports[0]['error']}" if "error" in reports[0] else ""
        return f"{_name(reports[0])} {verb} '{reports[0]['section']}'{_at_step(reports[0])}{what}"
    said = next((f" ({report['error']})" for report in reports if "error" in report), "")
    return (
        f"all {len(reports)} ranks waited in '{reports[0]['section']}'{_at_step(reports[0])}: network or device{said}"
    )


def _lost_a_peer(error: str) -> bool:
    return any(sign in error.lower() for sign in _PEER_LOST)


def _name(report: dict[str, Any]) -> str:
    return f"rank {report['rank']}" + (f" ({report['host']})" if "host" in report else "")


def _at_step(report: dict[str, Any]) -> str:
    return f" of step {report['step']}" if report.get("step") else ""
