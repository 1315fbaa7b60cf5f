from __future__ import annotations

import math
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fusiontree.training.config import SpikeConfig
from fusiontree.training.spikes import Rewinds, SpikeFilter
from fusiontree.utils.errors import UserError


def new_filter(**settings: Any) -> SpikeFilter:
    return SpikeFilter(SpikeConfig.model_validate({"policy": "skip", "window": 32} | settings))


def run(spikes: SpikeFilter, losses: list[float], seq_len: int = 8) -> list[int]:
    """Feed losses as the loop does; return the places of those that were judged spikes."""
    found = []
    for place, loss in enumerate(losses):
        if spikes.judge(loss, seq_len):
            found.append(place)
        else:
            spikes.accept(loss, seq_len)
    return found


def noisy(count: int, level: float = 3.0, seed: int = 0) -> list[float]:
    random = Random(seed)
    return [level + random.gauss(0, 0.05) for _ in range(count)]


def test_a_spike_is_found_and_noise_is_none() -> None:
    losses = noisy(400)
    assert run(new_filter(), losses) == []
    losses[200] = 5.0
    assert run(new_filter(), losses) == [200]
    assert run(new_filter(policy="off"), losses) == []


def test_a_falling_loss_and_a_flat_one_are_no_spikes() -> None:
    assert run(new_filter(), [10 * math.exp(-step / 50) + noise for step, noise in enumerate(noisy(300, 0.5))]) == []
    assert run(new_filter(), [2.0] * 50 + [2.05] * 5) == []


def test_losses_that_are_no_numbers_do_not_blind_the_filter() -> None:
    losses = noisy(100)
    losses[40:60] = [math.nan, math.inf] * 9 + [-math.inf, math.nan]  # most of a window
    losses[60] = 6.0
    assert run(new_filter(), losses) == [60]


def test_another_row_length_starts_the_window_anew() -> None:
    spikes = new_filter()
    run(spikes, noisy(50))
    assert run(spikes, noisy(50, level=6.0), seq_len=16) == []


def test_a_new_level_ends_the_run_instead_of_skipping_for_ever() -> None:
    spikes = new_filter(max_in_a_row=3)
    run(spikes, noisy(50))
    for step in range(3):
        assert spikes.judge(9.0, 8)
        spikes.count_skip(step, "loss spike")
    with pytest.raises(UserError, match=r"4 steps in a row .* training\.spikes\.max_in_a_row 3"):
        spikes.count_skip(3, "loss spike")


def test_a_resumed_filter_judges_alike() -> None:
    whole, first = new_filter(), new_filter()
    losses = noisy(100)
    losses[52] = 4.5  # before a new window would hold enough losses to judge
    found = run(whole, losses)
    run(first, losses[:50])
    resumed = new_filter()
    resumed.load_state_dict(first.state_dict())
    assert [place + 50 for place in run(resumed, losses[50:])] == found == [52]
    assert resumed.state_dict() == whole.state_dict()


def test_rewinds_happen_again_after_a_resume_from_any_checkpoint(tmp_path: Path) -> None:
    rewinds = Rewinds(tmp_path, limit=2)
    rewinds.restore(0)
    rewinds.write(rewinds.plan(15, 10, {"row": 60}, "spike"))
    for checkpoint_knows, steps, expected in (
        (0, [10], [{"row": 60}]),  # killed right after going back
        (0, [8, 9, 10, 11], [None, None, {"row": 60}, None]),  # step 10's checkpoint was damaged
        (1, [12, 13], [None, None]),  # saved behind it
    ):
        again = Rewinds(tmp_path, limit=2)
        again.restore(checkpoint_knows)
        assert [again.data_after(step) for step in steps] == expected


def test_going_back_to_the_same_place_too_often_ends_the_run(tmp_path: Path) -> None:
    rewinds = Rewinds(tmp_path, limit=2)
    for row in (60, 80):
        rewinds.restore(rewinds.applied)
        rewinds.write(rewinds.plan(15, 10, {"row": row}, "spike"))
        rewinds.restore(rewinds.applied)
        assert rewinds.data_after(10) == {"row": row}
    with pytest.raises(UserError, match="went back to step 10 2 times already"):
        rewinds.plan(15, 10, {"row": 99}, "spike")
