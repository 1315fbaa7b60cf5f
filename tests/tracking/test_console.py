from __future__ import annotations

import logging
import math
import sys
from typing import Any

import pytest

from fusiontree.tracking.console import NOTICE, Console, RunningMean

VALUES = {"step": 2, "loss": 3.25, "grad_norm": 1.5, "lr": 1e-3, "tokens_per_s": 3300.0, "peak_memory_gib": 1.25}


def play(console: Console, level: int = logging.INFO, **logged: Any) -> None:
    """Show eight steps, with messages of all modules on standard output as the training entry arranges."""
    root = logging.getLogger()
    before, root.handlers = root.handlers, [logging.StreamHandler(sys.stdout)]
    level_before = root.level
    root.setLevel(level)
    try:
        _play(console, logged)
    finally:
        root.handlers = before
        root.setLevel(level_before)


def _play(console: Console, logged: dict[str, Any]) -> None:
    console.start(0)
    for step in range(1, 9):
        console.after_step(step, 8.0 / step, step * 1000, [step / 4])
        if step == 2:
            console.logged(VALUES | logged)
            console.validated(2, 1.5, 3000)
            logging.getLogger("other").warning("slow disk")
    console.close()
    console.say("finished", NOTICE)


def test_a_log_file_gets_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    play(Console(8, backends=lambda: "reference for 3 operations"), mfu=0.485)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "backends   reference for 3 operations"
    assert shown[1].startswith("step 2/8  loss 3.2500  grad 1.5  lr 1.00e-03  3.3k tok/s  mfu 48.5%  eta 00:00:")
    assert shown[2:4] == ["step 2/8  validation loss 1.5000 on 3000 tokens", "slow disk"]
    assert shown[4].startswith("to the end 3 steps in about ")
    assert shown[5:] == ["finished"]


def test_a_terminal_gets_one_live_line(capsys: pytest.CaptureFixture[str]) -> None:
    play(Console(8, live=True), mfu=0.485)
    output = capsys.readouterr().out
    last = output.split("\r")[-1]
    smoothed = RunningMean()
    mean = [smoothed.add(8.0 / step) for step in range(1, 9)][-1]
    assert f"step 8/8  loss {mean:.4f}  eta 00:00:00  3.3k tok/s  mfu 48.5%  1.2 GiB  8k tokens  2.00 epochs" in last
    assert "\033[1;36mstep 2/8  validation loss" in output
    assert "slow disk\n" in output, "other modules' messages stand on lines of their own"
    assert "grad" not in output


def test_quiet_shows_validation_warnings_and_end(capsys: pytest.CaptureFixture[str]) -> None:
    play(Console(8, backends=lambda: "x"), NOTICE)
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["step 2/8  validation loss 1.5000 on 3000 tokens", "slow disk", "finished"]


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    play(Console(8, enabled=False, backends=lambda: "x"))
    assert "step" not in capsys.readouterr().out


def test_a_return_to_a_checkpoint_starts_a_new_pace() -> None:
    console = Console(100, live=False)
    console.start(0)
    console.after_step(50, None, 0, [0.0])
    console.start(20)
    assert console.eta_s() is None


def test_the_mean_is_unbiased_and_follows() -> None:
    mean = RunningMean(span=20)
    assert mean.add(5.0) == 5.0
    assert all(math.isclose(mean.add(5.0), 5.0) for _ in range(10))
    rest = [mean.add(6.0) for _ in range(20)][-1]
    assert 5.5 < rest < 5.9
    assert mean.add(math.nan) == rest, "a non-finite loss does not spoil the curve"
    assert math.isnan(RunningMean().add(math.nan))
