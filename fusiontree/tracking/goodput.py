"""How much of a run's wall time became steps that were kept, and what took the rest: from events.jsonl alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from fusiontree.tracking.crash_report import explain, read_reports
from fusiontree.tracking.records import read_records
from fusiontree.utils.errors import UserError


@dataclass
class Session:
    """One start of the training program, until its last sign of life. Times are seconds since the run's first event."""

    began: float
    first_step: int
    """The step it started or resumed after."""
    world_size: int
    last_sign: float = 0.0
    saves: list[tuple[int, float]] = field(default_factory=list)
    """Step and training seconds of this session so far, at every save."""
    end: str | None = None
    """finished, stopped, interrupted with its reason, or None: it ended without a word."""
    cause: str | None = None
    """What ended it, where it did not say so in time."""

    def kept(self, until_step: int) -> float:
        """Training seconds of this session that the run kept, when the next one resumed after ``until_step``."""
        return max((seconds for step, seconds in self.saves if step <= until_step), default=0.0)


@dataclass(frozen=True)
class Interruption:
    """The gap between two sessions, or a return to a checkpoint within one."""

    step: int
    """Where it went on."""
    cause: str
    lost_s: float
    """From the last kept save, or the start of the session that made none, to the resume."""


@dataclass(frozen=True)
class Goodput:
    """The account of a run."""

    wall_s: float
    kept_s: float
    saving_s: float
    sessions: list[Session]
    interruptions: list[Interruption]
    faults: list[dict[str, Any]]

    @property
    def share(self) -> float:
        """Kept training time over wall time."""
        return self.kept_s / self.wall_s if self.wall_s else 0.0

    def shares(self) -> list[tuple[str, float, str]]:
        """Return what the wall time went into: name, seconds and a colour; the seconds add up to ``wall_s``."""
        lost = min(sum(i.lost_s for i in self.interruptions), max(0.0, self.wall_s - self.kept_s - self.saving_s))
        rest = max(0.0, self.wall_s - self.kept_s - self.saving_s - lost)
        return [
            ("kept steps", self.kept_s, "tab:green"),
            ("saving", self.saving_s, "tab:blue"),
            ("lost to interruptions", lost, "tab:red"),
            ("starting, validating, other", rest, "tab:grey"),
        ]


FAULTS = (
    *("step_skipped", "rewind", "checkpoint_damaged", "partial_checkpoint_removed", "save_failed", "failed"),
    *("hang", "crash", "slow_rank", "slow_node", "unfit_node", "replica_mismatch"),
    *("wandb_failed", "wandb_offline", "tensorboard_failed", "clock_jump"),
)
"""Events that the report counts and shows."""


def account(run_dir: Path) -> Goodput:
    """Read a run's events and add up.

    Raises:
        UserError: the folder holds no events.
    """
    events = read_records(run_dir / "events.jsonl")
    if not events:
        raise UserError(f"'{run_dir}' holds no events.jsonl, so it is no run's folder, or the run never started")
    sessions: list[Session] = []
    interruptions: list[Interruption] = []
    saved_at: dict[int, float] = {}
    saving = 0.0
    times = timeline(events)
    for now, event in zip(times, events, strict=True):
        kind = event["event"]
        if kind in ("start", "resume"):
            step = event["step"]
            if sessions:
                lost = now - max(saved_at.get(step, 0.0), sessions[-1].began)
                interruptions.append(Interruption(step, _why_ended(sessions[-1]), lost))
            sessions.append(Session(now, step, event["world_size"]))
        if not sessions:
            continue
        session = sessions[-1]
        if kind in ("hang", "crash"):  # written by the next start, about the one before
            session.cause = event["reason"]
            continue
        session.last_sign = now
        if kind == "save":
            session.saves.append((event["step"], event["train_seconds"]))
            saved_at[event["step"]] = now
            saving += event["seconds"]
        elif kind == "rewind":
            back = event["to_step"]
            interruptions.append(Interruption(back, event["reason"], now - saved_at.get(back, session.began)))
        elif kind == "failed":
            session.cause = event["reason"]
        elif kind in ("finished", "stopped", "interrupted"):
            session.end = event["reason"]
    kept, until_step = 0.0, 1 << 62
    for session in reversed(sessions):
        kept += session.kept(until_step)
        until_step = min(until_step, session.first_step)
    if sessions and sessions[-1].end is None and (reports := read_reports(run_dir)):
        sessions[-1].cause = explain(reports)  # nobody started the run again to put this into its events
    return Goodput(
        wall_s=times[-1],
        kept_s=kept,
        saving_s=saving,
        sessions=sessions,
        interruptions=interruptions,
        faults=[event for event in events if event["event"] in FAULTS],
    )


def timeline(events: list[dict[str, Any]]) -> list[float]:
    """Return when each event happened, in seconds since the first, however the machine's clock jumped meanwhile.

    Within a process its own time counts. Between two processes there is only the clock; of what it says with and
    without a jump that was seen, the shorter time that is not negative is taken.
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
    return session.end or session.cause or "killed or crashed without a word"
