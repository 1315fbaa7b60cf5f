"""Output of training in a terminal and in a log file of a job."""

from __future__ import annotations

from pathlib import Path

from tests.end_to_end.runs import train, write_config

SHORT = (
    "training.max_steps=8",
    "training.validation.interval=8",
    "training.warmup_steps=1",
    "checkpoint.save_interval=0",
)


def test_the_start_is_a_summary_of_at_most_ten_lines(tmp_path: Path, data: Path) -> None:
    done = train(write_config(tmp_path, data), *SHORT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("step 1/"))
    assert first <= 10
    notes = [line for line in lines[:first] if "of its tokens are never read" in line]
    assert lines[: len(notes)] == notes  # on this corpus of few tokens
    names = [line.split()[0] for line in lines[len(notes) : first]]
    assert names == ["model", "layout", "data", "precision", "memory", "run", "backends"]
    assert sum(line.startswith("to the end") for line in lines) == 1


def test_quiet_prints_validation_and_end(tmp_path: Path, data: Path) -> None:
    done = train(write_config(tmp_path, data), "--quiet", *SHORT)
    assert done.returncode == 0, done.stderr
    validation, end = done.stdout.splitlines()
    assert validation.startswith("step 8/8  validation loss")
    assert end.startswith("finished at step 8/8")
