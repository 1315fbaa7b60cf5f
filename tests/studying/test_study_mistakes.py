"""A user's mistakes with a study: changed files, results of another study, options, searches that lead nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fusiontree.study import _outcome, main
from fusiontree.studying.results import collect, merged
from tests.studying.test_runs import BASE
from tests.studying.test_study import started, workers

_CURVE = {name: [] for name in ("tokens", "seconds", "loss", "validation_tokens", "validation_loss")}
FINISHED = {"state": "finished", "trained": True, "final_loss": 2.0, "curve": _CURVE | {"tokens_per_s": None}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"sizes": {"tiny": BASE["sizes"]["tiny"] | {"tokens": 20e3}}},
            "trained with steps 156, and the study asks for 78",
        ),
        ({"learning_rates": [1e-2]}, "trained with rate 0.003, and the study asks for 0.01"),
    ],
)
def test_runs_of_the_study_before_it_was_changed_do_not_count(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    first = workers(tmp_path, [])
    first.only = lambda run: run.arm == "fused"
    first.run_all()
    said: list[str] = []
    second = workers(tmp_path, said, **changes)
    second.run_all()
    assert started(said) == ["tiny/mean/seed-0", "tiny/mean/seed-3"]
    assert set(second.failed) == {"tiny/fused/seed-0", "tiny/fused/seed-3"}
    reason = second.failed["tiny/fused/seed-0"]
    assert words in reason and f"delete the folder '{tmp_path / 'tiny/fused/seed-0'}', or give another --out" in reason
    results = collect(second.study, second.runs(), tmp_path, second.is_finished, second.failed)
    states = {run["name"]: (run["state"], run.get("trained")) for run in results["runs"]}
    assert states["tiny/fused/seed-0"] == ("failed", False) and states["tiny/mean/seed-0"] == ("finished", True)


@pytest.mark.parametrize("stays", [True, False])
def test_a_study_that_cannot_go_on_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], stays: bool) -> None:
    """Every rate of the search diverged, or ``--only`` leaves the search out."""
    search = workers(tmp_path, [], learning_rates=[1e-3, 2e-3], evaluate=[])
    if stays:
        search.only = lambda run: run.searched
        search.run_all()
        for file in tmp_path.rglob("metrics.jsonl"):
            file.write_text('{"step": 1, "tokens": 256, "lm_loss": null}\n')
    search.only = lambda run: run.arm == "mean" and (stays or not run.searched)
    code = _outcome(search.study, search.runs(), search, search.only)
    text = "".join(capsys.readouterr())
    if stays:
        assert code == 1 and "failed: arms mean: no loss of the learning rates 0.001, 0.002 is finite" in text
    else:
        assert code == 75 and "1 runs wait for a search that --only leaves out: tiny/mean/lr-0.001-seed-0" in text


def test_mistyped_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.json"
    for words, message in (
        (["smoke", "--processes", "1", "--time-limit", "-5"], "--time-limit -5: give seconds above 0"),
        (["smoke", "--processes", "1", "--every", "nan"], "--every nan: give seconds above 0"),
        (["smoke", "--report", str(results)], "FILE 'smoke' is for runs, and --report runs nothing"),
        (["--report", str(results), "--known", str(results)], "--known '"),
        (["smoke", "--gpus", "1"], "this machine has no GPU that torch can use; give --processes N"),
    ):
        if "--gpus" not in words or not torch.cuda.is_available():
            assert main([*words, "--out", str(tmp_path / "out"), "--no-pictures"]) == 2
            assert message in capsys.readouterr().err
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(BASE | {"evaluate": ["--taks", "recall"]}))
    assert main([str(file), "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    assert "evaluate --taks recall: unrecognized arguments: --taks recall" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_results_of_another_budget_are_refused_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = workers(tmp_path / "first", [])
    results = collect(first.study, first.runs(), first.folder, first.is_finished, {})
    for run in results["runs"]:
        run["steps"] += 1
    merged([collect(first.study, first.runs(), first.folder, first.is_finished, {}), results])  # none has begun
    results["runs"][0] |= FINISHED
    known, file = tmp_path / "results.json", tmp_path / "study.yaml"
    known.write_text(json.dumps(results))
    file.write_text(yaml.safe_dump(BASE))
    words = ["--out", str(tmp_path / "out"), "--processes", "1", "--known", str(known), "--no-pictures"]
    assert main([str(file), *words]) == 2
    assert "the results differ in steps of tiny/fused: 156 and 157" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/tiny"))


def test_a_dry_run_lists_what_other_machines_have_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = workers(tmp_path / "first", [])
    results = collect(first.study, first.runs(), first.folder, first.is_finished, {})
    done = next(run for run in results["runs"] if run["arm"] == "mean")
    done |= FINISHED
    known, file = tmp_path / "results.json", tmp_path / "study.yaml"
    known.write_text(json.dumps(results))
    file.write_text(yaml.safe_dump(BASE))
    assert main([str(file), "--out", str(tmp_path / "out"), "--known", str(known), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("finished")] == [done["name"]]
    assert lines[-1].startswith(f"{len(results['runs']) - 1} runs to do") and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "configs/study").glob("*.yaml")), ids=lambda file: file.stem
)
def test_studies_of_this_project_are_valid(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file), "--out", str(tmp_path), "--dry-run"]) == 0
    assert "runs to do" in capsys.readouterr().out
