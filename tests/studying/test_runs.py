"""From a study's file to its runs: budgets, settings, rates."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusiontree.config.load import load_config
from fusiontree.config.packaged import packaged_names
from fusiontree.models.flops import training_flops_per_token
from fusiontree.studying.config import StudyConfig, load_study
from fusiontree.studying.runs import Run, choose_rates, plan_runs
from fusiontree.utils.errors import UserError

BASE = yaml.safe_load(Path(__file__).with_name("tiny_study.yaml").read_text())


def study(**changes: Any) -> StudyConfig:
    return StudyConfig.model_validate(BASE | changes)


def config_of(run: Run) -> Any:
    return load_config(run.config, run.arguments(Path("out"))[2:])


def test_every_run_spends_the_flops_of_the_reference() -> None:
    runs = plan_runs(study())
    budget = runs[0].flops
    assert runs[0].arm == "fused"
    assert abs(runs[0].tokens - 40_000) <= runs[0].tokens_per_step / 2
    for run in runs:
        config = config_of(run)
        per_token = training_flops_per_token(config.model, config.training.seq_len)
        actual = per_token * config.training.max_steps * config.training.global_batch_size * config.training.seq_len
        assert run.flops == pytest.approx(actual)
        assert actual == pytest.approx(budget, rel=0.5 / run.steps)
    steps = {run.arm: run.steps for run in runs}
    assert steps["llama"] != steps["fused"] != steps["mean"]


def test_equal_tokens() -> None:
    runs = plan_runs(study(equal="tokens"))
    assert len({run.tokens for run in runs}) == 1
    assert len({run.flops for run in runs}) > 1


def test_settings_of_a_run() -> None:
    runs = {run.name: run for run in plan_runs(study())}
    assert set(runs) == {f"tiny/{arm}/seed-{seed}" for arm in ("fused", "mean", "llama") for seed in (0, 3)}
    config = config_of(runs["tiny/mean/seed-3"])
    assert (config.model.branch_mix, config.model.branch_norm) == ("mean", True)
    assert (config.training.seed, config.training.learning_rate) == (3, 3e-3)
    assert config.run_dir == "out/tiny/mean/seed-3"
    assert config.training.warmup_steps == int(0.1 * runs["tiny/mean/seed-3"].steps)
    assert config.model.global_heads == 2
    assert config_of(runs["tiny/llama/seed-0"]).model.global_heads == 4  # of the size


def test_a_matched_arm_has_the_references_parameters() -> None:
    runs = {run.arm: run for run in plan_runs(study())}
    llama = config_of(runs["llama"]).model
    assert llama.pattern == "A" * llama.num_layers
    assert llama.num_layers != config_of(runs["fused"]).model.num_layers
    assert runs["llama"].parameters == pytest.approx(runs["fused"].parameters, rel=0.02)


def test_a_matched_arm_may_have_another_hidden_size() -> None:
    wide = BASE["arms"]["llama"] | {"set": BASE["arms"]["llama"]["set"] | {"model.hidden_size": 48}}
    runs = {run.arm: run for run in plan_runs(study(arms={"fused": {}, "wide": wide}))}
    assert config_of(runs["wide"]).model.hidden_size == 48
    assert runs["wide"].parameters == pytest.approx(runs["fused"].parameters, rel=0.02)


def test_a_pattern_is_repeated_to_the_number_of_layers() -> None:
    arms = {"fused": {}, "alternating": {"pattern": "MMA", "set": {"model.num_layers": 5}}}
    assert config_of(plan_runs(study(arms=arms))[-1]).model.pattern == "MMAMM"


def test_the_search_on_the_first_size_decides_the_later_rates() -> None:
    sizes = BASE["sizes"] | {"wide": BASE["sizes"]["tiny"] | {"set": {"model.hidden_size": 64}}}
    searching = study(sizes=sizes, learning_rates=[1e-3, 4e-3], rate_exponent=1.0)
    runs = plan_runs(searching)
    searched = [run for run in runs if run.searched]
    assert [run.name for run in searched[:2]] == ["tiny/fused/lr-0.001-seed-0", "tiny/fused/lr-0.004-seed-0"]
    assert len(searched) == 6
    assert all(run.rate is None for run in runs if not run.searched)

    losses = {run.name: abs(run.rate - (4e-3 if run.arm == "mean" else 1e-3)) for run in searched if run.rate}
    losses["tiny/mean/lr-0.001-seed-0"] = math.nan
    losses.pop("tiny/llama/lr-0.004-seed-0")  # not finished
    known = {run.name: run for run in choose_rates(searching, runs, lambda run: losses.get(run.name))}
    assert known["tiny/fused/seed-3"].rate == 1e-3
    assert known["tiny/mean/seed-3"].rate == 4e-3
    assert known["tiny/llama/seed-3"].rate is None
    wide = known["wide/fused/seed-0"]
    assert wide.rate == pytest.approx(1e-3 * known["tiny/fused/seed-3"].parameters / wide.parameters)
    assert replace(wide, rate=None) in runs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "other"}, "reference 'other' is no arm"),
        ({"arms": {"fused": {}, "a/b": {}}}, "names a folder"),
        ({"seeds": [1, 1]}, "give different numbers"),
        ({"arms": {"fused": {"sizes": {"huge": {}}}}}, r"arms.fused.sizes names \['huge'\]"),
        ({"sizes": {"tiny": BASE["sizes"]["tiny"] | {"arms": ["mean"]}}}, "lacks the reference"),
        ({"sizes": {"tiny": BASE["sizes"]["tiny"] | {"arms": ["fused", "mean", "mean"]}}}, "names an arm twice"),
        ({"nothing": 1}, "unknown key 'nothing'; known are purpose, "),
        ({"arms": {"fused": {"sett": {}}}}, r"unknown key 'arms.fused.sett'; did you mean 'set'\?; known are note, "),
        ({"arms": {"fused": {}, "..": {}}}, "'..' names a folder"),
        ({"warmup": 1.0}, "'warmup' is 1.0: input should be less than 1"),
        ({"learning_rates": [1e-3, -1e-3]}, "'learning_rates.1' is -0.001: input should be greater than 0"),
        ({"learning_rates": [1e-3, 1e-3]}, "give rates that differ"),
    ],
)
def test_mistakes_in_the_file_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(BASE | changes))
    with pytest.raises(UserError, match=message):
        load_study(file)


def test_a_mistake_in_an_arm_names_the_arm() -> None:
    with pytest.raises(UserError, match=r"size tiny, arm wrong: .*unknown key 'model.nothing'"):
        plan_runs(study(arms={"fused": {}, "wrong": {"set": {"model.nothing": 1}}}))


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [("training.seed", 7, "seeds"), ("training.learning_rate", 1.0, "learning_rates"), ("run_dir", "x", "--out")],
)
def test_settings_that_a_study_makes_are_refused(name: str, value: Any, instead: str) -> None:
    with pytest.raises(
        UserError, match=rf"size tiny, arm other: set gives '{name}' {value!r}, .*; give {instead} inst"
    ):
        plan_runs(study(arms={"fused": {}, "other": {"set": {name: value}}}))


def test_a_budget_that_cannot_be_names_the_arm() -> None:
    with pytest.raises(UserError, match=r"size tiny, arm fused: .*write a finite number"):
        plan_runs(study(sizes={"tiny": BASE["sizes"]["tiny"] | {"tokens": 1e30}}))


@pytest.mark.parametrize("name", packaged_names("study"))
def test_packaged_studies_can_be_planned(name: str) -> None:
    runs = plan_runs(load_study(Path(name)))
    assert len({run.name for run in runs}) == len(runs)
