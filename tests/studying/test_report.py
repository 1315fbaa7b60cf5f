"""The report, made from results alone."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from fusiontree.studying.pictures import _styles
from fusiontree.studying.report import write_report
from fusiontree.studying.results import curve, final_loss, merged, read_results
from fusiontree.studying.summary import accuracy_by_length, fit_run, summarize
from fusiontree.utils.errors import UserError
from tests.studying.test_runs import study

ARMS = {"fused": 2.0, "mean": 2.001, "llama": 2.3}


def entry(arm: str, seed: int, size: str = "tiny", **changes: Any) -> dict[str, Any]:
    """Return a finished run whose loss falls by a power law to the arm's level, 0.002 above it for seed 3."""
    final = ARMS[arm] + (0.002 if seed else 0.0)
    tokens = [1000 * step for step in range(1, 21)]
    losses = [final - 0.5 + 0.5 * (t / 20_000) ** -0.4 for t in tokens]
    return {
        "size": size,
        "arm": arm,
        "seed": seed,
        "searched": False,
        "name": f"{size}/{arm}/seed-{seed}",
        "rate": 1e-3,
        "parameters": 50_000,
        "steps": 20,
        "tokens": 20_000,
        "flops_per_token": 3e5,
        "state": "finished",
        "final_loss": final,
        "curve": {
            "tokens": tokens,
            "seconds": [t / 1000 for t in tokens],
            "loss": losses,
            "validation_tokens": tokens,
            "validation_loss": losses,
            "tokens_per_s": 1000.0,
        },
        "evaluation": {"recall": [{"length": n, "depth": d, "token_accuracy": d} for n in (64, 128) for d in (0, 1)]},
        **changes,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    runs = [entry(arm, seed) for arm in ARMS for seed in (0, 3)]
    return {
        "format": "fusiontree-study",
        "study": study().model_dump(mode="json"),
        "failed": {},
        "runs": runs,
    }


def test_differences_are_judged_by_the_noise_between_seeds(results: dict[str, Any]) -> None:
    (size,) = summarize(results)
    assert size.noise is not None and size.noise.std == pytest.approx(0.002 / math.sqrt(2)) and size.noise.degrees == 3
    arms = {arm.arm: arm for arm in size.arms}
    assert [arm.arm for arm in size.arms] == ["fused", "mean", "llama"]
    assert arms["mean"].verdict == "within noise" and arms["llama"].verdict == "worse"
    assert arms["llama"].difference == pytest.approx(0.3)
    # Two comparisons, three degrees of freedom: t = 4.177
    assert arms["llama"].needed == pytest.approx(4.177 * 0.002 / math.sqrt(2), rel=1e-3)
    assert [fit.c for fit in arms["fused"].fits] == [pytest.approx(0.4, abs=0.011)] * 2


def test_only_finished_runs_and_chosen_rates_count(results: dict[str, Any]) -> None:
    results["runs"][0] |= {"searched": True, "name": "tiny/fused/lr-0.001-seed-0"}
    results["runs"].append(
        entry("fused", 0, searched=True, name="tiny/fused/lr-0.004-seed-0", rate=4e-3, final_loss=2.5)
    )
    results["runs"].append(entry("mean", 5, state="unfinished", final_loss=9.0))
    results["runs"].append(entry("mean", 6, final_loss=math.nan))
    (size,) = summarize(results)
    losses = {arm.arm: arm.losses for arm in size.arms}
    assert losses["fused"] == [2.0, pytest.approx(2.002)] and len(losses["mean"]) == 2


def test_a_worse_rate_does_not_stand_for_the_chosen_one(results: dict[str, Any]) -> None:
    """The run of the chosen rate is trained and waits for its evaluation."""
    results["runs"][0] |= {"searched": True, "name": "tiny/fused/lr-0.001-seed-0"}
    chosen = {"searched": True, "rate": 4e-3, "final_loss": 1.5, "state": "unfinished"}
    results["runs"].append(entry("fused", 0, name="tiny/fused/lr-0.004-seed-0", **chosen, trained=True))
    (size,) = summarize(results)
    assert {arm.arm: arm.losses for arm in size.arms}["fused"] == [pytest.approx(2.002)]


@pytest.mark.parametrize(("state", "count"), [("waiting", 1), ("unfinished", 1), ("failed", 2)])
def test_no_run_counts_before_its_search_has_ended(
    results: dict[str, Any], tmp_path: Path, state: str, count: int
) -> None:
    results["runs"][0] |= {"searched": True, "name": "tiny/fused/lr-0.001-seed-0"}
    other = {"searched": True, "name": "tiny/fused/lr-0.004-seed-0", "rate": 4e-3, "state": state}
    results["runs"].append(entry("fused", 0, **other))
    (size,) = summarize(results)
    assert {arm.arm: len(arm.runs) for arm in size.arms}["fused"] == count
    text = write_report(results, tmp_path, pictures=False).read_text()
    assert ("- tiny/fused/lr-0.001-seed-0: its arm's search for a learning rate goes on" in text) == (count == 1)


def test_one_seed_gives_no_verdict(results: dict[str, Any], tmp_path: Path) -> None:
    results["runs"] = [run for run in results["runs"] if run["seed"] == 0]
    (size,) = summarize(results)
    assert size.noise is None and {arm.verdict for arm in size.arms if arm.arm != "fused"} == {"unknown"}
    assert "the noise between seeds is unknown" in write_report(results, tmp_path, pictures=False).read_text()


def test_accuracy_is_averaged_over_depths() -> None:
    found = accuracy_by_length([entry("fused", 0), entry("fused", 3)])
    assert found == {"recall": {64: (0.5, 0.0), 128: (0.5, 0.0)}}


def test_the_fit_leaves_out_the_beginning() -> None:
    run = entry("fused", 0)
    run["curve"]["validation_loss"][:3] = [99.0] * 3
    fit = fit_run(run)
    assert fit is not None and fit.residual < 1e-3


def test_the_report_and_its_pictures(results: dict[str, Any], tmp_path: Path) -> None:
    larger = [entry(arm, seed, "wide") | {"tokens": 40_000} for arm in ARMS for seed in (0, 3)]
    results["runs"] += larger
    results["study"]["sizes"]["wide"] = results["study"]["sizes"]["tiny"]
    results["runs"].append(entry("mean", 7, state="failed"))
    results["failed"]["tiny/mean/seed-7"] = "exit code 2: error: why"
    before = copy.deepcopy(results)
    text = write_report(results, tmp_path).read_text()
    assert results == before
    for name in ("final", "loss_tokens", "loss_flops", "loss_time", "ladder", "recall"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert f"({name}.png)" in text
    for words in (
        "| `llama` | 50k | 0.3 | 20k | 6.000e+09 | 0.001 | 1k | 2.3010 | 0.0014 | 2 | +0.3000 worse |",
        "is 0.0014 nats (3 degrees of freedom, runs minus arms)",
        "- tiny/mean/seed-7: failed: exit code 2: error: why",
        "| `fused` | 50.0% ± 0.0% | 50.0% ± 0.0% |",
    ):
        assert words in text


def test_arms_of_a_picture_look_different(results: dict[str, Any]) -> None:
    arms = list(results["study"]["arms"])
    others = {f"other_{number}": {"note": ""} for number in range(40)}
    results["study"]["arms"] = {arms[0]: {"note": ""}, **others, **{arm: {"note": ""} for arm in arms[1:]}}
    styles = _styles(results, summarize(results))
    assert list(styles) == arms and len({tuple(style.items()) for style in styles.values()}) == len(arms)


def test_runs_that_shared_a_gpu_have_no_speed(results: dict[str, Any], tmp_path: Path) -> None:
    results["runs"][0]["runs_per_gpu"] = 3
    text = write_report(results, tmp_path).read_text()
    assert "speeds are left out" in text and "| 1k |" not in text and "loss_time" not in text
    assert not (tmp_path / "loss_time.png").exists() and (tmp_path / "loss_flops.png").exists()


def test_a_task_that_no_arm_solves_has_no_table(results: dict[str, Any], tmp_path: Path) -> None:
    for run in results["runs"]:
        copies = [{"length": 64, "token_accuracy": 0.012, "alphabet": 100}]
        choices = [
            {"length": 64, "choice_accuracy": 0.2 + 0.3 * run["seed"], "exact_match": 0, "chance_choice_accuracy": 0.25}
        ]
        run["evaluation"] = {"copy": copies, "needle_single": choices}
    text = write_report(results, tmp_path).read_text()
    assert "Accuracy on copy: no arm is above chance (1.0%) at any length" in text and "(copy.png)" not in text
    assert "chance is 25.0%" in text and "| `fused` | 65.0% ± 63.6% |" in text and "(needle_single.png)" in text


def test_the_search_and_its_ends_are_shown(results: dict[str, Any], tmp_path: Path) -> None:
    for arm, best in (("fused", 1e-3), ("mean", 2e-3), ("llama", 4e-3)):
        for rate in (1e-3, 2e-3, 4e-3):
            loss = 2.0 + abs(rate - best) if arm != "llama" or rate > 1e-3 else None
            results["runs"].append(entry(arm, 0, rate=rate, searched=True, name=f"{arm}/{rate}", final_loss=loss))
    text = write_report(results, tmp_path, pictures=False).read_text()
    assert "| `llama` | diverged | 2.0020 | **2.0000** |" in text
    assert "The smallest rate is the best of `fused`: a better one" in text
    assert "The largest rate is the best of `llama`: a better one" in text


def test_waiting_runs_are_counted(results: dict[str, Any], tmp_path: Path) -> None:
    for arm, seed in (("mean", 5), ("mean", 6), ("llama", 5)):
        results["runs"].append(entry(arm, seed, state="waiting"))
    text = write_report(results, tmp_path, pictures=False).read_text()
    assert "- runs of tiny that have not started, by arm: `mean` 2, `llama` 1" in text


def test_losses_and_curves_of_a_run(tmp_path: Path) -> None:
    lines = [{"step": s, "tokens": 10 * s, "lm_loss": 3.0, "step_time_s": 0.5, "averaged_steps": 2} for s in range(200)]
    lines.insert(195, {"step": 195, "tokens": 1950, "lm_loss": None, "step_time_s": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert final_loss(tmp_path) == 3.0
    values = curve(tmp_path)
    assert 40 <= len(values["tokens"]) <= 60 and values["tokens"][-1] == 1990 and values["seconds"][-1] == 200.0
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 201, "tokens": 2010, "validation_loss": 2.5}) + "\n")
    assert final_loss(tmp_path) == 2.5
    assert final_loss(tmp_path / "nothing") is None


@pytest.mark.parametrize("name", ["lm_loss", "validation_loss"])
def test_a_run_that_diverged_has_no_final_loss(tmp_path: Path, name: str) -> None:
    lines = [{"step": s, "tokens": 10 * s, "lm_loss": 3.0, name: 3.0 if s < 5 else None} for s in range(20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert final_loss(tmp_path) is None


def test_results_of_two_machines_are_merged(results: dict[str, Any]) -> None:
    one, other = copy.deepcopy(results), copy.deepcopy(results)
    one["runs"][1]["state"] = other["runs"][0]["state"] = "waiting"
    one["runs"][2]["state"] = "failed"
    one["failed"] = {one["runs"][2]["name"]: "exit code 1"}
    both = merged([one, other])
    assert [run["state"] for run in both["runs"]] == ["finished"] * 6 and not both["failed"]
    one["failed"]["tiny/gone/seed-0"] = "exit code 1"
    assert not merged([one, other])["failed"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["study"].update(reference="mean"), "differ in reference: fused and mean"),
        (lambda r: r["study"].update(learning_rates=[1e-4]), "differ in learning_rates"),
        (lambda r: r["study"]["arms"]["mean"].update(pattern="M"), "differ in pattern of arm mean: None and M"),
        (lambda r: r["study"]["arms"]["mean"]["sizes"].update(tiny={"x": 1}), "differ in sizes.tiny of arm mean"),
        (lambda r: r["runs"][0].update(steps=10, tokens=10_000), "differ in steps of tiny/fused: 20 and 10"),
    ],
)
def test_results_of_another_study_are_not_merged(results: dict[str, Any], change: Any, message: str) -> None:
    other = copy.deepcopy(results)
    other["study"]["arms"]["mean"]["note"] = "says it in other words"
    other["study"]["sizes"]["wide"] = results["study"]["sizes"]["tiny"]
    merged([results, other])
    change(other)
    with pytest.raises(UserError, match=message):
        merged([results, other])


def test_a_run_with_another_rate_does_not_stand_for_one_of_the_study(results: dict[str, Any]) -> None:
    other = copy.deepcopy(results)
    results["runs"][0]["state"] = "unfinished"
    other["runs"][0]["rate"] = 2e-3
    assert merged([results, other])["runs"][0]["state"] == "unfinished"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("runs"), "runs: Field required"),
        (lambda r: r["runs"][0].pop("state"), "runs.0.state: Field required"),
        (lambda r: r["runs"][1].update(state="done"), "runs.1.state is 'done'"),
        (lambda r: r["runs"][1].update(final_loss="2.0"), "runs.1.final_loss is '2.0'"),
        (lambda r: r["runs"][1].pop("curve"), "'tiny/fused/seed-3' is finished and has no curve"),
        (lambda r: r["runs"][1].update(size="huge"), "has size 'huge', which the study lacks"),
    ],
)
def test_broken_results_are_named(results: dict[str, Any], tmp_path: Path, change: Any, message: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    assert read_results(file) == results
    change(results)
    file.write_text(json.dumps(results))
    with pytest.raises(UserError, match=f"'{file}': .*{message}.*; take an undamaged copy"):
        read_results(file)


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        (["fused"], "Nothing is tested: every other arm has no finished run"),
        (["mean", "llama"], "Nothing is tested: `fused` has no finished run"),
        (
            ["fused", "mean"],
            "with this deviation and these degrees of freedom at 5%; a difference from `fused` exceeds",
        ),
        ([*ARMS], "at 5%, divided by 2 comparisons (Bonferroni); a difference"),
        ([], "No run is finished: there is nothing to compare."),
    ],
)
def test_the_report_says_what_was_tested(results: dict[str, Any], tmp_path: Path, arms: list[str], words: str) -> None:
    results["runs"] = [run for run in results["runs"] if run["arm"] in arms]
    text = write_report(results, tmp_path, pictures=False).read_text()
    assert words in text and " 0 comparisons" not in text and ("divided" in text) == (len(arms) > 2)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="holds no results of a study"):
        read_results(tmp_path)
