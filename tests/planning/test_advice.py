"""What a plan says: idle ranks, days, the recommended layout and why the configured one is slower."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fusiontree.plan import main
from fusiontree.planning.advice import days, idle_note, idle_ranks, parse_tokens, recommendation
from fusiontree.utils.errors import UserError
from tests.planning.test_cost_model import CONFIGS


def layout(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"dp": 8, "cp": 1, "tp": 1, "activation_checkpointing": "none", "fits": True}
    values |= {"tokens_per_s": 1000.0, "compute_s": 1.0, "communication_s": 0.1, "total_gib": 40.0}
    return values | changes


@pytest.mark.parametrize(
    ("text", "tokens"), [("300B", 3e11), ("1.5T", 1.5e12), ("2e12", 2e12), ("7_000", 7000), ("2G", 2e9), ("10M", 1e7)]
)
def test_budgets_of_tokens(text: str, tokens: float) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-3B", "3 bananas", "nan", "inf", "1e999", "B", "3b"])
def test_a_budget_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="write for example 300B"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("dp", "batch", "idle"), [(256, 128, 128), (8, 8, 0), (8, 16, 0), (8, 17, 2), (3, 4, 1), (1, 5, 0), (8, 20, 1)]
)
def test_ranks_without_rows(dp: int, batch: int, idle: int) -> None:
    """Each rank takes the same number of rows, rounded up, until none is left."""
    rows = -(-batch // dp)
    given = [max(0, min(rows, batch - rank * rows)) for rank in range(dp)]
    assert (sum(given), given.count(0)) == (batch, idle)
    assert idle_ranks(layout(dp=dp), batch) == idle
    assert (idle_note(layout(dp=dp), batch) is None) == (idle == 0)


def test_the_note_names_gpus_and_ways_out() -> None:
    note = idle_note(layout(dp=256, tp=2), 128)
    assert note is not None and note.startswith("128 of 256 data parallel ranks (256 GPUs) idle")
    assert "at most 256 GPUs, a batch of 256 or more rows, or more tp or cp" in note


def test_days() -> None:
    assert days(86_400_000.0, layout()) == 1.0


def test_the_recommendation_says_why() -> None:
    own = layout(tp=4, dp=2, communication_s=0.9, activation_checkpointing="full", compute_s=1.4)
    faster = layout(tokens_per_s=1500.0)
    best, line = recommendation(own, [faster, own], 16)
    assert best is faster
    assert line == (
        "recommended: parallel.tp=1 parallel.cp=1 training.activation_checkpointing=none (50% faster than the "
        "configured layout: its steps communicate for 0.90 s (tp 4, cp 1) instead of 0.10 s, its steps compute for "
        "1.40 s (recomputing: full) instead of 1.00 s)"
    )
    assert "4 of its 8 data parallel ranks idle" in recommendation(layout(), [faster], 4)[1]
    assert recommendation(layout(), [layout(tokens_per_s=1010.0)], 8)[1] == "recommended: the configured layout"
    assert recommendation(layout(), [], 8)[1] == "recommended: the configured layout"
    slower = layout(tokens_per_s=500.0)
    best, line = recommendation(layout(fits=False, total_gib=99.0), [slower], 8)
    assert best is slower and "the configured layout needs 99.0 GiB" in line
    assert "no layout fits" in recommendation(layout(fits=False), [], 8)[1]


@pytest.mark.slow
def test_256_gpus_for_a_batch_of_128(capsys: pytest.CaptureFixture[str]) -> None:
    v1 = ["--config", str(CONFIGS / "pretrain_v1.yaml"), "--gpus", "256", "--tokens", "300B"]
    assert main(v1) == 0
    said = capsys.readouterr().out
    assert "idle: 128 of 256 data parallel ranks (128 GPUs) idle" in said
    assert "11.5B parameters, 300B tokens on 256 GPUs: configured " in said
    assert said.splitlines()[-1].startswith("recommended: parallel.tp=")
    assert "128 of its 256 data parallel ranks idle" in said.splitlines()[-1]
    assert main([*v1, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"] == 3e11 and told["recommended_days"] < told["days"]
    assert told["recommended"]["dp"] <= 128
    assert main([*v1, "--tokens", "many"]) == 2
