from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusiontree.supervision.config import SupervisionConfig
from fusiontree.supervision.restart_policy import apply_restart_policy, count_starts, failures_in_a_row
from fusiontree.tracking.crash_report import write_report
from fusiontree.utils.errors import UserError

CONFIG = SupervisionConfig(max_failed_starts=4, restart_backoff_s=3.0)


def events(*kinds: str) -> list[dict]:
    return [{"event": kind} for kind in kinds]


@pytest.mark.parametrize(
    ("kinds", "failed"),
    [
        ([], 0),
        (["start", "save", "finished"], 0),
        (["start", "failed"], 1),
        (["start", "save", "resume", "resume", "crash"], 2),
        (["start", "resume", "resume", "save"], 0),
        (["start", "resume", "interrupted"], 0),
    ],
)
def test_starts_without_a_new_checkpoint_are_counted(kinds: list[str], failed: int) -> None:
    assert failures_in_a_row(events(*kinds)) == failed
    assert count_starts(events(*kinds)) == sum(k in ("start", "resume") for k in kinds)


def waits(folder: Path, starts: int, config: SupervisionConfig = CONFIG) -> list[float]:
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events(*["resume"] * starts)))
    slept: list[float] = []
    apply_restart_policy(folder, config, slept.append)
    return slept


def test_the_wait_doubles_and_the_last_start_is_refused_with_the_cause(tmp_path: Path) -> None:
    assert waits(tmp_path, 0) == []
    assert waits(tmp_path, 1) == []
    assert waits(tmp_path, 2) == [3.0]
    assert waits(tmp_path, 3) == [6.0]
    write_report(tmp_path, 2, {"kind": "crash", "world_size": 4, "section": "backward", "error": "out of memory"})
    with pytest.raises(UserError, match=r"last 4 starts .* rank 2 .* 'backward': out of memory"):
        waits(tmp_path, 4)
    endless = CONFIG.model_copy(update={"max_failed_starts": 0})
    assert waits(tmp_path, 40, endless) == [600.0]
