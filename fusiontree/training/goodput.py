"""How much of a run's wall time became steps that were kept, and what took the rest: from events.jsonl alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusiontree.training.records import read_records


@dataclass
class Session:
    """One start of the training program, until its last sign of life."""

    began: float
    """Unix time in seconds."""
    first_step: int
    """The step it started or resumed after."""
    world_size: int
    last_sign: float = 0.0
    saves: list[tuple[int, float]] = field(default_factory=list)
    """Step and training seconds of this session so far, at every save."""
    end: str | None = None
    """finished, stopped, interrupted with its reason, or None: it ended without a word."""

    def kept(self, until_step: int) -> float:
        """Training seconds of this session that the run kept, when the next one resumed after ``until_step``."""
        return max((seconds for step, seconds in self.saves if step <= until_step), default=0.0)


@dataclass(frozen=True)
class Interruption:
    """The gap between two sessions."""

    step: int
    """Where the next session resumed."""
    cause: str
    lost_s: float
    """From the last kept save to the resume."""


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


_FAULTS = ("step_skipped", "checkpoint_damaged", "hang", "save_failed", "wandb_failed", "partial_checkpoint_removed")


def account(run_dir: Path) -> Goodput:
    """Read a run's events and add up.

    Raises:
        ValueError: the folder holds no events.
    """
    events = read_records(run_dir / "events.jsonl")
    if not events:
        raise ValueError(f"'{run_dir}' holds no events.jsonl, so it is no run's folder, or the run never started")
    sessions: list[Session] = []
    saved_at: dict[int, float] = {}
    saving = 0.0
    for event in events:
        now, kind = event["unix_time"], event["event"]
        if kind in ("start", "resume"):
            sessions.append(Session(now, event["step"], event["world_size"], last_sign=now))
        if not sessions:
            continue
        session = sessions[-1]
        session.last_sign = now
        if kind == "save":
            session.saves.append((event["step"], event["train_seconds"]))
            saved_at[event["step"]] = now
            saving += event["seconds"]
        elif kind in ("finished", "stopped", "interrupted"):
            session.end = event["reason"]
    kept = 0.0
    interruptions = []
    for session, following in zip(sessions, [*sessions[1:], None], strict=True):
        kept += session.kept(following.first_step if following else 1 << 62)
        if following:
            cause = session.end or _cause(events, session, following)
            resumed_from = saved_at.get(following.first_step, sessions[0].began)
            interruptions.append(Interruption(following.first_step, cause, following.began - resumed_from))
    return Goodput(
        wall_s=events[-1]["unix_time"] - events[0]["unix_time"],
        kept_s=kept,
        saving_s=saving,
        sessions=sessions,
        interruptions=interruptions,
        faults=[event for event in events if event["event"] in _FAULTS],
    )


def _cause(events: list[dict[str, Any]], session: Session, following: Session) -> str:
    """What a session that ended without a word may have died of: hangs are found by the next start."""
    hangs = [e for e in events if e["event"] == "hang" and session.last_sign <= e["unix_time"] <= following.began + 60]
    if hangs:
        return "; ".join(f"rank {h['rank']} hung in '{h['section']}'" for h in hangs)
    return "killed or crashed without a word"
