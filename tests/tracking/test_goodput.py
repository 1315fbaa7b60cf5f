from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusiontree.report import main
from fusiontree.tracking.crash_report import explain, read_reports, write_report
from fusiontree.tracking.goodput import account, timeline


def write(folder: Path, events: list[tuple[float, str, dict]]) -> Path:
    lines = [json.dumps({"time": "t", "unix_time": t, "event": kind, **details}) + "\n" for t, kind, details in events]
    (folder / "events.jsonl").write_text("".join(lines))
    return folder


EVENTS = [
    (0.0, "start", {"step": 0, "world_size": 8}),
    (40.0, "save", {"step": 10, "seconds": 2.0, "train_seconds": 30.0}),
    (80.0, "save", {"step": 20, "seconds": 2.0, "train_seconds": 60.0}),
    # killed; the save of step 20 was damaged, so the run went back to 10
    (100.0, "hang", {"reason": "rank 3 hung in 'backward'"}),
    (100.0, "checkpoint_damaged", {"reason": "step 20"}),
    (100.0, "resume", {"step": 10, "world_size": 4}),
    (150.0, "save", {"step": 25, "seconds": 1.0, "train_seconds": 40.0}),
    (151.0, "interrupted", {"step": 25, "reason": "stopped by SIGUSR1"}),
    (160.0, "resume", {"step": 25, "world_size": 4}),
    (200.0, "save", {"step": 40, "seconds": 1.0, "train_seconds": 35.0}),
    (200.0, "finished", {"step": 40, "reason": "finished"}),
]


def test_only_kept_steps_count(tmp_path: Path) -> None:
    goodput = account(write(tmp_path, EVENTS))
    assert goodput.wall_s == 200
    assert goodput.kept_s == 30 + 40 + 35  # not the 60 of the first session: its second half was done again
    assert goodput.share == pytest.approx(105 / 200)
    assert goodput.saving_s == 6
    assert [(i.step, i.lost_s) for i in goodput.interruptions] == [(10, 60.0), (25, 10.0)]
    assert goodput.interruptions[0].cause == "rank 3 hung in 'backward'"
    assert goodput.interruptions[1].cause == "stopped by SIGUSR1"


def test_report_as_text_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, EVENTS)
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "52.5%: 00:01:45 of 00:03:20 became kept steps" in shown
    assert "3 starts on 8, 4, 4 ranks, 2 interruptions" in shown
    assert "went on after step 10, 00:01:00 lost: rank 3 hung in 'backward'" in shown
    page = (tmp_path / "report.html").read_text()
    assert "52.5%" in page
    assert "rank 3 hung in &#x27;backward&#x27;" in page
    assert main([str(tmp_path / "no")]) == 2
    assert "no events.jsonl" in capsys.readouterr().err


def test_report_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, EVENTS)
    assert main([str(tmp_path), "--json", "--no-html"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["kept_s"] == 105
    assert values["interruptions"][0]["cause"] == "rank 3 hung in 'backward'"
    assert not (tmp_path / "report.html").exists()


def clocked(times: list[tuple[float, str, float]]) -> list[dict]:
    return [{"unix_time": clock, "session": name, "session_s": own} for clock, name, own in times]


def test_a_clock_that_jumps_moves_nothing() -> None:
    forward = [(0, "a", 0), (10, "a", 10), (3620, "a", 20), (40, "b", 1), (50, "b", 11)]
    back = [(0, "a", 0), (10, "a", 10), (-3580, "a", 20), (40, "b", 1), (50, "b", 11)]
    set_right = [(0, "a", 0), (3610, "a", 10), (3640, "b", 0), (3650, "b", 10)]
    assert timeline(clocked(forward)) == [0, 10, 20, 40, 50]
    assert timeline(clocked(back)) == [0, 10, 20, 40, 50]
    assert timeline(clocked(set_right)) == [0, 10, 40, 50]


def test_a_rewind_is_an_interruption_and_its_time_is_lost(tmp_path: Path) -> None:
    events = [
        (0.0, "start", {"step": 0, "world_size": 1}),
        (20.0, "save", {"step": 10, "seconds": 1.0, "train_seconds": 18.0}),
        (30.0, "rewind", {"step": 15, "to_step": 10, "reason": "loss spike"}),
        (60.0, "save", {"step": 20, "seconds": 1.0, "train_seconds": 40.0}),
        (61.0, "finished", {"step": 20, "reason": "finished"}),
    ]
    goodput = account(write(tmp_path, events))
    assert [(i.step, i.cause, i.lost_s) for i in goodput.interruptions] == [(10, "loss spike", 10.0)]
    assert goodput.kept_s == 40.0


def test_a_run_that_nobody_started_again_says_why_it_died(tmp_path: Path) -> None:
    write_report(tmp_path, 0, {"kind": "hang", "world_size": 2, "section": "backward", "step": 3})
    goodput = account(write(tmp_path, EVENTS[:1]))
    assert goodput.sessions[-1].cause
    assert "rank 1 left no report" in goodput.sessions[-1].cause


def test_a_fall_back_over_two_sessions_is_not_kept_and_no_time_is_lost_twice(tmp_path: Path) -> None:
    events = [
        (0.0, "start", {"step": 0, "world_size": 1}),
        (20.0, "save", {"step": 10, "seconds": 1.0, "train_seconds": 18.0}),
        (40.0, "save", {"step": 20, "seconds": 1.0, "train_seconds": 36.0}),
        (50.0, "resume", {"step": 20, "world_size": 1}),
        (60.0, "resume", {"step": 20, "world_size": 1}),
        (70.0, "resume", {"step": 10, "world_size": 1}),
        (90.0, "save", {"step": 20, "seconds": 1.0, "train_seconds": 19.0}),
    ]
    goodput = account(write(tmp_path, events))
    assert goodput.kept_s == 18 + 19
    assert [i.lost_s for i in goodput.interruptions] == [10, 10, 10]
    assert sum(seconds for _, seconds, _ in goodput.shares()) == pytest.approx(goodput.wall_s)


def test_time_after_the_end_is_idle_and_not_lost(tmp_path: Path) -> None:
    """A run that is extended a day after it finished has lost nothing."""
    events = [
        (0.0, "start", {"step": 0, "world_size": 1}),
        (20.0, "save", {"step": 10, "seconds": 1.0, "train_seconds": 18.0}),
        (20.0, "finished", {"step": 10, "reason": "finished"}),
        (86_400.0, "resume", {"step": 10, "world_size": 1}),
        (86_420.0, "save", {"step": 20, "seconds": 1.0, "train_seconds": 19.0}),
        (86_420.0, "finished", {"step": 20, "reason": "finished"}),
    ]
    goodput = account(write(tmp_path, events))
    assert goodput.interruptions == []
    assert (goodput.idle_s, goodput.busy_s, goodput.kept_s) == (86_380.0, 40.0, 37.0)
    assert goodput.share == pytest.approx(37 / 40)
    assert sum(seconds for _, seconds, _ in goodput.shares()) == pytest.approx(goodput.wall_s)


def test_what_a_start_writes_before_its_resume_is_not_part_of_the_idle_run(tmp_path: Path) -> None:
    """An extension changes settings, finds damage or fails before it resumes; a relaunch of a finished run ends."""
    finished = ("finished", {"step": 10, "reason": "finished"})
    events = [
        (0.0, "start", {"step": 0, "world_size": 1}),
        (20.0, "save", {"step": 10, "seconds": 1.0, "train_seconds": 18.0}),
        (20.0, *finished),
        (21.0, "wandb_failed", {"reason": "offline"}),
        (1000.0, "config_changed", {"changes": {"training.max_steps": [10, 20]}}),
        (1001.0, "failed", {"step": 0, "reason": "no space left"}),
        (1998.0, "checkpoint_damaged", {"reason": "step 10"}),
        (2000.0, "resume", {"step": 10, "world_size": 1}),
        (2001.0, *finished),
        (2500.0, "crash", {"reason": "of an earlier start"}),
        (2501.0, "resume", {"step": 10, "world_size": 1}),
        (2521.0, "save", {"step": 20, "seconds": 1.0, "train_seconds": 19.0}),
    ]
    goodput = account(write(tmp_path, events))
    assert goodput.interruptions == []
    assert (goodput.idle_s, goodput.busy_s, goodput.kept_s) == (1980.0 + 500.0, 41.0, 37.0)


def test_damaged_events_are_left_out_of_the_report(tmp_path: Path) -> None:
    write(tmp_path, EVENTS)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "save"}\n{"event": "resume", "unix_time": 3}\n{"half\n')
    (tmp_path / "hangs").mkdir()
    (tmp_path / "hangs" / "rank-0.json").write_text("[]")
    (tmp_path / "hangs" / "rank-x.json").write_text("{}")
    (tmp_path / "hangs" / "rank-1.json").write_text('{"kind": "crash"}')
    assert account(tmp_path).kept_s == 105
    assert [report["rank"] for report in read_reports(tmp_path)] == [0, 1]
    assert "cannot be read" in explain(read_reports(tmp_path))
