"""Finds checkpoints that a run's records know of and that are gone, so that no run silently goes back to old ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.folders import complete_checkpoints, damaged_steps, folder_step
from fusiontree.tracking.records import read_records
from fusiontree.utils.errors import UserError


def known_steps(events: Sequence[dict[str, Any]]) -> set[int]:
    """Return the steps of the checkpoints that must exist according to a run's events.

    A save adds a step; retention, setting a damaged checkpoint aside and a resume from an earlier step (which was
    allowed then) take steps away.
    """
    known: set[int] = set()
    for event in events:
        kind, step = event["event"], event.get("to_step", event.get("step"))
        if kind == "save" and isinstance(step, int):
            known.add(step)
            removed = event.get("removed")
            known -= {_step_of(name) for name in removed} if isinstance(removed, list) else set()
        elif kind == "checkpoint_set_aside":
            known.discard(_step_of(event.get("folder")))
        elif kind in ("start", "resume", "rewind") and isinstance(step, int):
            known = {known_step for known_step in known if known_step <= step}
    return known


def lost_steps(run_dir: Path, config: CheckpointConfig) -> tuple[list[int], int]:
    """Return the steps of lost checkpoints later than the newest complete one, and the step of that one (0: none).

    Without readable events, metrics of two save intervals after the newest checkpoint prove that one is lost: a save
    begins only after the previous save has ended.
    """
    checkpoints = run_dir / "checkpoints"
    events = read_records(run_dir / "events.jsonl")  # before the folders: another process may save meanwhile
    newest = max((folder_step(folder) for folder in complete_checkpoints(checkpoints)), default=0)
    lost = {step for step in known_steps(events) if step > newest} - damaged_steps(checkpoints)
    if not events and config.save_interval:
        last = max((record["step"] for record in read_records(run_dir / "metrics.jsonl")), default=0)
        due = (newest // config.save_interval + 1) * config.save_interval
        if last > due + config.save_interval:
            lost = {due} - damaged_steps(checkpoints)
    return sorted(lost), newest


def check_nothing_lost(run_dir: Path, config: CheckpointConfig) -> str | None:
    """Compare the run's records with its checkpoints; return a warning if a loss is accepted, None without a loss.

    Raises:
        UserError: the records know of checkpoints later than the newest complete one, and ``checkpoint.resume_step``
            does not accept to continue from that one.
    """
    lost, newest = lost_steps(run_dir, config)
    if not lost:
        return None
    which = ", ".join(map(str, lost[:6])) + (" …" if len(lost) > 6 else "")
    found = f"the newest there is of step {newest}" if newest else "there is none"
    text = f"checkpoints of step {which} were saved in '{run_dir / 'checkpoints'}' and are gone; {found}"
    if config.resume_step == newest:
        return f"{text}. The run continues from step {newest}, as checkpoint.resume_step says"
    raise UserError(
        f"{text}. Put them back (is a file system not mounted?), or set checkpoint.resume_step={newest} to compute the "
        f"steps after {newest} again; nothing was written"
    )


def _step_of(name: Any) -> int:
    try:
        return folder_step(Path(str(name)))
    except ValueError:
        return -1
