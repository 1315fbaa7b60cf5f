"""What a pruned model computes, and what is pruned. Shape legend: B rows, S tokens, V vocabulary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.models.config import ModelConfig
from fusiontree.parallel.validate import tp_problems
from fusiontree.pruning.analysis import analyze
from fusiontree.pruning.costs import MEASURES, Costs
from fusiontree.pruning.plan import make_plan, random_plan
from fusiontree.pruning.shapes import KeptLayer, everything, pruned_config
from fusiontree.pruning.statistics import (
    measure_activations,
    norm_scale,
    output_of,
    unit_channels,
    without_branch,
    without_channels,
    without_layer,
)
from fusiontree.pruning.weights import PrunedWeights
from fusiontree.utils.errors import UserError
from tests.helpers import tiny_model
from tests.pruning.sources import ModelSource, model_of, repeated, rows

FOUR_KV: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 4, "global_heads": 4, "head_dim": 8}


def ids_BS() -> torch.Tensor:
    return torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(3))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids_BS()).logits_BSV


def without_units(plan: list[KeptLayer], layer: int, **removed: tuple[int, ...]) -> list[KeptLayer]:
    """The plan without the given units of one layer."""
    units = {kind: tuple(u for u in held if u not in removed.get(kind, ())) for kind, held in plan[layer].units.items()}
    return [*plan[:layer], replace(plan[layer], units=units), *plan[layer + 1 :]]


@pytest.mark.parametrize(
    ("kind", "unit"), [("local", 0), ("local", 1), ("global", 0), ("global", 1), ("mlp", 0), ("mlp", 37)]
)
def test_a_pruned_unit_is_as_if_its_channels_were_zero(kind: str, unit: int) -> None:
    model = tiny_model(**FOUR_KV, mlp_activation="swiglu")
    plan = without_units(everything(model.config), 1, **{kind: (unit,)})
    pruned = model_of(PrunedWeights(ModelSource(model), plan))
    channels = unit_channels(model.config, kind, unit)
    with without_channels(model, 1, output_of(kind), channels):
        expected = logits(model)
    assert (expected - logits(model)).abs().max() > 1e-3
    torch.testing.assert_close(logits(pruned), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("groups", [{"n_groups": 2, "norm_groups": 2}, {"n_groups": 1, "norm_groups": 2}])
def test_a_pruned_state_space_unit_is_missing_from_the_norm(groups: dict[str, int]) -> None:
    """The norm of the pruned model has the mean square of the channels that are left."""
    model = tiny_model(mamba=groups)
    plan = without_units(everything(model.config), 0, mamba=(0,))
    pruned = model_of(PrunedWeights(ModelSource(model), plan))
    channels = unit_channels(model.config, "mamba", 0)
    block: Any = model.layers[0]
    keep_C = torch.ones(model.config.d_inner)
    keep_C[channels] = 0
    share = len(pruned.layers[0].mamba.norm.weight) / model.config.d_inner if groups["n_groups"] == 1 else 1.0  # type: ignore[union-attr,arg-type]
    block.mamba.norm.register_forward_pre_hook(lambda _, inputs: (inputs[0] * keep_C, inputs[1]))
    block.mamba.norm.register_forward_hook(lambda _, inputs, output: output * share**0.5)
    torch.testing.assert_close(logits(pruned), logits(model), atol=2e-3, rtol=0)


def test_the_scale_of_the_norm_keeps_the_mean_output() -> None:
    """With the scale, kept channels of the norm's output have the mean square that they had."""
    model = tiny_model(num_layers=1, mamba={"n_groups": 1, "norm_groups": 1})
    batches = repeated(rows())
    statistics = measure_activations(model, batches)
    kept = (1, 2, 5)
    scale = norm_scale(model.config, statistics[0], kept)
    plan = [replace(everything(model.config)[0], units={**everything(model.config)[0].units, "mamba": kept})]
    before = statistics[0].squares["mamba2"][[c for u in kept for c in unit_channels(model.config, "mamba", u)]].mean()

    def after(scales: dict[int, torch.Tensor]) -> float:
        pruned = model_of(PrunedWeights(ModelSource(model), plan, scales))
        return float(measure_activations(pruned, batches)[0].squares["mamba2"].mean() / before)

    assert abs(after({0: scale}) - 1) < 0.5 * abs(after({}) - 1) and abs(after({}) - 1) > 0.05


@pytest.mark.parametrize("mixer", ["mamba2", "attention"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"branch_norm": True},
        {"branch_mix": "mean", "branch_norm": True},
        {"branch_mix": "gated_sum", "mlp_input": "residual", "use_alignment": False},
        {"branch_mix": "concat"},
        {"branch_mix": "sum", "mlp_input": "residual", "use_alignment": False},
        {"use_alignment": False},
    ],
)
def test_a_layer_without_a_branch_is_as_if_its_output_were_zero(mixer: str, settings: dict[str, Any]) -> None:
    model = tiny_model(**settings)
    plan = everything(model.config)
    other = "attention" if mixer == "mamba2" else "mamba2"
    units = {**plan[0].units, **({"mamba": ()} if mixer == "mamba2" else {"local": (), "global": ()})}
    plan[0] = replace(plan[0], branches=(other,), units=units)
    pruned = model_of(PrunedWeights(ModelSource(model), plan))
    assert pruned.config.pattern == ("AF" if mixer == "mamba2" else "MF")
    with without_branch(model, 0, mixer):
        torch.testing.assert_close(logits(pruned), logits(model), atol=2e-5, rtol=0)


def test_a_removed_layer_is_as_if_it_did_nothing_and_windows_stay() -> None:
    model = tiny_model(num_layers=3, attention_type="pyramidal", window_size=2, window_size_last=20)
    plan = [everything(model.config)[layer] for layer in (0, 2)]
    pruned = model_of(PrunedWeights(ModelSource(model), plan))
    assert [pruned.config.window_of_layer(layer) for layer in (0, 1)] == [2, 20]
    with without_layer(model, 1):
        torch.testing.assert_close(logits(pruned), logits(model), atol=2e-5, rtol=0)


def pruned_to(model: Any, target: float, measure: str = "parameters", tp: int = 1) -> tuple[list[KeptLayer], Any]:
    analysis = analyze(model, repeated(rows()), lambda done, total: None)
    plan = make_plan(model.config, analysis.parts, Costs(model.config, measure, 64), target, tp)
    return plan, analysis


@pytest.mark.parametrize("measure", MEASURES)
def test_the_target_is_reached_and_not_missed_by_much(measure: str) -> None:
    model = tiny_model(layer_pattern="FMAF", **FOUR_KV)
    plan, _ = pruned_to(model, 0.7, measure)
    costs = Costs(model.config, measure, 64)
    assert 0.6 < costs.total(plan) / costs.total(everything(model.config)) <= 0.7


def test_costs_are_those_of_the_model() -> None:
    model = tiny_model(layer_pattern="FMAF", **FOUR_KV)
    plan, _ = pruned_to(model, 0.6)
    counted = sum(parameter.numel() for parameter in model_of(PrunedWeights(ModelSource(model), plan)).parameters())
    assert Costs(model.config, "parameters", 64).total(plan) == counted
    again = pruned_config(model.config, plan)
    assert Costs(again, "decode", 64).total(everything(again)) == Costs(model.config, "decode", 64).total(plan)


def test_the_plan_keeps_what_the_loss_needs() -> None:
    """A head that writes nothing goes first; a random plan of the same shapes has as many parameters."""
    model = tiny_model(**FOUR_KV)
    with torch.no_grad():
        model.layers[1].attention.o_proj.weight[:, unit_channels(model.config, "global", 1)] = 0  # type: ignore
        held_out = [replace(micro, labels_BS=model(micro.input_ids_BS).logits_BSV.argmax(-1)) for micro in rows()]
    analysis = analyze(model, repeated(held_out), lambda done, total: None)
    plan = make_plan(model.config, analysis.parts, Costs(model.config, "parameters", 64), 0.97)
    assert 1 not in plan[1].units["global"]
    free = next(part for part in analysis.parts if (part.layer, part.kind, part.units) == (1, "global", (1,)))
    assert free.loss == 0 and free.contribution == 0
    assert all(part.loss > 0 for part in analysis.parts if part.kind in ("layer", "branch"))
    costs = Costs(model.config, "parameters", 64)
    others = [random_plan(model.config, plan, seed) for seed in range(6)]
    assert {costs.total(other) for other in others} == {costs.total(plan)}
    assert len({str(other) for other in others}) > 1 and random_plan(model.config, plan, 3) == others[3]


@pytest.mark.parametrize("tp", [2, 4])
def test_the_pruned_model_allows_the_tensor_parallel_size(tp: int) -> None:
    sizes = {**FOUR_KV, "num_heads": 16, "num_kv_heads": 8, "global_heads": 8}
    model = tiny_model(layer_pattern="FMAF", **sizes, mamba={"n_groups": 1, "norm_groups": 4})
    plan, _ = pruned_to(model, 0.6, tp=tp)
    config = pruned_config(model.config, plan)
    assert config.letter_sizes and not list(tp_problems(config, tp))


def test_a_pruned_model_can_be_pruned_again() -> None:
    model = tiny_model(layer_pattern="FMAF", **FOUR_KV)
    once = model_of(PrunedWeights(ModelSource(model), pruned_to(model, 0.8)[0]))
    plan, _ = pruned_to(once, 0.8)
    twice = model_of(PrunedWeights(ModelSource(once), plan))
    assert sum(p.numel() for p in twice.parameters()) <= 0.8 * sum(p.numel() for p in once.parameters())
    assert logits(twice).isfinite().all()


def test_unreachable_targets_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(UserError, match="is not between 0 and 1"):
        pruned_to(model, 1.0)
    with pytest.raises(UserError, match=r"target 0\.1 of parameters is out of reach"):
        pruned_to(model, 0.1)
    with pytest.raises(UserError, match="--tp 3 does not fit"):
        pruned_to(model, 0.7, tp=3)


def test_sizes_of_letters_are_checked() -> None:
    values = tiny_model().config.model_dump(mode="json")
    for sizes, message in (
        ({"z": {"mlp_size": 3}}, "no layers have the letter 'z'"),
        ({"F": {"num_heads": 3}}, "letter_sizes.F: num_heads 3 does not divide by num_kv_heads 2"),
        ({"F": {"mamba_heads": 3}}, "letter_sizes.F: 3 state space heads .* mamba.n_groups 2"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig.model_validate({**values, "letter_sizes": sizes})


def test_a_wrong_share_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fusiontree.cli.prune_checkpoint import main

    assert main([str(tmp_path / "absent"), str(tmp_path / "new"), "--target", "1.7"]) == 2
    assert "--target 1.7 is not between 0 and 1" in capsys.readouterr().err
