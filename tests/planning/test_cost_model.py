"""The planner's arithmetic: held to the one measured step, to exact counts, and to laws that any layout obeys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusiontree.config.load import load_config
from fusiontree.plan import main
from fusiontree.planning.cost_model import Estimate, Hardware, count_parameters, estimate

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"


def estimated(name: str, gpus: int, *overrides: str) -> Estimate:
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    return estimate(config.model, config.parallel, config.training, gpus, Hardware())


@pytest.mark.parametrize(("length", "gib", "seconds"), [("32k", 68.9, 0.744), ("128k", 63.9, 4.583)])
def test_the_measured_steps(length: str, gib: float, seconds: float) -> None:
    """One H100, 2026-11: see docs/speed.md."""
    found = estimated(f"bench/hybrid_1b_{length}", 1)
    assert found.total_gib == pytest.approx(gib, rel=0.05)
    assert found.step_s == pytest.approx(seconds, rel=0.05)
    assert found.communication_s == 0


def test_parameters_are_counted_exactly() -> None:
    import torch

    from fusiontree.models.model import FusionTreeModel

    model = load_config(CONFIGS / "pretrain_v2.yaml").model
    with torch.device("meta"):
        total = sum(p.numel() for p in FusionTreeModel(model).parameters())
    for tp in (1, 2, 4):
        split, whole, block = count_parameters(model, tp)
        assert split + whole == total
        assert block < total / model.num_layers
        assert (split == 0) == (tp == 1)


def test_what_layouts_do_to_memory_and_passes() -> None:
    full = "training.activation_checkpointing=full"
    one, eight = (estimated("bench/hybrid_7b_32k", n, "training.global_batch_size=64", full) for n in (1, 8))
    assert eight.states_gib == pytest.approx(one.states_gib / 8, rel=1e-6)
    assert (one.accumulation, eight.accumulation) == (64, 8)
    assert eight.communication_s > 0 and eight.tokens_per_s > 6 * one.tokens_per_s
    batch = "training.global_batch_size=64"
    for axis in ("tp", "cp"):
        halved = estimated("bench/hybrid_7b_32k", 8, batch, full, f"parallel.{axis}=2")
        assert halved.activations_gib < 0.6 * eight.activations_gib
        assert halved.states_gib == pytest.approx(eight.states_gib, rel=1e-6)
        assert halved.accumulation == 2 * eight.accumulation
    modes = [
        estimated("bench/hybrid_7b_32k", 8, batch, f"training.activation_checkpointing={mode}")
        for mode in ("none", "selective", "full", "offload")
    ]
    assert [m.activations_gib for m in modes] == sorted((m.activations_gib for m in modes), reverse=True)
    assert modes[2].step_s > modes[1].step_s
    engines = {
        e: estimated("bench/hybrid_7b_32k", 8, f"parallel.engine={e}") for e in ("zero1", "ddp", "zero2", "zero3")
    }
    states = [engines[e].states_gib for e in ("zero1", "ddp", "zero2", "zero3")]
    assert states == sorted(states, reverse=True)
    # 16-bit copies and an eighth of the rest; several passes add up whole gradients, which are summed once a step.
    ddp = [
        estimated("bench/hybrid_7b_32k", 8, "parallel.engine=ddp", f"training.global_batch_size={n}") for n in (8, 64)
    ]
    assert ddp[0].states_gib == pytest.approx(one.states_gib * (2 + 16 / 8) / 16, rel=1e-6)
    assert ddp[1].states_gib == pytest.approx(one.states_gib * (6 + 12 / 8) / 16, rel=1e-6)
    assert (ddp[1].accumulation, ddp[1].communication_s) == (8, ddp[0].communication_s)
    slices = estimated("bench/hybrid_7b_32k", 16, full, "parallel.shard_size=8", "parallel.engine=fsdp2")
    assert slices.states_gib == pytest.approx(eight.states_gib, rel=1e-6)
    kept = estimated("bench/hybrid_7b_32k", 8, full, "parallel.engine=fsdp2", "parallel.reshard_after_forward=false")
    assert kept.total_gib > eight.total_gib + 10  # 7 G parameters of two bytes, less what is gathered anyway
    assert kept.communication_s < eight.communication_s


def test_auto_fills_the_memory_that_full_recomputation_leaves() -> None:
    name, modes = "bench/hybrid_7b_32k", ("full", "selective", "none")
    full, selective, none = (estimated(name, 4, f"training.activation_checkpointing={mode}") for mode in modes)
    auto = estimated(name, 4)
    assert full.total_gib < 50 and 70 < auto.total_gib <= 0.92 * 80 < selective.total_gib
    assert selective.step_s < auto.step_s < full.step_s
    assert (auto.fits, auto.recompute) == (True, "full in 12 layers, selective in 8")
    assert estimated(name, 4, "training.memory_limit=0.7").recompute == "full in 16 layers, selective in 4"
    assert not estimated(name, 4, "training.memory_limit=0.5").fits
    many = estimated(name, 64, "parallel.tp=4", "training.global_batch_size=64")
    assert (many.recompute, none.recompute) == ("none in 20 layers",) * 2


def test_the_command_tells_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    v1 = ["--config", str(CONFIGS / "pretrain_v1.yaml")]
    assert main([*v1, "--gpus", "64", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["configured"]["fits"] and told["configured"]["accumulation"] == 2
    rates = [one["tokens_per_s"] for one in told["others"] if one["fits"]]
    assert rates == sorted(rates, reverse=True)
    assert main([*v1, "--gpus", "1", "parallel.engine=fsdp2"]) == 1
    said = capsys.readouterr().out
    assert "does not fit 80 GiB" in said and "\n{" not in said
    assert main([*v1, "--gpus", "6", "parallel.tp=4"]) == 2
    assert "do not divide" in capsys.readouterr().err
    main([*v1, "--gpus", "64", "training.activation_checkpointing=auto", "training.memory_limit=0.7"])
    assert "; 70% of the memory is usable; " in capsys.readouterr().out
    for option, number, least in (("gpus-per-node", "0", "at least 1"), ("node-gb-per-s", "0", "a number above 0")):
        assert main([*v1, "--gpus", "8", f"--{option}", number]) == 2
        assert f"--{option} {number}: give {least}" in capsys.readouterr().err
