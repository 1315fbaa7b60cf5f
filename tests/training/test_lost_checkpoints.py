"""A run never starts over without a word: its records know which checkpoints must be there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.folders import MANIFEST, incomplete_checkpoints, step_folder
from fusiontree.training.lost_checkpoints import check_nothing_lost, known_steps
from fusiontree.utils.errors import UserError

CONFIG = CheckpointConfig(save_interval=10)


def event(kind: str, step: int, **details: Any) -> dict[str, Any]:
    return {"event": kind, "step": step, **details}


def write_run(run: Path, events: list[dict[str, Any]], *steps: int) -> Path:
    run.mkdir(exist_ok=True)
    (run / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    for step in steps:
        step_folder(run / "checkpoints", step).mkdir(parents=True)
        (step_folder(run / "checkpoints", step) / MANIFEST).write_text("{}")
    return run


SAVED = [event("start", 0), event("save", 10), event("save", 20), event("finished", 20)]


def test_a_run_with_all_its_checkpoints_passes(tmp_path: Path) -> None:
    assert check_nothing_lost(tmp_path / "new", CONFIG) is None
    assert check_nothing_lost(write_run(tmp_path, SAVED, 10, 20), CONFIG) is None


@pytest.mark.parametrize(
    ("left", "message"),
    [((), "step 10, 20 .* there is none.* checkpoint.resume_step=0"), ((10,), "step 20 .* newest there is of step 10")],
)
def test_a_lost_checkpoint_is_refused_with_the_way_out(tmp_path: Path, left: tuple[int, ...], message: str) -> None:
    run = write_run(tmp_path, SAVED, *left)
    with pytest.raises(UserError, match=message):
        check_nothing_lost(run, CONFIG)
    newest = left[-1] if left else 0
    accepted = check_nothing_lost(run, CONFIG.model_copy(update={"resume_step": newest}))
    assert accepted is not None and f"continues from step {newest}" in accepted
    with pytest.raises(UserError):  # it accepts the loss that it names and no other
        check_nothing_lost(run, CONFIG.model_copy(update={"resume_step": newest + 5}))


def test_the_checkpoints_folder_is_a_link_to_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path, SAVED)
    (run / "checkpoints").symlink_to(tmp_path / "not-mounted")
    with pytest.raises(UserError, match="not mounted"):
        check_nothing_lost(run, CONFIG)


def test_what_retention_or_damage_took_is_not_lost(tmp_path: Path) -> None:
    removed = [event("start", 0), event("save", 10), event("save", 20, removed=["step-00000010", None])]
    assert known_steps(removed) == {20}
    aside = [*SAVED, event("checkpoint_set_aside", 20, folder="step-00000020", renamed="damaged-step-00000020")]
    assert check_nothing_lost(write_run(tmp_path / "a", aside, 10), CONFIG) is None
    # Killed between the renaming and the event.
    killed = write_run(tmp_path / "b", SAVED, 10)
    (killed / "checkpoints" / "damaged-step-00000020").mkdir()
    assert check_nothing_lost(killed, CONFIG) is None
    # Without a manifest: damaged, so that the resume goes back, says so, and sets it aside.
    torn = write_run(tmp_path / "c", SAVED, 10, 20)
    (step_folder(torn / "checkpoints", 20) / MANIFEST).unlink()
    assert check_nothing_lost(torn, CONFIG) is None
    assert [folder.name for folder in incomplete_checkpoints(torn / "checkpoints")] == ["step-00000020"]


def test_a_resume_that_was_allowed_is_remembered(tmp_path: Path) -> None:
    again = [*SAVED, event("resume", 10), event("save", 15)]
    assert check_nothing_lost(write_run(tmp_path / "a", again, 10, 15), CONFIG) is None
    over = [*SAVED, event("start", 0)]
    assert check_nothing_lost(write_run(tmp_path / "b", over), CONFIG) is None
    back = [*SAVED, {"event": "rewind", "step": 25, "to_step": 10}]
    assert check_nothing_lost(write_run(tmp_path / "c", back, 10), CONFIG) is None


def test_without_events_the_metrics_prove_a_loss(tmp_path: Path) -> None:
    run = write_run(tmp_path, [])
    metrics = run / "metrics.jsonl"
    metrics.write_text('{"step": 9}\n{"step": 19}\n')  # the save of step 10 may never have ended
    assert check_nothing_lost(run, CONFIG) is None
    metrics.write_text('{"step": 9}\n{"step": 21}\n')
    with pytest.raises(UserError, match="step 10 were saved"):
        check_nothing_lost(run, CONFIG)


def test_damaged_events_neither_stop_nor_hide(tmp_path: Path) -> None:
    run = write_run(tmp_path, [*SAVED, {"event": "save"}, {"event": "save", "step": "x"}], 10)
    with (run / "events.jsonl").open("ab") as file:
        file.write(b'{"broken\n\xff\xfe\n[]\n')
    with pytest.raises(UserError, match="step 20"):
        check_nothing_lost(run, CONFIG)
