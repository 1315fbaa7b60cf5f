"""Goodput of a run, the share of its wall time spent on steps that were kept, from events.jsonl alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from fusiontree.tracking.crash_report import NO_REPORT, explain, read_reports
from fusiontree.tracking.records import read_records
from fusiontree.utils.errors import UserError


@dataclass
class Session:
    """One start of the training program, until its last event. Times are seconds since the run's first event."""

    began: float
    first_step: int
    """The step it started or resumed after."""
    world_size: int
    last_sign: float = 0.0
    saves: list[tuple[int, float]] = field(default_factory=list)
    """Step and training seconds of this session so far, at every save."""
    is_done: bool = False
    """It reached its last step; until the next start nothing was to do."""
    end: str | None = None
    """Reason recorded by the session itself: finished, stopped or interrupted. None: it recorded no end."""
    cause: str | None = None
    """Cause of its end that the next start, or a crash report, recorded."""

    def kept(self, until_step: int) -> float:
        """Return the training seconds of this session up to ``until_step``, after which the next session resumed."""
        return max((seconds for step, seconds in self.saves if step <= until_step), default=0.0)


@dataclass(frozen=True)
class Interruption:
    """The gap between two sessions, or a return to a checkpoint within one."""

    step: int
    """Step after which training resumed."""
    cause: str
    lost_s: float
    """From the last kept save, or the start of the session that made none, to the resume."""
    at_s: float
    """Time of the resume, in seconds since the run's first event."""


@dataclass(frozen=True)
class Goodput:
    """Use of a run's wall time."""

    wall_s: float
    kept_s: float
    saving_s: float
    idle_s: float
    """Part of ``wall_s`` between an end that the user asked for and the next start."""
    sessions: list[Session]
    interruptions: list[Interruption]
    faults: list[dict[str, Any]]

    @property
    def share(self) -> float:
        """Kept training time over busy time."""
        return self.kept_s / self.busy_s if self.busy_s else 0.0

    @property
    def busy_s(self) -> float:
        """Wall time without the idle time."""
        return self.wall_s - self.idle_s

    def shares(self) -> list[tuple[str, float, str]]:
        """Return the uses of the wall time: name, seconds and a colour; the seconds add up to ``wall_s``."""
        lost = min(sum(i.lost_s for i in self.interruptions), max(0.0, self.busy_s - self.kept_s - self.saving_s))
        rest = max(0.0, self.busy_s - self.kept_s - self.saving_s - lost)
        idle = [("idle after an end", self.idle_s, "#d5dae0")] if self.idle_s else []
        return [
            ("kept steps", self.kept_s, "#009E73"),
            ("saving", self.saving_s, "#56B4E9"),
            ("lost to interruptions", lost, "#D55E00"),
            ("starting, validating, other", rest, "#9aa5b1"),
            *idle,
        ]


FAULTS = (
    *("step_skipped", "rewind", "checkpoint_damaged", "partial_checkpoint_removed", "failed"),
    *("hang", "crash", "slow_rank", "slow_node", "unfit_node", "replica_mismatch"),
    *("_failed", "_offline", "clock_jump"),
)
"""Endings of the names of events that the report counts and shows; trackers add NAME_failed and NAME_offline."""


_TIMED = frozenset({"unix_time"})
_FIELDS: dict[str, frozenset[str]] = {
    "start": _TIMED | {"step", "world_size"},
    "resume": _TIMED | {"step", "world_size"},
    "save": _TIMED | {"step", "train_seconds", "seconds"},
    "rewind": _TIMED | {"to_step", "reason"},
    **dict.fromkeys(("hang", "crash", "failed", "finished", "stopped", "interrupted"), _TIMED | {"reason"}),
}
"""What the report reads of an event; an event without it is left out."""


def account(run_dir: Path) -> Goodput:
    """Read a run's events and sum up its wall time.

    Raises:
        UserError: the folder holds no events.
    """
    events = [e for e in read_records(run_dir / "events.jsonl") if _FIELDS.get(e["event"], _TIMED) <= e.keys()]
    if not events:
        raise UserError(f"'{run_dir}' holds no events.jsonl, so it is no run folder, or the run never started")
    sessions: list[Session] = []
    interruptions: list[Interruption] = []
    saved_at: dict[int, float] = {}
    saving = idle = 0.0
    times = timeline(events)
    for now, event in zip(times, events, strict=True):
        kind = event["event"]
        if kind in ("start", "resume"):
            step = event["step"]
            if sessions and sessions[-1].is_done:
                idle += now - sessions[-1].last_sign
            elif sessions:
                lost = now - max(saved_at.get(step, 0.0), sessions[-1].began)
                interruptions.append(Interruption(step, _why_ended(sessions[-1]), lost, now))
            sessions.append(Session(now, step, event["world_size"]))
        if not sessions:
            continue
        session = sessions[-1]
        if kind in ("hang", "crash"):  # written by the next start about the previous one
            session.cause = event["reason"]
            continue
        if not session.is_done:  # the next start writes events before its own: changed settings, damage that it found
            session.last_sign = now
        if kind == "save":
            session.saves.append((event["step"], event["train_seconds"]))
            saved_at[event["step"]] = now
            saving += event["seconds"]
        elif kind == "rewind":
            back = event["to_step"]
            interruptions.append(Interruption(back, event["reason"], now - saved_at.get(back, session.began), now))
        elif kind == "failed":
            session.cause = event["reason"]
        elif kind in ("finished", "stopped", "interrupted"):
            session.end = event["reason"]
            session.is_done = kind != "interrupted"
    kept, until_step = 0.0, 1 << 62
    for session in reversed(sessions):
        kept += session.kept(until_step)
        until_step = min(until_step, session.first_step)
    if sessions and sessions[-1].end is None and (reports := read_reports(run_dir)):
        sessions[-1].cause = explain(reports)  # no later start has recorded it as an event
    return Goodput(
        wall_s=times[-1],
        kept_s=kept,
        saving_s=saving,
        idle_s=idle,
        sessions=sessions,
        interruptions=interruptions,
        faults=[event for event in events if event["event"].endswith(FAULTS)],
    )


def timeline(events: list[dict[str, Any]]) -> list[float]:
    """Return the time of each event in seconds since the first, independent of jumps of the machine's clock.

    Within a process, its monotonic time counts. Between two processes only the clock is known: the times with and
    without the jumps that the first process saw are computed, and the shorter one that is not negative is taken.
    """
    times = [0.0]
    began_unix, began_s = events[0]["unix_time"], events[0].get("session_s", 0.0)
    for before, event in pairwise(events):
        by_clock = event["unix_time"] - before["unix_time"]
        if "session" in event and event["session"] == before.get("session"):
            passed = event["session_s"] - before["session_s"]
        else:
            steady = began_unix + before.get("session_s", 0.0) - began_s if "session" in before else before["unix_time"]
            candidates = [seconds for seconds in (by_clock, event["unix_time"] - steady) if seconds >= 0]
            passed = min(candidates, default=0.0)
            began_unix, began_s = event["unix_time"], event.get("session_s", 0.0)
        times.append(times[-1] + passed)
    return times


def _why_ended(session: Session) -> str:
    return session.end or session.cause or NO_REPORT
