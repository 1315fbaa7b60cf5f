"""Whole runs of the real program on two ranks, each with one fault; see also tools/fault_campaign.py."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from fusiontree.tracking.records import read_records
from tools.fault_injection import Fault
from tools.fault_starts import CONFIG, STEPS, build_corpus, start, write_config

pytestmark = [pytest.mark.xdist_group("training"), pytest.mark.timeout(600)]
SPIKES = {"window": 8, "threshold": 12.0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("faults"))


def go(
    folder: Path,
    corpus: Path,
    *faults: Fault,
    world: int = 2,
    parallel: dict[str, Any] | None = None,
    supervision: dict[str, Any] | None = None,
    policy: str = "off",
    **training: Any,
) -> list[int]:
    folder.mkdir(exist_ok=True)
    sections = {
        "parallel": parallel or {},
        "training": CONFIG["training"] | {"spikes": SPIKES | {"policy": policy}} | training,
        "supervision": CONFIG["supervision"] | (supervision or {}),
    }
    config = write_config(folder, corpus, "fsdp2", **sections)
    return start(folder, config, world, list(faults), {})


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_records(folder / "run" / "events.jsonl") if e["event"] == kind]


def losses(folder: Path) -> dict[int, tuple[float, str]]:
    records = read_records(folder / "run" / "metrics.jsonl")
    return {r["step"]: (r["loss"], r["tokens_hash"]) for r in records if "loss" in r}


def test_a_stopped_rank_ends_the_job_in_time_and_is_named(tmp_path: Path, corpus: Path) -> None:
    began = time.monotonic()
    codes = go(
        tmp_path, corpus, Fault("hang", rank=1, entry=6, section="backward"), supervision={"hang_timeout_s": 6.0}
    )
    assert time.monotonic() - began < 120
    assert codes[0] == 70
    said = (tmp_path / "log.txt").read_text()
    assert "rank 0 hung: 'backward" in said
    assert "rank 1 left no report: stopped, killed or cut off" in said
    assert "backward" in (tmp_path / "run" / "hangs" / "rank-0.stacks.txt").read_text()
    assert go(tmp_path, corpus) == [0, 0]
    assert "rank 1 left no report" in events(tmp_path, "hang")[0]["reason"]
    # Whether the save of two steps before was over when the rank stopped is a matter of the machine's load.
    begun = events(tmp_path, "start") + events(tmp_path, "resume")
    assert [event["restarts"] for event in begun] == [0, 1]


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path, corpus: Path) -> None:
    assert go(tmp_path, corpus, Fault("usr1", rank=1, entry=8, section="wait for data")) == [75, 75]
    (save,) = [e for e in events(tmp_path, "save") if e["step"] == 8]
    assert events(tmp_path, "interrupted")[0]["step"] == save["step"] == 8


def test_poison_on_one_rank_is_named_with_its_shard(tmp_path: Path, corpus: Path) -> None:
    codes = go(tmp_path, corpus, Fault("nan", rank=1, entry=4, section="forward"), max_skipped_steps=0)
    assert codes[0] == 2
    (event,) = events(tmp_path, "step_skipped")
    assert "loss not finite on rank 1: row" in event["reason"]
    assert ".tar" in event["reason"]
    assert "max_skipped_steps 0" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("parallel", "entry", "section"),
    [
        ({"shard_size": 1}, 5, "wait for data"),
        ({"engine": "ddp"}, 8, "optimizer step"),  # of the step that is checked: the next one brings the copies anew
    ],
)
def test_a_copy_that_differs_stops_the_run_and_is_named(
    tmp_path: Path, corpus: Path, parallel: dict[str, Any], entry: int, section: str
) -> None:
    codes = go(tmp_path, corpus, Fault("flip", rank=1, entry=entry, section=section), parallel=parallel)
    assert codes == [2, 2]
    (event,) = events(tmp_path, "replica_mismatch")
    assert event["step"] == 8
    assert "embed.weight differs on ranks 0, 1" in event["reason"]


@pytest.mark.slow
def test_a_slow_rank_is_named(tmp_path: Path, corpus: Path) -> None:
    assert go(tmp_path, corpus, Fault("slow", rank=1, entry=1, amount=0.2), max_steps=8) == [0, 0]
    named = {(e["rank"], e["what"]) for e in events(tmp_path, "slow_rank")}
    assert (1, "data and host work") in named
    assert (0, "data and host work") not in named
    ranks = json.loads((tmp_path / "run" / "health.json").read_text())
    assert [r["rank"] for r in ranks] == [0, 1]
    assert all(r["link_gb_per_s"] > 0 and r["matmul_tflops"] > 0 for r in ranks)


SPIKE = Fault("spike", rank=0, entry=33, section="forward", amount=40.0)  # two micro batches a step: step 17


@pytest.mark.slow
def test_a_spike_is_skipped_on_all_ranks(tmp_path: Path, corpus: Path) -> None:
    fault = Fault("spike", rank=1, entry=17, section="forward", amount=40.0)  # one micro-batch per step and rank
    assert go(tmp_path, corpus, fault, policy="skip") == [0, 0]
    (event,) = events(tmp_path, "step_skipped")
    assert event["step"] == 17
    assert event["reason"].startswith("loss spike")
    assert set(losses(tmp_path)) == set(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_rewind_goes_on_behind_the_spike_and_a_resume_does_the_same(tmp_path: Path, corpus: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert go(whole, corpus, SPIKE, world=1, policy="rewind") == [0]
    (event,) = events(whole, "rewind")
    assert (event["step"], event["to_step"]) == (17, 15)
    final = losses(whole)
    assert set(final) == set(range(1, STEPS + 1))
    discarded = read_records(whole / "run" / "metrics.discarded.jsonl")
    assert [r["step"] for r in discarded] == [16]
    # Step 16 is now made of the rows behind step 17's.
    assert final[16][1] != discarded[0]["tokens_hash"]

    # The same, killed as soon as it trains again: before any checkpoint knows of the rewind.
    killed = Fault("kill", rank=0, entry=18, section="wait for data")
    assert go(broken, corpus, SPIKE, killed, world=1, policy="rewind") != [0]
    assert go(broken, corpus, world=1, policy="rewind") == [0]
    assert len(events(broken, "rewind")) == 1
    assert losses(broken) == final
